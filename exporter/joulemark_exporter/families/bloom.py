"""BLOOM: ALiBi instead of positions, a norm behind the embedding, queries, keys and values interleaved head by head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from joulemark.errors import BadInput
from joulemark_exporter import configuration
from joulemark_exporter.families import Config, Linear, Placement, Tensor, Value, head, norm
from joulemark_exporter.weights import Float32

MODEL_TYPES = ("bloom",)
PREFIX = "transformer."
LAYERS = "transformer.h"
EMBEDDING = "transformer.word_embeddings.weight"
TIED = True
GGUF = "bloom"
RETURNS_TUPLE = True
"""A block returns (states, attention), where the other classes return the states."""
LINEARS = (
    Linear("self_attention.query_key_value", "attn_qkv", 0),
    Linear("self_attention.dense", "attn_output", 1),
    Linear("mlp.dense_h_to_4h", "ffn_up", 2),
    Linear("mlp.dense_4h_to_h", "ffn_down", 3),
)
TRAINED_CONTEXT = 2048
"""BLOOM was trained with 2048 positions; its config.json states them as `seq_length`, or not at all."""


def tensors(config: Config) -> tuple[Tensor, ...]:
    """See the contract."""
    width, vocabulary = _width(config), configuration.count(config, "vocab_size")
    found = [
        Tensor(EMBEDDING, (vocabulary, width), Placement("token_embd.weight")),
        *head(config, bool(config.get("tie_word_embeddings", TIED)), width),
    ]
    for name, place in (("word_embeddings_layernorm", "token_embd_norm"), ("ln_f", "output_norm")):
        found += [norm(f"transformer.{name}.{kind}", f"{place}.{kind}", width) for kind in ("weight", "bias")]
    shapes = {
        "attn_qkv": (3 * width, width),
        "attn_output": (width, width),
        "ffn_up": (4 * width, width),
        "ffn_down": (width, 4 * width),
    }
    order = {"attn_qkv": separated(_heads(config), width)}
    for layer in range(_layers(config)):
        source, target = f"{LAYERS}.{layer}", f"blk.{layer}"
        for name, place in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
            found += [norm(f"{source}.{name}.{kind}", f"{target}.{place}.{kind}", width) for kind in ("weight", "bias")]
        for linear in LINEARS:
            shape, place, rows = shapes[linear.role], f"{target}.{linear.role}", order.get(linear.role)
            found.append(Tensor(f"{source}.{linear.name}.weight", shape, Placement(f"{place}.weight", row_order=rows)))
            bias = Placement(f"{place}.bias", row_order=rows, full_precision=True)
            found.append(Tensor(f"{source}.{linear.name}.bias", shape[:1], bias))
    return tuple(found)


def separated(heads: int, width: int) -> NDArray[np.intp]:
    """The order of the fused matrix's rows in GGUF: all queries, all keys, all values, where BLOOM has q, k, v of each head in turn."""
    return np.arange(3 * width, dtype=np.intp).reshape(heads, 3, width // heads).swapaxes(0, 1).reshape(-1)


def metadata(config: Config) -> dict[str, Value]:
    """See the contract. Raises BadInput for variants that llama.cpp's bloom does not compute."""
    if config.get("apply_residual_connection_post_layernorm"):
        raise BadInput("this BLOOM adds its residual after the norm", "llama.cpp's bloom cannot: use the ONNX format")
    return {
        "context_length": configuration.count(config, "seq_length", default=TRAINED_CONTEXT),
        "embedding_length": _width(config),
        "feed_forward_length": 4 * _width(config),
        "block_count": _layers(config),
        "attention.head_count": _heads(config),
        "attention.head_count_kv": _heads(config),
        "attention.layer_norm_epsilon": configuration.real(config, "layer_norm_epsilon", 1e-5),
    }


def generated(config: Config) -> dict[str, Float32]:
    """See the contract."""
    del config
    return {}


def _layers(config: Config) -> int:
    return configuration.count(config, "n_layer", "num_hidden_layers")


def _heads(config: Config) -> int:
    return configuration.count(config, "n_head", "num_attention_heads")


def _width(config: Config) -> int:
    return configuration.count(config, "hidden_size", "n_embed")
