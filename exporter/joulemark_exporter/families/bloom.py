"""BLOOM: ALiBi instead of positions, a norm behind the embedding, queries, keys and values interleaved head by head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from joulemark.errors import BadInput
from joulemark_exporter import configuration
from joulemark_exporter.families import (
    Config,
    Family,
    Linear,
    Placement,
    Tensor,
    Value,
    affine_norm,
    head,
    memory_of_all_heads,
    plain_metadata,
    vector,
)

LAYERS = "transformer.h"
EMBEDDING = "transformer.word_embeddings.weight"
LINEARS = (
    Linear("self_attention.query_key_value", "attn_qkv", 0),
    Linear("self_attention.dense", "attn_output", 1),
    Linear("mlp.dense_h_to_4h", "ffn_up", 2),
    Linear("mlp.dense_4h_to_h", "ffn_down", 3),
)
TRAINED_CONTEXT = 2048
"""BLOOM was trained with 2048 positions; its config.json states them as `seq_length`, or not at all."""


def _tensors(config: Config) -> tuple[Tensor, ...]:
    width, vocabulary, memory = _width(config), configuration.count(config, "vocab_size"), FAMILY.memory(config)
    found = [
        Tensor(EMBEDDING, (vocabulary, width), Placement("token_embd.weight")),
        *head(config, FAMILY.is_tied(config), width),
        *affine_norm("transformer.word_embeddings_layernorm", "token_embd_norm", width),
        *affine_norm("transformer.ln_f", "output_norm", width),
    ]
    shapes = {
        "attn_qkv": (3 * width, width),
        "attn_output": (width, width),
        "ffn_up": (4 * width, width),
        "ffn_down": (width, 4 * width),
    }
    order = {"attn_qkv": separated(memory.heads, width)}
    for layer in range(memory.layers):
        source, target = f"{LAYERS}.{layer}", f"blk.{layer}"
        found += affine_norm(f"{source}.input_layernorm", f"{target}.attn_norm", width)
        found += affine_norm(f"{source}.post_attention_layernorm", f"{target}.ffn_norm", width)
        for linear in LINEARS:
            name, place, shape, rows = (
                f"{source}.{linear.name}",
                f"{target}.{linear.role}",
                shapes[linear.role],
                order.get(linear.role),
            )
            found.append(Tensor(f"{name}.weight", shape, Placement(f"{place}.weight", row_order=rows)))
            found.append(vector(f"{name}.bias", f"{place}.bias", shape[0], row_order=rows))
    return tuple(found)


def separated(heads: int, width: int) -> NDArray[np.intp]:
    """The order of the fused matrix's rows in GGUF: all queries, all keys, all values, where BLOOM has q, k, v of each head in turn."""
    return np.arange(3 * width, dtype=np.intp).reshape(heads, 3, width // heads).swapaxes(0, 1).reshape(-1)


def _metadata(config: Config) -> dict[str, Value]:
    if config.get("apply_residual_connection_post_layernorm"):
        raise BadInput("this BLOOM adds its residual after the norm", "llama.cpp's bloom cannot: use the ONNX format")
    memory, width = FAMILY.memory(config), _width(config)
    shared = plain_metadata(config, memory, width, 4 * width, _context(config))
    return {**shared, "attention.head_count_kv": memory.heads}


def _context(config: Config) -> int:
    return configuration.count(config, "seq_length", default=TRAINED_CONTEXT)


def _width(config: Config) -> int:
    return configuration.count(config, "hidden_size", "n_embed", most=configuration.MOST_WIDTH)


FAMILY = Family(
    model_types=("bloom",),
    prefix="transformer.",
    layers=LAYERS,
    embedding=EMBEDDING,
    linears=LINEARS,
    tied=True,
    gguf="bloom",
    tensors=_tensors,
    metadata=_metadata,
    context=_context,
    memory=lambda config: memory_of_all_heads(config, _width(config)),
    returns_tuple=True,
)
