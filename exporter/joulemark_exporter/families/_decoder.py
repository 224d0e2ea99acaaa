"""The layout that LLaMA's descendants share: RMS norms, rotary attention, a gated feed-forward block. Not a plug-in; families build on it.

Shapes are (outputs, inputs), as torch.nn.Linear stores them.
"""

from __future__ import annotations

from dataclasses import dataclass

from joulemark.errors import BadInput
from joulemark_exporter import configuration
from joulemark_exporter.families import Config, Linear, Placement, Tensor, Value, head, norm, rotary_rows
from joulemark_exporter.weights import Float32

PREFIX = "model."
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
    width, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    if config.get("head_dim") is None and width % heads:
        raise BadInput(f"{heads} heads do not divide a width of {width}", "config.json is damaged")
    return Sizes(
        layers=number(config, "num_hidden_layers"),
        width=width,
        inner=number(config, "intermediate_size"),
        heads=heads,
        key_heads=number(config, "num_key_value_heads", default=heads),
        head=number(config, "head_dim", default=width // heads),
        vocabulary=number(config, "vocab_size"),
    )


@dataclass(frozen=True)
class Layout:
    """How a family differs from LLaMA."""

    permuted: bool = False
    """Whether GGUF's rotary embedding pairs other rows (`rotary_rows`)."""
    biased: frozenset[str] = frozenset()
    """Roles that have a bias."""
    norms: tuple[tuple[str, str], ...] = NORMS
    head_norms: bool = False
    """Whether queries and keys are normed head by head."""
    norm_offset: float = 0.0
    """Added to norm weights: Gemma stores them minus one."""
    tied: bool = False


def tensors(config: Config, layout: Layout) -> tuple[Tensor, ...]:
    """All tensors of such a model."""
    size, add = sizes(config), layout.norm_offset
    found = [
        Tensor(EMBEDDING, (size.vocabulary, size.width), Placement("token_embd.weight")),
        norm("model.norm.weight", "output_norm.weight", size.width, add),
        *head(config, layout.tied, size.width),
    ]
    for layer in range(size.layers):
        source, target = f"{LAYERS}.{layer}", f"blk.{layer}"
        found += [
            norm(f"{source}.{name}.weight", f"{target}.{place}.weight", size.width, add) for name, place in layout.norms
        ]
        if layout.head_norms:
            for letter in "qk":
                found.append(
                    norm(
                        f"{source}.self_attn.{letter}_norm.weight",
                        f"{target}.attn_{letter}_norm.weight",
                        size.head,
                        add,
                    )
                )
        for linear in LINEARS:
            found += _linear(f"{source}.{linear.name}", f"{target}.{linear.role}", linear.role, size, layout)
    return tuple(found)


def _linear(source: str, target: str, role: str, size: Sizes, layout: Layout) -> list[Tensor]:
    shape = size.shape(role)
    heads = {"attn_q": size.heads, "attn_k": size.key_heads}.get(role)
    order = rotary_rows(heads, shape[0]) if layout.permuted and heads else None
    found = [Tensor(f"{source}.weight", shape, Placement(f"{target}.weight", row_order=order))]
    if role in layout.biased:
        place = Placement(f"{target}.bias", row_order=order, full_precision=True)
        found.append(Tensor(f"{source}.bias", (shape[0],), place))
    return found


def metadata(config: Config) -> dict[str, Value]:
    """GGUF's key-values that all of them have, without the architecture's prefix."""
    size = sizes(config)
    values: dict[str, Value] = {
        "block_count": size.layers,
        "context_length": context(config),
        "embedding_length": size.width,
        "feed_forward_length": size.inner,
        "attention.head_count": size.heads,
        "attention.head_count_kv": size.key_heads,
        "attention.layer_norm_rms_epsilon": configuration.real(config, "rms_norm_eps"),
    }
    if config.get("head_dim") is not None:
        values |= {"attention.key_length": size.head, "attention.value_length": size.head}
    return values | configuration.rope_metadata(configuration.rope(config))


def context(config: Config) -> int:
    """Positions that the model was trained for."""
    return configuration.count(config, "max_position_embeddings")


def rope_tensor(config: Config) -> dict[str, Float32]:
    """The rotary factors of llama3's scaling, which GGUF holds as a tensor."""
    factors = configuration.rope_factors(configuration.rope(config), sizes(config).head)
    return {} if factors is None else {"rope_freqs.weight": factors}
