"""Real ranks for tests. A clean server process imports the heavy libraries once and forks ranks. A group of ranks
stays alive and runs one job after another, so a job costs no imports and no start."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "transformers", "peft", "deepspeed", "transformers.models.llama.modeling_llama"]
)
TIMEOUT_S = 120.0  # of one job; the longest takes about 10 s on a free core
START_S = 180.0
GRACE_S = 20.0
TAIL = 3000  # characters of a rank's output that a failure shows


def _serve(pipe: Connection, rank: int, world_size: int, folder: Path) -> None:
    """A rank's process: join the gloo group, then run the jobs that come through `pipe` until it is closed."""
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank)
    )
    try:
        import torch

        gc.freeze()  # exclude the imports: DeepSpeed collects garbage at every start, .8 s with them
        gc.set_threshold(50_000, 10, 10)  # a tenth of a step of ZeRO-3 was spent on looking for garbage
        torch.set_num_threads(1)
        meeting = f"file://{folder / 'meeting'}"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
        pipe.send("ready")
        while pipe.poll(None):
            try:
                function, arguments = pipe.recv()
            except EOFError:  # the pipe is closed: no more jobs
                os._exit(0)
            function(rank, world_size, *arguments)
            pipe.send("done")
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a normal exit would wait for the other ranks, which wait for this one


Ends = dict[int, Literal["done", "killed"] | int]  # by rank; "killed": by us after the timeout; a number: the exit code


class Group:
    """The ranks of one gloo group. After a failed job the group cannot be used again."""

    def __init__(self, world_size: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs, rank, world_size, self.folder), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:  # a job's timeout starts after all ranks have started
            with contextlib.suppress(EOFError, ConnectionError):  # a rank died at the start: the first job reports it
                if pipe.poll(START_S):
                    pipe.recv()

    def run(self, function: Callable[..., None], arguments: tuple[Any, ...], timeout_s: float) -> Ends:
        """Run `function(rank, world_size, *arguments)` on every rank and wait. After one rank fails, the others have
        GRACE_S seconds to end."""
        for pipe in self.pipes:
            with contextlib.suppress(ConnectionError):  # a rank died: handled below
                pipe.send((function, arguments))
        ends: Ends = {}
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        deadline = time.monotonic() + timeout_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ready in wait(list(waiting), left):
                told: Any = ready
                rank = waiting.pop(told)
                try:
                    ends[rank] = told.recv()
                except (EOFError, ConnectionError):
                    self.processes[rank].join()
                    ends[rank] = self.processes[rank].exitcode
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for rank in waiting.values():
            self.processes[rank].kill()
            self.processes[rank].join()
            ends[rank] = "killed"
        return ends

    def explain(self, ends: Ends, timeout_s: float) -> str:
        """How each rank ended, and the last TAIL characters of its output."""
        said = {
            "done": "done",
            "killed": f"not done after {timeout_s:g} s, or {GRACE_S:g} s after another failed: killed",
        }
        return "\n".join(
            f"rank {rank} of {len(ends)}: {said.get(str(end), f'exit code {end}')}; the end of its output:\n"
            + self._said(rank)
            for rank, end in sorted(ends.items())
        )

    def _said(self, rank: int) -> str:
        log = self.folder / f"rank-{rank}.log"
        return log.read_text(errors="replace")[-TAIL:] if log.exists() else "(it did not begin)"

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join(10)
            process.kill()


_groups: dict[int, Group] = {}


def run(function: Callable[..., None], world_size: int, *arguments: Any, timeout_s: float = TIMEOUT_S) -> None:
    """Run `function(rank, world_size, *arguments)` on `world_size` ranks. The test fails if a rank fails or takes
    longer than `timeout_s` seconds; its message says which rank, how it ended, and what the ranks wrote. The next job
    then gets new ranks."""
    group = _groups.get(world_size) or _groups.setdefault(world_size, Group(world_size))
    ends = group.run(function, arguments, timeout_s)
    if set(ends.values()) != {"done"}:
        _groups.pop(world_size).close()
        pytest.fail(f"{function.__name__}{arguments!r}:\n{group.explain(ends, timeout_s)}", pytrace=False)


def codes(function: Callable[..., None], world_size: int, *arguments: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Run a function that kills ranks, on a new group. Returns for each rank its exit code, "done", or "killed" after
    the timeout."""
    group = Group(world_size)
    ends = group.run(function, arguments, timeout_s)
    group.close()
    return [ends[rank] for rank in range(world_size)]


def close() -> None:
    """End all ranks that wait for another job."""
    while _groups:
        _groups.popitem()[1].close()
