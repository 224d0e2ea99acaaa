"""Which disks are refused, and what a disk gives back. Real block devices (loop) where root runs this; else files and a made-up /sys."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from joulemark.errors import BadInput, Conflict, JoulemarkError, NotFound, ToolFailed
from joulemark_deploy import disks
from tests.fixtures import card_images
from tests.fixtures.needed_programs import require_root_and

SIZE = 12 << 20


def silent(*_: object) -> None:
    """Progress that nobody looks at."""


class Machine:
    """A made-up /sys and /proc with one disk at 8:16, on USB, with two partitions."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sysfs, self.proc = root / "sys", root / "proc"
        self.block = self.sysfs / "devices/pci0000:00/usb2/2-1/block/sdb"
        for part, dev in ((self.block, "8:16"), (self.block / "sdb1", "8:17"), (self.block / "sdb2", "8:18")):
            part.mkdir(parents=True)
            (part / "dev").write_text(f"{dev}\n")
            (part / "holders").mkdir()
            (part / "size").write_text(f"{SIZE // 512}\n")
        for part in ("sdb1", "sdb2"):
            (self.block / part / "partition").write_text(f"{part[-1]}\n")
        self.say("removable", "0")
        self.say("ro", "0")
        self.say("device/model", "Card Reader")
        names = self.sysfs / "dev/block"
        names.mkdir(parents=True)
        (names / "8:16").symlink_to(self.block)
        (names / "8:17").symlink_to(self.block / "sdb1")
        (self.proc / "self").mkdir(parents=True)
        self.mounted("254:0", "/")
        (self.proc / "swaps").write_text("Filename\tType\tSize\tUsed\tPriority\n/dev/vda3 partition 100 0 -2\n")
        numbers = {"sdb": "8:16", "sdb1": "8:17", "none": "9:9"}

        def number(device: Path) -> str:
            return numbers[device.name]

        monkeypatch.setattr(disks, "_number", number)

    def say(self, name: str, value: str) -> None:
        (self.block / name).parent.mkdir(exist_ok=True)
        (self.block / name).write_text(f"{value}\n")

    def mounted(self, number: str, place: str) -> None:
        with (self.proc / "self/mountinfo").open("a") as file:
            file.write(f"29 1 {number} / {place} rw,relatime shared:1 - ext4 /dev/x rw\n")

    def move(self, place: str) -> None:
        """The same disk somewhere else in the machine."""
        new = self.sysfs / place
        new.parent.mkdir(parents=True)
        self.block.rename(new)
        (self.sysfs / "dev/block/8:16").unlink()
        (self.sysfs / "dev/block/8:16").symlink_to(new)
        self.block = new

    def choose(self, name: str = "sdb") -> disks.Disk:
        return disks.choose(Path("/dev") / name, self.sysfs, self.proc)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_a_card_on_usb_is_taken(machine: Machine) -> None:
    found = machine.choose()
    assert (found.size_bytes, found.model) == (SIZE, "Card Reader")
    assert "Card Reader" in str(found)


@pytest.mark.parametrize(
    ("place", "words"),
    [("/", "own disk"), ("/boot/firmware", "own disk"), ("/media/anna/my\\040card", "mounted at /media/anna/my card")],
)
@pytest.mark.parametrize("number", ["8:16", "8:18"])
def test_what_is_mounted_is_refused(machine: Machine, number: str, place: str, words: str) -> None:
    machine.mounted(number, place)
    with pytest.raises(Conflict, match=words):
        machine.choose()


def test_what_is_used_otherwise_is_refused(machine: Machine) -> None:
    with pytest.raises(BadInput, match="partition") as refused:
        machine.choose("sdb1")
    assert "/dev/sdb" in refused.value.hint
    (machine.block / "sdb2/holders/dm-0").mkdir()
    with pytest.raises(Conflict, match="part of dm-0"):
        machine.choose()
    (machine.block / "sdb2/holders/dm-0").rmdir()
    with (machine.proc / "swaps").open("a") as file:
        file.write("/dev/sdb2 partition 100 0 -3\n")
    with pytest.raises(Conflict, match="swap"):
        machine.choose()


def test_what_is_built_in_locked_or_empty_is_refused(machine: Machine) -> None:
    machine.say("ro", "1")
    with pytest.raises(BadInput, match="write-protected"):
        machine.choose()
    machine.say("ro", "0")
    machine.say("size", "0")
    with pytest.raises(NotFound, match="no card"):
        machine.choose()
    machine.say("size", f"{SIZE // 512}")
    machine.move("devices/pci0000:00/ata1/block/sdb")
    with pytest.raises(BadInput, match="built-in disk"):
        machine.choose()
    machine.say("device/type", "MMC")  # what is soldered on
    with pytest.raises(BadInput, match="built-in disk"):
        machine.choose()
    machine.say("device/type", "SD")
    assert machine.choose().size_bytes == SIZE
    machine.say("device/type", "")
    machine.say("removable", "1")
    assert machine.choose().size_bytes == SIZE
    with pytest.raises(NotFound, match="kernel says nothing"):
        machine.choose("none")


def test_what_is_no_block_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="no disk"):
        disks.choose(tmp_path / "file")
    with pytest.raises(NotFound):
        disks.choose(tmp_path / "none")


