"""Low supply voltage of a Raspberry Pi as the kernel's `rpi_volt` driver sees it, without starting a program.

Owns: throttle.low_voltage, 1 while `in0_lcrit_alarm` is up: the driver asks the firmware every two seconds whether the voltage was too low
since it asked before, so that a drop shows up to two seconds late. Truth: Documentation/hwmon/raspberrypi-hwmon.rst and the driver.
"""

from __future__ import annotations

from joulemark.wire import Channel
from joulemark_agent.sensors import NotPresent, Options, Pace, Sensor, Values
from joulemark_agent.sensors._raspberry_pi import has_voltage_detector
from joulemark_agent.sysfs import KeptFile, Roots, hwmon_devices

_INTERVAL_S = 0.5


class _Undervoltage:
    channels = (
        Channel(name="throttle.low_voltage", quantity="flag", unit="1", source="hwmon rpi_volt: in0_lcrit_alarm"),
    )

    def __init__(self, file: KeptFile, options: Options) -> None:
        self._file = file
        self._pace = Pace(options.clock, _INTERVAL_S)

    def read(self) -> Values:
        return (self._pace.read(self._file.number),)

    def notes(self) -> dict[str, str]:
        why = self._file.explanation()
        return {self.channels[0].name: why} if why else {}

    def close(self) -> None:
        self._file.close()


def probe(roots: Roots, options: Options) -> Sensor:
    """The alarm. Raises NotPresent without the driver, or where nothing looks at the voltage."""
    if not has_voltage_detector(roots):
        raise NotPresent("this Raspberry Pi has no detector of low voltage", "attach a meter to see its supply")
    for device in hwmon_devices(roots, "rpi_volt"):
        if (device / "in0_lcrit_alarm").exists():
            return _Undervoltage(KeptFile(device / "in0_lcrit_alarm"), options)
    raise NotPresent("the kernel has no rpi_volt driver (Raspberry Pi only)")
