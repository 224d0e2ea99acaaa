"""From a blank card to a heatmap cell: the README's lines of that name, word for word, with an emulated board.

One board lives through this file, test after test. Its clock begins in 1970 and is set right in the middle of its first run. Emulated:
what is checked is that it works, never how long it took.
"""

from __future__ import annotations

import base64
import itertools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

from joulemark import sources
from joulemark.wire import RunRecord
from joulemark_deploy.card import wifi_of
from joulemark_host.options import database_url
from joulemark_host.records import Records
from tests.fixtures import arm64_machine, card_images
from tests.fixtures.agent_process import free_port
from tests.fixtures.arm64_machine import Machine, System
from tests.fixtures.host_process import wait_until
from tests.flashed.conftest import PASSWORD, USER, number

pytestmark = pytest.mark.timeout(1700)
README = Path(__file__).resolve().parents[2] / "README.md"
NAME, ITEMS = "bench-7", 5
SMOLLM2 = "smollm2-135m-instruct-q4_1"


def readme_lines() -> dict[str, list[str]]:
    """The commands of the section in words, by their names."""
    section = README.read_text("utf-8").partition("## From a blank card to a heatmap cell\n")[2].partition("\n## ")[0]
    block = section.partition("```sh\n")[2].partition("```")[0].replace("\\\n", " ")
    lines = [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]
    return {" ".join(words[1:3]) if words[1] == "host" and words[2][0] != "-" else words[1]: words for words in lines}


LINES = readme_lines()


@dataclass
class Desk:
    """The workstation: a home folder of its own, and what stands in the README in place of what a person has."""

    folder: Path
    port: int
    card: Path
    device: Path
    system: System
    key: Path

    @property
    def data(self) -> Path:
        return self.folder / ".local/share/joulemark/host"

    def words(self, line: list[str]) -> list[str]:
        address = f"{arm64_machine.HOST_ADDRESS}:{self.port}"
        here = {
            "joulemark": [sys.executable, "-m", "joulemark"],
            "0.0.0.0:8443": [address],
            "https://192.168.1.10:8443": [f"https://{address}"],
            "raspios-lite.img.xz": [str(self.system.image)],
            "/dev/sdX": [str(self.device)],
            "model.gguf": [str(sources.fetch(SMOLLM2, sources.default_cache()))],
            # No terminal here to be asked at.
            "HOME": ["HOME", "--wifi-password-file", "password"],
        }
        return [word for given in line for word in here.get(given, [given])]

    @property
    def environment(self) -> dict[str, str]:
        cache = str(sources.default_cache())
        return {**os.environ, "HOME": str(self.folder), "JOULEMARK_CACHE": cache, "LOGNAME": USER, "XDG_DATA_HOME": ""}

    def run(self, line: list[str], answer: str = "") -> str:
        done = subprocess.run(
            self.words(line),
            cwd=self.folder,
            env=self.environment,
            input=answer,
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, line: list[str]) -> subprocess.Popen[str]:
        log = (self.folder / f"{line[1]}.log").open("w")
        return subprocess.Popen(
            self.words(line), cwd=self.folder, env=self.environment, stdout=log, stderr=log, text=True
        )


@pytest.fixture(scope="module")
def desk(system: System, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Desk]:
    """See Desk. The card is a block device whose content lies in a file, so that a machine can be started from it afterwards."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / ".ssh").mkdir()
    (folder / ".ssh/id_ed25519.pub").write_text(key.with_suffix(".pub").read_text())
    (folder / "password").write_text(f"{PASSWORD}\n")
    card = folder / "card.img"
    with (
        arm64_machine.host_address(),
        card_images.loop_device(card, system.image.stat().st_size + (64 << 20)) as device,
    ):
        yield Desk(folder, free_port(), card, device, system, key)


@pytest.fixture(scope="module")
def records(desk: Desk) -> Generator[Records]:
    """The host's records, looked at from here."""
    made = Records(database_url(desk.data, None))
    yield made
    made.close()


