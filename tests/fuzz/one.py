"""One parser under Atheris, in a process of its own: `python -m tests.fuzz.one SELF NAME [libFuzzer's arguments]`.

SELF is a program that does the same with the arguments behind the name: libFuzzer begins itself again for parts of its work.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import atheris  # pyright: ignore[reportMissingImports]  # only where fuzzing is done: pip install 'joulemark[fuzz]'

fuzzer: Any = atheris
OURS = ["joulemark", "joulemark_agent", "joulemark_exporter", "joulemark_host", "tomllib"]
with fuzzer.instrument_imports(include=OURS):
    from tests.fixtures.json_places import places
    from tests.fuzz import parsers

JUNK = (
    None,
    True,
    0,
    -1,
    2**63,
    10**400,
    1e308,
    0.5,
    "",
    "x" * 300,
    "\ud800",
    "../a",
    "\x00",
    [],
    {},
    [[[[]]]],
    {"a": {}},
)


def main() -> None:
    """Fuzzes until libFuzzer's arguments say that it is enough, or something breaks."""
    own, name = sys.argv[1:3]
    sys.argv[:3] = [own]
    parser = parsers.PARSERS[name]

    def one(data: bytes) -> None:
        parsers.survives(parser, data)

    fuzzer.Setup(sys.argv, one, **({"custom_mutator": change_json} if parser.json else {}))
    fuzzer.Fuzz()


def change_json(data: bytes, most_bytes: int, seed: int) -> bytes:
    """Bytes are changed half of the time; else values, of which most are deeper than changed bytes would get."""
    dice = random.Random(seed)
    try:
        value = json.loads(data) if dice.random() < 0.5 else None
    except (ValueError, RecursionError):
        value = None
    found = list(places(value))
    if not found:
        return fuzzer.Mutate(data, most_bytes)
    for inside, key in dice.choices(found, k=dice.choice((1, 1, 2))):
        if isinstance(inside, dict) and dice.random() < 0.2:
            inside.pop(key, None)
        elif dice.random() < 0.3:
            other, place = dice.choice(found)
            inside[key] = other[place] if not isinstance(other, dict) or place in other else None
        else:
            inside[key] = dice.choice(JUNK)
    try:
        changed = json.dumps(value).encode()
    except (ValueError, RecursionError):  # something was put into itself
        return fuzzer.Mutate(data, most_bytes)
    return changed if len(changed) <= most_bytes else fuzzer.Mutate(data, most_bytes)


if __name__ == "__main__":
    main()