# --- writing ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "card.img"
    path.write_bytes(b"partition table".ljust(512, b"\1") + os.urandom(9 << 20))
    return path


def file_disk(tmp_path: Path, size: int = SIZE) -> disks.Disk:
    """A file in place of a disk, full of what was there before."""
    path = tmp_path / "disk"
    path.write_bytes(b"\xaa" * size)
    return disks.Disk(path, "a file", size)


def test_what_was_written_is_read_back(tmp_path: Path, image: Path) -> None:
    disk = file_disk(tmp_path)
    told: list[tuple[int, int]] = []
    disks.write(disk, image, lambda done, total: told.append((done, total)))
    content = image.read_bytes()
    assert disk.device.read_bytes() == content + b"\xaa" * (SIZE - len(content))
    assert told[-1] == (len(content), len(content))
    told.clear()
    disks.read_back(disk, image, lambda done, total: told.append((done, total)))
    assert told[-1] == (len(content), len(content))


@pytest.mark.parametrize("place", [0, 5_000_000, -1])
def test_one_wrong_byte_is_found(tmp_path: Path, image: Path, place: int) -> None:
    disk = file_disk(tmp_path)
    disks.write(disk, image, silent)
    at = place % image.stat().st_size
    with disk.device.open("r+b") as file:
        file.seek(at)
        wrong = bytes([file.read(1)[0] ^ 1])
        file.seek(at)
        file.write(wrong)
    with pytest.raises(ToolFailed, match="does not give back") as found:
        disks.read_back(disk, image, silent)
    assert f"MiB at {at // disks.PIECE_BYTES * disks.PIECE_BYTES >> 20}" in found.value.message


def test_a_card_that_ends_early_is_found(tmp_path: Path, image: Path) -> None:
    disk = file_disk(tmp_path)
    disks.write(disk, image, silent)
    os.truncate(disk.device, 5 << 20)
    with pytest.raises(ToolFailed, match="does not give back"):
        disks.read_back(disk, image, silent)


def test_a_card_that_was_pulled_out_does_not_start(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = file_disk(tmp_path)
    write = os.pwrite

    def until_it_is_gone(descriptor: int, piece: bytes, at: int) -> int:
        if at >= disks.PIECE_BYTES:
            raise OSError(5, "Input/output error")
        return write(descriptor, piece, at)

    monkeypatch.setattr(disks.os, "pwrite", until_it_is_gone)
    with pytest.raises(ToolFailed, match="could not be written") as failed:
        disks.write(disk, image, silent)
    assert "does not start" in failed.value.hint
    assert not any(disk.device.read_bytes()[: disks.PIECE_BYTES])
    monkeypatch.undo()

    def gone(*_: object) -> bytes:
        raise OSError(6, "No such device or address")

    monkeypatch.setattr(disks.os, "pread", gone)
    with pytest.raises(ToolFailed, match="could not be read back"):
        disks.read_back(disk, image, silent)


def test_an_image_larger_than_the_card_changes_nothing(tmp_path: Path, image: Path) -> None:
    disk = file_disk(tmp_path, 1 << 20)
    with pytest.raises(BadInput, match="larger"):
        disks.write(disk, image, silent)
    assert set(disk.device.read_bytes()) == {0xAA}


def test_a_disk_that_is_gone_or_not_ours_is_said(tmp_path: Path, image: Path) -> None:
    with pytest.raises(JoulemarkError, match="cannot be opened"):
        disks.write(disks.Disk(tmp_path / "gone", "", SIZE), image, silent)


# --- a real block device ----------------------------------------------------------------------------------------------
def test_a_real_block_device(tmp_path: Path, image: Path) -> None:
    require_root_and({"losetup": "util-linux", "mkfs.ext4": "e2fsprogs"}, "no loop device here")
    with card_images.loop_device(tmp_path / "backing", SIZE) as device:
        disk = disks.choose(device)
        assert disk.size_bytes == SIZE
        disks.write(disk, image, silent)
        disks.read_back(disk, image, silent)
        with device.open("r+b") as file:
            file.seek(6 << 20)
            file.write(b"\0" * 4096)
        with pytest.raises(ToolFailed, match="MiB at 4"):
            disks.read_back(disk, image, silent)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(device)], check=True)
        place = tmp_path / "mounted"
        place.mkdir()
        subprocess.run(["mount", str(device), str(place)], check=True)
        try:
            with pytest.raises(Conflict, match=f"mounted at {place}"):
                disks.choose(device)
            # Even when it is mounted between the look and the writing.
            with pytest.raises(Conflict, match="cannot be opened"):
                disks.write(disk, image, silent)
        finally:
            subprocess.run(["umount", str(place)], check=True)
    with card_images.loop_device(tmp_path / "backing", 4 << 20) as device, pytest.raises(BadInput, match="larger"):
        disks.write(disks.choose(device), image, silent)


def test_this_machine_s_own_disk_is_refused() -> None:
    own = subprocess.run(
        ["findmnt", "-n", "-o", "SOURCE", "/"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if not Path(own).is_block_device():
        pytest.skip("this machine's root is on no disk")
    with pytest.raises((Conflict, BadInput), match=r"own disk|is a partition"):
        disks.choose(Path(own))
