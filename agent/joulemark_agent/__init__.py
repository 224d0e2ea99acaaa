"""The device program: stores artifacts and packs, runs evaluations in a worker process, samples sensors, reports records.

Light by rule: no torch, transformers or datasets; engines are imported only inside the worker process.
"""
