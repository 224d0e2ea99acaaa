"""Plays a recorded trace back on the sampler's clock: the energy figures can be followed end to end without a meter.

Owns: the two file formats and the values between recorded samples. Time 0 of the recording is the first read.
Channels carry the source "replay:FILE", so that no figure made of them can pass for a measurement of this machine.
Settings: `path` (required), `loop` (default false: after its end the recording gives None).
- JSON: {"channels": [Channel…], "times_s": […], "values": [[…] per channel]}, as `joulemark.wire.Trace` has them; a
  whole trace works.
- CSV: header `time_s` and one column per channel, named NAME:QUANTITY or NAME:QUANTITY:MEANING:total, e.g.
  `psu:power:wall:total`; empty cells are gaps. Between two samples power, energy, temperature, memory and frequency
  are interpolated linearly, shares, counts and flags keep the former value; next to a gap there is no value. With
  `loop` an energy sum goes on from where it ended.
"""

from __future__ import annotations

import bisect
import csv
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from joulemark.errors import BadInput
from joulemark.wire import Channel
from joulemark_agent.sensors import NotPresent, Options, Sensor, Values
from joulemark_agent.sysfs import Roots

_UNITS: Final = {
    "power": "W", "energy": "J", "temperature": "Cel", "memory": "By", "frequency": "Hz",
    "share": "1", "count": "1", "flag": "1",
}  # fmt: skip
_STEPPED = frozenset({"share", "count", "flag"})
_ROUNDING_S = 1e-6
"""A tick at the very end must not fall behind it because start + k × interval was rounded."""
_MAX_BYTES = 256 * 1024 * 1024


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    channels: tuple[Channel, ...]
    times_s: tuple[float, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Recording:
    """A trace in columns, its times starting at 0 and rising strictly."""

    channels: tuple[Channel, ...]
    times_s: tuple[float, ...]
    values: tuple[tuple[float | None, ...], ...]

    @property
    def length_s(self) -> float:
        """From the first to the last sample."""
        return self.times_s[-1]


def load(path: Path) -> Recording:
    """Reads and checks a recording. Raises BadInput naming the file and the fault, NotPresent without a file."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadInput(
                f"the recording {path} is larger than {_MAX_BYTES} bytes", "record fewer channels or a shorter time"
            )
        text = path.read_text("utf-8")
    except OSError as error:
        raise NotPresent(f"the recording {path} cannot be read: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"the recording {path} is not UTF-8 text", "save it as UTF-8") from error
    read = _from_csv if path.suffix.lower() == ".csv" else _from_json
    try:
        return _checked(read(text), path)
    except (ValidationError, csv.Error, json.JSONDecodeError) as error:
        raise BadInput(
            f"the recording {path} is malformed: {error}", "see joulemark_agent/sensors/replay.py"
        ) from error


def _from_json(text: str) -> _File:
    return _File.model_validate_json(text)


def _from_csv(text: str) -> _File:
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if not rows or rows[0][0] != "time_s":
        raise csv.Error("the first column must be named time_s")
    if any(len(row) != len(rows[0]) for row in rows):
        raise csv.Error("rows have different lengths")
    cells = [[_cell(cell, number) for cell in row] for number, row in enumerate(rows[1:], start=2)]
    columns = [list(column) for column in zip(*cells, strict=True)] or [[] for _ in rows[0]]
    channels = [_csv_channel(head) for head in rows[0][1:]]
    return _File.model_validate({"channels": channels, "times_s": columns[0], "values": columns[1:]})


def _cell(text: str, row: int) -> float | None:
    try:
        return float(text) if text.strip() else None
    except ValueError as error:
        raise csv.Error(f"row {row}: {text[:40]!r} is not a number") from error


def _csv_channel(head: str) -> dict[str, Any]:
    parts = head.split(":")
    quantity = parts[1] if len(parts) > 1 else ""
    if quantity not in _UNITS or len(parts) > 4 or (len(parts) == 4 and parts[3] != "total"):
        raise csv.Error(f"column {head[:80]!r} must be NAME:QUANTITY or NAME:QUANTITY:MEANING:total")
    return {
        "name": parts[0],
        "quantity": quantity,
        "unit": _UNITS[quantity],
        "source": "replay",
        "meaning": parts[2] if len(parts) > 2 and parts[2] else None,
        "total": len(parts) == 4,
    }


def _checked(file: _File, path: Path) -> Recording:
    times = file.times_s
    if not times or not file.channels:
        raise BadInput(f"the recording {path} is empty", "it needs at least one channel and one sample")
    if any(later <= earlier for earlier, later in itertools.pairwise(times)):
        raise BadInput(f"the times of the recording {path} do not rise strictly", "sort it by time_s")
    if len(file.values) != len(file.channels) or any(len(column) != len(times) for column in file.values):
        raise BadInput(
            f"the recording {path} has columns of different lengths", "one value or null per time and channel"
        )
    source = f"replay:{path.name}"[:200]
    channels = tuple(channel.model_copy(update={"source": source}) for channel in file.channels)
    return Recording(channels, tuple(t - times[0] for t in times), file.values)


def value_at(recording: Recording, index: int, offset_s: float) -> float | None:
    """Channel `index` at `offset_s` seconds after the recording's first sample; None outside it and next to gaps."""
    times, column = recording.times_s, recording.values[index]
    if not 0 <= offset_s <= recording.length_s + _ROUNDING_S:
        return None
    offset_s = min(offset_s, recording.length_s)
    right = bisect.bisect_left(times, offset_s)
    if times[right] == offset_s:
        return column[right]
    before, after = column[right - 1], column[right]
    if before is None or recording.channels[index].quantity in _STEPPED:
        return before
    if after is None:
        return None
    share = (offset_s - times[right - 1]) / (times[right] - times[right - 1])
    return before + share * (after - before)


class _Replay:
    def __init__(self, recording: Recording, loop: bool, clock: Callable[[], float]) -> None:
        self.channels = recording.channels
        self._recording = recording
        self._loop = loop and recording.length_s > 0
        self._clock = clock
        self._start_s: float | None = None
        self._past_end = 0

    def read(self) -> Values:
        now_s = self._clock()
        if self._start_s is None:
            self._start_s = now_s
        offset_s, rounds = now_s - self._start_s, 0
        if self._loop:
            rounds = int(offset_s // self._recording.length_s)
            offset_s -= rounds * self._recording.length_s
        elif offset_s > self._recording.length_s + _ROUNDING_S:
            self._past_end += 1
        return tuple(self._value(index, offset_s, rounds) for index in range(len(self.channels)))

    def _value(self, index: int, offset_s: float, rounds: int) -> float | None:
        value = value_at(self._recording, index, offset_s)
        if value is None or not rounds or self.channels[index].quantity != "energy":
            return value
        column = self._recording.values[index]
        first, last = column[0], column[-1]
        return None if first is None or last is None else value + rounds * (last - first)

    def notes(self) -> dict[str, str]:
        if not self._past_end:
            return {}
        return {"replay": f"the recording of {self._recording.length_s:g} s was over at {self._past_end} ticks"}

    def close(self) -> None:
        """Nothing is held open."""


def probe(roots: Roots, options: Options) -> Sensor:
    """The recording named in the settings. Raises NotPresent when none was asked for, BadInput when it is malformed."""
    path = options.settings.get("path")
    if path is None:
        raise NotPresent("no recording was asked for")
    loop = options.settings.get("loop", False)
    if not isinstance(path, str | Path) or not isinstance(loop, bool):
        raise BadInput("the replay sensor's settings are malformed", "path is a text, loop is true or false")
    return _Replay(load(Path(path)), loop, options.clock)
