"""What a test is told when a rank fails."""

from __future__ import annotations

import os
import time

import pytest

from safecl.testing import ranks


def _meet(rank: int, world_size: int) -> None:
    import torch

    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert int(total) == world_size


def _disagree(rank: int, world_size: int, reason: str) -> None:
    if rank == 1:
        print("the one before the last line")
        raise ValueError(reason)
    _meet(rank, world_size)


def _stay(rank: int, world_size: int) -> None:
    print("rank", rank, "begins to wait", flush=True)
    time.sleep(600 if rank == 1 else 0)


def _die(rank: int, world_size: int) -> None:
    os.kill(os.getpid(), 9)


def test_a_failure_says_which_job_which_rank_how_and_what_it_wrote_and_the_next_job_runs() -> None:
    ranks.run(_meet, 2)
    with pytest.raises(pytest.fail.Exception) as failed:
        ranks.run(_disagree, 2, "no reason")
    said = str(failed.value)
    assert "_disagree('no reason',)" in said and "rank 1 of 2: exit code 1" in said
    assert "the one before the last line" in said and "ValueError: no reason" in said
    assert "rank 0 of 2: exit code 1" in said or "rank 0 of 2: not done" in said
    began = time.monotonic()
    with pytest.raises(pytest.fail.Exception) as late:
        ranks.run(_stay, 2, timeout_s=1)
    assert "rank 0 of 2: done" in str(late.value) and "rank 1 of 2: not done after 1 s" in str(late.value)
    assert time.monotonic() - began < 60
    assert ranks.codes(_die, 1) == [-9]
    ranks.run(_meet, 2)
