"""Rows -> token ids -> micro-batches, the order of global batches, and the random streams.

Everything random depends only on (seed, stream name, position). The number of workers, the micro-batch size and
earlier computations have no influence, so a resumed run needs no random state.

Shapes: P tokens of a micro-batch; its rows lie end to end, without padding.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from safecl.base import json_lines
from safecl.tasks import Row
from safecl.training.tokens import Encoded

IGNORED = -100  # label of a position that carries no loss


def stream(seed: int, name: str, *position: int) -> int:
    """Seed of a named random stream, in [0, 2**63). Streams of different names or positions are independent.

    Names used here: adapter, order, dropout, memory, memory.dropout, memory.pick. Other parts of safecl add their
    own.
    """
    text = "/".join([str(seed), name, *map(str, position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permutation(seed: int, num: int) -> list[int]:
    """A seeded permutation of range(num). It does not use torch, so it is the same on every machine and torch
    version."""
    return sorted(range(num), key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())


def read_rows(folder: Path) -> list[Row]:
    """Read rows.jsonl of a stage's folder."""
    return [Row(**row) for row in json_lines(folder / "rows.jsonl")]


def write_rows(rows: Sequence[Row], folder: Path) -> None:
    """Write rows.jsonl into a stage's folder."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row.as_json()) + "\n" for row in rows))


def order(seed: int, num_rows: int, batch_size: int, epochs: float, shuffle: bool = True) -> list[list[int]]:
    """Global batches as lists of row indices.

    Each epoch is one seeded permutation of the rows (without `shuffle`: the rows' own order). The epochs are laid end
    to end and cut every `batch_size` rows. The last epoch may be a fraction of the rows, and the last batch may be
    smaller.
    """
    total = max(1, round(num_rows * epochs))
    sequence: list[int] = []
    epoch = 0
    while len(sequence) < total:
        sequence += permutation(stream(seed, "order", epoch), num_rows) if shuffle else range(num_rows)
        epoch += 1
    sequence = sequence[:total]
    return [sequence[i : i + batch_size] for i in range(0, total, batch_size)]


@dataclass
class Batch:
    """A micro-batch, or one rank's part of a global batch with its micro-batches in `parts`.

    `num_targets` counts the response tokens of the whole GLOBAL batch. A loss is a sum over this micro-batch's tokens
    divided by it, so the sum over ranks and micro-batches is the global mean. `rows` is empty if this rank has no
    row. The tensors then hold one row without targets, for engines whose ranks must all run a forward.
    """

    ids_P: Tensor
    labels_P: Tensor  # IGNORED on prompts
    positions_P: Tensor  # from 0 in each row
    lengths: list[int]  # tokens of each row
    num_targets: int
    rows: list[Encoded]
    indices: list[int]  # of the rows, in the list from which they were drawn
    dropout_seeds: list[int]  # one per row
    states_ND: Tensor | None = None  # memory batches: theta_safe's hidden states at the response positions
    parts: list[Batch] = field(default_factory=list, repr=False)  # micro-batches; the same number on every rank


def collate(
    rows: Sequence[Encoded],
    indices: Sequence[int],
    seeds: Sequence[int],
    num_targets: int,
    filler: Encoded,
    device: str,
) -> Batch:
    """One micro-batch of `rows`. Without rows it holds `filler`, without targets."""
    shown = list(rows) or [filler]
    ids = [i for row in shown for i in row.ids]
    labels = [IGNORED] * len(ids)
    start = 0
    for row in rows:
        # A row's first token is never a target: no token of the row precedes it.
        first = max(1, row.num_prompt)
        labels[start + first : start + len(row.ids)] = row.ids[first:]
        start += len(row.ids)
    return Batch(
        torch.tensor(ids, device=device),
        torch.tensor(labels, device=device),
        torch.cat([torch.arange(len(row.ids)) for row in shown]).to(device),
        [len(row.ids) for row in shown],
        num_targets,
        list(rows),
        list(indices),
        list(seeds) if rows else [0],
    )


def join(given: Sequence[Batch]) -> Batch:
    """Several micro-batches as one, for one forward of all their rows."""
    return Batch(
        torch.cat([batch.ids_P for batch in given]),
        torch.cat([batch.labels_P for batch in given]),
        torch.cat([batch.positions_P for batch in given]),
        [length for batch in given for length in batch.lengths],
        given[0].num_targets,
        [row for batch in given for row in batch.rows],
        [i for batch in given for i in batch.indices],
        [seed for batch in given for seed in batch.dropout_seeds],
    )


def share(
    rows: Sequence[Encoded],
    indices: Sequence[int],
    seeds: Sequence[int],
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    device: str = "cpu",
) -> Batch:
    """This rank's part of the global batch `rows[i] for i in indices`, with its micro-batches in `parts`.

    Rows are sorted by length within the global batch only and dealt to the ranks in turn. Every rank gets the same
    number of micro-batches; the last ones may be empty.
    """
    num_targets = sum(rows[i].num_targets for i in indices)
    by_length = sorted(range(len(indices)), key=lambda k: (len(rows[indices[k]].ids), k))
    mine = by_length[rank::world_size]
    num_parts = max(1, math.ceil(math.ceil(len(indices) / world_size) / micro_batch_size))

    def make(places: Sequence[int]) -> Batch:
        chosen = [indices[k] for k in places]
        found = [rows[i] for i in chosen]
        return collate(found, chosen, [seeds[k] for k in places], num_targets, rows[indices[0]], device)

    whole = make(mine)
    cuts = [mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(num_parts)]
    whole.parts = [whole] if num_parts == 1 else [make(cut) for cut in cuts]
    return whole
