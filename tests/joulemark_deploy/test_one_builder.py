"""Two that want the same thing of the cache: one builds, the other waits and finds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, time
from pathlib import Path
from joulemark_deploy.one_builder import one_builder
thing = Path(sys.argv[1])
with one_builder(thing):
    if not thing.exists():
        time.sleep(1)
        thing.write_text("whole")
        print("built")
"""


def start(thing: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(thing)], stdout=subprocess.PIPE, text=True)


def test_one_builds_and_the_other_finds(tmp_path: Path) -> None:
    thing = tmp_path / "cache" / "thing"
    said = [process.communicate(timeout=60)[0] for process in [start(thing), start(thing)]]
    assert sorted(said) == ["", "built\n"]


def test_a_killed_builder_holds_nobody_up(tmp_path: Path) -> None:
    thing = tmp_path / "thing"
    first = start(thing)
    while not list(tmp_path.glob(".thing.lock")):
        assert first.poll() is None
    first.kill()
    first.communicate(timeout=60)
    assert start(thing).communicate(timeout=60)[0] == "built\n"
