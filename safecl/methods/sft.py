"""SFT: supervised fine-tuning on the user rows. It is the baseline that every other method changes.

    L(theta) = - sum over the global batch's response tokens of log p_theta(y_t | x, y_<t) / their number

Source: arXiv 2512.10150, section 4. The paper names SFT and gives no equation of its own. The first term of its EWC,
LwF and DER (section 4.1) is this loss. The mean over the batch's tokens is our reading; the paper does not say.
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
