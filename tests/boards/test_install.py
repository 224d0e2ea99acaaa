"""`joulemark install`, `upgrade`, `uninstall` over ssh: again changes nothing, what is not ready is undone, what was measured stays."""

from __future__ import annotations

import dataclasses
import io
import json
import socket
import tarfile
from pathlib import Path

import pytest

from joulemark.errors import BadInput
from joulemark_deploy import installing
from joulemark_deploy.files import SERVICE_FILES, deploy_file
from joulemark_deploy.installing import Facts
from joulemark_deploy.release import Release
from joulemark_deploy.remote import Board as Remote
from joulemark_deploy.targets import ARMV8, DOTPROD, InstructionSet
from tests.boards.conftest import NAME, Board, joulemark
from tests.fixtures.host_process import wait_until

pytestmark = pytest.mark.timeout(1700)
BROKEN = b"raise SystemExit('this release does not start')\n"


def in_use(board: Board) -> str:
    return str((board.userland.root / "opt/joulemark").readlink())


def test_the_board_is_in_the_fleet_and_no_secret_stays(board: Board) -> None:
    wait_until(lambda: any(device.name == NAME for device in board.host.registry.devices()), 60)
    assert board.host.registry.device(NAME).admission == "approved"
    root = board.userland.root
    assert not (root / "root/.joulemark-install").exists()
    assert not (root / "var/lib/joulemark/enrol.key").exists(), "it was used"
    assert in_use(board) == "/opt/joulemark-releases/1"


