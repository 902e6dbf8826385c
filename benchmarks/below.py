"""A finetune whose rows are known below the first adapted layer (training/below.py) against one through all layers.

    .venv/bin/python benchmarks/below.py [--model wheel|tiny|FOLDER] [--dtype float32] [--layers 12] [--steps 10]

SFT's steps of 4 rows of the `mini` task on SmolLM2-135M, its last 12 layers adapted. `known` is every finetune of a process
but the first on the same rows, and every epoch but the first. Both begin at the same adapter, on the same batches; the
largest relative difference of a step's loss is printed. CPU time, single thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import _bench
import torch
import train

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of a step's loss, relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="below")
    options = parser.parse_args()
    from safecl import tasks
    from safecl.config import Execution, Lora, Template, Training
    from safecl.stages import finetune
    from safecl.training import batches, loop

    settings: dict[str, Any] = {
        "method": "sft", "params": {}, "lora": Lora(dropout=0.0, last_layers=options.layers).model_dump(),
        "training": Training(epochs=1.0, batch_size=4, learning_rate=1e-3).model_dump(),
        "template": Template().model_dump(), "bos": False, "dtype": options.dtype, "adapter": "continue", "seed": 0,
    }  # fmt: skip
    execution = Execution(engine="torch", micro_batch_size=4, checkpoint_every_s=1e9).model_dump()
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = tasks.load("mini")(None).rows("user", 4 * options.steps, 0)
        batches.write_rows(rows, Path(folder))
        inputs = {"model": train.model_folder(options.model, options.dtype), "rows": Path(folder)}

        def run(name: str) -> float:
            made = finetune.make_run(settings, inputs, execution)
            if made.run.hidden_states.below is None:
                raise SystemExit("nothing lies below: expected fewer --layers than the model has")
            if name == "all layers":
                made.run.hidden_states.below = None
            losses[name] = []
            with tempfile.TemporaryDirectory() as scratch:
                start = time.process_time()
                loop.train(
                    made.method, made.run, Path(scratch), lambda _, __, told: losses[name].append(told["loss"]) or None
                )
                return time.process_time() - start

        loop.REPORT_EVERY_S = 0.0  # each step's loss
        first = run("known")  # nothing is yet
        found = _bench.interleaved(
            {name: lambda name=name: run(name) for name in ("known", "all layers")}, options.repeats
        )
    pairs = zip(losses["known"], losses["all layers"], strict=True)
    apart = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    row = {"dtype": options.dtype, "adapted layers": options.layers, "steps": options.steps, "first, s": first}
    title = "SFT's steps on rows that are known below the first adapted layer"
    _bench.faster(options.name, title, found, apart, TOLERANCE[options.dtype], row)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
