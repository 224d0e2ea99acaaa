"""From a blank card to a heatmap cell: flashed, started for the first time in 1970, enrolled, a real model evaluated, a cell in the grid.

One board lives through this file, test after test. Its clock begins in 1970 and is set right in the middle of its first run. Emulated:
what is checked is that it works, never how long it took.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from joulemark import documents, packs, sources
from joulemark.tasks import arc_challenge
from joulemark_deploy.card import wifi_of
from joulemark_host.evaluation import Subject
from tests.fixtures import arm64_machine, card_images
from tests.fixtures.arm64_machine import Machine, System
from tests.fixtures.host_process import HostProcess, wait_until
from tests.flashed.conftest import PASSWORD, USER, flash, joulemark, number, queue, record_of

pytestmark = pytest.mark.timeout(1700)
NAME = "first-board"
ITEMS = 4
SMOLLM2 = "smollm2-135m-instruct-q4_1"


@pytest.fixture(scope="module")
def board(
    system: System, packed: Path, host: HostProcess, key: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Machine]:
    """A flashed card in a board whose clock knows nothing."""
    folder = tmp_path_factory.mktemp("first-board")
    card = flash(system, packed, host, key, folder / "card.img", NAME)
    with arm64_machine.machine(system, card, key, USER) as made:
        made.switch_on("1970-01-01T00:00:00")
        yield made


def test_it_reports_in_by_itself(board: Machine, host: HostProcess) -> None:
    began = time.monotonic()
    wait_until(lambda: any(device.name == NAME for device in host.registry.devices()), 600, 1)
    print(f"in the fleet after {time.monotonic() - began:.0f} s")
    assert host.registry.device(NAME).admission == "approved"


def test_no_secret_stays_where_any_card_reader_finds_it(board: Machine) -> None:
    board.wait_for("test ! -e /boot/firmware/joulemark/first_boot.sh", 300)
    left = board.run("cd /boot/firmware && find . -type f | sort").split()
    assert left == ["./cmdline.txt", "./config.txt", "./joulemark/first_boot.log"], left
    log = board.run("cat /boot/firmware/joulemark/first_boot.log")
    assert "done: the agent is installed" in log and "jme." not in log
    assert board.run("sudo ls /var/lib/joulemark").split().count("enrol.key") == 0, "it was used"
    # Whatever holds the network's key is read by root alone.
    secret = wifi_of("home", PASSWORD, "DE", hidden=False).key
    assert (
        board.run(f"sudo -u nobody grep -rl -e {secret} -e {PASSWORD!r} /etc /var /run /boot /home 2>/dev/null; true")
        == ""
    )
    assert board.run("cat /etc/hostname").strip() == NAME


def test_nobody_gets_in_with_a_password(board: Machine) -> None:
    shadow = dict(line.split(":")[:2] for line in board.run("sudo cat /etc/shadow").splitlines())
    assert {secret[:1] for secret in shadow.values()} <= {"!", "*"}
    assert "passwordauthentication no" in board.run("sudo sshd -T")


def test_the_service_is_as_hardened_as_it_says(board: Machine) -> None:
    shown = board.run(
        "systemctl show joulemark-agent -p ActiveState,User,ProtectSystem,NoNewPrivileges,CapabilityBoundingSet,DevicePolicy"
    )
    facts = dict(line.split("=", 1) for line in shown.splitlines())
    assert facts == {
        "ActiveState": "active", "User": "joulemark", "ProtectSystem": "strict", "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "", "DevicePolicy": "closed",
    }  # fmt: skip
    exposure = board.run("systemd-analyze security joulemark-agent --no-pager | tail -n 1")
    assert float(exposure.split("exposure level for joulemark-agent.service:")[1].split()[0]) < 3.0, exposure
    # Nothing in the units or rules that this systemd and udev do not understand.
    journal = "sudo journalctl -b --no-pager -t systemd -t systemd-udevd"
    said = board.run(f"{journal} | grep -i joulemark | grep -i -E 'unknown|invalid|failed|ignoring'; true")
    assert said == "", said
    assert "99-joulemark.rules" in board.run("ls /etc/udev/rules.d")


def test_the_agent_is_small(board: Machine) -> None:
    """A board with 1 GB has little to give away. At rest; what an engine takes is the worker's."""
    status = board.run("sudo cat /proc/$(systemctl show -p MainPID --value joulemark-agent)/status")
    resident = {line.split()[0]: int(line.split()[1]) for line in status.splitlines() if line.startswith("Vm")}
    print(f"resident: {resident['VmRSS:'] / 1000:.1f} MB, at most {resident['VmHWM:'] / 1000:.1f} MB")
    assert resident["VmRSS:"] * 1024 <= 70e6


def test_it_measures_while_its_clock_is_set_right(board: Machine, host: HostProcess) -> None:
    # systemd moves a clock that stands in 1970 to the day when it was built itself; no further.
    behind_s = time.time() - int(board.run("date +%s"))
    assert behind_s > 86_400, "its clock is right already: nothing is shown"
    model = sources.fetch(SMOLLM2, sources.default_cache())
    rendered = packs.render("arc_challenge", documents.load(arc_challenge.DATASET, sources.default_cache()))
    artifact_id, manifest = host.shelf.publish_model(model, "SmolLM2-135M-Q4_1")
    subject = Subject(artifact_id, manifest, {"arc_challenge": host.shelf.publish_pack(rendered)})
    queue(host, NAME, subject, "first", limit=ITEMS)
    phases = "SELECT count(*) FROM phases WHERE run_id = 'first' AND name = 'accuracy'"
    wait_until(lambda: number(board, "journal.sqlite", phases) > 0, 600, 1)
    before = time.time()
    board.run(f"sudo date -s @{before:.0f}")
    record = record_of(host, "first")
    assert record.status == "done", record.problem
    assert len(record.items) == ITEMS
    print(record.verdict)
    durations = [phase.end_s - phase.start_s for phase in record.phases]
    assert all(0 <= duration < 3600 for duration in durations), durations
    assert record.trace is not None
    steps = [later - earlier for earlier, later in itertools.pairwise(record.trace.times_s)]
    assert all(0 < step < 600 for step in steps), max(steps)


def test_its_cell_is_in_the_grid(board: Machine, host: HostProcess, tmp_path: Path) -> None:
    page = tmp_path / "grid.html"
    done = joulemark("heatmap", "--data", str(host.data), "--metric", "accuracy", "--out", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    assert NAME in page.read_text() and "SmolLM2-135M" in page.read_text()
    listed = json.loads(joulemark("records", "--data", str(host.data), "--json").stdout)
    print(listed)


def test_a_second_start_is_quiet_and_the_agent_is_back(board: Machine, host: HostProcess) -> None:
    board.switch_off()
    card_images.check_boot(card_images.boot_of(board.card).cut_out(board.card.parent))
    card_images.check_root(card_images.root_of(board.card).cut_out(board.card.parent))
    board.switch_on()
    board.wait_for("systemctl is-active --quiet joulemark-agent", 300)
    assert board.run("cat /etc/hostname").strip() == NAME
    assert "cloud-init" not in board.run("systemctl list-units --state=active --no-legend --plain 'cloud-*'")
    assert board.run("systemctl list-unit-files --no-legend 'joulemark*'").split()[:2] == [
        "joulemark-agent.service",
        "enabled",
    ]
