"""What a layer-by-layer quantizer has finished, on disk: after a crash or Ctrl-C it goes on at the next layer instead of the first.

Owns the files of a working folder and their order: a layer's matrices, then the states behind it, then the old states go. Each file is
complete or absent. Whether the folder belongs to the same inputs is the pipeline's business.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from joulemark import durable
from joulemark_exporter.group_quantized import GroupQuantized


class FinishedLayers:
    """The layers of one quantizer's run in `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder / name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._where: dict[str, int] = {}
        self.count = self._found()
        """How many are finished: the next one's index."""
        for index in range(self.count):
            self._index(index)

    def _found(self) -> int:
        """The latest states whose layers are all there."""
        stored = sorted(
            (int(path.stem.removeprefix("states-")) for path in self._folder.glob("states-*.npy")), reverse=True
        )
        complete = (count for count in stored if all(self._layer(index).is_file() for index in range(count)))
        return next(complete, 0)

    def _layer(self, index: int) -> Path:
        return self._folder / f"layer-{index:04d}.npz"

    def _states(self, index: int) -> Path:
        return self._folder / f"states-{index:04d}.npy"

    def _index(self, index: int) -> None:
        with np.load(self._layer(index), allow_pickle=False) as data:
            names = json.loads(bytes(data["about"]))["names"]
        self._where.update(dict.fromkeys(names, index))

    def states(self) -> NDArray[np.float32] | None:
        """The states before the next layer; None when nothing is finished yet."""
        return np.load(self._states(self.count), allow_pickle=False) if self.count else None

    def add(self, matrices: Mapping[str, GroupQuantized], note: Mapping[str, Any], states: NDArray[np.float32]) -> None:
        """Stores a layer and the states behind it."""
        arrays: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for number, (name, matrix) in enumerate(matrices.items()):
            settings[name] = [number, matrix.bits, matrix.group_size, matrix.symmetric]
            arrays |= {
                f"{number}.integers": matrix.integers,
                f"{number}.scales": matrix.scales,
                f"{number}.zeros": matrix.zeros,
            }
            if matrix.column_groups is not None:
                arrays[f"{number}.column_groups"] = matrix.column_groups
        about = json.dumps({"names": list(matrices), "settings": settings, "note": dict(note)}).encode()
        _store(self._layer(self.count), lambda file: np.savez(file, about=np.frombuffer(about, np.uint8), **arrays))
        _store(self._states(self.count + 1), lambda file: np.save(file, states))
        self._index(self.count)
        self._states(self.count).unlink(missing_ok=True)
        self.count += 1

    def matrix(self, name: str) -> GroupQuantized:
        """A finished matrix, read from its layer's file."""
        with np.load(self._layer(self._where[name]), allow_pickle=False) as data:
            number, bits, group_size, symmetric = json.loads(bytes(data["about"]))["settings"][name]
            groups = f"{number}.column_groups"
            return GroupQuantized(
                bits,
                group_size,
                symmetric,
                data[f"{number}.integers"],
                data[f"{number}.scales"],
                data[f"{number}.zeros"],
                data.get(groups),
            )

    def notes(self) -> list[Any]:
        """What was noted with each layer."""
        found: list[Any] = []
        for index in range(self.count):
            with np.load(self._layer(index), allow_pickle=False) as data:
                found.append(json.loads(bytes(data["about"]))["note"])
        return found


def _store(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Written under another name, made durable, renamed."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    durable.synchronise_folder(path.parent)
