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

import torch

from safecl.config import Lora
from safecl.stages.fisher import RowSquares
from safecl.training import losses, model


def small() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = model.load(options.model, "bfloat16") if options.model else small()
    peft_model = model.with_adapter(base, Lora(dropout=0.0).model_dump(), seed=0)
    with torch.no_grad():
        for name, p in model.factors(peft_model).items():
            if "lora_B" in name:
                p.normal_(0, 0.02)
    forward, head = model.HiddenStates(peft_model).eval(), losses.head_of(base)
    ids_BT = torch.randint(5, 40_000, (options.rows, options.tokens))
    positions = torch.arange(options.tokens)[None]

    def backward(part_BT: torch.Tensor) -> None:
        hidden_BTD = forward(part_BT, torch.ones_like(part_BT), positions.expand(len(part_BT), -1))[:, :-1]
        losses.cross_entropy_sum(hidden_BTD.flatten(0, 1), head, part_BT[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]

    named = model.factors(peft_model)
    looped = {name: torch.zeros_like(p) for name, p in named.items()}
    start = time.perf_counter()
    for row in ids_BT:
        peft_model.zero_grad()
        backward(row[None])
        for name, p in named.items():
            assert p.grad is not None
            looped[name] += p.grad.square()
    slow = time.perf_counter() - start
    peft_model.zero_grad()
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    squares = RowSquares(peft_model, total)
    start = time.perf_counter()
    for part_BT in ids_BT.split(options.batch):
        backward(part_BT)
    fast = time.perf_counter() - start
    squares.close()
    sizes = [(float((total[n] - looped[n]).norm() / looped[n].norm())) for n in named]
    print(
        f"loop {slow:.2f} s   batch of {options.batch} {fast:.2f} s   ratio {slow / fast:.1f}x   difference {max(sizes):.1e}"
    )


if __name__ == "__main__":
    main()
