"""The two forms of ONNX graphs: what they take and give, and what they say of the model. The exporter writes them, agents run them.

**Growing**, of torch's exporter: the memory grows in place where present is bound to the buffer of past, and masks are the caller's.

    input_ids, position_ids   (batch, tokens)            int64
    attention_bias            (1, 1, tokens, keys)       float32, added to the scores: 0, or HIDDEN for keys that a token must not see
    key_positions             (keys,)                    int64: the position that each key stands at
    last_keys                 (batch,)                   int32: where in the memory each row's last token goes
    total_keys                (1,)                       int32: keys of the longest row
    logit_positions           (wanted,)                  int64: the tokens whose logits are wanted
    past_key_values.N.key / .value   (batch, key heads, capacity, head size) float32
    → logits (batch, wanted, vocabulary) · present.N.key / .value, as large as the past, or as `total_keys` where that is more

**Rebuilt**, of optimum: every call copies the past, and a token sees all keys before it that the mask shows.

    input_ids                 (batch, tokens)            int64
    attention_mask            (batch, past + tokens)     int64: 1 for keys that are seen
    position_ids              (batch, tokens)            int64; some families lack it: the first key then stands at position 0
    past_key_values.N.key / .value   (batch, key heads, past, head size) float32
    → logits (batch, tokens, vocabulary) · present.N.key / .value (batch, key heads, past + tokens, head size)

Metadata of both are JSON values under `joulemark.`. Knows no engine.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import Field

from joulemark.wire import Identifier, Wire

GROWING_INPUTS = (
    "input_ids",
    "position_ids",
    "attention_bias",
    "key_positions",
    "last_keys",
    "total_keys",
    "logit_positions",
)
REBUILT_INPUTS = ("input_ids", "attention_mask")
POSITIONS = "position_ids"
"""What a rebuilt graph may take beside them."""
PAST, PRESENT, LOGITS = "past_key_values.", "present.", "logits"
HIDDEN = -1e9
"""Added to the score of a key that a token must not see: its weight is then exactly 0."""
PREFIX = "joulemark."

Form = Literal["growing", "rebuilt"]
COPIES: Mapping[Form, int] = {"growing": 1, "rebuilt": 4}
"""How often a position's keys and values are reckoned to be in memory. Rebuilt: two are there while one is copied, and what was freed is
too short for the next (SmolLM2-135M on onnxruntime 1.32 grew by 4.4 copies, the prompt's logits included)."""


def form_of(inputs: Collection[str]) -> Form | None:
    """The form of a graph by the names of its inputs; None where it has neither."""
    others = {name for name in inputs if not name.startswith(PAST)}
    if len(others) == len(inputs):
        return None
    if others == set(GROWING_INPUTS):
        return "growing"
    return "rebuilt" if others - {POSITIONS} == set(REBUILT_INPUTS) else None


class GraphFacts(Wire):
    """What a graph says of its model, with bounds."""

    architecture: Identifier
    precision: Identifier
    quantization: Identifier
    parameters: Annotated[int, Field(ge=1)]
    context_tokens: Annotated[int, Field(ge=1, le=1 << 27)]
    vocabulary: Annotated[int, Field(ge=1, le=1 << 24)]
    end_tokens: Annotated[tuple[int, ...], Field(max_length=1000)]
    """Tokens that end a generation."""


def to_metadata(facts: GraphFacts) -> dict[str, str]:
    """The metadata of a graph file."""
    return {f"{PREFIX}{name}": json.dumps(value) for name, value in facts.model_dump(mode="json").items()}


def from_metadata(metadata: Mapping[str, str]) -> GraphFacts:
    """What the metadata of a graph file say. Raises ValueError or RecursionError where that is not what it must be."""
    stated = {name.removeprefix(PREFIX): text for name, text in metadata.items() if name.startswith(PREFIX)}
    return GraphFacts.model_validate_json(json.dumps({name: json.loads(text) for name, text in stated.items()}))
