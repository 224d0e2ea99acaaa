"""The layout that LLaMA's descendants share: RMS norms, rotary attention, a gated feed-forward block. Not a plug-in; families build on it.

Shapes are (outputs, inputs), as torch.nn.Linear stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from joulemark.errors import BadInput
from joulemark_exporter import configuration
from joulemark_exporter.families import (
    Config,
    Family,
    Linear,
    Memory,
    Placement,
    Tensor,
    Value,
    head,
    rotary_rows,
    vector,
    with_defaults,
)
from joulemark_exporter.weights import Float32

LAYERS = "model.layers"
EMBEDDING = "model.embed_tokens.weight"
LINEARS = (
    Linear("self_attn.q_proj", "attn_q", 0),
    Linear("self_attn.k_proj", "attn_k", 0),
    Linear("self_attn.v_proj", "attn_v", 0),
    Linear("self_attn.o_proj", "attn_output", 1),
    Linear("mlp.gate_proj", "ffn_gate", 2),
    Linear("mlp.up_proj", "ffn_up", 2),
    Linear("mlp.down_proj", "ffn_down", 3),
)
NORMS = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"))
GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Layout:
    """How a family differs from the plain layout. `defaults` are those of its configuration class, for keys that config.json may omit."""

    model_types: tuple[str, ...]
    gguf: str
    class_name: str
    activation: str = "silu"
    permuted: bool = False
    """Whether GGUF's rotary embedding pairs other rows (`rotary_rows`)."""
    biased: Callable[[Config], frozenset[str]] = lambda _: frozenset()
    """Roles that have a bias."""
    norms: tuple[tuple[str, str], ...] = NORMS
    head_norms: bool = False
    """Whether queries and keys are normed head by head."""
    norm_offset: float = 0.0
    """Added to norm weights: Gemma stores them minus one."""
    tied: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    check: Callable[[Config], None] = lambda _: None
    """Raises BadInput for variants that llama.cpp computes otherwise."""
    more_metadata: Callable[[Config], dict[str, Value]] = lambda _: {}
    context: Callable[[Config], int] = lambda config: configuration.count(config, "max_position_embeddings")
    generated: Callable[[Config], dict[str, Float32]] = lambda _: {}
    more_from_gguf: Callable[[Config], Config] = lambda _: {}


@dataclass(frozen=True)
class Sizes:
    """The numbers that every shape follows from."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int

    def shape(self, role: str) -> tuple[int, int]:
        """(outputs, inputs) of a linear."""
        queries, keys = self.heads * self.head, self.key_heads * self.head
        shapes = {
            "attn_q": (queries, self.width),
            "attn_k": (keys, self.width),
            "attn_v": (keys, self.width),
            "attn_output": (self.width, queries),
            "ffn_gate": (self.inner, self.width),
            "ffn_up": (self.inner, self.width),
            "ffn_down": (self.width, self.inner),
        }
        return shapes[role]


def sizes(config: Config) -> Sizes:
    """Read from config.json. Raises BadInput."""
    number = configuration.count
    wide = configuration.MOST_WIDTH
    width, heads = number(config, "hidden_size", most=wide), number(config, "num_attention_heads", most=wide)
    stated = config.get("head_dim") is not None
    head = number(config, "head_dim", most=wide // heads) if stated else configuration.head_size(width, heads)
    if head % 2:
        raise BadInput(f"a rotary embedding needs heads of an even size, these have {head}", "config.json is damaged")
    return Sizes(
        layers=number(config, "num_hidden_layers", most=configuration.MOST_LAYERS),
        width=width,
        inner=number(config, "intermediate_size", most=wide),
        heads=heads,
        key_heads=number(config, "num_key_value_heads", default=heads, most=heads),
        head=head,
        vocabulary=number(config, "vocab_size"),
    )


def family(layout: Layout) -> Family:
    """The family of a layout."""

    def full(config: Config) -> Config:
        return with_defaults(config, layout.defaults)

    def memory(config: Config) -> Memory:
        size = sizes(full(config))
        return Memory(size.layers, size.key_heads, size.head)

    def from_gguf(config: Config) -> Config:
        about = {"architectures": [layout.class_name], "model_type": layout.model_types[0], "attention_bias": False}
        return {
            **about,
            "hidden_act": layout.activation,
            "hidden_activation": layout.activation,
            **layout.more_from_gguf(config),
        }

    return Family(
        model_types=layout.model_types,
        prefix="model.",
        layers=LAYERS,
        embedding=EMBEDDING,
        linears=LINEARS,
        tied=layout.tied,
        gguf=layout.gguf,
        tensors=lambda config: _tensors(full(config), layout),
        metadata=lambda config: _metadata(full(config), layout),
        context=layout.context,
        memory=memory,
        generated=layout.generated,
        from_gguf=from_gguf,
    )


def _tensors(config: Config, layout: Layout) -> tuple[Tensor, ...]:
    size, add = sizes(config), layout.norm_offset
    biased = layout.biased(config)
    found = [
        Tensor(EMBEDDING, (size.vocabulary, size.width), Placement("token_embd.weight")),
        vector("model.norm.weight", "output_norm.weight", size.width, add),
        *head(config, bool(config.get("tie_word_embeddings", layout.tied)), size.width),
    ]
    for layer in range(size.layers):
        source, target = f"{LAYERS}.{layer}", f"blk.{layer}"
        for name, place in layout.norms:
            found.append(vector(f"{source}.{name}.weight", f"{target}.{place}.weight", size.width, add))
        for letter in "qk" if layout.head_norms else "":
            name, place = f"{source}.self_attn.{letter}_norm.weight", f"{target}.attn_{letter}_norm.weight"
            found.append(vector(name, place, size.head, add))
        for linear in LINEARS:
            found += _linear(
                f"{source}.{linear.name}", f"{target}.{linear.role}", linear.role, size, layout.permuted, biased
            )
    return tuple(found)


def _linear(source: str, target: str, role: str, size: Sizes, permuted: bool, biased: frozenset[str]) -> list[Tensor]:
    shape = size.shape(role)
    heads = {"attn_q": size.heads, "attn_k": size.key_heads}.get(role)
    order = rotary_rows(heads, shape[0]) if permuted and heads else None
    found = [Tensor(f"{source}.weight", shape, Placement(f"{target}.weight", row_order=order))]
    if role in biased:
        found.append(vector(f"{source}.bias", f"{target}.bias", shape[0], row_order=order))
    return found


def _metadata(config: Config, layout: Layout) -> dict[str, Value]:
    layout.check(config)
    size = sizes(config)
    values: dict[str, Value] = {
        "block_count": size.layers,
        "context_length": layout.context(config),
        "embedding_length": size.width,
        "feed_forward_length": size.inner,
        "attention.head_count": size.heads,
        "attention.head_count_kv": size.key_heads,
        "attention.layer_norm_rms_epsilon": configuration.real(config, "rms_norm_eps"),
    }
    if config.get("head_dim") is not None:
        values |= {"attention.key_length": size.head, "attention.value_length": size.head}
    return {**values, **configuration.rope_metadata(configuration.rope(config)), **layout.more_metadata(config)}


def rope_tensor(config: Config) -> dict[str, Float32]:
    """The rotary factors of llama3's scaling, which GGUF holds as a tensor."""
    factors = configuration.rope_factors(configuration.rope(config), sizes(config).head)
    return {} if factors is None else {"rope_freqs.weight": factors}
