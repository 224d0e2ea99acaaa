"""How a system's first boot is told what to do: one module for each way. Adding a file adds a way.

Each has `TITLE`, `recognizes(image) -> bool`, which looks at the image alone, and `prepare(image, card, release) -> None`, which puts the
card's files and settings where that system looks for them. Exactly one may recognize an image.
"""
