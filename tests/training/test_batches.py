from __future__ import annotations

import pytest

from safecl.config import Template
from safecl.training import batches
from safecl.training.tokens import Encoded

TEMPLATE = Template().model_dump()
PLAIN = {**TEMPLATE, "prompt": "Q: {prompt}\nA:", "end": "<|im_end|>"}


def test_the_order_is_a_permutation_an_epoch_and_depends_on_nothing_else() -> None:
    order = batches.order(seed=1, num_rows=10, batch_size=4, epochs=2.5)
    flat = [i for batch in order for i in batch]
    assert [len(batch) for batch in order] == [4] * 6 + [1]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and len(set(flat[20:])) == 5
    assert flat[:10] != flat[10:20]
    assert order == batches.order(1, 10, 4, 2.5) != batches.order(2, 10, 4, 2.5)
    assert batches.order(1, 3, 2, 2, shuffle=False) == [[0, 1], [2, 0], [1, 2]]
    assert [i for batch in batches.order(1, 10, 3, 2.5) for i in batch] == flat


def test_streams_differ_by_name_seed_and_position() -> None:
    seeds = {batches.stream(s, n, p) for s in (0, 1) for n in ("order", "dropout") for p in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2, 8])
def test_shares_hold_every_row_once_in_as_many_parts_on_every_rank(num_rows: int, world_size: int, micro: int) -> None:
    rows = [Encoded(str(i), list(range(3, 9 + 7 * i % 5)), 2 + i % 3) for i in range(9)]
    indices = list(range(9))[-num_rows:]
    shares = [
        batches.share(rows, indices, [100 + i for i in indices], rank=r, world_size=world_size, micro_batch_size=micro)
        for r in range(world_size)
    ]
    parts = [part for share in shares for part in share.parts]
    assert len({len(share.parts) for share in shares}) == 1
    assert sorted(i for part in parts for i in part.indices) == indices
    assert max(len(part.rows) for part in parts) <= micro
    total = sum(rows[i].num_targets for i in indices)
    assert {part.num_targets for part in parts} == {total}
    assert sum(int((part.labels_P != -100).sum()) for part in parts) == total
    for part in parts:
        assert len(part.dropout_seeds) == len(part.lengths) and sum(part.lengths) == len(part.ids_P)
        if part.rows:
            assert part.dropout_seeds == [100 + i for i in part.indices]


def test_rows_lie_end_to_end_each_with_positions_of_its_own() -> None:
    rows = [Encoded("short", [7, 8, 2], 1), Encoded("long", [7, 8, 9, 9, 2], 3), Encoded("bare", [5, 2], 0)]
    batch = batches.collate(rows, [0, 1, 2], [0, 0, 0], 6, rows[0], "cpu")
    assert batch.ids_P.tolist() == [7, 8, 2, 7, 8, 9, 9, 2, 5, 2] and batch.lengths == [3, 5, 2]
    assert batch.positions_P.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1]
    # No row predicts the next one's first token, although the last row has no prompt.
    assert batch.labels_P.tolist() == [-100, 8, 2, -100, -100, -100, 9, 2, -100, 2]
    empty = batches.collate([], [], [], 6, rows[0], "cpu")
    assert empty.ids_P.tolist() == [7, 8, 2] and empty.labels_P.tolist() == [-100] * 3 and empty.rows == []
