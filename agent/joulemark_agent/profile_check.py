"""Whether a device profile fits a board, and a first profile for a board that has none.

Owns: what is compared and what can be read off a machine. Decides nothing for its owner: which rail is the whole board is asked for, not
guessed. Not aware of runs. Values in SI units; `roots` may be a recorded tree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from joulemark import plugins
from joulemark.errors import BadInput, NotFound
from joulemark.wire import Channel
from joulemark_agent import machine, tuning
from joulemark_agent.findings import Finding
from joulemark_agent.profiles import DeviceProfile, specificity
from joulemark_agent.sampling import open_sensors
from joulemark_agent.sensors import NotPresent, Options, Sensor
from joulemark_agent.sysfs import Roots, Unreadable, entries, read_number, text_or_none

_KERNEL_SHARE = 0.7
"""Of the memory that is sold the kernel shows at least so much: firmware and graphics take the rest (Pi Zero 2 W: 81 %, with the
camera's share less)."""
_NEED_SETTINGS = ("ina2xx", "jetson_stats", "replay", "wall_http", "wall_scpi")
_TRIPS = ("passive", "hot")


def check(profile: DeviceProfile, roots: Roots) -> list[Finding]:
    """What of the profile holds on this board, in a fixed order. A finding with status "problem" makes the profile unusable here."""
    return [_match(profile, roots), *_memory(profile, roots), *_modes(profile, roots), *_sensors(profile, roots)]


def _match(profile: DeviceProfile, roots: Roots) -> Finding:
    name = machine.model_name(roots) or "this machine"
    if specificity(profile.match, roots) is not None:
        return Finding("match", "ok", f"{name} fits the rules of {profile.id}")
    known = ", ".join(machine.dt_compatible(roots)) or machine.dmi_product(roots) or roots.arch
    return Finding("match", "problem", f"{name} does not fit: it calls itself {known}", "correct [match]")


def _memory(profile: DeviceProfile, roots: Roots) -> Iterator[Finding]:
    try:
        total = machine.memory_bytes(roots)
    except NotFound as error:
        yield Finding("memory", "unknown", error.message, error.hint)
        return
    shown = f"{total / 2**30:.2f} GiB"
    if not profile.memory_bytes:
        yield Finding("memory", "ok", f"{shown}; the profile names no size")
    elif any(_KERNEL_SHARE * size <= total <= size for size in profile.memory_bytes):
        yield Finding("memory", "ok", shown)
    else:
        sizes = ", ".join(f"{size / 2**30:g}" for size in profile.memory_bytes)
        yield Finding("memory", "warning", f"{shown}; the profile knows {sizes} GiB", "add the size to memory_bytes")


def _modes(profile: DeviceProfile, roots: Roots) -> Iterator[Finding]:
    modes = tuning.power_modes(roots)
    if not modes:
        return
    new = [name for name in modes.values() if name not in profile.power_modes]
    text = f"now {tuning.power_mode(roots)}; nvpmodel knows {', '.join(modes.values())}"
    if new and profile.power_modes:
        yield Finding(
            "power modes", "warning", f"{text}; not in the profile: {', '.join(new)}", "add them to power_modes"
        )
    else:
        yield Finding("power modes", "ok", text)


def _sensors(profile: DeviceProfile, roots: Roots) -> Iterator[Finding]:
    try:
        sensors, absent = open_sensors(profile, roots, None)
    except BadInput as error:
        yield Finding("sensors", "problem", error.message, error.hint)
        return
    channels = [channel for sensor in sensors for channel in sensor.channels]
    for sensor in sensors:
        sensor.close()
    for name, reason in absent.items():
        yield Finding(f"sensor {name}", "unknown", reason.reason)
    yield Finding(
        "channels", "ok" if channels else "warning", _listed(channels), "" if channels else "correct [[sensors]]"
    )
    yield _total(channels)


def _listed(channels: list[Channel]) -> str:
    return ", ".join(channel.name for channel in channels) or "none"


def _total(channels: list[Channel]) -> Finding:
    totals = [channel for channel in channels if channel.total]
    parts = [channel.name for channel in channels if channel.quantity in ("power", "energy") and not channel.total]
    if totals:
        words = " + ".join(f"{channel.name} ({channel.meaning})" for channel in totals)
        return Finding("energy", "ok", f"the board's joules are {words}")
    if parts:
        fix = "look up which of them is the board's input, and name it in the sensor's total"
        return Finding("energy", "warning", f"no channel is the whole board; parts: {', '.join(parts)}", fix)
    return Finding("energy", "warning", "the board has no meter", "attach one: wall_http, wall_scpi, ina2xx")


# --- a first profile --------------------------------------------------------------------------------------------------
def draft(name: str, roots: Roots) -> str:
    """A TOML profile of this board with all that can be read off it; what its owner must say stands in comments."""
    title = machine.model_name(roots) or f"{roots.arch} board"
    lines = [
        f"# {title}. Written by `joulemark profile new` from what this board says of itself.",
        "# device_profiles/generic.toml explains the format; `joulemark profile check` tries it.",
        f"id = {json.dumps(name)}",
        f"title = {json.dumps(title, ensure_ascii=False)}",
        'backends = ["llamacpp", "xllamacpp", "onnx"]',
        "idle_s = 5.0",
        *_memory_lines(roots),
        *_mode_lines(roots),
        "",
        "[match]",
        *_match_lines(roots),
        *_sensor_lines(roots),
        *_limit_lines(roots),
    ]
    return "\n".join(lines) + "\n"


def _memory_lines(roots: Roots) -> Iterator[str]:
    total, size = machine.memory_bytes(roots), 2**28
    while size < total:
        size *= 2
    yield f"memory_bytes = [{size:_}]"


def _mode_lines(roots: Roots) -> Iterator[str]:
    if modes := tuning.power_modes(roots):
        yield f"power_modes = {json.dumps(list(modes.values()))}"


def _match_lines(roots: Roots) -> Iterator[str]:
    yield f"arch = {json.dumps([roots.arch])}"
    if names := machine.dt_compatible(roots):
        yield f"# all of its names: {', '.join(names)[:400]}"
        yield f"dt_compatible = {json.dumps([names[0]])}"
    elif product := machine.dmi_product(roots):
        yield f"dmi_product = {json.dumps([product], ensure_ascii=False)}"


def _sensor_lines(roots: Roots) -> Iterator[str]:
    for name in plugins.names("joulemark_agent.sensors"):
        if name in _NEED_SETTINGS:
            continue
        try:
            sensor: Sensor = plugins.load("joulemark_agent.sensors", name).probe(roots, Options())
        except NotPresent:
            continue
        yield from ("", "[[sensors]]", f"use = {json.dumps(name)}", *_advice(name, sensor.channels))
        sensor.close()


def _advice(name: str, channels: tuple[Channel, ...]) -> Iterator[str]:
    """What only the owner knows about a sensor."""
    meters = [channel for channel in channels if channel.quantity in ("power", "energy")]
    if meters and not any(channel.total for channel in meters):
        labels = [channel.name.partition(".")[2] for channel in meters]
        yield f"# it measures {', '.join(labels)[:400]}: which of them, or which sum, is the whole board?"
        yield "# options = { total = [] }"


def _limit_lines(roots: Roots) -> Iterator[str]:
    """The lowest temperature at which the kernel begins to slow the board down, where it says so."""
    trips: list[float] = []
    for zone in entries(roots.sys / "class" / "thermal"):
        for path in entries(zone):
            if path.name.startswith("trip_point_") and path.name.endswith("_type") and text_or_none(path) in _TRIPS:
                value = read_number(Path(str(path).removesuffix("type") + "temp"))
                if not isinstance(value, Unreadable) and 40_000 <= value <= 130_000:
                    trips.append(value / 1000)
    if trips:
        yield from ("", "[limits]", f"temperature_c = {min(trips):.1f}")
