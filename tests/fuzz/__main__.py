"""Fuzzes the parsers of ours with Atheris (coverage-guided) and keeps what took a new path.

    python -m tests.fuzz [NAME…] [--seconds 60]

Begins with the kept seeds, ends with the smallest set that reaches as much, in tests/fuzz/seeds; `make test` replays them. What broke a
parser is kept for good, so that the test fails until it is mended and whenever it comes back. Prints the table of the README.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import beginnings, parsers

AT_ONCE = 2
LONGEST_S = 5
MOST_MIB = 1024


@dataclass(frozen=True)
class Outcome:
    """Of one parser. `broken`: the inputs that it did not survive. `said`: the fuzzer's last words."""

    name: str
    executions: int
    edges: int
    kept: int
    broken: Sequence[bytes]
    said: str


def fuzz(name: str, begin: Sequence[bytes], seconds: int) -> Outcome:
    """One parser for so long, or until something breaks it."""
    parser, known = parsers.PARSERS[name], parsers.seeds(name)
    with tempfile.TemporaryDirectory(prefix="joulemark-fuzz-") as place:
        corpus, smallest, broken = (Path(place) / part for part in ("corpus", "smallest", "broken"))
        for folder in (corpus, smallest, broken):
            folder.mkdir()
        for number, data in enumerate([*known, *begin]):
            (corpus / str(number)).write_bytes(data)
        # At least the beginnings have to fit: what is cut is another input.
        most = max(parser.most_bytes, *(len(data) for data in [b"", *known, *begin]))
        limits = [f"-max_len={most}", f"-timeout={LONGEST_S}", f"-rss_limit_mb={MOST_MIB}"]
        ends = [f"-max_total_time={seconds}", "-print_final_stats=1", f"-artifact_prefix={broken}/"]
        own = Path(place) / "own"
        own.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.fuzz.one "$0" {name} "$@"\n')
        own.chmod(0o700)
        said = _run([str(own), str(corpus), *limits, *ends])
        found = [path.read_bytes() for path in broken.iterdir()]
        parsers.keep_broken(name, found)
        merged = _run([str(own), "-merge=1", str(smallest), str(corpus), *limits])
        kept = [path.read_bytes() for path in smallest.iterdir()]
    executions = re.search(r"number_of_executed_units:\s*(\d+)", said)
    edges = re.findall(r"cov: (\d+)", said)
    if not executions or not edges or not kept:  # what was kept before stays
        raise RuntimeError(f"{name}: the fuzzer did not run:\n{said[-2000:]}\n{merged[-2000:]}")
    parsers.keep(name, [*kept, *begin])
    return Outcome(name, int(executions[1]), int(edges[-1]), len(parsers.seeds(name)), found, said)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, check=False)
    return (done.stdout + done.stderr).decode(errors="replace")


def main() -> int:
    """The command line: 0, or 1 when something broke."""
    words = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    words.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(parsers.PARSERS)}; default: all")
    words.add_argument("--seconds", type=int, default=60, help="for each parser (default 60)")
    asked = words.parse_args()
    if unknown := set(asked.names) - set(parsers.PARSERS):
        words.error(f"there is no parser {', '.join(sorted(unknown))}")
    if importlib.util.find_spec("atheris") is None:
        words.error("Atheris is not installed: pip install 'joulemark[fuzz]' (Python 3.11 or newer)")
    begin, broken = beginnings.beginnings(), 0
    print("| parser | inputs tried | edges reached | seeds kept | broke it |\n|---|---|---|---|---|", flush=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for outcome in pool.map(
            lambda name: fuzz(name, begin.get(name, []), asked.seconds), asked.names or parsers.PARSERS
        ):
            broken += len(outcome.broken)
            row = (outcome.name, f"{outcome.executions:,}", outcome.edges, outcome.kept, len(outcome.broken))
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
            if outcome.broken:
                print(f"{[data[:200] for data in outcome.broken]}\n{outcome.said[-3000:]}", file=sys.stderr)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