def test_again_brings_nothing_and_keeps_the_release(board: Board, packed: Path) -> None:
    done = joulemark("install", "root@127.0.0.1", "--release", str(packed), *board.server.options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept: /opt/joulemark-releases/1 is the same" in done.stdout
    assert "kept: /etc/joulemark/agent.env" in done.stdout
    assert in_use(board) == "/opt/joulemark-releases/1"


def broken_release(whole: Path, out: Path) -> Path:
    """A release whose agent does not start, whole in every other way."""
    with tarfile.open(whole) as source, tarfile.open(out, "w:gz", compresslevel=1) as target:
        for member in source:
            if member.name == "site/joulemark_agent/server.py":
                member.size = len(BROKEN)
                target.addfile(member, io.BytesIO(BROKEN))
            elif not member.name.startswith("site/joulemark_agent/__pycache__/server."):
                target.addfile(member, source.extractfile(member) if member.isfile() else None)
    return out


def smallest_release(out: Path) -> Path:
    """All that the script looks at, in a few kilobytes; its agent does not start."""
    files = {
        "release.json": _manifest(ARMV8),
        "bin/joulemark": b"#!/bin/sh\necho this release does not start\nexit 1\n",
        "bin/python": b"#!/bin/sh\n",
        **{name: deploy_file(name).read_bytes() for name in SERVICE_FILES},
    }
    with tarfile.open(out, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            archive.addfile(member, io.BytesIO(content))
    return out


def test_an_update_that_does_not_report_ready_is_undone(board: Board, packed: Path, tmp_path: Path) -> None:
    broken = broken_release(packed, tmp_path / "broken.tar.gz")
    # Of an installation that was interrupted; it goes too.
    half = board.userland.root / "opt/joulemark-releases/7/site"
    half.mkdir(parents=True)
    done = joulemark("upgrade", "root@127.0.0.1", "--release", str(broken), *board.server.options)
    assert done.returncode == 1
    assert "the new release did not report that it is ready; /opt/joulemark-releases/1 runs again" in done.stderr
    assert "this release does not start" in board.server.agent_log()
    assert in_use(board) == "/opt/joulemark-releases/1"
    assert [path.name for path in (board.userland.root / "opt/joulemark-releases").iterdir()] == ["1"]
    pid = int((board.userland.root / "run/agent.pid").read_text())
    assert Path(f"/proc/{pid}").exists(), "the former agent serves again"


def test_options_with_which_the_agent_does_not_start_are_undone(board: Board, packed: Path) -> None:
    options = board.userland.root / "etc/joulemark/agent.env"
    before = options.read_text()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        done = joulemark(
            "install", "root@127.0.0.1", "--release", str(packed), "--listen", listen, *board.server.options
        )
    assert done.returncode == 1
    assert "the agent with its new options did not report that it is ready" in done.stderr
    assert "/opt/joulemark-releases/1 runs again as before" in done.stderr
    assert options.read_text() == before and [path.name for path in options.parent.iterdir()] == ["agent.env"]
    pid = int((board.userland.root / "run/agent.pid").read_text())
    assert Path(f"/proc/{pid}").exists()


def test_an_older_release_with_fewer_units_can_be_gone_back_to(board: Board, packed: Path, tmp_path: Path) -> None:
    """By hand, with this script: what the older one has not goes, and comes again with the newer one. Options that are not given stay."""
    options = board.userland.root / "etc/joulemark/agent.env"
    before = options.read_text().strip().removesuffix('"')
    units = board.userland.root / "etc/systemd/system"
    assert len(list(units.glob("joulemark-*"))) == 3
    older = tmp_path / "older.tar.gz"
    with tarfile.open(packed) as source, tarfile.open(older, "w:gz", compresslevel=1) as target:
        for member in source:
            if "power-mode" not in member.name:
                target.addfile(member, source.extractfile(member) if member.isfile() else None)
    done = joulemark(
        "install", "root@127.0.0.1", "--release", str(older), "--listen", "127.0.0.1:0", *board.server.options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in units.glob("joulemark-*")] == ["joulemark-agent.service"]
    assert "--host-url" in before and options.read_text() == f'{before} --listen 127.0.0.1:0"\n'
    done = joulemark("upgrade", "root@127.0.0.1", "--release", str(packed), *board.server.options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(units.glob("joulemark-*"))) == 3


def test_a_release_for_another_processor_or_none_is_not_even_sent(board: Board, tmp_path: Path) -> None:
    before = in_use(board)
    for content, words in (
        (made_for(DOTPROD), "is for another processor"),
        (b"no archive", "is no release of Joulemark"),
    ):
        path = tmp_path / "other.tar.gz"
        path.write_bytes(content)
        done = joulemark("install", "root@127.0.0.1", "--release", str(path), *board.server.options)
        assert done.returncode == 1 and words in done.stderr, done.stderr
    assert in_use(board) == before


def _manifest(instructions: InstructionSet) -> bytes:
    fields = {
        "instruction_set": instructions.name,
        "hwcap": instructions.hwcap,
        "joulemark": "1",
        "engine": "1",
        "python": "3.11",
    }
    return json.dumps(Release.model_validate(fields).model_dump(mode="json"), indent=2).encode() + b"\n"


def made_for(instructions: InstructionSet) -> bytes:
    """The beginning of a release."""
    text, out = _manifest(instructions), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        member = tarfile.TarInfo("release.json")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    return out.getvalue()


def test_uninstall_keeps_what_was_measured_unless_told(board: Board) -> None:
    """The last test of this board."""
    root = board.userland.root
    done = joulemark("uninstall", "root@127.0.0.1", *board.server.options)
    assert done.returncode == 0, done.stdout + done.stderr
    for gone in (
        "opt/joulemark",
        "opt/joulemark-releases",
        "etc/systemd/system/joulemark-agent.service",
        "run/agent.pid",
    ):
        assert not (root / gone).exists() and not (root / gone).is_symlink(), gone
    assert (root / "var/lib/joulemark/identity").is_dir() and (root / "etc/joulemark/agent.env").exists()
    again = joulemark("uninstall", "root@127.0.0.1", "--purge", *board.server.options)
    assert again.returncode == 0, again.stdout + again.stderr
    assert not (root / "var/lib/joulemark").exists() and not (root / "etc/joulemark").exists()
    there = joulemark("upgrade", "root@127.0.0.1", *board.server.options)
    assert there.returncode == 1 and "there is no Joulemark on root@127.0.0.1" in there.stderr


def test_a_first_installation_that_does_not_report_ready_says_so(board: Board, tmp_path: Path) -> None:
    """After the last one there is nothing to go back to."""
    broken = smallest_release(tmp_path / "broken.tar.gz")
    done = joulemark("install", "root@127.0.0.1", "--release", str(broken), *board.server.options)
    assert done.returncode == 1
    assert "the agent did not report that it is ready" in done.stderr and "journalctl" in done.stderr
    assert (
        in_use(board) == "/opt/joulemark-releases/1"
        and (board.userland.root / "opt/joulemark-releases/1/release.json").exists()
    )
    gone = joulemark("uninstall", "root@127.0.0.1", "--purge", *board.server.options)
    assert gone.returncode == 0, gone.stdout + gone.stderr


# --- what a board must have -------------------------------------------------------------------------------------------
GOOD = Facts("aarch64", "/home/pi", True, False, "3.11", True, 0, 5_000_000, "Raspberry Pi 4 Model B Rev 1.5", "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine": "armv7l"}, "the board is armv7l"),
        ({"machine": "x86_64"}, "pip install 'joulemark[agent,llama]'"),
        ({"python": "3.6"}, "its Python is 3.6"),
        ({"python": ""}, "its Python is missing"),
        ({"venv": False}, "python3-venv"),
        ({"root": False}, "sudo asks for a password"),
        ({"free_kb": 1000}, "0.0 GB are free below /opt"),
    ],
)
def test_what_a_board_lacks_is_said_before_anything_is_brought(changes: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput) as caught:
        lacking = dataclasses.replace(GOOD, **changes)  # type: ignore[arg-type]
        installing.refuse(lacking, at_terminal=False, from_wheels=True)
    assert words in str(caught.value)
    if "python" in changes or "venv" in changes:
        installing.refuse(lacking, at_terminal=False, from_wheels=False)
    installing.refuse(GOOD, at_terminal=False, from_wheels=True)
    installing.refuse(dataclasses.replace(GOOD, root=False), at_terminal=True, from_wheels=False)


def test_a_host_whose_name_a_release_cannot_resolve_is_refused_at_once() -> None:
    done = joulemark("install", "nobody@127.0.0.1", "-p", "1", "--host-url", "https://workstation.local:8443")
    assert done.returncode == 1 and "workstation.local would not be resolved" in done.stderr


@pytest.mark.parametrize("destination", ["-oProxyCommand=evil", "a b", "user@", "", "x;y", "user@-host", "a" * 400])
def test_a_destination_that_is_none_never_reaches_ssh(destination: str) -> None:
    with pytest.raises(BadInput, match="no user@address"):
        Remote(destination)


def test_a_board_that_does_not_answer_is_said_in_words() -> None:
    done = joulemark("install", "nobody@127.0.0.1", "-p", "1", "--ssh-option", "-oBatchMode=yes")
    assert done.returncode == 1
    assert "nobody@127.0.0.1 cannot be reached" in done.stderr and "hint: try `ssh`" in done.stderr
