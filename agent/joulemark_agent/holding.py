"""Power mode, governor and clocks as a run wants them, and afterwards as they were: also after a kill or a power cut.

Owns: setting, putting back, and the note of what was before, which is on the disk before anything is changed. Not aware of runs. What is in
force is read by tuning.py; this module only writes. Needs root, or what deploy/privileges.sh lets the agent's group do: write these files,
ask for a power mode.

The kernel's files: cpufreq's scaling_governor and scaling_min_freq, devfreq's min_freq. A clock is fixed by raising its lower limit to the
upper one, as jetson_clocks does; a Jetson's memory clock, which that sets through debugfs, stays the power mode's and moves. The power mode
goes through NVIDIA's nvpmodel; one that needs a restart is refused and put back.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from joulemark.durable import replace_file
from joulemark.errors import BadInput, JoulemarkError
from joulemark.wire import Tuning
from joulemark_agent import tuning
from joulemark_agent.programs import ask, ask_behind
from joulemark_agent.sysfs import Roots, Unreadable, entries, read_text, text_or_none

_NVPMODEL_S = 30.0
_MOST_NOTE_BYTES = 256 * 1024
_SOCKET = "joulemark-power-mode.socket"
"""Below /run: behind it root sets the power mode (deploy/joulemark-power-mode.socket)."""
_HINT = "deploy/install.sh installs a service that may do it; or run the agent as root; or set it by hand and leave it out of the run"

log = logging.getLogger(__name__)


class TuningRefused(JoulemarkError, RuntimeError):
    """A setting that a run asked for could not be made."""

    code = "tuning_refused"


class _Before(BaseModel):
    """What was set: the power mode's number, and files below /sys with their content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    power_mode: int | None = None
    files: tuple[tuple[str, str], ...] = ()


@contextlib.contextmanager
def held(roots: Roots, wanted: Tuning | None, note: Path) -> Generator[None]:
    """The settings as `wanted` while this lasts. Raises TuningRefused, BadInput; then everything is as before."""
    if wanted is None or wanted == Tuning():
        yield
        return
    put_back(roots, note)
    if note.exists():
        hint = f"set governor, clocks and power mode by hand and remove {note}, or run the agent as root"
        raise TuningRefused("the machine is not set as it was before an earlier run", hint)
    mode = _mode_number(roots, wanted.power_mode) if wanted.power_mode is not None else None
    _check_governor(roots, wanted.governor)
    # A power mode sets clocks and governor by itself: then all that this module can set is kept in mind.
    touched = wanted if mode is None else Tuning(governor="any", fixed_clocks=True)
    number = tuning.power_mode_number(roots) if mode is not None else None
    before = _Before(power_mode=number, files=_read(roots, touched))
    replace_file(note, [before.model_dump_json().encode()])
    try:
        if mode is not None:
            _set_mode(roots, mode)
        for path, content in _writes(roots, wanted):
            _write(path, content)
        yield
    finally:
        put_back(roots, note)


def put_back(roots: Roots, note: Path) -> None:
    """What a note says was set before. The note goes when all of it is; what could not be set stays in it. At an agent's start: what a
    killed one left behind."""
    try:
        with note.open("rb") as file:
            before = _Before.model_validate_json(file.read(_MOST_NOTE_BYTES))
    except FileNotFoundError:
        return
    except (OSError, ValidationError) as error:
        log.warning("what was set before a run cannot be read: %s; look at governor and clocks by hand", error)
        note.unlink(missing_ok=True)
        return
    failed: list[str] = []
    if before.power_mode is not None:
        # First: a mode takes cores away and gives them back, with their files.
        _attempt(lambda: _set_mode(roots, before.power_mode or 0), failed)
    for name, content in before.files:
        path = roots.sys / name
        # Only what this module writes: the note is a file like any other.
        if path.name in _FILES and ".." not in Path(name).parts:
            _attempt(partial(_write, path, content), failed)
    if failed:
        log.warning("not everything is set as it was before the run: %s", "; ".join(failed[:4]))
    else:
        note.unlink(missing_ok=True)


def _attempt(setting: Callable[[], None], failed: list[str]) -> None:
    try:
        setting()
    except TuningRefused as error:
        failed.append(error.message)


# --- what is written --------------------------------------------------------------------------------------------------
_FILES = ("scaling_governor", "scaling_min_freq", "min_freq", "governor")


def _policies(roots: Roots) -> list[Path]:
    folder = roots.sys / "devices" / "system" / "cpu" / "cpufreq"
    return [policy for policy in entries(folder) if policy.name.startswith("policy")]


def _writes(roots: Roots, wanted: Tuning) -> Iterator[tuple[Path, str]]:
    """(file, content), in the order in which they are written. Upper limits are read now: a power mode may have changed them."""
    for policy in _policies(roots):
        if wanted.governor is not None:
            yield policy / "scaling_governor", wanted.governor
        if wanted.fixed_clocks:
            yield policy / "scaling_min_freq", _text(policy / "scaling_max_freq")
    if wanted.fixed_clocks:
        for device in entries(roots.sys / "class" / "devfreq"):
            yield device / "min_freq", _text(device / "max_freq")


def _read(roots: Roots, wanted: Tuning) -> tuple[tuple[str, str], ...]:
    """What those files hold now, by their names below /sys, the last written first."""
    files = [path for path, _ in _writes(roots, wanted)]
    return tuple((str(path.relative_to(roots.sys)), _text(path)) for path in reversed(files))


def _text(path: Path) -> str:
    text = read_text(path)
    if isinstance(text, Unreadable):
        raise TuningRefused(f"a setting cannot be read: {text}", _HINT)
    return text


def _write(path: Path, content: str) -> None:
    try:
        # Not replaced: the kernel's files are written in place.
        with path.open("w", encoding="ascii") as file:
            file.write(content)
    except OSError as error:
        raise TuningRefused(f"{path} cannot be set to {content}: {error.strerror or error}", _HINT) from error


def _check_governor(roots: Roots, governor: str | None) -> None:
    if governor is None:
        return
    known = {
        name
        for policy in _policies(roots)
        for name in (text_or_none(policy / "scaling_available_governors") or "").split()
    }
    if governor not in known:
        there = f"it knows {', '.join(sorted(known))}" if known else "its kernel scales no frequencies"
        raise BadInput(f"this board has no governor {governor!r}", there)


# --- the power mode ---------------------------------------------------------------------------------------------------
def _mode_number(roots: Roots, wanted: str) -> int:
    modes = tuning.power_modes(roots)
    for number, name in modes.items():
        if wanted in (name, str(number)):
            return number
    known = ", ".join(f"{number}: {name}" for number, name in modes.items())
    raise BadInput(f"this board has no power mode {wanted!r}", f"it has {known}" if known else "it has no nvpmodel")


def _set_mode(roots: Roots, number: int) -> None:
    if tuning.power_mode_number(roots) == number:
        return
    behind = roots.run / _SOCKET
    if behind.is_socket():
        answer = ask_behind(behind, f"{number}\n", _NVPMODEL_S)
    else:
        answer = ask(roots, ("nvpmodel", "-m", str(number)), _NVPMODEL_S)
    if isinstance(answer, Unreadable) and answer.reason != "empty":
        raise TuningRefused(f"the power mode cannot be set to {number}: {answer}", _HINT)
    if tuning.power_mode_number(roots) != number:
        said = "" if isinstance(answer, Unreadable) else f": {answer.splitlines()[-1][:200]}"
        raise TuningRefused(
            f"the power mode is not {number} after nvpmodel -m {number}{said}",
            "this mode may need a restart: set it by hand",
        )
