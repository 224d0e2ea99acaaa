"""OPT: learned positions (two more than the context), biases everywhere. llama.cpp has no such architecture: ONNX only."""

from __future__ import annotations

from joulemark.errors import BadInput
from joulemark_exporter import configuration
from joulemark_exporter.families import HEAD, Config, Linear, Tensor, Value
from joulemark_exporter.weights import Float32

MODEL_TYPES = ("opt",)
PREFIX = "model."
LAYERS = "model.decoder.layers"
EMBEDDING = "model.decoder.embed_tokens.weight"
TIED = True
GGUF = ""
LINEARS = (
    Linear("self_attn.q_proj", "attn_q", 0),
    Linear("self_attn.k_proj", "attn_k", 0),
    Linear("self_attn.v_proj", "attn_v", 0),
    Linear("self_attn.out_proj", "attn_output", 1),
    Linear("fc1", "ffn_up", 2),
    Linear("fc2", "ffn_down", 3),
)
POSITION_OFFSET = 2
"""OPT's positions begin at 2 (transformers' OPTLearnedPositionalEmbedding)."""


def tensors(config: Config) -> tuple[Tensor, ...]:
    """See the contract."""
    width, inner = configuration.count(config, "hidden_size"), configuration.count(config, "ffn_dim")
    vocabulary, embedded = (
        configuration.count(config, "vocab_size"),
        configuration.count(config, "word_embed_proj_dim", default=width),
    )
    positions = configuration.count(config, "max_position_embeddings") + POSITION_OFFSET
    found = [
        Tensor(EMBEDDING, (vocabulary, embedded)),
        Tensor("model.decoder.embed_positions.weight", (positions, width)),
    ]
    if not config.get("tie_word_embeddings", TIED):
        found.append(Tensor(HEAD, (vocabulary, embedded)))
    if embedded != width:
        found += [
            Tensor("model.decoder.project_in.weight", (width, embedded)),
            Tensor("model.decoder.project_out.weight", (embedded, width)),
        ]
    if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
        found += _norm("model.decoder.final_layer_norm", width)
    shapes = {
        "attn_q": (width, width),
        "attn_k": (width, width),
        "attn_v": (width, width),
        "attn_output": (width, width),
    }
    shapes |= {"ffn_up": (inner, width), "ffn_down": (width, inner)}
    biased = config.get("enable_bias", True)
    for layer in range(configuration.count(config, "num_hidden_layers")):
        source = f"{LAYERS}.{layer}"
        found += [*_norm(f"{source}.self_attn_layer_norm", width), *_norm(f"{source}.final_layer_norm", width)]
        for linear in LINEARS:
            found.append(Tensor(f"{source}.{linear.name}.weight", shapes[linear.role]))
            if biased:
                found.append(Tensor(f"{source}.{linear.name}.bias", shapes[linear.role][:1]))
    return tuple(found)


def _norm(name: str, width: int) -> list[Tensor]:
    return [Tensor(f"{name}.{kind}", (width,)) for kind in ("weight", "bias")]


def metadata(config: Config) -> dict[str, Value]:
    """Raises BadInput: there is no GGUF of it."""
    del config
    raise BadInput("llama.cpp has no OPT architecture", 'use the ONNX format: format = "onnx" in the recipe')


def generated(config: Config) -> dict[str, Float32]:
    """See the contract."""
    del config
    return {}
