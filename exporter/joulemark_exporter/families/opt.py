"""OPT: learned positions (two more than the context), biases everywhere. llama.cpp has no such architecture: ONNX only."""

from __future__ import annotations

from joulemark.errors import BadInput
from joulemark_exporter import configuration
from joulemark_exporter.families import HEAD, Config, Family, Linear, Tensor, Value, memory_of_all_heads

LAYERS = "model.decoder.layers"
EMBEDDING = "model.decoder.embed_tokens.weight"
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


def _tensors(config: Config) -> tuple[Tensor, ...]:
    width, inner = (
        configuration.count(config, "hidden_size", most=configuration.MOST_WIDTH),
        configuration.count(config, "ffn_dim", most=configuration.MOST_WIDTH),
    )
    vocabulary, embedded = (
        configuration.count(config, "vocab_size"),
        configuration.count(config, "word_embed_proj_dim", default=width, most=configuration.MOST_WIDTH),
    )
    found = [
        Tensor(EMBEDDING, (vocabulary, embedded)),
        Tensor("model.decoder.embed_positions.weight", (_context(config) + POSITION_OFFSET, width)),
    ]
    if not FAMILY.is_tied(config):
        found.append(Tensor(HEAD, (vocabulary, embedded)))
    if embedded != width:
        found += [
            Tensor("model.decoder.project_in.weight", (width, embedded)),
            Tensor("model.decoder.project_out.weight", (embedded, width)),
        ]
    if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
        found += _norm("model.decoder.final_layer_norm", width)
    shapes = {"ffn_up": (inner, width), "ffn_down": (width, inner)}
    biased = config.get("enable_bias", True)
    for layer in range(FAMILY.layer_count(config)):
        source = f"{LAYERS}.{layer}"
        found += [*_norm(f"{source}.self_attn_layer_norm", width), *_norm(f"{source}.final_layer_norm", width)]
        for linear in LINEARS:
            shape = shapes.get(linear.role, (width, width))
            found.append(Tensor(f"{source}.{linear.name}.weight", shape))
            if biased:
                found.append(Tensor(f"{source}.{linear.name}.bias", shape[:1]))
    return tuple(found)


def _norm(name: str, width: int) -> list[Tensor]:
    return [Tensor(f"{name}.{kind}", (width,)) for kind in ("weight", "bias")]


def _metadata(config: Config) -> dict[str, Value]:
    del config
    raise BadInput("llama.cpp has no OPT architecture", 'use the ONNX format: [writer] use = "onnx"')


def _context(config: Config) -> int:
    return configuration.count(config, "max_position_embeddings")


def _width(config: Config) -> int:
    return configuration.count(config, "hidden_size", most=configuration.MOST_WIDTH)


FAMILY = Family(
    model_types=("opt",),
    prefix="model.",
    layers=LAYERS,
    embedding=EMBEDDING,
    linears=LINEARS,
    tied=True,
    gguf="",
    tensors=_tensors,
    metadata=_metadata,
    context=_context,
    memory=lambda config: memory_of_all_heads(config, _width(config)),
)
