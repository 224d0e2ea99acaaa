"""The power goes in every phase of a board's life: nothing is lost, nothing is half, nothing happens twice.

Each cut kills qemu: what the system had brought to its disk stays, the rest is gone. Afterwards both file systems are checked by their own
checkers, and the board is switched on again.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Generator
from pathlib import Path

import pytest

from joulemark import sources
from joulemark_host.evaluation import Subject
from tests.fixtures import arm64_machine, card_images
from tests.fixtures.arm64_machine import Machine, System
from tests.fixtures.fleet import make_subject
from tests.fixtures.host_process import HostProcess, wait_until
from tests.flashed.conftest import DATA, USER, flash, number, queue, record_of

pytestmark = pytest.mark.timeout(1700)
NAME, ITEMS = "cut-board", 60


@pytest.fixture(scope="module")
def board(
    system: System, packed: Path, host: HostProcess, key: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Machine]:
    """A flashed card in a board that was never on."""
    folder = tmp_path_factory.mktemp("cut-board")
    card = flash(system, packed, host, key, folder / "card.img", NAME)
    with arm64_machine.machine(system, card, key, USER) as made:
        yield made


def cut(board: Machine) -> None:
    """The plug is pulled. The card itself stays as it is; a copy shows that its file systems need no hand."""
    board.cut_power()
    boot, root = (
        part.cut_out(board.card.parent) for part in (card_images.boot_of(board.card), card_images.root_of(board.card))
    )
    card_images.repair(boot, root)
    card_images.check_boot(boot)
    card_images.check_root(root)


def is_enrolled(host: HostProcess) -> bool:
    return any(device.name == NAME for device in host.registry.devices())


def test_in_the_middle_of_the_first_boot(board: Machine, host: HostProcess) -> None:
    """Twice: while the release is unpacked, and as soon as it is the one in use."""
    board.switch_on()
    board.wait_for("sudo find /opt/joulemark-releases/1/site -maxdepth 1 | grep -q .", 300)
    cut(board)
    assert not is_enrolled(host)
    board.switch_on()
    board.wait_for("test -L /opt/joulemark", 300)
    cut(board)
    board.switch_on()
    board.wait_for("test ! -e /boot/firmware/joulemark/first_boot.sh", 600)
    wait_until(lambda: is_enrolled(host), 120, 0.5)
    assert [device.name for device in host.registry.devices()].count(NAME) == 1
    assert "tries again" not in board.run("cat /boot/firmware/joulemark/first_boot.log")
    assert board.run("sudo systemctl is-enabled joulemark-agent").strip() == "enabled"


def begin(board: Machine, host: HostProcess) -> None:
    """A test that runs alone has had no first boot yet."""
    if not board.is_on:
        board.switch_on()
        wait_until(lambda: is_enrolled(host), 600, 1)


def real_model(host: HostProcess, folder: Path, size: int) -> Subject:
    """SmolLM2 on invented questions: slow enough, emulated, to be cut off in the middle of anything."""
    model = sources.fetch("smollm2-135m-instruct-q4_1", sources.default_cache())
    artifact_id, manifest = host.shelf.publish_model(model, "SmolLM2-135M-Q4_1")
    return dataclasses.replace(make_subject(host, folder, size=size), artifact_id=artifact_id, manifest=manifest)


def test_while_a_model_comes(board: Machine, host: HostProcess, tmp_path: Path) -> None:
    """What arrives is whole, or the run would not be done; nothing half stays beside it."""
    begin(board, host)
    subject = real_model(host, tmp_path, 2)
    # Else it comes between two looks.
    board.run("sudo sed -i 's/JOULEMARK_OPTIONS=\"/&--limit-rate 4 /' /etc/joulemark/agent.env")
    board.run("sudo systemctl restart joulemark-agent")
    queue(host, NAME, subject, "pulled")
    board.wait_for(f"sudo find {DATA}/store/files -name '*.part' -size +20M | grep -q .", 120)
    cut(board)
    board.switch_on()
    record = record_of(host, "pulled")
    assert record.status == "done", record.problem
    assert record.manifest == subject.manifest and len(record.items) == 2
    assert board.run(f"sudo find {DATA}/store/files -name '*.part'") == ""


def test_in_the_middle_of_a_run(board: Machine, host: HostProcess, tmp_path: Path) -> None:
    """Its items that were on the disk are kept; the record says what happened; there is one."""
    begin(board, host)
    queue(host, NAME, real_model(host, tmp_path, ITEMS), "cut-run")
    wait_until(
        lambda: number(board, "journal.sqlite", "SELECT count(*) FROM items WHERE run_id = 'cut-run'") > 0, 300, 5
    )
    cut(board)
    board.switch_on()
    record = record_of(host, "cut-run")
    assert record.status == "done", record.problem
    assert sorted(item.doc_id for item in record.items) == list(range(ITEMS))
    assert record.attempts == 2
    assert [problem.code for problem in record.interruptions] == ["board_went_down"]


NVPMODEL = r"""
mkdir -p /var/lib/nvpmodel
echo "pmode:0000 fmode:quiet" >/var/lib/nvpmodel/status
printf "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >\n" >/etc/nvpmodel.conf
cat >/usr/sbin/nvpmodel <<'END'
#!/bin/sh
[ "$(id -u)" = 0 ] || exit 1
echo "pmode:000$2 fmode:quiet" >/var/lib/nvpmodel/status
END
chmod 755 /usr/sbin/nvpmodel
systemctl restart joulemark-power-mode.socket
"""
"""In the place of NVIDIA's, which no emulated board has: its files, and that it wants root."""


