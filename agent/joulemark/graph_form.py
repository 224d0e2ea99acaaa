"""The form of Joulemark's ONNX graphs: what they take and give, and what they say of the model. The exporter writes them, agents run them.

    input_ids, position_ids   (batch, tokens)            int64
    attention_bias            (1, 1, tokens, keys)       float32, added to the scores: 0, or HIDDEN for keys that a token must not see
    key_positions             (keys,)                    int64: the position that each key stands at
    last_keys                 (batch,)                   int32: where in the memory each row's last token goes
    total_keys                (1,)                       int32: keys of the longest row
    logit_positions           (wanted,)                  int64: the tokens whose logits are wanted
    past_key_values.N.key / .value   (batch, key heads, capacity, head size) float32
    → logits (batch, wanted, vocabulary) · present.N.key / .value, as large as the past, or as `total_keys` where that is more

The memory grows in place where present is bound to the buffer of past. Metadata are JSON values under `joulemark.`. Knows no engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from joulemark.wire import Identifier, Wire

INPUTS = (
    "input_ids",
    "position_ids",
    "attention_bias",
    "key_positions",
    "last_keys",
    "total_keys",
    "logit_positions",
)
PAST, PRESENT, LOGITS = "past_key_values.", "present.", "logits"
HIDDEN = -1e9
"""Added to the score of a key that a token must not see: its weight is then exactly 0."""
PREFIX = "joulemark."


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
