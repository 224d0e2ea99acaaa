"""What config.json says, in the words of both generations of transformers, with bounds.

Owns reading the file and the rotary embedding's settings, which moved: transformers 4 writes `rope_theta` and `rope_scaling`, 5 writes
`rope_parameters`, and each takes a wrong default without a word where it finds only the other's keys. So a model whose settings are in
neither place is refused rather than guessed. Not aware of weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from joulemark.errors import BadInput, NotFound

MAX_BYTES = 4 << 20
MOST = 1 << 24
"""Of anything that is counted: tokens, positions."""
MOST_LAYERS = 512
"""llama.cpp's LLAMA_MAX_LAYERS."""
MOST_WIDTH = 1 << 18
"""Of states, feed-forward blocks, all heads together; the widest published models have some 2^16."""


@dataclass(frozen=True)
class Rope:
    """A rotary embedding. `kind` is transformers' rope_type: default, linear, yarn, llama3 …; `settings` its other keys."""

    theta: float
    kind: str
    settings: Mapping[str, Any]

    def number(self, name: str, default: float | None = None) -> float:
        """A setting that must be a finite number. Raises BadInput."""
        value = self.settings.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise BadInput(
                f"the rotary embedding ({self.kind}) lacks the number {name}", "complete rope_parameters in config.json"
            )
        return float(value)


def read(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises NotFound, BadInput."""
    path = folder / "config.json"
    if not path.is_file():
        raise NotFound(
            f"there is no config.json in {folder}", "give a Hugging Face model folder, a hub id or a .gguf file"
        )
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise BadInput(f"{path} names no model_type", "the file is damaged or is not a transformers model")
    if "auto_map" in config:
        raise BadInput(
            f"{path} asks for code of its own (auto_map)",
            "models with remote code are not run: use one that transformers itself knows",
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises BadInput."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise BadInput(f"{path} is larger than {MAX_BYTES} bytes", "this is not a file that a model needs")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}", "download the file again") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} does not hold a JSON object", "download the file again")
    return value


def count(config: Mapping[str, Any], *names: str, default: int | None = None, most: int = MOST) -> int:
    """The first of `names` that is there, a whole number from 1 to `most`. Raises BadInput."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise BadInput(f"config.json gives {name} = {value!r}", f"it must be a whole number from 1 to {most}")
        return value
    if default is None:
        raise BadInput(
            f"config.json does not give {' or '.join(names)}", "the file is damaged or of another kind of model"
        )
    return default


def head_size(width: int, heads: int) -> int:
    """What each head has of the width. Raises BadInput where the heads do not divide it."""
    if width % heads:
        raise BadInput(f"{heads} heads do not divide a width of {width}", "config.json is damaged")
    return width // heads


def real(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A finite number. Raises BadInput."""
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise BadInput(f"config.json gives {name} = {value!r}, not a number", "the file is damaged")
    return float(value)


def rope(config: Mapping[str, Any], layer_type: str = "full_attention") -> Rope:
    """The rotary embedding of a kind of layer. Raises BadInput when config.json does not state it."""
    stated = config.get("rope_parameters")
    if isinstance(stated, Mapping):
        parameters = stated.get(layer_type, stated)
        if isinstance(parameters, Mapping) and "rope_theta" in parameters:
            return _rope(parameters["rope_theta"], parameters)
    legacy = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}[layer_type]
    if legacy not in config:
        raise BadInput(
            "config.json states no rotary base (neither rope_parameters.rope_theta nor " + legacy + ")",
            "write the value the model was trained with into config.json; guessing gives wrong logits without a word",
        )
    scaling = config.get("rope_scaling") if layer_type == "full_attention" else None
    return _rope(config[legacy], scaling if isinstance(scaling, Mapping) else {})


def _rope(theta: Any, settings: Mapping[str, Any]) -> Rope:
    kind = str(settings.get("rope_type") or settings.get("type") or "default").lower()
    read_rope = Rope(0.0, kind, {**settings, "rope_theta": theta})
    return Rope(read_rope.number("rope_theta"), kind, settings)


def rope_metadata(rotary: Rope) -> dict[str, str | int | float | bool]:
    """GGUF's key-values of a rotary embedding, without the architecture's prefix. Raises BadInput for kinds that llama.cpp lacks."""
    values: dict[str, str | int | float | bool] = {"rope.freq_base": rotary.theta}
    if rotary.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": rotary.number("factor")}
    elif rotary.kind == "yarn":
        values |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rotary.number("factor")}
        values["rope.scaling.original_context_length"] = int(rotary.number("original_max_position_embeddings"))
        for name, key in _YARN.items():
            if rotary.settings.get(name) is not None:
                values[f"rope.scaling.{key}"] = rotary.number(name)
    elif rotary.kind not in ("default", "llama3"):
        raise BadInput(
            f"rotary embeddings of kind {rotary.kind!r} cannot be written", "known: default, linear, yarn, llama3"
        )
    return values


_YARN = {
    "extrapolation_factor": "yarn_ext_factor",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def rope_factors(rotary: Rope, head_size: int) -> NDArray[np.float32] | None:
    """What llama3's scaling divides each frequency by, shape (head_size / 2,); None for the other kinds.

    Truth: `_compute_llama3_parameters` in transformers' modeling_rope_utils.
    """
    if rotary.kind != "llama3":
        return None
    factor, low, high = rotary.number("factor"), rotary.number("low_freq_factor"), rotary.number("high_freq_factor")
    trained = rotary.number("original_max_position_embeddings")
    frequencies = 1.0 / rotary.theta ** (np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size))
    wavelengths = 2 * np.pi / frequencies.astype(np.float32)
    smooth = (trained / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < trained / high, 1.0, np.where(wavelengths > trained / low, factor, between))
    return factors.astype(np.float32)
