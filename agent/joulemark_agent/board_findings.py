"""What is peculiar to boards: their profile and its meters, the supply, throttling, power mode, swap on the card, a desktop.

Owns: these questions, the judgement on each, and what to do. Not aware of how findings are shown. `roots` may be a recorded tree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from joulemark import plugins
from joulemark.errors import JoulemarkError
from joulemark.wire import Channel
from joulemark_agent import machine, tuning
from joulemark_agent.findings import Finding, in_units
from joulemark_agent.profiles import DeviceProfile, load_profiles, match, own_folder
from joulemark_agent.sensors import NotPresent, Options, Sensor, SensorUse
from joulemark_agent.sysfs import Roots, Unreadable, entries, hwmon_devices, read_number, text_or_none

_SENSORS = "joulemark_agent.sensors"
_FAMILIES = ("arm64", "generic")
_DESKTOPS = frozenset(
    {"Xorg", "Xwayland", "labwc", "wayfire", "lxsession", "gnome-shell", "kwin_wayland", "kwin_x11", "mutter", "weston"}
)
_SUPPLY_FIX = "use the maker's power supply and a short, thick cable; take USB devices off"


def chosen_profile(roots: Roots) -> DeviceProfile | JoulemarkError:
    """The profile that matches, or why there is none."""
    try:
        return match(load_profiles(own=own_folder(roots)), roots)
    except JoulemarkError as error:
        return error


def profile(found: DeviceProfile | JoulemarkError) -> Finding:
    """Which profile this machine gets."""
    if isinstance(found, JoulemarkError):
        return Finding("profile", "problem", found.message, found.hint or "`joulemark profile check` says more")
    text = f"{found.title} ({found.id})"
    if found.id in _FAMILIES:
        fix = "if it has a meter: `joulemark profile new NAME`, and say which channel is the whole board"
        return Finding("profile", "warning", f"{text}: no profile knows this very board", fix)
    return Finding("profile", "ok", text)


# --- meters -----------------------------------------------------------------------------------------------------------
def meters(
    found: DeviceProfile | JoulemarkError, roots: Roots, clock: Callable[[], float], sleep: Callable[[float], None]
) -> Iterator[Finding]:
    """One finding a sensor of the profile, one for each other that is there, and what the joules are."""
    uses = () if isinstance(found, JoulemarkError) else found.sensors
    totals: list[Channel] = []
    for use in uses:
        sensor = _probe(use, roots, clock)
        if isinstance(sensor, Finding):
            yield sensor
            continue
        totals += [channel for channel in sensor.channels if channel.total]
        yield _read(use.use, sensor, sleep)
    named = [use.use for use in uses]
    for name in plugins.names(_SENSORS):
        sensor = None if name in named else _probe(SensorUse(name), roots, clock)
        if sensor is not None and not isinstance(sensor, Finding):
            words = _read(name, sensor, sleep)
            yield Finding(words.area, "ok", f"{words.text} (there, and not in the profile)")
    yield _energy(totals, None if isinstance(found, JoulemarkError) else found.without_meter)


def _probe(use: SensorUse, roots: Roots, clock: Callable[[], float]) -> Sensor | Finding:
    area = f"sensor {use.use}"
    try:
        options = Options(worker_pid=os.getpid(), clock=clock, settings=use.options)
        sensor: Sensor = plugins.load(_SENSORS, use.use).probe(roots, options)
    except NotPresent as reason:
        return Finding(area, "warning" if reason.hint else "unknown", reason.message, reason.hint)
    except OSError as error:
        return Finding(area, "unknown", f"it could not be examined: {error}")
    except JoulemarkError as error:
        return Finding(area, "problem", error.message, error.hint)
    return sensor


def _read(name: str, sensor: Sensor, sleep: Callable[[float], None]) -> Finding:
    """What it gives now; of a slow source what its own thread read within a second."""
    values = sensor.read()
    for _ in range(10):
        if any(value is not None for value in values):
            break
        sleep(0.1)
        values = sensor.read()
    shown = [f"{channel.name}{_shown(channel, value)}" for channel, value in zip(sensor.channels, values, strict=True)]
    notes = sensor.notes()
    sensor.close()
    text = ", ".join(shown) + ("".join(f"; {part}: {reason}" for part, reason in notes.items()))
    return Finding(f"sensor {name}", "ok", text)


def _shown(channel: Channel, value: float | None) -> str:
    if value is None or channel.quantity in ("energy", "share", "count", "flag"):
        return ""
    if channel.quantity == "memory":
        return f" {in_units(int(value))}"
    if channel.quantity == "frequency":
        return f" {value / 1e9:.2f} GHz" if value >= 1e6 else f" {value:.1f} Hz"
    return f" {value:.1f} °C" if channel.quantity == "temperature" else f" {value:.2f} {channel.unit}"


def _energy(totals: Sequence[Channel], why: str | None) -> Finding:
    if not totals:
        return Finding(
            "energy",
            "warning",
            f"no meter for the whole machine: records will have no joules{f' ({why})' if why else ''}",
            "see the sensors above for what could be opened, or attach a meter: wall_http, wall_scpi, ina2xx",
        )
    meanings = ", ".join(f"{channel.name} ({channel.meaning})" for channel in totals)
    return Finding("energy", "ok", f"joules are counted by {meanings}")


# --- supply and throttling --------------------------------------------------------------------------------------------
def supply(roots: Roots) -> Iterator[Finding]:
    """Low voltage and slowing down, now and since the boot; nothing where the machine does not say."""
    yield from _pi_supply(roots)
    events = _overcurrent_events(roots)
    if events is not None and events > 0:
        text = f"{events:.0f} over-current or under-voltage events since the boot: the module slowed itself down"
        yield Finding("supply", "warning", text, "a stronger power supply, or a lower power mode: sudo nvpmodel -m N")
    elif events is not None:
        yield Finding("supply", "ok", "no over-current event since the boot")


def _pi_supply(roots: Roots) -> Iterator[Finding]:
    firmware = plugins.load(_SENSORS, "pi_throttling")
    bits = firmware.flags_now(roots)
    if isinstance(bits, Unreadable):
        return
    if not firmware.has_voltage_detector(roots):
        yield Finding("supply", "unknown", "this Raspberry Pi has no detector of low voltage", _SUPPLY_FIX)
    elif bits & 1:
        yield Finding("supply", "problem", "the supply's voltage is too low now", _SUPPLY_FIX)
    elif bits & 1 << 16:
        yield Finding("supply", "warning", "the supply's voltage was too low since the boot", _SUPPLY_FIX)
    else:
        yield Finding("supply", "ok", "the supply's voltage was never too low since the boot")
    now, before = bits & 0b1110, bits >> 16 & 0b1110
    if now:
        yield Finding(
            "throttling", "problem", "the processor is slowed down now", "cool it: a heat sink, a fan, open the case"
        )
    elif before:
        fix = "cool it better before long runs; a restart clears the history"
        yield Finding("throttling", "warning", "the processor was slowed down since the boot", fix)
    else:
        yield Finding("throttling", "ok", "the processor was never slowed down since the boot")


def _overcurrent_events(roots: Roots) -> float | None:
    counts = [
        count
        for device in hwmon_devices(roots, "soctherm_oc")
        for path in entries(device)
        if path.name.endswith("_event_cnt") and not isinstance(count := read_number(path), Unreadable)
    ]
    return sum(counts) if counts else None


# --- what was set -----------------------------------------------------------------------------------------------------
def power_mode(roots: Roots) -> Iterator[Finding]:
    """The power mode and the clocks' limits; nothing where the machine has neither."""
    mode, clocks = tuning.power_mode(roots), tuning.clock_limits(roots)
    if mode == "not set":
        names = ", ".join(f"{number}: {name}" for number, name in tuning.power_modes(roots).items())
        fix = f"sudo nvpmodel -m N, then restart ({names})"
        yield Finding(
            "power mode", "warning", "none was chosen: what the board starts with differs between systems", fix
        )
    elif mode:
        yield Finding("power mode", "ok", mode)
    if clocks:
        yield Finding("clock limits", "ok", clocks)