@pytest.fixture(scope="module")
def board(desk: Desk, packed: Path) -> Generator[Machine]:
    """The README's lines up to the card; then the card in a board whose clock knows nothing."""
    desk.run(LINES["host init"])
    host = desk.start(LINES["host"])
    try:
        wait_until(lambda: "serves on" in (desk.folder / "host.log").read_text(), 60)
        desk.run(LINES["host token"])
        # The release is in the cache already: that it is built when it is not, the tests of releases show.
        said = desk.run(LINES["flash"], answer="y\n")
        assert "first boot by cloud-init" in said and not (desk.folder / "board.key").exists()
        with arm64_machine.machine(desk.system, desk.card, desk.key, USER) as made:
            made.switch_on("1970-01-01T00:00:00")
            yield made
    finally:
        host.terminate()
        host.wait(30)


def test_the_section_has_these_lines() -> None:
    assert list(LINES) == ["host init", "host", "host token", "flash", "devices", "run", "heatmap"]


def test_it_reports_in_by_itself(board: Machine, desk: Desk) -> None:
    began = time.monotonic()
    wait_until(lambda: NAME in desk.run(LINES["devices"]), 600, 5)
    print(f"in the fleet after {time.monotonic() - began:.0f} s")
    listed = desk.run(LINES["devices"])
    assert any(NAME in line and "approved" in line for line in listed.splitlines()), listed
    # Enrolment does not tell the time: its first session does.
    wait_until(lambda: "nothing is judged by it" in desk.run(LINES["devices"]), 60, 2)
    assert "its clock is" in desk.run(LINES["devices"])


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


def test_it_measures_while_its_clock_is_set_right(board: Machine, desk: Desk, records: Records) -> None:
    # systemd moves a clock that stands in 1970 to the day when it was built itself; no further.
    behind_s = time.time() - int(board.run("date +%s"))
    assert behind_s > 86_400, "its clock is right already: nothing is shown"
    running = desk.start(LINES["run"])
    wait_until(
        lambda: number(board, "journal.sqlite", "SELECT count(*) FROM phases WHERE name = 'accuracy'") > 0, 900, 20
    )
    board.run(f"sudo date -s @{time.time():.0f}")
    assert running.wait(1500) == 0, (desk.folder / "run.log").read_text()
    print((desk.folder / "run.log").read_text())
    (facts,) = records.facts()
    record = RunRecord.model_validate_json(records.raw(facts.run_id))
    assert record.status == "done", record.problem
    assert (record.device.name, len(record.items)) == (NAME, ITEMS)
    # Nothing that was measured knows of the jump.
    durations = [phase.end_s - phase.start_s for phase in record.phases]
    assert all(0 <= duration < 3600 for duration in durations), durations
    assert record.trace is not None
    steps = [later - earlier for earlier, later in itertools.pairwise(record.trace.times_s)]
    assert all(0 < step < 600 for step in steps), max(steps)


def test_its_cell_is_in_the_grid(board: Machine, desk: Desk) -> None:
    desk.run(LINES["heatmap"])
    page = (desk.folder / "heatmap.html").read_text()
    assert NAME in page and "smollm2" in page.lower()
    assert (desk.folder / "heatmap.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_start_is_quiet_and_the_agent_is_back(board: Machine) -> None:
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


def test_when_it_is_uninstalled_what_was_opened_to_it_is_closed(board: Machine) -> None:
    """What was measured stays."""
    settings = "cd /sys/devices/system/cpu/cpufreq/policy0; stat -c '%G %a' scaling_governor scaling_min_freq"
    assert board.run(settings).splitlines() == ["joulemark 664", "joulemark 664"]
    for name in ("install.sh", "privileges.sh"):
        script = base64.b64encode((README.parent / "deploy" / name).read_bytes()).decode()
        board.run(f"echo {script} | base64 -d >/tmp/{name}")
    board.run("sudo sh /tmp/install.sh --uninstall")
    assert board.run(settings).splitlines() == ["root 644", "root 644"]
    assert board.run("systemctl list-unit-files --no-legend 'joulemark*'; ls /etc/udev/rules.d") == ""
    assert "journal.sqlite" in board.run("sudo ls /var/lib/joulemark")
