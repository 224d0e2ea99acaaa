"""Pins of the board's header: one that marks the measured phases for an external analyser, a status lamp, a fan.

Owns: opening them through gpiozero, their levels, and what a missing pin means. Not aware of runs: it is told when. Which pins there are
is the profile's word ([pins], BCM numbers); gpiozero belongs to the extra `pi` and works on Raspberry Pi. Off a board it is not imported.

The sync pin idles high. It falls at the beginning of a phase, stays low as long as the phase lasts, and rises at its end: an analyser
(EEMBC's energy runner, a Joulescope, a Keysight N6705) integrates between the edges. The time of the fall is in the record, on the run's
clock; it is taken right after the write, which takes some tens of microseconds on a board. The fan turns at one speed while a run lasts,
and not at all otherwise: a fan that follows the temperature would be part of what is measured. Where the kernel drives the fan
(Raspberry Pi 5) none is named here.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Generator
from typing import Any, Literal

from joulemark.errors import JoulemarkError, MissingExtra

State = Literal["idle", "fetching", "running", "trouble"]
BLINKS: dict[State, tuple[float, float] | None] = {
    "idle": (0.05, 2.95),
    "fetching": (0.5, 0.5),
    "running": None,
    "trouble": (0.1, 0.1),
}
"""Seconds on and off; None: on without a pause, for a run must not be woken by its own lamp."""
LOOK_S = 0.5

log = logging.getLogger(__name__)


class PinNotThere(JoulemarkError, RuntimeError):
    """A pin that the profile names cannot be used."""

    code = "pin_not_there"


def _device(kind: str, gpio: int, **options: Any) -> Any:
    """One of gpiozero's devices. Raises MissingExtra without gpiozero, PinNotThere where there is no such pin or somebody else has it."""
    try:
        import gpiozero
    except ImportError as error:
        raise MissingExtra("gpiozero is not installed", "pip install 'joulemark[pi]'") from error
    try:
        with warnings.catch_warnings():
            # It warns of every pin library that it tries in vain.
            warnings.simplefilter("ignore")
            return getattr(gpiozero, kind)(gpio, **options)
    except Exception as error:
        # gpiozero, lgpio and the kernel each have their own errors here; "no pins on this machine" is an ImportError too.
        hint = "check [pins] in the device profile, and that the agent's user is in the group gpio"
        raise PinNotThere(f"GPIO {gpio} cannot be used: {type(error).__name__}: {error}", hint) from error


class SyncPin:
    """High while nothing is measured, low during a phase. `gpio` None: there is none, and nothing happens."""

    def __init__(self, gpio: int | None) -> None:
        self._pin = _device("DigitalOutputDevice", gpio, initial_value=True) if gpio is not None else None

    def fall(self) -> bool:
        """A phase begins. Whether there is a pin."""
        if self._pin is None:
            return False
        self._pin.off()
        return True

    def rise(self) -> None:
        """A phase ended."""
        if self._pin is not None:
            self._pin.on()

    def close(self) -> None:
        """Leaves the pin to others."""
        if self._pin is not None:
            self._pin.close()


@contextlib.contextmanager
def steady_fan(gpio: int | None, speed: float) -> Generator[None]:
    """The fan at one speed as long as this lasts. Raises PinNotThere, MissingExtra."""
    if gpio is None:
        yield
        return
    fan = _device("PWMOutputDevice", gpio, initial_value=speed)
    try:
        yield
    finally:
        fan.off()
        fan.close()


class Lamp:
    """Shows what `state()` says, on a thread of its own. A lamp that cannot be used is said once and then left alone."""

    def __init__(self, gpio: int, state: Callable[[], State]) -> None:
        self._gpio = gpio
        self._state = state
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lamp", daemon=True)

    def start(self) -> None:
        """From now on."""
        self._thread.start()

    def stop(self) -> None:
        """Off, and free."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def _run(self) -> None:
        try:
            lamp = _device("LED", self._gpio)
        except JoulemarkError as error:
            log.warning("no status lamp: %s", error.message)
            return
        shown: State | None = None
        while not self._stop.is_set():
            state = self._state()
            if state != shown:
                shown = state
                blink = BLINKS[state]
                if blink is None:
                    lamp.on()
                else:
                    lamp.blink(on_time=blink[0], off_time=blink[1])
            self._stop.wait(LOOK_S)
        lamp.off()
        lamp.close()
