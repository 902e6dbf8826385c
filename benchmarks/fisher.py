"""The Fisher information row by row: one backward over a batch with per-row gradients, against a loop over rows.

    .venv/bin/python benchmarks/fisher.py [--model FOLDER] [--rows 32] [--tokens 48] [--batch 8]

Without a model: a random Llama of SmolLM2-135M's width and a quarter of its depth. Prints seconds of each, their ratio and
the largest relative difference. Single thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import _bench
import torch

from safecl.config import Lora
from safecl.stages.fisher import RowSquares
from safecl.training import attention, batches, losses, model
from safecl.training.tokens import Encoded

TOLERANCE = 1e-3  # of a factor's squares, relative: float32 products of other shapes


def small() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    attention.register()
    made = LlamaForCausalLM(config).requires_grad_(False)
    made.set_attn_implementation(attention.NAME)  # as `model.load` does
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = model.load(options.model, "float32") if options.model else small()
    peft_model = model.with_adapter(base, Lora(dropout=0.0).model_dump(), seed=0)
    with torch.no_grad():
        for name, p in model.factors(peft_model).items():
            if "lora_B" in name:
                p.normal_(0, 0.02)
    forward, head = model.HiddenStates(peft_model, fused=False).eval(), losses.head_of(base)
    chance = torch.randint(5, 40_000, (options.rows, options.tokens))
    rows = [Encoded(str(i), ids, 1) for i, ids in enumerate(chance.tolist())]

    def backward(part: list[Encoded], squares: RowSquares | None = None) -> None:
        batch = batches.collate(part, range(len(part)), [0] * len(part), 1, part[0], "cpu")
        if squares is not None:
            squares.lengths = batch.lengths
        mask_P, targets_N = losses.targets(batch.labels_P)
        losses.cross_entropy_sum(forward(batch)[mask_P], head, targets_N).backward()  # type: ignore[no-untyped-call]

    named = model.factors(peft_model)
    totals: dict[str, dict[str, torch.Tensor]] = {}

    def loop() -> float:
        totals["loop"] = {name: torch.zeros_like(p) for name, p in named.items()}
        start = time.perf_counter()
        for row in rows:
            peft_model.zero_grad()
            backward([row])
            for name, p in named.items():
                assert p.grad is not None
                totals["loop"][name] += p.grad.square()
        return time.perf_counter() - start

    def batched() -> float:
        peft_model.zero_grad()
        totals["batched"] = {name: torch.zeros_like(p) for name, p in named.items()}
        squares = RowSquares(peft_model, totals["batched"])
        start = time.perf_counter()
        for first in range(0, len(rows), options.batch):
            backward(rows[first : first + options.batch], squares)
        taken = time.perf_counter() - start
        squares.close()
        for p in named.values():
            p.requires_grad_()  # which it turns off
        return taken

    found = _bench.interleaved({"batched": batched, "loop": loop}, options.repeats)
    pairs = [(totals["batched"][name], totals["loop"][name]) for name in named]
    apart = max(float((fast - slow).norm() / slow.norm()) for fast, slow in pairs)
    row = {"rows": options.rows, "tokens a row": options.tokens, "rows a batch": options.batch}
    _bench.faster("fisher", "Fisher information of each row", found, apart, TOLERANCE, row)


if __name__ == "__main__":
    main()
