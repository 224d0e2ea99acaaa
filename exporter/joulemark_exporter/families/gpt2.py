"""GPT-2: learned positions, layer norms with biases, one matrix for queries, keys and values. Its matrices are stored (inputs, outputs)."""

from __future__ import annotations

from joulemark.errors import BadInput
from joulemark_exporter import configuration
from joulemark_exporter.families import Config, Linear, Placement, Tensor, Value, head, norm
from joulemark_exporter.weights import Float32

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."
LAYERS = "transformer.h"
EMBEDDING = "transformer.wte.weight"
TIED = True
GGUF = "gpt2"
LINEARS = (
    Linear("attn.c_attn", "attn_qkv", 0, transposed=True),
    Linear("attn.c_proj", "attn_output", 1, transposed=True),
    Linear("mlp.c_fc", "ffn_up", 2, transposed=True),
    Linear("mlp.c_proj", "ffn_down", 3, transposed=True),
)


def tensors(config: Config) -> tuple[Tensor, ...]:
    """See the contract."""
    width, positions = configuration.count(config, "n_embd", "hidden_size"), _positions(config)
    vocabulary, inner = configuration.count(config, "vocab_size"), _inner(config)
    found = [
        Tensor(EMBEDDING, (vocabulary, width), Placement("token_embd.weight")),
        Tensor("transformer.wpe.weight", (positions, width), Placement("position_embd.weight", full_precision=True)),
        norm("transformer.ln_f.weight", "output_norm.weight", width),
        norm("transformer.ln_f.bias", "output_norm.bias", width),
        *head(config, bool(config.get("tie_word_embeddings", TIED)), width),
    ]
    outputs = {
        "attn_qkv": (width, 3 * width),
        "attn_output": (width, width),
        "ffn_up": (width, inner),
        "ffn_down": (inner, width),
    }
    for layer in range(_layers(config)):
        source, target = f"{LAYERS}.{layer}", f"blk.{layer}"
        for name, place in (("ln_1", "attn_norm"), ("ln_2", "ffn_norm")):
            found += [norm(f"{source}.{name}.{kind}", f"{target}.{place}.{kind}", width) for kind in ("weight", "bias")]
        for linear in LINEARS:
            shape, place = outputs[linear.role], f"{target}.{linear.role}"
            found.append(Tensor(f"{source}.{linear.name}.weight", shape, Placement(f"{place}.weight", transpose=True)))
            found.append(norm(f"{source}.{linear.name}.bias", f"{place}.bias", shape[1]))
    return tuple(found)


def metadata(config: Config) -> dict[str, Value]:
    """See the contract. Raises BadInput for variants that llama.cpp's gpt2 does not compute."""
    activation = config.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        raise BadInput(
            f"this GPT-2 uses {activation}", "llama.cpp's gpt2 has the tanh form of GELU only: use the ONNX format"
        )
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("scale_attn_weights") is False:
        raise BadInput("this GPT-2 scales its attention otherwise", "llama.cpp's gpt2 cannot: use the ONNX format")
    return {
        "block_count": _layers(config),
        "context_length": _positions(config),
        "embedding_length": configuration.count(config, "n_embd", "hidden_size"),
        "feed_forward_length": _inner(config),
        "attention.head_count": configuration.count(config, "n_head", "num_attention_heads"),
        "attention.layer_norm_epsilon": configuration.real(config, "layer_norm_epsilon", 1e-5),
    }


def generated(config: Config) -> dict[str, Float32]:
    """See the contract."""
    del config
    return {}


def _layers(config: Config) -> int:
    return configuration.count(config, "n_layer", "num_hidden_layers")


def _positions(config: Config) -> int:
    return configuration.count(config, "n_positions", "max_position_embeddings", "n_ctx")


def _inner(config: Config) -> int:
    return configuration.count(config, "n_inner", default=4 * configuration.count(config, "n_embd", "hidden_size"))
