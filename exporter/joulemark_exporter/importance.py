"""How much every input of every matrix matters: the mean of its square on the calibration text, which llama.cpp calls the importance
matrix.

Owns measuring it, layer by layer on the unquantized model, and keeping it in the working folder. Not aware of who weighs errors with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from joulemark_exporter import calibration
from joulemark_exporter.quantizers import Task
from joulemark_exporter.walk import Walk

FILE = "importance.npz"
Importance = Mapping[str, NDArray[np.float32]]


def measure(task: Task) -> tuple[Importance, calibration.Windows]:
    """state_dict name → (inputs,) float32 for every matrix of every layer, and the windows it was measured on."""
    windows = calibration.calibration_windows(task.model, task.calibration, task.cache)
    stored = task.work / FILE
    if stored.is_file():
        with np.load(stored, allow_pickle=False) as data:
            return dict(data.items()), windows
    walk = Walk(task.model, task.family)
    states = walk.embed(windows.tokens)
    by_stage: dict[tuple[int, int], NDArray[np.float32]] = {}
    for index in range(walk.layers):
        task.say("measuring what matters", index, walk.layers)
        with (
            walk.layer(index) as layer,
            calibration.measured(layer, task.family, task.family.stages(), diagonal=True) as moments,
        ):
            walk.run(index, layer, states)
        by_stage |= {(index, stage): values.astype(np.float32) for stage, values in moments.items()}
    task.say("measuring what matters", walk.layers, walk.layers)
    found = {
        name: by_stage[task.family.layer_of(name), linear.stage]
        for name, linear in task.family.matrices(task.model.config).items()
    }
    temporary = stored.with_name(f".{FILE}")
    with temporary.open("wb") as file:
        np.savez(file, **found)  # pyright: ignore[reportArgumentType] - names are keywords here
    temporary.replace(stored)
    return found, windows
