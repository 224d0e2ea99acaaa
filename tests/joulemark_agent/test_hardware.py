"""What tells boards apart must not travel on a copied card, must not change with a USB stick, and must not tell a serial number."""

from __future__ import annotations

from pathlib import Path

from joulemark_agent import hardware
from joulemark_agent.sysfs import Roots

KEY = "ab" * 32


def roots(folder: Path) -> Roots:
    return Roots(sys=folder / "sys", proc=folder / "proc", etc=folder / "etc", run=folder / "run")


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def port(folder: Path, name: str, address: str, bus: str, assigned: str = "0") -> None:
    device = folder / "sys" / "devices" / bus / name
    device.mkdir(parents=True)
    put(folder / "sys" / "class" / "net" / name / "address", address + "\n")
    put(folder / "sys" / "class" / "net" / name / "addr_assign_type", assigned + "\n")
    (folder / "sys" / "class" / "net" / name / "device").symlink_to(device)


def test_a_boards_serial_number_counts_first(tmp_path: Path):
    put(tmp_path / "proc" / "device-tree" / "serial-number", "10000000abcdef01\0")
    port(tmp_path, "eth0", "dc:a6:32:00:00:01", "platform")
    found = hardware.digest(roots(tmp_path), KEY)
    assert found is not None and "abcdef" not in found
    put(tmp_path / "sys" / "class" / "net" / "eth0" / "address", "dc:a6:32:00:00:99\n")
    assert hardware.digest(roots(tmp_path), KEY) == found
    put(tmp_path / "proc" / "device-tree" / "serial-number", "10000000abcdef02\0")
    assert hardware.digest(roots(tmp_path), KEY) != found
    assert hardware.digest(roots(tmp_path), "cd" * 32) != hardware.digest(roots(tmp_path), KEY)


def test_built_in_ports_count_and_usb_sticks_and_random_addresses_do_not(tmp_path: Path):
    port(tmp_path, "eth0", "dc:a6:32:00:00:01", "pci0000:00")
    found = hardware.digest(roots(tmp_path), KEY)
    port(tmp_path, "wlan1", "00:11:22:33:44:55", "pci0000:00/usb1/1-2")
    port(tmp_path, "veth", "9a:00:00:00:00:01", "pci0000:01", assigned="1")
    put(tmp_path / "sys" / "class" / "net" / "lo" / "address", "00:00:00:00:00:00\n")
    assert found is not None and hardware.digest(roots(tmp_path), KEY) == found
    port(tmp_path, "eth1", "dc:a6:32:00:00:02", "pci0000:00")
    assert hardware.digest(roots(tmp_path), KEY) != found


def test_what_says_nothing_counts_as_nothing(tmp_path: Path):
    put(tmp_path / "etc" / "machine-id", "0123456789abcdef\n")
    put(tmp_path / "sys" / "class" / "dmi" / "id" / "product_uuid", "To be filled by O.E.M.\n")
    assert hardware.digest(roots(tmp_path), KEY) is None
    put(tmp_path / "sys" / "class" / "dmi" / "id" / "product_uuid", "4c4c4544-0001\n")
    assert hardware.digest(roots(tmp_path), KEY) is not None
