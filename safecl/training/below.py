"""What the layers below the first adapted one make of a row, computed once.

With `lora.last_layers` nothing below the first adapted layer changes, and dropout is the adapters' alone: what a row comes to
there is the same in every step, epoch, trial and method. Of 30 layers with 12 adapted that is three sevenths of a step.

Rows are computed in groups: consecutive ones of the finetune's own list, of some hundred tokens together. A group is the
same whatever was computed before it, so a result depends on nothing that this process did for others, and a run that is
resumed goes on bit for bit. What differs from a forward through all layers is float rounding.

Shapes: P tokens of a micro-batch, T of a group, D hidden.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from safecl.training.batches import Batch, collate
from safecl.training.tokens import Encoded

if TYPE_CHECKING:
    from safecl.training.model import HiddenStates

MOST = 2**29  # bytes that a process keeps, over all its finetunes
GROUP = 256  # tokens: fewer multiply slower

_kept: OrderedDict[Hashable, Tensor] = OrderedDict()


class Used(NamedTuple):
    """Rows, and how many of them a finetune takes in all, repeated ones counted."""

    rows: Sequence[Encoded]
    num_taken: float


class _Place(NamedTuple):
    group: int
    start: int
    stop: int


class _Entered(Exception):
    """Ends a forward at the first adapted layer."""


class Below:
    """The frozen layers of one model, which are passed over where what they give is known.

    `identity`: of the weights that they hold; equal ones must mean equal weights.
    """

    def __init__(self, states: HiddenStates, layers: nn.ModuleList, first: int, identity: Hashable) -> None:
        self.states, self.identity = states, (identity, first)
        self.groups: list[list[Encoded]] = []
        self.places: dict[int, _Place] = {}  # by the id() of a row
        self._given_PD: Tensor | None = None
        self._stops = False
        for layer in layers[: first - 1]:
            layer.forward = partial(self._pass, layer.forward)
        layers[first - 1].forward = partial(self._enter, layers[first - 1].forward)

    def add(self, rows: Sequence[Encoded]) -> None:
        """Let these be known."""
        num_tokens = GROUP
        for row in rows:
            if num_tokens >= GROUP:
                self.groups.append([])
                num_tokens = 0
            self.groups[-1].append(row)
            self.places[id(row)] = _Place(len(self.groups) - 1, num_tokens, num_tokens := num_tokens + len(row.ids))

    def knows(self, batch: Batch) -> bool:
        return bool(batch.rows) and all(id(row) in self.places for row in batch.rows)

    @contextmanager
    def given(self, batch: Batch) -> Iterator[None]:
        """Meanwhile a forward of the batch begins at the first adapted layer."""
        places = [self.places[id(row)] for row in batch.rows]
        groups = {number: self._group(self.groups[number]) for number in sorted({place.group for place in places})}
        self._given_PD = torch.cat([groups[place.group][place.start : place.stop] for place in places])
        try:
            yield
        finally:
            self._given_PD = None

    def _group(self, rows: Sequence[Encoded]) -> Tensor:
        key = self.identity, tuple(tuple(row.ids) for row in rows)
        if key not in _kept:
            _kept[key] = self._compute(rows)
            while sum(kept.nbytes for kept in _kept.values()) > MOST and len(_kept) > 1:
                _kept.popitem(last=False)
        _kept.move_to_end(key)
        return _kept[key]

    @torch.no_grad()
    def _compute(self, rows: Sequence[Encoded]) -> Tensor:
        self._stops = True
        try:
            self.states.through(collate(rows, [], [0] * len(rows), 1, rows[0], "cpu"))
        except _Entered as entered:
            hidden_TD: Tensor = entered.args[0]
            return hidden_TD
        finally:
            self._stops = False
        raise AssertionError("a forward went by the first adapted layer")

    def _pass(self, forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden if self._given_PD is not None else forward(hidden, *args, **kwargs)

    def _enter(self, forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._given_PD is not None:
            return self._given_PD[None]
        found = forward(hidden, *args, **kwargs)
        if self._stops:
            raise _Entered(found.squeeze(0))
        return found


def of(states: HiddenStates, last_layers: int | None, identity: Hashable, used: Sequence[Used]) -> Below | None:
    """For the rows that are taken as often as there are of them; a group is computed for any one of its rows. None where no
    layer is below, where it would take more than `MOST` bytes, or where layers hand on more than hidden states."""
    config = states.base.config.get_text_config()
    num_layers = int(config.num_hidden_layers)
    lists = [rows for rows, num_taken in used if rows and num_taken >= len(rows)]
    num_tokens = sum(len(row.ids) for rows in lists for row in rows)
    num_bytes = num_tokens * int(config.hidden_size) * states.base.dtype.itemsize
    stacks = [m for m in states.inner.children() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if not (last_layers and last_layers < num_layers and lists and num_bytes <= MOST and stacks and states.takes_rows):
        return None
    found = Below(states, stacks[0], num_layers - last_layers, identity)
    if not _same(found):
        return None
    for rows in lists:
        found.add(rows)
    return found


@torch.no_grad()
def _same(below: Below) -> bool:
    """Whether the model gives the same either way: layers may read what lower ones left beside hidden states."""
    row = Encoded("", [0, 1], 1)
    batch = collate([row], [0], [0], 1, row, "cpu")
    whole_PD = below.states.through(batch)
    try:
        given_PD = below._compute([row])
        below._compute([Encoded("", [2, 3, 4], 1)])  # now they would read what was left of this one
        below._given_PD = given_PD
        apart_PD = below.states.through(batch)
    except Exception:  # whatever a model says of layers that were passed over
        return False
    finally:
        below._given_PD = None
    return torch.equal(whole_PD, apart_PD)
