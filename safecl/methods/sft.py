"""SFT: supervised fine-tuning on the user rows, the baseline that every other method changes.

    L(theta) = - sum over the global batch's response tokens of log p_theta(y_t | x, y_<t) / their number

Source: Eq. 1 of arXiv 2512.10150 (token mean over the batch is our reading; the paper does not say).
"""

from __future__ import annotations

from safecl.base import Strict
from safecl.methods import Method


class Sft(Method):
    """Cross-entropy on the user rows, nothing else."""

    class Config(Strict):
        pass

    equation = "CE(user)"

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config()
