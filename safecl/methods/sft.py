"""SFT: supervised fine-tuning on the user rows, the baseline that every other method changes.

    L(theta) = - sum over the global batch's response tokens of log p_theta(y_t | x, y_<t) / their number

Source: arXiv 2512.10150, section 4, which names it and writes no equation of its own; its first term in EWC, LwF and DER
(section 4.1) is this. A token mean over the batch is our reading; the paper does not say.
"""

from __future__ import annotations

from safecl.base import Strict
from safecl.methods import Method


class Sft(Method):
    """Cross-entropy on the user rows, nothing else."""

    class Config(Strict):
        pass

    source = "arXiv 2512.10150, section 4"
    equation = "CE(user)"

    @classmethod
    def neutral(cls) -> Config:
        return cls.Config()
