"""Text from outside, made harmless for terminals, logs and tables. Pure."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """`text` without control and format characters (terminal escapes, NUL, bidi); white space becomes a space."""
    return "".join(
        " " if character.isspace() else character
        for character in text
        if character.isspace() or not unicodedata.category(character).startswith("C")
    ).strip()
