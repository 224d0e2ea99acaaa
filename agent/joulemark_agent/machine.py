"""What this machine is: processor, cores that may be used, memory, system, governor, boot, and whether its clock is
right.

Owns: where each fact is read from. Not aware of profiles, sensors or runs. A fact that cannot be read is None or
Absent, except cores and memory, without which nothing can be planned. Truth: Documentation/filesystems/proc.rst,
Documentation/admin-guide/ cgroup-v2.rst, os-release(5), adjtimex(2); ARM part numbers as in util-linux's lscpu-arm.c.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from joulemark.errors import NotFound
from joulemark.wire import Absent
from joulemark_agent.sysfs import Roots, Unreadable, entries, read_number, read_text, text_or_none

_ARM_PARTS = {
    ("0x41", "0xb76"): "ARM1176", ("0x41", "0xc07"): "Cortex-A7", ("0x41", "0xc08"): "Cortex-A8",
    ("0x41", "0xc09"): "Cortex-A9", ("0x41", "0xc0d"): "Cortex-A17", ("0x41", "0xc0e"): "Cortex-A17",
    ("0x41", "0xc0f"): "Cortex-A15", ("0x41", "0xd03"): "Cortex-A53", ("0x41", "0xd04"): "Cortex-A35",
    ("0x41", "0xd05"): "Cortex-A55", ("0x41", "0xd07"): "Cortex-A57", ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd09"): "Cortex-A73", ("0x41", "0xd0a"): "Cortex-A75", ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1", ("0x41", "0xd0d"): "Cortex-A77", ("0x41", "0xd0e"): "Cortex-A76AE",
    ("0x41", "0xd40"): "Neoverse-V1", ("0x41", "0xd41"): "Cortex-A78", ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd44"): "Cortex-X1", ("0x41", "0xd46"): "Cortex-A510", ("0x41", "0xd47"): "Cortex-A710",
    ("0x41", "0xd48"): "Cortex-X2", ("0x41", "0xd49"): "Neoverse-N2", ("0x41", "0xd4b"): "Cortex-A78C",
    ("0x41", "0xd4d"): "Cortex-A715", ("0x41", "0xd4e"): "Cortex-X3", ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x41", "0xd80"): "Cortex-A520", ("0x41", "0xd81"): "Cortex-A720", ("0x41", "0xd82"): "Cortex-X4",
    ("0x4e", "0x000"): "NVIDIA Denver", ("0x4e", "0x003"): "NVIDIA Denver 2", ("0x4e", "0x004"): "NVIDIA Carmel",
}  # fmt: skip
_JUNK_PRODUCTS = ("", "to be filled by o.e.m.", "system product name", "default string", "not specified", "none")
_TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronised."""


def cpu_model(roots: Roots) -> str:
    """The processor's name; of ARM the cores by kind, most numerous first; the architecture when nothing more is
    said."""
    fields = [line.partition(":") for line in (text_or_none(roots.proc / "cpuinfo") or "").splitlines()]
    pairs = [(name.strip(), value.strip()) for name, _, value in fields]
    for wanted in ("model name", "cpu model", "uarch"):
        for name, value in pairs:
            # 32-bit ARM kernels put the architecture's revision there, which names no processor
            if name == wanted and value and not value.startswith("ARMv"):
                return value[:200]
    kinds = Counter(_arm_cores(pairs))
    return " + ".join(f"{count} × {kind}" for kind, count in kinds.most_common())[:200] or roots.arch


def _arm_cores(pairs: list[tuple[str, str]]) -> list[str]:
    cores: list[str] = []
    implementer = ""
    for name, value in pairs:
        if name == "CPU implementer":
            implementer = value.lower()
        elif name == "CPU part":
            unknown = f"implementer {implementer or 'unknown'} part {value.lower()}"
            cores.append(_ARM_PARTS.get((implementer, value.lower()), unknown))
    return cores


def model_name(roots: Roots) -> str | None:
    """The board's name from the device tree, or maker and product from the firmware; None when neither says
    anything."""
    if tree := text_or_none(roots.proc / "device-tree" / "model"):
        return tree[:200]
    product = dmi_product(roots)
    if product is None:
        return None
    vendor = text_or_none(roots.sys / "class" / "dmi" / "id" / "sys_vendor") or ""
    return (product if vendor.lower() in _JUNK_PRODUCTS else f"{vendor} {product}")[:200]


def dmi_product(roots: Roots) -> str | None:
    """The product name that PC firmware gives, None where it is a filler."""
    product = text_or_none(roots.sys / "class" / "dmi" / "id" / "product_name") or ""
    return None if product.lower() in _JUNK_PRODUCTS else product


def dt_compatible(roots: Roots) -> tuple[str, ...]:
    """The device tree's names for the board, the most exact first; empty on machines without one."""
    text = text_or_none(roots.proc / "device-tree" / "compatible") or ""
    return tuple(name for name in text.split("\0") if name)


def online_cpus(roots: Roots) -> tuple[int, ...]:
    """The processors that run: nvpmodel switches some off. Empty when the kernel does not say."""
    return parse_cpu_list(text_or_none(roots.sys / "devices" / "system" / "cpu" / "online") or "")


