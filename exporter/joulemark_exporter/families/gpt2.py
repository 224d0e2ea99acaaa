"""GPT-2: learned positions, layer norms with biases, one matrix for queries, keys and values. Its matrices are stored (inputs, outputs)."""

from __future__ import annotations

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
EMBEDDING = "transformer.wte.weight"
LINEARS = (
    Linear("attn.c_attn", "attn_qkv", 0, transposed=True),
    Linear("attn.c_proj", "attn_output", 1, transposed=True),
    Linear("mlp.c_fc", "ffn_up", 2, transposed=True),
    Linear("mlp.c_proj", "ffn_down", 3, transposed=True),
)


def _tensors(config: Config) -> tuple[Tensor, ...]:
    width, positions = _width(config), _positions(config)
    vocabulary, inner = configuration.count(config, "vocab_size"), _inner(config)
    found = [
        Tensor(EMBEDDING, (vocabulary, width), Placement("token_embd.weight")),
        Tensor("transformer.wpe.weight", (positions, width), Placement("position_embd.weight", full_precision=True)),
        *affine_norm("transformer.ln_f", "output_norm", width),
        *head(config, FAMILY.is_tied(config), width),
    ]
    shapes = {
        "attn_qkv": (width, 3 * width),
        "attn_output": (width, width),
        "ffn_up": (width, inner),
        "ffn_down": (inner, width),
    }
    for layer in range(FAMILY.layer_count(config)):
        source, target = f"{LAYERS}.{layer}", f"blk.{layer}"
        found += affine_norm(f"{source}.ln_1", f"{target}.attn_norm", width)
        found += affine_norm(f"{source}.ln_2", f"{target}.ffn_norm", width)
        for linear in LINEARS:
            name, place, shape = f"{source}.{linear.name}", f"{target}.{linear.role}", shapes[linear.role]
            found.append(Tensor(f"{name}.weight", shape, Placement(f"{place}.weight", transpose=True)))
            found.append(vector(f"{name}.bias", f"{place}.bias", shape[1]))
    return tuple(found)


def _metadata(config: Config) -> dict[str, Value]:
    activation = config.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        raise BadInput(
            f"this GPT-2 uses {activation}", "llama.cpp's gpt2 has the tanh form of GELU only: use the ONNX format"
        )
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("scale_attn_weights") is False:
        raise BadInput("this GPT-2 scales its attention otherwise", "llama.cpp's gpt2 cannot: use the ONNX format")
    return plain_metadata(config, FAMILY.memory(config), _width(config), _inner(config), _positions(config))


def _width(config: Config) -> int:
    return configuration.count(config, "n_embd", "hidden_size", most=configuration.MOST_WIDTH)


def _positions(config: Config) -> int:
    return configuration.count(config, "n_positions", "max_position_embeddings", "n_ctx")


def _inner(config: Config) -> int:
    return configuration.count(config, "n_inner", default=4 * _width(config), most=configuration.MOST_WIDTH)


FAMILY = Family(
    model_types=("gpt2",),
    prefix="transformer.",
    layers=LAYERS,
    embedding=EMBEDDING,
    linears=LINEARS,
    tied=True,
    gguf="gpt2",
    tensors=_tensors,
    metadata=_metadata,
    context=_positions,
    memory=lambda config: memory_of_all_heads(config, _width(config)),
)
