"""The exporter: a checkpoint and its adapters become one verified artifact. Runs on a workstation; torch, transformers, onnx and gguf are
imported here and nowhere else, and only by the steps that need them.

    checkpoint → fold adapters → calibrate → quantize → write → verify → publish
"""
