"""Text from outside, made harmless for terminals, logs and tables. Pure."""

from __future__ import annotations

import unicodedata

from joulemark.wire import Problem


def printable(text: str) -> str:
    """`text` without control and format characters (terminal escapes, NUL, bidi); white space becomes a space."""
    return "".join(
        " " if character.isspace() else character
        for character in text
        if character.isspace() or not unicodedata.category(character).startswith("C")
    ).strip()


def printable_problem(problem: Problem) -> Problem:
    """A problem that came from outside, its texts made printable and cut to what a person reads."""
    texts = {"message": printable(problem.message)[:2000], "hint": printable(problem.hint)[:1000]}
    return problem.model_copy(update=texts)