def usable_cpus(roots: Roots) -> tuple[int, ...]:
    """The processors that this process may run on and that run. Raises NotFound when the kernel does not say.

    An affinity outlasts that processors are switched off: the kernel lists them on.
    """
    for line in (text_or_none(roots.proc / "self" / "status") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "Cpus_allowed_list":
            allowed, online = parse_cpu_list(value), online_cpus(roots)
            return tuple(cpu for cpu in allowed if not online or cpu in online)
    raise NotFound(f"{roots.proc / 'self' / 'status'} does not list the usable processors", "mount /proc")


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The numbers in a kernel list such as `0-3,8`; parts that are no numbers of processors are left out."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.strip().partition("-")
        if _is_cpu(first) and _is_cpu(last or first):
            found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def _is_cpu(text: str) -> bool:
    return text.isdecimal() and len(text) <= 5  # Linux knows 8192 at most


def usable_cores(roots: Roots) -> int:
    """Processors that may be used at full speed: `usable_cpus`, cut to the whole cores of a cgroup's quota, at least 1."""
    cores = len(usable_cpus(roots))
    quota = cpu_quota(roots)
    return max(1, cores if quota is None else min(cores, int(quota)))


def cpu_quota(roots: Roots) -> float | None:
    """The smallest processor quota, in cores, of the process's cgroup and those above; None without a limit."""
    quotas: list[float] = []
    for folder in _cgroup_folders(roots, ""):
        words = (text_or_none(folder / "cpu.max") or "").split()
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    for folder in _cgroup_folders(roots, "cpu"):
        quota, period = read_number(folder / "cpu.cfs_quota_us"), read_number(folder / "cpu.cfs_period_us")
        if not isinstance(quota, Unreadable) and not isinstance(period, Unreadable) and quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def memory_limit_bytes(roots: Roots) -> int | None:
    """The smallest memory limit of the process's cgroup and those above, when it is below the machine's memory."""
    total = memory_bytes(roots)
    files = [folder / "memory.max" for folder in _cgroup_folders(roots, "")]
    files += [folder / "memory.limit_in_bytes" for folder in _cgroup_folders(roots, "memory")]
    limits = [limit for file in files if not isinstance(limit := read_number(file), Unreadable)]
    return min((int(limit) for limit in limits if 0 < limit < total), default=None)


def available_bytes(roots: Roots) -> int | None:
    """What this process may take: what the machine has available, and no more than a cgroup's limit. None when the kernel does not say."""
    available = memory_field_bytes(roots, "MemAvailable")
    if available is None:
        return None
    return min(available, memory_limit_bytes(roots) or available)


def _cgroup_folders(roots: Roots, controller: str) -> list[Path]:
    """The process's folder and those above it in the hierarchy of `controller` ("" is version 2)."""
    base = roots.sys / "fs" / "cgroup"
    for line in (text_or_none(roots.proc / "self" / "cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(",") and (controller or not controllers):
            top = base / controllers if controller else base
            inner = [part for part in path.split("/") if part and part != ".."]
            return [top.joinpath(*inner[:depth]) for depth in range(len(inner), -1, -1)]
    return []


def memory_field_bytes(roots: Roots, field: str) -> int | None:
    """A line of /proc/meminfo in bytes, None when it is not there."""
    for line in (text_or_none(roots.proc / "meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if name == field and words and words[0].isdecimal():
            return int(words[0]) * 1024
    return None


def memory_bytes(roots: Roots) -> int:
    """The machine's memory. Raises NotFound when the kernel does not say."""
    total = memory_field_bytes(roots, "MemTotal")
    if total is None:
        raise NotFound(f"{roots.proc / 'meminfo'} does not give MemTotal", "mount /proc")
    return total


def kernel(roots: Roots) -> str:
    """The kernel's release, "unknown" when /proc does not give it."""
    return (text_or_none(roots.proc / "sys" / "kernel" / "osrelease") or "unknown")[:200]


def operating_system(roots: Roots) -> str:
    """PRETTY_NAME of os-release, "unknown" without one."""
    for line in (text_or_none(roots.etc / "os-release") or "").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "PRETTY_NAME":
            return value.strip().strip("\"'")[:200] or "unknown"
    return "unknown"


def governor(roots: Roots) -> str | None:
    """The frequency governors in use, None where the kernel does not scale frequencies."""
    folder = roots.sys / "devices" / "system" / "cpu" / "cpufreq"
    policies = [policy for policy in entries(folder) if policy.name.startswith("policy")]
    found = {name for policy in policies if (name := text_or_none(policy / "scaling_governor"))}
    return ", ".join(sorted(found))[:200] or None


def boot_id(roots: Roots) -> str | Absent:
    """The kernel's random name of this boot: monotonic times may only be compared within one."""
    text = read_text(roots.proc / "sys" / "kernel" / "random" / "boot_id")
    return Absent(reason=str(text)) if isinstance(text, Unreadable) else text


def kernel_clock_state() -> int:
    """What adjtimex(2) returns when it changes nothing: 0 to 4 synchronised, 5 not. Raises OSError when it is
    refused."""
    library = ctypes.CDLL(None, use_errno=True)
    # struct timex is 208 bytes on 64-bit and less on 32-bit systems; all zeros asks only
    state = library.adjtimex(ctypes.create_string_buffer(512))
    if state < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(state)


def clock_synchronised(roots: Roots, clock_state: Callable[[], int] = kernel_clock_state) -> bool | Absent:
    """Whether the wall clock follows a time source: systemd-timesyncd's mark, else what the kernel's clock says."""
    if (roots.run / "systemd" / "timesync" / "synchronized").exists():
        return True
    try:
        return clock_state() != _TIME_ERROR
    except (OSError, AttributeError) as error:
        return Absent(reason=f"the kernel does not say whether the clock is synchronised: {error}")
