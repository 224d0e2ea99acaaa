"""Flashing to a file: each way of a first boot, read by another program than the one that wrote it; and everything that is refused."""

from __future__ import annotations

import bz2
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import shlex
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from joulemark.credentials import EnrolmentKey
from joulemark.errors import BadInput, Conflict, DigestMismatch, JoulemarkError, NoSpace, NotFound
from joulemark_deploy import flashing, unpacking
from joulemark_deploy.card import Card, Wifi, check_card, wifi_of
from joulemark_deploy.disk_image import DiskImage
from joulemark_deploy.targets import target_of
from tests.fixtures import card_images

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOtherBytesThatLookLikeAKeyOfThisKind0123456 anna@desk"
ENROLMENT_KEY = EnrolmentKey("0011223344556677", "c" * 43, "f" * 64).text()
HOSTILE_NETWORK = 'it\'s; $(reboot) `x` "Café"'


def silent(*_: object) -> None:
    """Progress that nobody looks at."""


def card(**changes: Any) -> Card:
    settings: dict[str, Any] = {
        "hostname": "bench-7",
        "user": "anna",
        "ssh_keys": (KEY,),
        "wifi": wifi_of(HOSTILE_NETWORK, "correct horse", "DE", hidden=True),
        "host_url": "https://192.0.2.1:8443",
        "enrolment_key": ENROLMENT_KEY,
        "listen": None,
        "licence_accepted": False,
    }
    return check_card(Card(**{**settings, **changes}))


def flashed(image: Path, given: Card, release: Path) -> tuple[str, Path]:
    out = image.parent / f"flashed-{image.name}"
    before = image.stat().st_mtime_ns
    title = flashing.to_file(flashing.Source(image), out, given, release, silent, silent)
    assert image.stat().st_mtime_ns == before
    return title, out


@pytest.fixture(autouse=True)
def tools() -> None:
    card_images.require()


def test_cloud_init_finds_its_seed(tmp_path: Path) -> None:
    release = card_images.pretended_release(tmp_path)
    image = card_images.raspberry_pi(tmp_path, card_images.CLOUD_INIT, boot_mib=512)
    title, out = flashed(image, card(), release)
    assert title.startswith("cloud-init")
    boot = card_images.boot_of(out).cut_out(tmp_path)
    card_images.check_boot(boot)
    words = card_images.read(boot, "cmdline.txt").decode().split()
    assert words[: len(card_images.COMMAND_LINE.split())] == card_images.COMMAND_LINE.split()
    seed = json.loads(card_images.read(boot, "meta-data"))
    assert words[-3:] == ["cgroup_enable=memory", f"ds=nocloud;i={seed['instance-id']}", "cfg80211.ieee80211_regdom=DE"]
    first, _, rest = card_images.read(boot, "user-data").decode().partition("\n")
    user_data = json.loads(rest)
    assert first == "#cloud-config"
    assert user_data["hostname"] == "bench-7" and user_data["enable_ssh"] is True and user_data["ssh_pwauth"] is False
    assert user_data["users"][0]["name"] == "anna" and user_data["users"][0]["ssh_authorized_keys"] == [KEY]
    begin = user_data["bootcmd"][0][2]
    subprocess.run(["sh", "-n"], input=begin, text=True, check=True)
    assert "/boot/firmware/joulemark/joulemark-first-boot.service" in begin
    # Nobody sits there to say a user's name.
    assert begin.index("ln -sf /dev/null /run/systemd/system/userconfig.service") < begin.index("daemon-reload")
    settings = card_images.read(boot, "joulemark/settings.sh").decode()
    subprocess.run(["sh", "-n"], input=settings, text=True, check=True)
    assert "disable --quiet userconfig.service" in settings and "rfkill unblock wifi" in settings
    assert (
        card_images.read(boot, "ssh") == b""
        and "/ssh" in card_images.read(boot, "joulemark/cloud-init").decode().splitlines()
    )
    network = json.loads(card_images.read(boot, "network-config"))["network"]
    # The key of IEEE 802.11i: `wpa_passphrase` gives the same for this name and this password.
    derived = hashlib.pbkdf2_hmac("sha1", b"correct horse", HOSTILE_NETWORK.encode(), 4096, 32).hex()
    assert network["wifis"]["wlan0"]["access-points"] == {HOSTILE_NETWORK: {"password": derived, "hidden": True}}
    assert network["wifis"]["wlan0"]["regulatory-domain"] == "DE"
    options = card_images.read(boot, "joulemark/install.options").decode().splitlines()
    assert options == [
        "--release", "/boot/firmware/joulemark/release.tar.gz", "--name", "bench-7", "--host-url", "https://192.0.2.1:8443",
    ]  # fmt: skip
    assert card_images.read(boot, "joulemark/release.tar.gz") == release.read_bytes()
    assert card_images.read(boot, "joulemark/enrol.key").decode().strip() == ENROLMENT_KEY
    unit = card_images.read(boot, "joulemark/joulemark-first-boot.service").decode()
    assert "ExecStart=/bin/sh /boot/firmware/joulemark/first_boot.sh" in unit and "@" not in unit
    assert "\nAfter=cloud-final.service\n" in unit
    root = card_images.root_of(out).cut_out(tmp_path)
    card_images.check_root(root)
    assert card_images.read(root, "etc/cloud/cloud.cfg") == b"users: []\n"


