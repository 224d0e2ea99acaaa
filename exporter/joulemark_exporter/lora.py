"""PEFT adapters: read with bounds, folded into a model's weights in float32, row by row when somebody reads them.

    W' = W + Σ scale·B·A,    scale = user's · α / r   (α / √r for rsLoRA),   DoRA: W' = m · (W + scale·B·A) / ‖W + scale·B·A‖ row by row

Owns PEFT's file format and its rules of scales. Whatever changes the computation in a way that is not written here is refused by name,
because an adapter that is folded wrongly gives plausible nonsense. Only safetensors are read. Truth: peft 0.21, tuners/lora."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from joulemark.artifact import hash_file
from joulemark.errors import BadInput, NotFound
from joulemark_exporter import configuration
from joulemark_exporter.families import HEAD, find
from joulemark_exporter.weights import Float32, Model, Weight

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_BYTES = 8 << 30
MAX_PATTERN = 200
PREFIX = "base_model.model."
PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.default)?(\.weight)?"
)

# Settings under which PEFT computes something else than the formulas above.
UNKNOWN = (
    "use_qalora", "alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config", "megatron_config", "lora_bias", "ensure_weight_tying",
)  # fmt: skip
# Initializations that take the adapter's start out of the base: the adapter fits no other base.
MOVED_BASE = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class Delta:
    """One module's change: `down` is A (rank, inputs), `up` is B (outputs, rank), `scale` what their product is multiplied with."""

    module: str
    down: Float32
    up: Float32
    scale: float
    embedding: bool = False
    magnitude: Float32 | None = None
    """DoRA's norms of the outputs, (outputs,)."""

    @property
    def trained(self) -> bool:
        """Whether it changes anything at all."""
        return bool(self.down.any() and self.up.any()) or self.magnitude is not None


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder. `replaced` are tensors that were trained whole (modules_to_save, biases), by state_dict name."""

    name: str
    sha256: str
    deltas: tuple[Delta, ...]
    replaced: Mapping[str, Float32]
    alpha: float

    @property
    def untrained(self) -> tuple[str, ...]:
        """The modules whose change is zero."""
        return tuple(delta.module for delta in self.deltas if not delta.trained)


# --- reading ----------------------------------------------------------------------------------------------------------
def read_adapter(folder: Path) -> Adapter:
    """The adapter in a PEFT folder. Raises NotFound, BadInput for anything that cannot be folded exactly."""
    if not (folder / CONFIG).is_file():
        raise NotFound(f"there is no {CONFIG} in {folder}", "give a folder that PEFT's save_pretrained wrote")
    config = configuration.read_json(folder / CONFIG)
    _refuse_unknown(config, folder)
    if not (folder / WEIGHTS).is_file():
        raise NotFound(
            f"there is no {WEIGHTS} in {folder}",
            "pickled adapters (.bin) are not read: save it again with safe_serialization=True",
        )
    tensors = _tensors(folder / WEIGHTS)
    parts, replaced = _sort(tensors)
    alpha = configuration.real(config, "lora_alpha")
    deltas = tuple(_delta(module, found, config) for module, found in sorted(parts.items()))
    if not deltas and not replaced:
        raise BadInput(f"the adapter {folder} holds nothing", "save it again")
    digest = hashlib.sha256(f"{hash_file(folder / CONFIG)}{hash_file(folder / WEIGHTS)}".encode()).hexdigest()
    return Adapter(folder.resolve().name, digest, deltas, replaced, alpha)


def _refuse_unknown(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{folder} is an adapter of type {config.get('peft_type')!r}", "LoRA adapters can be folded")
    used = [name for name in UNKNOWN if config.get(name)]
    if used:
        raise BadInput(
            f"the adapter {folder} uses {', '.join(used)}", "it cannot be folded exactly: merge it with PEFT first"
        )
    start = str(config.get("init_lora_weights"))
    if start.startswith(MOVED_BASE):
        raise BadInput(
            f"the adapter {folder} was initialized by {start}, which moved the base's weights",
            "convert it with PEFT's path_initial_model_for_weight_conversion, so that it fits the original base",
        )


def _tensors(path: Path) -> dict[str, Float32]:
    if path.stat().st_size > MAX_BYTES:
        raise BadInput(f"{path} is larger than {MAX_BYTES >> 30} GiB", "this is not an adapter")
    try:
        with safe_open(path, framework="numpy") as file:
            found = {key: np.asarray(file.get_tensor(key)).astype(np.float32) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path} is not a readable safetensors file: {error}", "save the adapter again") from error
    for key, values in found.items():
        if not np.isfinite(values).all():
            raise BadInput(f"the adapter's {key} holds NaN or infinity", "its training diverged: nothing is folded")
    return found


def _sort(tensors: Mapping[str, Float32]) -> tuple[dict[str, dict[str, Float32]], dict[str, Float32]]:
    """(module → its parts, tensors that replace the base's)."""
    parts: dict[str, dict[str, Float32]] = {}
    replaced: dict[str, Float32] = {}
    for key, values in tensors.items():
        bare = key.removeprefix(PREFIX)
        match = PART.fullmatch(bare)
        if match:
            parts.setdefault(match[1], {})[match[2]] = values
        elif ".lora_" in bare:
            raise BadInput(f"the adapter holds {key}, which is not known", "merge it with PEFT first")
        else:
            # PEFT stores embeddings, heads and biases beside their adapters under the name of the wrapped layer.
            replaced[bare.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")] = values
    return parts, replaced


def _delta(module: str, parts: Mapping[str, Float32], config: Mapping[str, Any]) -> Delta:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    missing = [name for name in names if name not in parts]
    if missing:
        raise BadInput(f"the adapter of {module} lacks {missing[0]}", "the file is incomplete: save it again")
    down, up = (parts[name] for name in names)
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise BadInput(f"A {down.shape} and B {up.shape} of {module} do not fit one another", "the file is damaged")
    rank = down.shape[0]
    stated = _pattern(config.get("rank_pattern"), module, config.get("r"))
    if stated != rank:
        raise BadInput(
            f"{module} has rank {rank}, adapter_config.json says {stated}",
            "config and weights belong to different adapters",
        )
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise BadInput(f"the alpha of {module} is {alpha!r}", "adapter_config.json is damaged")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    magnitude = parts.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None) or (magnitude is not None and embedding):
        raise BadInput(
            f"DoRA's magnitudes of {module} do not go with adapter_config.json", "merge this adapter with PEFT first"
        )
    return Delta(module, down, up, float(scale), embedding, None if magnitude is None else magnitude.reshape(-1))


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the module's name, after a dot."""
    if not isinstance(patterns, Mapping):
        return default
    for key, value in patterns.items():
        # A repeated group can take for ever to match; names of modules need none.
        if len(str(key)) > MAX_PATTERN or re.search(r"\)[*+{]", str(key)):
            raise BadInput(f"{str(key)[:80]!r} in adapter_config.json", "this is not a pattern of module names")
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise BadInput(
                f"the pattern {key!r} in adapter_config.json is not one: {error}", "the file is damaged"
            ) from error
    return default


# --- folding ----------------------------------------------------------------------------------------------------------
def fold(model: Model, adapters: Sequence[tuple[Adapter, float]]) -> Model:
    """The model with all adapters added, each times its scale. Raises BadInput for an adapter of another base, or that changes nothing."""
    by_weight: dict[str, list[Delta]] = {}
    replaced: dict[str, Weight] = {}
    for adapter, scale in adapters:
        for name, delta in check(model, adapter):
            by_weight.setdefault(name, []).append(replace(delta, scale=delta.scale * scale))
        for name, values in adapter.replaced.items():
            if name in replaced:
                raise BadInput(f"two adapters replace {name}", "they cannot be folded together")
            replaced[name] = _replacement(model, adapter, name, values)
    base = {**model.weights, **replaced}
    transposed = {name for name, linear in find(model.model_type).matrices(model.config).items() if linear.transposed}
    changed = {
        **replaced,
        **{name: _folded(base[name], deltas, name in transposed) for name, deltas in by_weight.items()},
    }
    steps = tuple((f"adapter {adapter.name} × {scale:g}", adapter.sha256) for adapter, scale in adapters)
    return replace(model, weights={**model.weights, **changed}, lineage=(*model.lineage, *steps))


def check(model: Model, adapter: Adapter) -> list[tuple[str, Delta]]:
    """The weight that each change belongs to. Raises BadInput for an adapter of another base, or that changes nothing."""
    if len(adapter.untrained) == len(adapter.deltas) and not adapter.replaced:
        raise BadInput(
            f"the adapter {adapter.name} is untrained: every B is zero",
            "it would change nothing; is it the right folder?",
        )
    return [(_check(model, adapter, delta), delta) for delta in adapter.deltas]


def _check(model: Model, adapter: Adapter, delta: Delta) -> str:
    """The name of the weight that the change belongs to. Raises BadInput where it does not fit."""
    family, name = find(model.model_type), f"{delta.module}.weight"
    weight = model.weights.get(name)
    if name in (HEAD, family.embedding) and family.is_tied(model.config):
        raise BadInput(
            f"the adapter {adapter.name} changes {delta.module}, which is tied to the other end of the model",
            "one tensor cannot hold both: untie the base first",
        )
    if weight is None:
        raise BadInput(
            f"the adapter {adapter.name} changes {delta.module}, which this model does not have",
            "is it an adapter of another model?",
        )
    outputs, inputs = delta.up.shape[0], delta.down.shape[1]
    linear = family.matrices(model.config).get(name)
    turned = delta.embedding or (linear is not None and linear.transposed)
    expected = tuple(reversed(weight.shape)) if turned else weight.shape
    if (outputs, inputs) != expected:
        raise BadInput(
            f"the adapter {adapter.name} was made for a {delta.module} of {outputs} × {inputs}, "
            f"the model's is {expected[0]} × {expected[1]}",
            "it belongs to another base model",
        )
    if delta.down.shape[0] > min(outputs, inputs):
        raise BadInput(
            f"rank {delta.down.shape[0]} of {delta.module} is above the layer's {min(outputs, inputs)}",
            "this is not an adapter of low rank",
        )
    if delta.magnitude is not None and delta.magnitude.shape != (outputs,):
        raise BadInput(f"DoRA's magnitudes of {delta.module} have shape {delta.magnitude.shape}", "the file is damaged")
    return name


def _replacement(model: Model, adapter: Adapter, name: str, values: Float32) -> Weight:
    weight, family = model.weights.get(name), find(model.model_type)
    if name in (HEAD, family.embedding) and family.is_tied(model.config):
        raise BadInput(
            f"the adapter {adapter.name} replaces {name}, which is tied to the other end of the model",
            "untie the base first",
        )
    if weight is None or weight.shape != values.shape:
        found = "no such tensor" if weight is None else f"one of shape {weight.shape}"
        raise BadInput(
            f"the adapter {adapter.name} replaces {name} {values.shape}; the model has {found}",
            "it belongs to another base model",
        )
    return Weight(name, weight.shape, "F32", functools.partial(_part, values))


def _part(values: Float32, start: int, stop: int) -> Float32:
    return values[start:stop].copy()


def _folded(weight: Weight, deltas: Sequence[Delta], transposed: bool) -> Weight:
    with_magnitude = [delta for delta in deltas if delta.magnitude is not None]
    if with_magnitude and len(deltas) > 1:
        raise BadInput(
            f"{weight.name} has a DoRA adapter and another one",
            "their sum is not defined: fold them one after the other",
        )
    read = functools.partial(_changed, weight, tuple(deltas), transposed)
    if with_magnitude:
        read = functools.partial(_with_magnitude, weight, deltas[0], transposed)
    return Weight(weight.name, weight.shape, "F32", read)


def _changed(weight: Weight, deltas: Sequence[Delta], transposed: bool, start: int, stop: int) -> Float32:
    values = weight.read(start, stop)
    for delta in deltas:
        values += _product(delta, transposed, start, stop)
    return values


def _product(delta: Delta, transposed: bool, start: int, stop: int) -> Float32:
    """Rows of scale·B·A as the weight is stored: rows are outputs, or inputs for embeddings and Conv1D."""
    by_inputs = transposed or delta.embedding
    product = delta.down[:, start:stop].T @ delta.up.T if by_inputs else delta.up[start:stop] @ delta.down
    return np.multiply(product, np.float32(delta.scale), out=product)


def _with_magnitude(weight: Weight, delta: Delta, transposed: bool, start: int, stop: int) -> Float32:
    assert delta.magnitude is not None
    if not transposed:
        values = _changed(weight, (delta,), transposed, start, stop)
        return values * (delta.magnitude[start:stop] / np.linalg.norm(values, axis=1))[:, None]
    values = _changed(weight, (delta,), transposed, 0, weight.shape[0])
    return np.ascontiguousarray((values * (delta.magnitude / np.linalg.norm(values, axis=0)))[start:stop])