def swap_on_card(roots: Roots) -> Iterator[Finding]:
    """Swap in a file or on an SD card of a board, from /proc/swaps."""
    lines = (text_or_none(roots.proc / "swaps") or "").splitlines()[1:]
    places = [line.split()[0] for line in lines if line.split()]
    slow = [place for place in places if "/zram" not in place and ("mmcblk" in place or not place.startswith("/dev/"))]
    if slow and machine.dt_compatible(roots):
        fix = (
            "turn it off: sudo swapoff -a, and on Raspberry Pi OS bookworm sudo systemctl disable --now dphys-swapfile; "
            "a model that does not fit then fails at once"
        )
        text = f"it lies on the card ({', '.join(slow)}): a model that does not fit crawls and wears the card out"
        yield Finding("swap on the card", "warning", text, fix)


def memory_control(roots: Roots) -> Iterator[Finding]:
    """Whether the kernel can limit a service's memory: Raspberry Pi's firmware turns that off."""
    controllers = text_or_none(roots.sys / "fs" / "cgroup" / "cgroup.controllers")
    if controllers is not None and "memory" not in controllers.split():
        fix = "add cgroup_enable=memory to the one line of /boot/firmware/cmdline.txt, and restart"
        text = "the kernel's memory control is off: limits of services and containers have no effect"
        yield Finding("memory control", "warning", text, fix)


def desktop(roots: Roots) -> Iterator[Finding]:
    """A running desktop: it takes memory, wakes up, and draws."""
    running = {
        name
        for folder in entries(roots.proc)
        if folder.name.isdecimal() and (name := text_or_none(folder / "comm")) in _DESKTOPS
    }
    if running:
        fix = "sudo systemctl set-default multi-user.target, and restart; back: graphical.target"
        text = f"a desktop runs here ({', '.join(sorted(running))}): it takes memory and time from the measurement"
        yield Finding("desktop", "warning", text, fix)
