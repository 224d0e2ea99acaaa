"""`joulemark flash` as a person types it: to a file without root, to a real block device, and the answers it refuses to guess."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

import joulemark_deploy
from joulemark_deploy import flash_cli
from tests.fixtures import card_images
from tests.fixtures.needed_programs import require_root_and
from tests.joulemark_deploy.test_flashing import ENROLMENT_KEY, KEY

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def tools() -> None:
    card_images.require()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A home folder with a key of its own, an image, a release."""
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/id_ed25519.pub").write_text(f"{KEY}\n")
    card_images.raspberry_pi(tmp_path, card_images.CLOUD_INIT)
    card_images.pretended_release(tmp_path).rename(tmp_path / "joulemark-release.tar.gz")
    (tmp_path / "board.key").write_text(f"{ENROLMENT_KEY}\n")
    return tmp_path


def flash(place: Path, *options: str, before: tuple[str, ...] = (), text: str = "") -> subprocess.CompletedProcess[str]:
    command = [
        *before,
        sys.executable,
        "-m",
        "joulemark",
        "flash",
        "pi.img",
        "--board",
        "pi4",
        "--release",
        "joulemark-release.tar.gz",
    ]
    environment = {**os.environ, "HOME": str(place), "PYTHONPATH": str(REPOSITORY), "LOGNAME": "Anna", "COLUMNS": "200"}
    return subprocess.run(
        [*command, *options],
        cwd=place,
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_behind_sudo_the_person_is_still_who_sits_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = pwd.struct_passwd(("Anna", "x", 1000, 1000, "", str(tmp_path), "/bin/sh"))
    monkeypatch.setattr(flash_cli.os, "geteuid", lambda: 0)
    monkeypatch.setattr(flash_cli.pwd, "getpwnam", {"Anna": entry}.__getitem__)
    for sudo_user, found in (("Anna", ("anna", tmp_path)), ("nobody-known", None), ("root", None), ("", None)):
        monkeypatch.setenv("SUDO_USER", sudo_user)
        monkeypatch.setenv("LOGNAME", "root")
        assert flash_cli._person() == (found or ("pi", Path.home()))  # pyright: ignore[reportPrivateUsage]


HOST = ("--host-url", "https://192.0.2.1:8443", "--enrol-key-file", "board.key")


def test_a_file_and_what_to_do_next(place: Path) -> None:
    done = flash(place, "--out", "card.img", *HOST)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "✓ card.img: Raspberry Pi 4, 400, first boot by cloud-init (Raspberry Pi OS trixie, Ubuntu 24.04)",
        "  put it into the board and switch it on; `joulemark devices` on the host shows it after its first start",
    ]
    boot = card_images.boot_of(place / "card.img").cut_out(place)
    user_data = card_images.read(boot, "user-data").decode()
    assert '"name": "anna"' in user_data and KEY in user_data and '"hostname": "pi4"' in user_data
    # The key is on the card now and opens once: it is nowhere else.
    assert not (place / "board.key").exists()
    assert not list(place.glob(".joulemark-flash-*"))


def is_open_to_all(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in path.parents)


def test_it_needs_no_root(place: Path) -> None:
    require_root_and({"setpriv": "util-linux"}, "root is needed to be nobody")
    place.chmod(0o777)
    for parent in place.parents:
        if parent.stat().st_mode & 0o001 == 0:
            parent.chmod(parent.stat().st_mode | 0o011)
    # Nothing that only root may; but for reading, and that only where the checkout lies in a folder of somebody's own.
    kept = "-all" if is_open_to_all(Path(joulemark_deploy.__file__)) else "-all,+dac_read_search"
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", f"--bounding-set={kept}")
    nobody += (f"--inh-caps={kept}", f"--ambient-caps={kept}", "--no-new-privs")
    done = flash(place, "--out", "card.img", before=nobody)
    if "Permission denied" in done.stderr and sys.executable in done.stderr:
        pytest.skip("nobody may not read this Python")
    assert done.returncode == 0, done.stderr
    assert (place / "card.img").stat().st_uid == 65534
    card_images.check_boot(card_images.boot_of(place / "card.img").cut_out(place))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "say where the image goes"),
        (("--out", "card.img", "--device", "/dev/sdx"), "say where the image goes"),
        (("--out", "pi.img"), "is there already"),
        (("--device", "pi.img"), "is no disk"),
        (("--out", "card.img", "--host-url", "https://desk.local:8443"), "would not be resolved"),
        (("--out", "card.img", "--enrol-key-file", "board.key"), "needs --host-url"),
        (("--out", "card.img", "--host-url", "https://192.0.2.1", "--enrol-key-file", "pi.img"), "no enrolment key"),
        (("--out", "card.img", "--wifi", "home", "--wifi-country", "DE"), "no terminal"),
        (("--out", "card.img", "--wifi-country", "DE"), "which network"),
        (("--out", "card.img", "--board", "pi9"), "there is no target"),
        (("--out", "card.img", "--sha256", "0" * 64), "has the SHA-256"),
        (("--out", "card.img", "--ssh-key", "board.key"), "no public ssh key"),
        (("--out", "card.img", "--release", "pi.img"), "no release of Joulemark"),
        (("--out", "card.img", "--user", "root"), "cannot be the name of who logs in"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(place: Path, options: tuple[str, ...], words: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    done = flash(place, *options)
    assert done.returncode == 1
    assert words in done.stderr and "hint:" in done.stderr and "Traceback" not in done.stderr
    assert "jme." not in done.stderr + done.stdout or "jme.…" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == before


def test_a_card_is_written_and_compared_only_after_a_yes(place: Path) -> None:
    require_root_and({"losetup": "util-linux"}, "no loop device here")
    (place / "wifi").write_text("correct horse\n")
    size = (place / "pi.img").stat().st_size
    wifi = ("--wifi", "home", "--wifi-country", "DE", "--wifi-password-file", "wifi")
    with card_images.loop_device(place / "backing", size + (8 << 20)) as device:
        for answer in ("n\n", "\n", ""):
            refused = flash(place, "--device", str(device), *HOST, *wifi, text=answer)
            assert refused.returncode == 1 and "Everything on it will be lost" in refused.stderr
            assert "nothing was written" in refused.stderr and "Traceback" not in refused.stderr
        assert (place / "board.key").exists() and not any(device.open("rb").read(1 << 20))
        done = flash(place, "--device", str(device), *HOST, *wifi, "--yes")
        assert done.returncode == 0, done.stderr
        assert not (place / "board.key").exists()
    card = place / "backing"
    os.truncate(card, size)
    boot = card_images.boot_of(card).cut_out(place)
    card_images.check_boot(boot)
    assert '"home"' in card_images.read(boot, "network-config").decode()
    assert "correct horse" not in card_images.read(boot, "network-config").decode()
    card_images.check_root(card_images.root_of(card).cut_out(place))
