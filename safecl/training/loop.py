"""The training loop, top to bottom. run.py says what a method may use of it. It does not know Ray.

One optimizer step:

    batch = this rank's part of the global batch
    method.before_step -> for each micro-batch: backward(method.loss) -> method.after_backward -> clip, AdamW, clear
    -> method.after_step

Schedule, order, draws and dropout depend only on (seed, step). So a run resumed from a checkpoint (checkpoints.py)
continues bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecl.config import Training
from safecl.training import batches, checkpoints
from safecl.training.model import norm
from safecl.training.run import Run

Report = Callable[[int, int, dict[str, float]], bool | None]  # see store.Context
REPORT_EVERY_S = 0.3


def learning_rate(config: Training, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up over the first `warmup_ratio` of the steps, then
    `schedule`. With `warmup_from_zero` it equals Hugging Face's schedule of the same name (`constant`:
    constant_with_warmup)."""
    warm = math.ceil(config.warmup_ratio * num_steps)
    if step < warm:
        return config.learning_rate * (step + (not config.warmup_from_zero)) / warm
    done = (step - warm) / max(1, num_steps - warm)
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "linear":
        return config.learning_rate * (1 - done)
    least = config.min_rate if config.schedule == "cosine_with_min_lr" else 0.0
    return config.learning_rate * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class Outcome:
    """The result of training, in numbers. `response_tokens` counts response tokens of the user batches, `tokens` all
    their tokens."""

    steps: int
    final_loss: float
    response_tokens: int
    tokens: int
    seconds: float  # in this attempt
    tokens_per_s: float  # of all tokens, in this attempt
    decayed: float  # fraction of the starting factors that weight decay alone removed, in [0, 1]
    norm_start: float  # L2 norm of the LoRA factors
    norm_end: float


def train(
    method: Any,
    run: Run,
    scratch: Path,
    report: Report | None = None,
    checkpoint_every_s: float = 60.0,
    after_step: Callable[[int], None] | None = None,
) -> Outcome:
    """Train `run.model`'s adapter in place, from the newest checkpoint in `scratch` if there is one.

    Rank 0 writes `scratch/curves.jsonl`, one line per step. A checkpoint is written every `checkpoint_every_s`
    seconds, and when `report` asks for one by returning true. After each checkpoint `report` gets the metric
    `checkpoint` with its step. `after_step` is for tests.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    config = run.config
    order = batches.order(run.seed, len(run.rows), config.batch_size, config.epochs, config.shuffle)
    run.num_steps = len(order)
    saved = checkpoints.restore(run, scratch)
    norm_start = saved["norm_start"] if saved else norm(list(run.values().values()))
    response_tokens, tokens = (saved["response_tokens"], saved["tokens"]) if saved else (0, 0)
    loss = saved["loss"] if saved else math.nan
    tokens_before = tokens
    method.prepare(run)
    run.hidden_states.train()
    curves = _open_curves(scratch, run.step) if run.rank == 0 else None
    started = checkpointed = time.monotonic()
    reported = 0.0
    wanted = False  # `report` asked for a checkpoint
    while run.step < run.num_steps:
        run.metrics, run.shared = {}, {}
        run.indices = order[run.step]
        batch = run.share(run.indices, run.step)
        run.num_parts = len(batch.parts)
        method.before_step(run, batch)
        for part, last in run.each_part(batch):
            value = method.loss(run, part)
            run.log("loss", value.detach())
            run.engine.backward(value, last)
        method.after_backward(run, batch)
        rate = learning_rate(config, run.step, run.num_steps)
        grad_norm = run.engine.step(rate)
        method.after_step(run)
        run.step += 1

        # One small all-reduce per step: metrics, and rank 0's decision whether all ranks write a checkpoint now.
        names = sorted(run.metrics)
        due = run.rank == 0 and (wanted or time.monotonic() - checkpointed >= checkpoint_every_s)
        *sums, due_now = run.sum_over_ranks([run.metrics[name] for name in names] + [float(due)])
        line = {"step": run.step, **dict(zip(names, sums, strict=True))}
        line.update({name: float(value) for name, value in run.shared.items()})
        line.update(learning_rate=rate, grad_norm=float(grad_norm), response_tokens=batch.num_targets)
        loss = line["loss"]
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {run.step}: the loss is {loss}, not finite; lower learning_rate")
        response_tokens += batch.num_targets
        tokens += sum(len(run.rows[i].ids) for i in run.indices)
        if curves is not None:
            curves.write(json.dumps(line) + "\n")
            curves.flush()
            if report is not None and (time.monotonic() - reported >= REPORT_EVERY_S or run.step == run.num_steps):
                reported = time.monotonic()
                told = {k: v for k, v in line.items() if k != "step"}
                wanted = bool(report(run.step, run.num_steps, told)) or wanted
        if due_now and run.step < run.num_steps:
            checkpoints.save(
                run, scratch, norm_start=norm_start, response_tokens=response_tokens, tokens=tokens, loss=loss
            )
            checkpointed, wanted = time.monotonic(), False
            if run.rank == 0 and report is not None:
                report(run.step, run.num_steps, {"checkpoint": float(run.step)})
        if after_step is not None:
            after_step(run.step)
    if curves is not None:
        curves.close()
    run.engine.release()
    seconds = time.monotonic() - started
    kept = math.prod(1 - learning_rate(config, s, run.num_steps) * config.weight_decay for s in range(run.num_steps))
    return Outcome(
        steps=run.num_steps,
        final_loss=loss,
        response_tokens=response_tokens,
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=(tokens - tokens_before) / max(seconds, 1e-9),
        decayed=1 - kept,
        norm_start=norm_start,
        norm_end=norm(list(run.values().values())),
    )


def _open_curves(scratch: Path, step: int) -> Any:
    """Remove steps after the checkpoint from curves.jsonl and open it to append, so that each step is in it once."""
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "curves.jsonl"
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                known = json.loads(line)["step"] <= step
            except (ValueError, KeyError):  # an incomplete line of a killed process
                known = False
            kept += [line + "\n"] if known else []
    temporary = scratch / "curves.tmp"
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
    return path.open("a")
