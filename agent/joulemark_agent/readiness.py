"""Whether the board is in a state to begin a run: cool enough, and with enough voltage.

Owns: the two questions and the waiting. Not aware of runs: whoever waits says how long, and when to give up early. A board that stays too
warm begins all the same when its time is over: the temperature is in the trace, and the verdict judges it there.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from joulemark import plugins
from joulemark.wire import Problem
from joulemark_agent.profiles import DeviceProfile
from joulemark_agent.sensors import NotPresent, Options, Sensor
from joulemark_agent.sysfs import Roots, Unreadable

LOOK_S = 2.0
_SENSORS = "joulemark_agent.sensors"
_LOW_VOLTAGE_NOW = 1


def low_voltage(profile: DeviceProfile, roots: Roots) -> Problem | None:
    """Why a run should not begin: the firmware says that the supply's voltage is too low now. None: it is not, or nobody says."""
    if "pi_throttling" not in [use.use for use in profile.sensors]:
        return None
    bits = plugins.load(_SENSORS, "pi_throttling").flags_now(roots)
    if isinstance(bits, Unreadable) or not bits & _LOW_VOLTAGE_NOW:
        return None
    return Problem(
        code="low_voltage",
        message="the supply's voltage is too low now (vcgencmd get_throttled, bit 0): every figure would be that of a slowed board",
        hint="use the maker's supply and a short cable; to run all the same: --anyway (INVALID while it stays low)",
    )


def hottest(profile: DeviceProfile, roots: Roots) -> float | None:
    """The temperature (°C) of the hottest zone that the profile counts, None where there is none."""
    use = next((use for use in profile.sensors if use.use == "thermal"), None)
    if use is None:
        return None
    try:
        sensor: Sensor = plugins.load(_SENSORS, use.use).probe(roots, Options(settings=use.options))
    except NotPresent:
        return None
    values = [value for value in sensor.read() if value is not None]
    sensor.close()
    return max(values, default=None)


def wait_until_cool(
    profile: DeviceProfile,
    roots: Roots,
    patience_s: float,
    go_on: Callable[[], bool],
    tell: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float | None:
    """Wait until every zone is below the profile's start temperature. Returns the hottest zone's last temperature, None without either.

    Ends early when `go_on` says no. `tell` is called with words whenever it looks and has to wait.
    """
    limit_c = profile.limits.start_temperature_c
    if limit_c is None:
        return None
    deadline_s = clock() + patience_s
    while True:
        now_c = hottest(profile, roots)
        remaining_s = deadline_s - clock()
        if now_c is None or now_c < limit_c or remaining_s <= 0 or not go_on():
            return now_c
        tell(f"cooling down: {now_c:.1f} °C, it begins below {limit_c:g} °C or in {remaining_s:.0f} s")
        sleep(min(LOOK_S, remaining_s))
