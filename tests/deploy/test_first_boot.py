"""deploy/first_boot.sh with a made-up install.sh: what it leaves, and that a power cut at any step ends in the same.

/etc and /run are its own.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "first_boot.sh"
UNIT = "joulemark-first-boot.service"
# Writes down what it was told, and that the key was there, as the real one copies it into the agent's folder.
INSTALL = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >"$(dirname "$0")/../told"
while [ $# -gt 0 ]; do if [ "$1" = --enrol-key-file ]; then cat "$2" >"$(dirname "$0")/../key-of-the-agent"; fi; shift; done
echo "installing"
"""


class Card:
    """A boot partition as `joulemark flash` leaves it."""

    def __init__(self, root: Path, namespace: tuple[str, ...]) -> None:
        self._namespace = namespace
        self.boot, self.folder = root / "boot", root / "boot" / "joulemark"
        self.folder.mkdir(parents=True)
        shutil.copy(SCRIPT, self.folder / "first_boot.sh")
        (self.folder / "install.sh").write_text(INSTALL)
        (self.folder / "install.options").write_text("--release\n/boot/a b\n--name\n$(reboot)\n")
        (self.folder / "enrol.key").write_text("jme.secret\n")
        (self.folder / UNIT).write_text("[Unit]\n")
        (self.folder / "release.tar.gz").write_bytes(b"release")
        (self.folder / "cloud-init").write_text("/user-data\n/network-config\n")
        for name in ("user-data", "network-config", "cmdline.txt"):
            (self.boot / name).write_text(name)
        self.system = root / "etc"
        (self.system / "cloud").mkdir(parents=True)
        wanted = self.system / "systemd/system/multi-user.target.wants"
        wanted.mkdir(parents=True)
        (wanted.parent / UNIT).write_text("[Unit]\n")
        (wanted / UNIT).symlink_to(f"../{UNIT}")

    def start(self, variable: str = "", *before: str) -> subprocess.CompletedProcess[str]:
        """What systemd does at a boot, on a machine whose /etc is the card's."""
        mounts = f"mount --bind {self.system} /etc && mount -t tmpfs none /run"
        command = [*before, *self._namespace, "sh", "-c", f"{mounts} && {variable} exec sh {self.folder}/first_boot.sh"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    def is_done(self) -> bool:
        left = sorted(path.name for path in self.folder.iterdir())
        seed = sorted(path.name for path in self.boot.iterdir() if path.is_file())
        units = list(self.system.rglob(UNIT))
        return (
            left == ["first_boot.log"]
            and not units
            and (self.system / "cloud/cloud-init.disabled").exists()
            and seed == ["cmdline.txt", "key-of-the-agent", "told"]
            and (self.boot / "key-of-the-agent").read_text() == "jme.secret\n"
        )


@pytest.fixture
def card(tmp_path: Path, namespace: tuple[str, ...]) -> Card:
    return Card(tmp_path, namespace)


def test_it_installs_and_takes_secrets_and_itself_away(card: Card) -> None:
    done = card.start()
    assert done.returncode == 0, done.stdout + done.stderr
    assert card.is_done()
    told = (card.boot / "told").read_text().splitlines()
    assert told == ["--release", "/boot/a b", "--name", "$(reboot)", "--enrol-key-file", f"{card.folder}/enrol.key"]
    log = (card.folder / "first_boot.log").read_text()
    assert "installing" in log and "done: the agent is installed" in log and "jme." not in log + done.stdout
    assert "installing" in done.stdout


def test_a_failure_keeps_everything_for_the_next_boot(card: Card) -> None:
    (card.folder / "install.sh").write_text("echo the disk is full; exit 3\n")
    done = card.start()
    assert done.returncode == 3
    log = (card.folder / "first_boot.log").read_text()
    assert "the disk is full" in log and "the next boot tries again" in log and "done:" not in log
    assert (card.folder / "enrol.key").exists() and (card.boot / "user-data").exists()
    assert not (card.system / "cloud/cloud-init.disabled").exists()
    (card.folder / "install.sh").write_text(INSTALL)
    assert card.start().returncode == 0 and card.is_done()


def test_a_log_that_cannot_be_written_stops_nothing(card: Card) -> None:
    (card.folder / "first_boot.log").mkdir()
    done = card.start()
    assert done.returncode == 0 and "done: the agent is installed" in done.stdout
    (card.folder / "first_boot.log").rmdir()
    (card.folder / "first_boot.log").touch()
    assert card.is_done()


def test_settings_come_before_the_agent(card: Card) -> None:
    (card.folder / "settings.sh").write_text(f"test ! -e {card.boot}/told && touch {card.boot}/user-was-made\n")
    assert card.start().returncode == 0
    assert (card.boot / "user-was-made").exists() and not (card.folder / "settings.sh").exists()


@pytest.mark.parametrize("programs", ["sync", "rm"])
@pytest.mark.parametrize("call", range(1, 7))
def test_a_power_cut_at_any_step_ends_the_same(card: Card, programs: str, call: int) -> None:
    # A program that kills the script the n-th time that it is called, half-way: rm has removed its first file.
    stub = card.boot.parent / "stubs"
    stub.mkdir()
    real = shutil.which(programs)
    (stub / programs).write_text(
        f"#!/bin/sh\necho >>{stub}/calls\nif [ $(wc -l <{stub}/calls) -eq {call} ]; then "
        f'if [ {programs} = rm ]; then {real} -f "$2"; fi; kill -9 0; fi\nexec {real} "$@"\n'
    )
    (stub / programs).chmod(0o755)
    cut = card.start(f"PATH={stub}:$PATH", "setsid")
    calls = len((stub / "calls").read_text().splitlines())
    assert (cut.returncode == -9) == (calls == call)
    if (card.folder / "first_boot.sh").exists():
        again = card.start()
        assert again.returncode == 0, again.stdout + again.stderr
    assert card.is_done()
