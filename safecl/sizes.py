"""Sizes from which a stage's work is estimated: a model's parameters and shape, the rows and tokens of a data set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

TYPICAL_PARAMETERS, TYPICAL_LAYERS, TYPICAL_ROWS = 1e9, 30, 500
TEMPLATE_TOKENS = 12  # tokens of the template around a prompt
GUARD_TOKENS = 25  # tokens of the template of a guard that is trained here


class Size(NamedTuple):
    """Size of a model: number of parameters, number of layers, and width of a hidden state (0: unknown)."""

    parameters: float
    layers: int = TYPICAL_LAYERS
    hidden: int = 0

    @property
    def width(self) -> float:
        """`hidden`, or if that is unknown, the width of a common shape with as many parameters and layers."""
        return self.hidden or math.sqrt(self.parameters / (12 * self.layers))


class Length(NamedTuple):
    """Number of rows of a data set, and mean numbers of tokens of a row's prompt and answer."""

    rows: int
    prompt: float
    answer: float


TYPICAL = Length(TYPICAL_ROWS, 60, 100)


def shape(config: Mapping[str, Any]) -> Size:
    """Size of a decoder, from its config.json (layout of Llama, Mistral and Gemma-2)."""
    text = config.get("text_config", config)
    width, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
    head = text.get("head_dim") or width // heads
    attention = width * head * (2 * heads + 2 * text.get("num_key_value_heads", heads))
    parameters = layers * (attention + 3 * width * text["intermediate_size"]) + text["vocab_size"] * width
    return Size(parameters, layers, width)
