"""A board's kernel files in one text file, to look at a board without having it: record them there, plant them anywhere.

Owns: the format, what is recorded, and planting. Not aware of what a file means. `joulemark profile record` writes such a file;
`joulemark profile check --tree` and the tests read them.

    # a comment
    arch = "aarch64"
    sys/class/thermal/thermal_zone0/temp = "41500\\n"
    bin/vcgencmd get_throttled = "throttled=0x0\\n"

A line is a path below one of the roots and its content as a JSON string. `bin/PROGRAM ARGUMENTS` is what a program printed; planted, it is
a script that prints it again. What a board's user would not want to show is not recorded: serial numbers, network addresses, process names.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from joulemark.errors import BadInput
from joulemark_agent.sysfs import Roots

_MOST_BYTES = 4 * 1024 * 1024
_MOST_FILES = 20_000
_FILE_BYTES = 16_384
_LINE = re.compile(r'^([A-Za-z0-9_./:,@+ -]{1,300}?) = (".*")$', re.ASCII)
_TREES = ("sys", "proc", "etc", "run", "var")
_RECORDED = (
    "sys/bus/i2c/drivers/ina3221*/*/iio:device*/*",
    "sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/*",
    "sys/class/devfreq/*/*",
    "sys/class/dmi/id/product_name",
    "sys/class/dmi/id/sys_vendor",
    "sys/class/hwmon/hwmon*/*",
    "sys/class/powercap/*/*",
    "sys/class/thermal/cooling_device*/*",
    "sys/class/thermal/thermal_zone*/*",
    "sys/devices/system/cpu/online",
    "sys/devices/system/cpu/cpufreq/policy*/*",
    "sys/devices/system/cpu/cpu*/thermal_throttle/*_count",
    "sys/devices/system/cpu/cpu*/topology/core_id",
    "sys/devices/system/cpu/cpu*/topology/physical_package_id",
    "sys/fs/cgroup/cgroup.controllers",
    "proc/cgroups",
    "proc/cmdline",
    "proc/cpuinfo",
    "proc/device-tree/compatible",
    "proc/device-tree/model",
    "proc/loadavg",
    "proc/meminfo",
    "proc/pressure/*",
    "proc/self/cgroup",
    "proc/self/status",
    "proc/stat",
    "proc/swaps",
    "proc/sys/kernel/osrelease",
    "etc/nv_tegra_release",
    "etc/nvpmodel.conf",
    "etc/os-release",
    "var/lib/nvpmodel/status",
)
_PROGRAMS = (("vcgencmd", "get_throttled"), ("vcgencmd", "pmic_read_adc"))
_PRIVATE = re.compile(r"^(Serial|Uid|Gid|Groups|Name|Pid|PPid|TracerPid|NSpid)\b.*\n?", re.MULTILINE)
_ADDRESS = re.compile(r"\b[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}\b", re.ASCII)


def record(roots: Roots, title: str, programs: dict[str, str]) -> str:
    """The text of this machine's tree; `programs` is what `bin/PROGRAM ARGUMENTS` printed. Files that cannot be read become comments."""
    lines = [f"# {line}" for line in title.splitlines()]
    lines.append(f"arch = {json.dumps(roots.arch)}")
    for path, content in _found(roots):
        lines.append(f"# not readable: {path}" if content is None else f"{path} = {json.dumps(content)}")
    lines.extend(f"bin/{command} = {json.dumps(text)}" for command, text in sorted(programs.items()))
    return "\n".join(lines) + "\n"


def program_commands() -> tuple[tuple[str, ...], ...]:
    """The programs whose answers belong into a recording."""
    return _PROGRAMS


def _found(roots: Roots) -> Iterator[tuple[str, str | None]]:
    folders = {"sys": roots.sys, "proc": roots.proc, "etc": roots.etc, "run": roots.run, "var": roots.var}
    for pattern in _RECORDED:
        tree, _, rest = pattern.partition("/")
        for path in sorted(folders[tree].glob(rest)):
            if path.is_file():
                name = f"{tree}/{path.relative_to(folders[tree])}"
                if _LINE.match(f'{name} = ""'):
                    yield name, _content(path)


def _content(path: Path) -> str | None:
    try:
        with path.open("rb", buffering=0) as file:
            text = (file.read(_FILE_BYTES) or b"").decode("utf-8", "replace")
    except OSError:
        return None
    return _ADDRESS.sub("00:00:00:00:00:00", _PRIVATE.sub("", text))


def plant(text: str, folder: Path) -> Roots:
    """Write a recorded tree below `folder`; its roots. Raises BadInput for what is no recording, and writes nothing then."""
    files, arch = _parse(text)
    for name in _TREES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    programs: dict[str, list[tuple[str, str]]] = {}
    for name, content in files.items():
        if name.startswith("bin/"):
            program, _, arguments = name[4:].partition(" ")
            programs.setdefault(program, []).append((arguments, content))
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")
    (folder / "bin").mkdir(exist_ok=True)
    for program, answers in programs.items():
        _write_program(folder / "bin" / program, answers)
    trees = {name: folder / name for name in _TREES}
    return Roots(**trees, bin=folder / "bin", arch=arch)


def _parse(text: str) -> tuple[dict[str, str], str]:
    if len(text) > _MOST_BYTES:
        raise BadInput(f"the recorded tree is larger than {_MOST_BYTES} bytes", "record one board in one file")
    files: dict[str, str] = {}
    arch = "unknown"
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        matched = _LINE.match(line)
        content = _string(matched[2]) if matched else None
        if matched is None or content is None or not _allowed(matched[1]):
            hint = 'a line is PATH = "content"; `joulemark profile record` writes them'
            raise BadInput(f"line {number} of the recorded tree is malformed: {line[:80]!r}", hint)
        if matched[1] == "arch":
            arch = content[:40]
        else:
            files[matched[1]] = content
    if len(files) > _MOST_FILES:
        raise BadInput(f"the recorded tree has more than {_MOST_FILES} files", "record one board in one file")
    return files, arch


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _allowed(path: str) -> bool:
    """Whether the path stays below a root: it becomes a file's name."""
    if path == "arch":
        return True
    parts = path.split(" ", 1)[0].split("/") if path.startswith("bin/") else path.split("/")
    inside = len(parts) > 1 and all(part not in ("", ".", "..") for part in parts)
    return inside and (parts[0] in _TREES or (parts[0] == "bin" and len(parts) == 2))


def _write_program(path: Path, answers: list[tuple[str, str]]) -> None:
    cases = "".join(f"{shlex.quote(arguments)}) printf %s {shlex.quote(text)};;\n" for arguments, text in answers)
    path.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}*) exit 64;;\nesac\n', "utf-8")
    path.chmod(0o755)
