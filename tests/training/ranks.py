"""Real processes for tests: a clean server imports the heavy libraries once and forks each rank from there."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "transformers", "peft", "deepspeed", "transformers.models.llama.modeling_llama"]
)


def _rank(function: Callable[..., None], rank: int, world_size: int, meeting: str, arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank)
    )
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    function(rank, world_size, *arguments)
    torch.distributed.destroy_process_group()


def start(function: Callable[..., None], world_size: int, *arguments: Any) -> list[Any]:
    """Start `function(rank, world_size, *arguments)` on every rank of a gloo group; the processes."""
    meeting = str(Path(tempfile.mkdtemp()) / "meeting")
    processes = [
        CONTEXT.Process(target=_rank, args=(function, rank, world_size, meeting, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any], timeout_s: float = 120.0) -> list[int | None]:
    """Wait; exit codes by rank. A rank that outlives the time is killed and reads as None."""
    codes: list[int | None] = []
    for process in processes:
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            codes.append(None)
        else:
            codes.append(process.exitcode)
    return codes


def run(function: Callable[..., None], world_size: int, *arguments: Any) -> list[int | None]:
    """`start` and `finish`."""
    return finish(start(function, world_size, *arguments))
