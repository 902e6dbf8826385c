"""DER's distance by the Gram matrix against the literal formula on logits, same hidden states, forward and backward.

    .venv/bin/python benchmarks/der_gram.py [--tokens 512] [--hidden 576] [--vocab 49152]

Prints seconds of each, their ratio, and the relative difference of the two losses (bounded by 1e-4). Single thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import _bench
import torch
from torch import Tensor

from safecl.training.losses import Head, LogitDistance

TOLERANCE = 1e-4  # of the two losses, relative: float32 sums of V terms in another order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight_VD = torch.randn(options.vocab, options.hidden) / options.hidden**0.5
    safe_ND = torch.randn(options.tokens, options.hidden)
    hidden_ND = (safe_ND + 0.1 * torch.randn_like(safe_ND)).requires_grad_()
    logits_NV = safe_ND @ weight_VD.T  # what the literal form stores
    distance = LogitDistance(Head(weight_VD))
    losses: dict[str, float] = {}

    def seconds(name: str, distance: Callable[[], Tensor]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            loss = distance()
            loss.backward()
            taken = time.perf_counter() - start
            losses[name] = float(loss.detach())
            return taken

        return run

    found = _bench.interleaved(
        {
            "Gram": seconds("Gram", lambda: distance(hidden_ND, safe_ND)[0]),
            "literal": seconds("literal", lambda: (hidden_ND @ weight_VD.T - logits_NV).square().sum() / options.vocab),
        },
        options.repeats,
    )
    apart = abs(losses["Gram"] / losses["literal"] - 1)
    row = {
        "tokens": options.tokens, "hidden": options.hidden, "vocabulary": options.vocab,
        "stored numbers a token, literal / Gram": options.vocab / options.hidden,
    }  # fmt: skip
    _bench.faster("der_gram", "DER's distance, forward and backward", found, apart, TOLERANCE, row)


if __name__ == "__main__":
    main()