def settings(board: Machine) -> list[str]:
    """Governor and lower limit of its one clock, and the power mode."""
    files = "/sys/devices/system/cpu/cpufreq/policy0/scaling_governor /sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq"
    return board.run(f"cat {files}; cut -d' ' -f1 /var/lib/nvpmodel/status").split()


def test_what_a_run_sets_is_recorded_and_put_back(board: Machine, host: HostProcess, tmp_path: Path) -> None:
    """By the installed service, which is not root; also when the agent alone is killed while it is set."""
    begin(board, host)
    assert board.run("systemctl is-active joulemark-power-mode.socket; true").strip() == "inactive", (
        "there is no nvpmodel yet"
    )
    board.run(f"echo {base64.b64encode(NVPMODEL.encode()).decode()} | base64 -d | sudo sh")
    assert board.run("stat -c '%U %G %a' /run/joulemark-power-mode.socket").strip() == "root joulemark 660"
    before = settings(board)
    assert before == ["schedutil", "600000", "pmode:0000"]
    wanted = {"governor": "performance", "fixed_clocks": True, "power_mode": "7W"}
    queue(host, NAME, real_model(host, tmp_path, 2), "set-run", idle_s=5.0, tuning=wanted)
    wait_until(lambda: settings(board) == ["performance", "1500000", "pmode:0001"], 300, 3)
    board.run("sudo systemctl kill --signal=KILL joulemark-agent")
    record = record_of(host, "set-run")
    assert record.status == "done", record.problem
    assert record.attempts == 2
    assert (record.device.governor, record.device.clocks) == ("performance", "cpu fixed at 1.50 GHz")
    assert record.device.power_mode == "7W (1)"
    wait_until(lambda: settings(board) == before, 30, 3)
    others = "find /sys/devices/system/cpu/cpufreq/ -type f -writable ! -name scaling_governor ! -name scaling_min_freq"
    assert board.run(f"sudo -u joulemark {others}") == "", "nothing else was opened to it"


def test_right_after_a_run(board: Machine, host: HostProcess, tmp_path: Path) -> None:
    """The host is away while it ends; the record waits on the card through the cut, and arrives once."""
    begin(board, host)
    queue(host, NAME, real_model(host, tmp_path, 4), "kept-run", idle_s=10.0)
    wait_until(
        lambda: number(board, "journal.sqlite", "SELECT count(*) FROM runs WHERE run_id = 'kept-run'") > 0, 120, 3
    )
    host.stop()
    wait_until(
        lambda: number(board, "outbox.sqlite", "SELECT count(*) FROM entries WHERE run_id = 'kept-run'") > 0, 300, 5
    )
    assert not any(run.run_id == "kept-run" for run in host.records.facts())
    cut(board)
    host.start()
    board.switch_on()
    record = record_of(host, "kept-run")
    assert record.status == "done", record.problem
    assert [run.run_id for run in host.records.facts()].count("kept-run") == 1


def test_again_and_again_in_the_same_run(board: Machine, host: HostProcess, tmp_path: Path) -> None:
    """A run that takes the board down each time is given up by itself, so that the board comes out of it and does the next one."""
    begin(board, host)
    queue(host, NAME, real_model(host, tmp_path, 2), "fatal", idle_s=600.0)
    query = "SELECT count(*) FROM attempts WHERE run_id = 'fatal'"
    for attempt in (1, 2, 3):
        wait_until(lambda attempt=attempt: number(board, "journal.sqlite", query) >= attempt, 300, 5)
        cut(board)
        board.switch_on()
    record = record_of(host, "fatal")
    assert record.status == "failed" and record.problem is not None
    assert record.problem.code == "board_went_down" and "3 times in a row" in record.problem.message
    queue(host, NAME, real_model(host, tmp_path, 2), "next")
    assert record_of(host, "next").status == "done"
