"""Checkpoints of a finetune, as safetensors and JSON: adapter, optimizer state, a method's own state (`run.kept`),
and step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from safecl.training.run import Run


def save(run: Run, scratch: Path, **counts: float) -> None:
    """Write `scratch/checkpoint-<step>` atomically and remove older checkpoints. All ranks call it; rank 0 writes."""
    from safetensors.torch import save_file

    state, adapter = run.engine.state(), run.values()
    if run.rank == 0:
        scratch.mkdir(parents=True, exist_ok=True)
        temporary = scratch / f"tmp-{os.getpid()}-{run.step}"
        temporary.mkdir()
        for name, tensors in (("adapter", adapter), ("optimizer", state), ("kept", run.kept)):
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, str(temporary / f"{name}.safetensors"))
        (temporary / "state.json").write_text(json.dumps({"step": run.step, "num_steps": run.num_steps, **counts}))
        final = scratch / f"checkpoint-{run.step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        for old in [*scratch.glob("checkpoint-*"), *scratch.glob("tmp-*")]:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
    if run.world_size > 1:
        dist.barrier()


def newest(scratch: Path) -> Path | None:
    """The newest complete checkpoint in `scratch`, or None."""
    return max(scratch.glob("checkpoint-*"), default=None)


def restore(run: Run, scratch: Path) -> dict[str, Any] | None:
    """Load the newest checkpoint into model, engine and `run.step`. Returns its state.json, or None without a
    checkpoint.

    Raises:
        RuntimeError: the checkpoint is of a run with another number of steps.
    """
    from safetensors.torch import load_file

    folder = newest(scratch)
    if folder is None:
        return None
    saved: dict[str, Any] = json.loads((folder / "state.json").read_text())
    if saved["num_steps"] != run.num_steps:
        raise RuntimeError(f"{folder}: is of a run of {saved['num_steps']} steps, expected {run.num_steps}; remove it")
    adapter = load_file(str(folder / "adapter.safetensors"), device=run.device)
    for name, p in run.parameters().items():
        run.engine.set_full_parameter(p, adapter[name])
    run.engine.load_state(load_file(str(folder / "optimizer.safetensors")))
    run.kept = load_file(str(folder / "kept.safetensors"), device=run.device)
    run.step = int(saved["step"])
    return saved
