"""DER's distance by the Gram matrix against the literal formula on logits, same hidden states, forward and backward.

    .venv/bin/python benchmarks/der_gram.py [--tokens 512] [--hidden 576] [--vocab 49152]

Prints seconds of each, their ratio, and the relative difference of the two losses. Single thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from safecl.training.losses import gram_distance


def seconds(run: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    """(median seconds, value) of a forward and backward."""
    times, value = [], 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        loss = run()
        loss.backward()
        times.append(time.perf_counter() - start)
        value = float(loss.detach())
    return statistics.median(times), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight_VD = torch.randn(options.vocab, options.hidden) / options.hidden**0.5
    safe_ND = torch.randn(options.tokens, options.hidden)
    hidden_ND = (safe_ND + 0.1 * torch.randn_like(safe_ND)).requires_grad_()
    logits_NV = safe_ND @ weight_VD.T  # what the literal form stores
    gram_DD = weight_VD.T @ weight_VD

    def literal() -> Tensor:
        return (hidden_ND @ weight_VD.T - logits_NV).square().sum() / options.vocab

    def by_gram() -> Tensor:
        return gram_distance(hidden_ND, safe_ND, gram_DD, options.vocab)

    slow, first = seconds(literal, options.repeats)
    fast, second = seconds(by_gram, options.repeats)
    print(
        f"literal {slow:.4f} s   gram {fast:.4f} s   ratio {slow / fast:.1f}x   relative difference {abs(first / second - 1):.1e}"
    )
    print(
        f"stored per token: logits {options.vocab} numbers, hidden state {options.hidden}: {options.vocab / options.hidden:.0f}x"
    )


if __name__ == "__main__":
    main()