def test_firstrun_does_what_it_says(tmp_path: Path) -> None:
    release = card_images.pretended_release(tmp_path)
    title, out = flashed(card_images.raspberry_pi(tmp_path, card_images.FIRSTRUN), card(), release)
    assert title.startswith("firstrun")
    boot = card_images.boot_of(out).cut_out(tmp_path)
    card_images.check_boot(boot)
    line = card_images.read(boot, "cmdline.txt").decode()
    assert line.count("\n") == 1
    assert line.split()[-4:] == [
        "systemd.run=/boot/firmware/firstrun.sh",
        "systemd.run_success_action=reboot",
        "systemd.run_failure_action=reboot",
        "systemd.unit=kernel-command-line.target",
    ]
    # The script itself, with the system's places moved into a folder and helpers that write down what they are told. Twice: a power cut.
    system = tmp_path / "system"
    script = card_images.read(boot, "firstrun.sh").decode()
    for place in ("/usr/lib/", "/boot/firmware", "/etc/systemd"):
        script = script.replace(place, f"{system}{place}")
    told = system / "told"
    for helper in ("raspberrypi-sys-mods/imager_custom", "userconf-pi/userconf"):
        path = system / "usr/lib" / helper
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\nprintf '%s\\0' ${{0##*/}} \"$@\" >>{told}; echo >>{told}\n")
        path.chmod(0o755)
    place = system / "boot/firmware"
    (system / "etc/systemd/system").mkdir(parents=True)
    for _ in range(2):
        (place / "joulemark").mkdir(parents=True, exist_ok=True)
        (place / "joulemark/joulemark-first-boot.service").write_text("unit")
        (place / "cmdline.txt").write_text(line)
        (place / "firstrun.sh").write_text(script)
        told.write_text("")
        subprocess.run(["sh", str(place / "firstrun.sh")], check=True, timeout=60)
        assert [call.split("\0")[:-1] for call in told.read_text().splitlines()] == [
            ["imager_custom", "set_hostname", "bench-7"],
            ["userconf", "anna", "*"],
            ["imager_custom", "enable_ssh", "-k", KEY],
            ["imager_custom", "set_wlan", "-h", HOSTILE_NETWORK, card_key(), "DE"],
        ]
        assert (place / "cmdline.txt").read_text() == f"{card_images.COMMAND_LINE} cgroup_enable=memory\n"
        assert not (place / "firstrun.sh").exists()
        wanted = system / "etc/systemd/system/multi-user.target.wants/joulemark-first-boot.service"
        assert wanted.resolve().read_text() == "unit"


def card_key() -> str:
    wifi = card().wifi
    assert isinstance(wifi, Wifi)
    return wifi.key


def test_a_jetson_starts_our_service_and_not_the_questions(tmp_path: Path) -> None:
    release = card_images.pretended_release(tmp_path)
    image = card_images.jetson(tmp_path)
    with pytest.raises(BadInput, match="asks questions") as refused:
        flashed(image, card(), release)
    assert "--accept-license" in refused.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jetson.img", "jetson.img-root", release.name]
    title, out = flashed(image, card(licence_accepted=True), release)
    assert title.startswith("Jetson")
    root = card_images.root_of(out).cut_out(tmp_path)
    card_images.check_root(root)
    modes = card_images.listing(root)
    folder = "var/lib/joulemark-card"
    assert card_images.read(root, "etc/systemd/system/default.target") == b"/lib/systemd/system/multi-user.target"
    link = "etc/systemd/system/multi-user.target.wants/joulemark-first-boot.service"
    assert card_images.read(root, link) == b"../joulemark-first-boot.service"
    # Nothing of cloud-init's: where there is one, its end waits for what waits for this unit.
    assert "\nAfter=\n" in card_images.read(root, "etc/systemd/system/joulemark-first-boot.service").decode()
    assert (
        f"/bin/sh /{folder}/first_boot.sh"
        in card_images.read(root, "etc/systemd/system/joulemark-first-boot.service").decode()
    )
    assert card_images.read(root, f"{folder}/release.tar.gz") == release.read_bytes()
    assert card_images.read(root, "etc/hostname") == b"bench-7\n"
    assert modes[f"{folder}/enrol.key"] == "-rw-------" and modes[f"{folder}/first_boot.sh"] == "-rw-r--r--"
    network = "etc/NetworkManager/system-connections/joulemark.nmconnection"
    assert modes[network] == "-rw-------"
    text = card_images.read(root, network).decode()
    # Bytes as numbers: a name that holds the format's own signs cannot break it.
    assert (
        f"ssid={''.join(f'{byte};' for byte in HOSTILE_NETWORK.encode())}\n" in text and f"psk={card_key()}\n" in text
    )
    settings = card_images.read(root, f"{folder}/settings.sh").decode()
    assert shlex.quote(KEY) in settings
    assert settings.startswith("if [ -x /usr/lib/nvidia/resizefs/nvresizefs.sh ]"), (
        "the questions would have grown the partition"
    )
    subprocess.run(["sh", "-n"], input=settings, text=True, check=True)
    # An image whose questions were answered needs nobody's consent, and keeps its target.
    shutil.rmtree(tmp_path / "jetson.img-root")
    image.unlink()
    out.unlink()
    _, out = flashed(card_images.jetson(tmp_path, asks=False), card(), release)
    root = card_images.root_of(out).cut_out(tmp_path)
    assert card_images.read(root, "etc/systemd/system/default.target") == b"/lib/systemd/system/graphical.target"


def test_a_jetson_whose_first_start_is_not_known_is_refused(tmp_path: Path) -> None:
    """JetPack 7 has cloud-init."""
    with pytest.raises(BadInput, match="Jetson Linux 38, whose first start is not known") as refused:
        flashed(
            card_images.jetson(tmp_path, release=38),
            card(licence_accepted=True),
            card_images.pretended_release(tmp_path),
        )
    assert "joulemark install" in refused.value.hint
    shutil.rmtree(tmp_path / "jetson.img-root")
    (tmp_path / "jetson.img").unlink()
    assert flashed(
        card_images.jetson(tmp_path, release=36), card(licence_accepted=True), card_images.pretended_release(tmp_path)
    )[0].startswith("Jetson")


def test_without_key_network_or_host_there_is_none_on_the_card(tmp_path: Path) -> None:
    bare = card(ssh_keys=(), wifi=None, host_url=None, enrolment_key=None)
    release = card_images.pretended_release(tmp_path)
    _, out = flashed(card_images.raspberry_pi(tmp_path, card_images.CLOUD_INIT), bare, release)
    boot = card_images.boot_of(out).cut_out(tmp_path)
    user_data = json.loads(card_images.read(boot, "user-data").decode().partition("\n")[2])
    assert "users" not in user_data and "enable_ssh" not in user_data and "ssh" not in card_images.listing(boot)
    assert "rfkill" not in card_images.read(boot, "joulemark/settings.sh").decode()
    assert "wifis" not in json.loads(card_images.read(boot, "network-config"))["network"]
    assert "joulemark/enrol.key" not in card_images.listing(boot)
    assert "--host-url" not in card_images.read(boot, "joulemark/install.options").decode()


@pytest.mark.parametrize(
    "layout",
    [
        {"boot": {"config.txt": ""}, "root": {"etc/os-release": "ID=other\n"}},
        # cloud-init is there and looks elsewhere: what lies on the boot partition would be ignored without a word.
        {
            "boot": {"config.txt": ""},
            "root": {"etc/cloud/cloud.cfg": "", "usr/lib/raspberrypi-sys-mods/imager_custom": ""},
        },
    ],
)
def test_an_unknown_first_boot_is_refused(tmp_path: Path, layout: dict[str, dict[str, str]]) -> None:
    release = card_images.pretended_release(tmp_path)
    image = card_images.raspberry_pi(tmp_path, layout)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInput, match="no way that is known") as refused:
        flashed(image, card(), release)
    assert "joulemark install" in refused.value.hint
    assert sorted(tmp_path.iterdir()) == before


def test_an_image_that_two_ways_claim_is_refused(tmp_path: Path) -> None:
    both = {
        "boot": card_images.CLOUD_INIT["boot"],
        "root": {**card_images.CLOUD_INIT["root"], "etc/nv_tegra_release": ""},
    }
    image = card_images.raspberry_pi(tmp_path, both)
    with pytest.raises(BadInput, match=r"cloud-init \(.*\) and Jetson"):
        flashing.way_of(DiskImage(image))


def test_damaged_images_are_refused(tmp_path: Path) -> None:
    release = card_images.pretended_release(tmp_path)
    image = card_images.raspberry_pi(tmp_path, card_images.CLOUD_INIT)
    root = card_images.root_of(image)
    with image.open("r+b") as file:  # the flag that a journal has to be replayed
        file.seek(root.start + 1024 + 96)
        flags = int.from_bytes(file.read(4), "little") | 4
        file.seek(root.start + 1024 + 96)
        file.write(flags.to_bytes(4, "little"))
    with pytest.raises(BadInput, match="not closed cleanly"):
        flashed(image, card(), release)
    with image.open("r+b") as file:
        file.truncate(root.start + (1 << 20))
    with pytest.raises(BadInput, match="cut off"):
        flashed(image, card(), release)
    (tmp_path / "noise.img").write_bytes(os.urandom(1 << 20))
    with pytest.raises(JoulemarkError, match="no partition table"):
        flashed(tmp_path / "noise.img", card(), release)
    assert not list(tmp_path.glob("flashed-*")) and not list(tmp_path.glob(".joulemark-flash-*"))


def test_a_full_boot_partition_is_said(tmp_path: Path) -> None:
    image = card_images.raspberry_pi(tmp_path, card_images.CLOUD_INIT)
    release = tmp_path / "large.tar.gz"
    with release.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(NoSpace, match="boot partition is full"):
        flashed(image, card(), release)
    assert not list(tmp_path.glob("flashed-*"))


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    image = card_images.raspberry_pi(tmp_path, card_images.CLOUD_INIT)
    (tmp_path / "flashed-pi.img").write_text("mine")
    with pytest.raises(Conflict):
        flashed(image, card(), card_images.pretended_release(tmp_path))
    assert (tmp_path / "flashed-pi.img").read_text() == "mine"


def test_what_a_killed_one_left_goes_and_a_living_one_stays(tmp_path: Path) -> None:
    image = card_images.raspberry_pi(tmp_path, card_images.CLOUD_INIT)
    killed, living, young = (tmp_path / f".joulemark-flash-{name}" for name in ("killed", "living", "young"))
    for folder in (killed, living, young):
        folder.mkdir()
        (folder / "card.img").write_text("the network's key")
    (living / "lock").touch()
    for folder in (killed, living):
        os.utime(folder, (0, 0))
    with (living / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(living, (0, 0))
        flashed(image, card(), card_images.pretended_release(tmp_path))
    assert not killed.exists()
    assert (living / "card.img").exists() and (young / "card.img").exists()


def test_under_our_name_in_a_folder_for_all_nothing_is_followed(tmp_path: Path) -> None:
    """As in /tmp: a link to a file, which would be made there as root; a pipe that nobody reads; a link to a folder."""
    image = card_images.raspberry_pi(tmp_path, card_images.CLOUD_INIT)
    linked, piped, folder = (tmp_path / f".joulemark-flash-{name}" for name in ("linked", "piped", "folder"))
    linked.mkdir()
    (linked / "lock").symlink_to(tmp_path / "nologin")
    piped.mkdir()
    os.mkfifo(piped / "lock")
    (tmp_path / "precious").mkdir()
    folder.symlink_to(tmp_path / "precious")
    for place in (linked, piped, tmp_path / "precious"):
        os.utime(place, (0, 0))
    flashed(image, card(), card_images.pretended_release(tmp_path))
    assert not (tmp_path / "nologin").exists() and (tmp_path / "precious").is_dir()
    assert list((tmp_path / "precious").iterdir()) == []


def test_an_image_with_secrets_in_it_is_its_owners_alone(tmp_path: Path) -> None:
    image = card_images.raspberry_pi(tmp_path, card_images.CLOUD_INIT)
    _, made = flashed(image, card(), card_images.pretended_release(tmp_path))
    assert stat.S_IMODE(made.stat().st_mode) == 0o600


def test_a_release_for_a_faster_board_is_refused(tmp_path: Path) -> None:
    release = card_images.pretended_release(tmp_path, hwcap=1 << 20)
    with pytest.raises(BadInput, match="not for Raspberry Pi 4"):
        flashing.refuse_release(release, target_of("pi4"))
    flashing.refuse_release(release, target_of("pi5"))


@pytest.mark.parametrize(
    "changes",
    [
        {"hostname": "a b"},
        {"hostname": "-x"},
        {"hostname": "a" * 64},
        {"hostname": "x;reboot"},
        {"user": "root"},
        {"user": "joulemark"},
        {"user": "an na"},
        {"user": "$(id)"},
        {"ssh_keys": ("ssh-ed25519 AAAA",)},
        {"ssh_keys": (f"{KEY}\nsecond",)},
        {"ssh_keys": (f'command="x" {KEY}',)},
        {"host_url": "https://a b"},
        {"host_url": "https://a$(reboot)"},
        {"listen": "0.0.0.0:8090;x"},
    ],
)
def test_settings_that_a_shell_would_misread_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        card(**changes)


@pytest.mark.parametrize(
    ("name", "password", "country"),
    [
        ("", "correct horse", "DE"),
        ("n" * 33, "correct horse", "DE"),
        ("a\nb", "correct horse", "DE"),
        ("home", "short", "DE"),
        ("home", "p" * 64, "DE"),
        ("home", "zwölf zeichen", "DE"),
        ("home", "correct horse", None),
        ("home", "correct horse", "de"),
        ("home", "correct horse", "DEU"),
    ],
)
def test_networks_that_cannot_be_are_refused(name: str, password: str, country: str | None) -> None:
    with pytest.raises(BadInput) as refused:
        wifi_of(name, password, country, hidden=False)
    assert password not in str(refused.value) or not password


def test_a_key_that_was_derived_already_stays() -> None:
    assert wifi_of("home", "ab" * 32, "DE", hidden=False).key == "ab" * 32
    # IEEE 802.11i-2004, annex H.4.1, first test vector.
    assert (
        wifi_of("IEEE", "password", "US", hidden=False).key
        == "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"
    )
    assert card_key() not in repr(card()) and ENROLMENT_KEY not in repr(card())


# --- unpacking --------------------------------------------------------------------------------------------------------
CONTENT = b"start".ljust(512, b"\1") + bytes(12 << 20) + b"end".ljust(512, b"\2")


def zipped(content: bytes, path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("README.txt", "about")
        for name in names:
            archive.writestr(name, content)


PACKERS: dict[str, Callable[[Path], object]] = {
    "plain": lambda path: path.write_bytes(CONTENT),
    "xz": lambda path: path.write_bytes(lzma.compress(CONTENT)),
    "gzip": lambda path: path.write_bytes(gzip.compress(CONTENT)),
    "bzip2": lambda path: path.write_bytes(bz2.compress(CONTENT)),
    "zip": lambda path: zipped(CONTENT, path, "sd-blob.img"),
}


@pytest.mark.parametrize("packer", PACKERS)
def test_every_packing_gives_the_same_image(tmp_path: Path, packer: str) -> None:
    source, out = tmp_path / "image", tmp_path / "out"
    PACKERS[packer](source)
    seen: list[tuple[int, int]] = []
    published = hashlib.sha256(source.read_bytes()).hexdigest()
    unpacking.unpack(source, out, published.upper(), lambda done, total: seen.append((done, total)))
    assert out.read_bytes() == CONTENT
    assert out.stat().st_blocks * 512 < len(CONTENT)  # zeros are holes
    assert seen[-1] == (source.stat().st_size, source.stat().st_size)
    with pytest.raises(DigestMismatch):
        unpacking.unpack(source, tmp_path / "other", "0" * 64, silent)


@pytest.mark.parametrize("packer", ["xz", "gzip", "bzip2", "zip"])
def test_a_download_that_was_cut_off_is_said(tmp_path: Path, packer: str) -> None:
    source = tmp_path / "image"
    PACKERS[packer](source)
    source.write_bytes(source.read_bytes()[:-40])
    with pytest.raises(BadInput, match="cannot be unpacked"):
        unpacking.unpack(source, tmp_path / "out", None, silent)


def test_what_is_no_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(content: bytes | None) -> str:
        (tmp_path / "out").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "image").write_bytes(content)
        with pytest.raises(JoulemarkError) as refused:
            unpacking.unpack(tmp_path / "image", tmp_path / "out", None, silent)
        return str(refused.value)

    assert "zstd -d" in refusal(b"\x28\xb5\x2f\xfd" + bytes(100))
    assert "no disk has that size" in refusal(b"x" * 513)
    assert "no disk has that size" in refusal(b"")
    zipped(CONTENT, tmp_path / "image", "a.img", "b.img")
    assert "holds 2 images" in refusal(None)
    monkeypatch.setattr(unpacking, "_MOST_BYTES", 1 << 20)
    assert "larger than" in refusal(gzip.compress(CONTENT))
    monkeypatch.undo()
    monkeypatch.setattr(unpacking.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # pyright: ignore
    with pytest.raises(NoSpace):
        (tmp_path / "out").unlink()
        (tmp_path / "image").write_bytes(CONTENT)
        unpacking.unpack(tmp_path / "image", tmp_path / "out", None, silent)
    with pytest.raises(NotFound):
        unpacking.unpack(tmp_path / "none", tmp_path / "out2", None, silent)
