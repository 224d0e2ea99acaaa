"""An adapter as a GGUF file of its own, so that llama.cpp can put it on a running model and take it off again.

Owns the file and the scales in it. llama.cpp multiplies B·A by user's scale · α / rank with one α for the file and the rank of each
tensor; PEFT has scales by module, square roots of ranks, and more. So α is written as 1 and every B carries what is left: scale · rank.
What such a file cannot express (DoRA, whole tensors) is refused. Truth: llama-adapter.cpp of llama-cpp-python 0.3.36."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from joulemark.errors import BadInput
from joulemark_exporter import lora
from joulemark_exporter.families import find
from joulemark_exporter.lora import Adapter, Delta
from joulemark_exporter.weights import Model

ALPHA = 1.0


def write(path: Path, adapter: Adapter, model: Model) -> None:
    """Writes the adapter for a base in GGUF. Raises BadInput for what llama.cpp's adapters cannot hold, and for those of another base."""
    lora.check(model, adapter)
    family = find(model.model_type)
    if not family.gguf:
        raise BadInput(
            f"llama.cpp has no architecture for {model.model_type} models", "fold the adapter and use the ONNX format"
        )
    if adapter.replaced or any(delta.magnitude is not None or delta.embedding for delta in adapter.deltas):
        raise BadInput(
            f"the adapter {adapter.name} changes more than products of low rank (DoRA, embeddings, whole tensors)",
            "llama.cpp's adapters cannot hold that: fold it with --adapter instead",
        )
    known = family.matrices(model.config)
    places = {tensor.name: tensor.placement for tensor in family.tensors(model.config)}
    temporary = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(temporary, family.gguf)
    writer.add_string("general.type", "adapter")
    writer.add_name(adapter.name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for delta in adapter.deltas:
        if f"{delta.module}.weight" not in known:
            raise BadInput(
                f"the adapter {adapter.name} changes {delta.module}",
                "llama.cpp's adapters change the layers' matrices only: fold it",
            )
        target = places[f"{delta.module}.weight"]
        assert target is not None
        up = _scaled(delta)
        writer.add_tensor(f"{target.name}.lora_a", np.ascontiguousarray(delta.down))
        writer.add_tensor(
            f"{target.name}.lora_b", np.ascontiguousarray(up if target.row_order is None else up[target.row_order])
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(path)


def _scaled(delta: Delta) -> np.ndarray:
    """B with the module's scale in it, so that llama.cpp's α / rank gives back what PEFT computes."""
    return delta.up * np.float32(delta.scale * delta.down.shape[0] / ALPHA)
