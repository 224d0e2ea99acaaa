"""What differs between the models of the Raspberry Pi and what they measure, by the device tree's names.

Truth: raspberrypi/documentation, power supplies: every model since the B+ looks at its supply's voltage, "except the Zero range";
raspberrypi/linux issue 2367: nor do the Compute Modules of that time. A bit of the firmware that is never set says nothing there.
"""

from __future__ import annotations

from joulemark_agent.sysfs import Roots, text_or_none

_WITHOUT_DETECTOR = ("raspberrypi,model-zero", "raspberrypi,3-compute-module")


def _names(roots: Roots) -> list[str]:
    return (text_or_none(roots.proc / "device-tree" / "compatible") or "").split("\0")


def is_raspberry_pi(roots: Roots) -> bool:
    """Whether the firmware, and not the kernel, has the last word on clocks."""
    return any(name.startswith("raspberrypi,") for name in _names(roots))


def has_voltage_detector(roots: Roots) -> bool:
    """Whether "never too low" means that somebody looked."""
    return not any(name.startswith(_WITHOUT_DETECTOR) for name in _names(roots))
