"""The output of the frozen layers below the first adapted one, computed once per row.

With `lora.last_layers` no layer below the first adapted one changes, and dropout is only in the adapters. So a row's
states there are the same in every step, epoch, trial and method. With 12 of 30 layers adapted, these layers are three
sevenths of a step.

Rows are computed in groups: consecutive rows of the finetune's own list, of some hundred tokens together. A group
does not depend on what was computed before. So a result does not depend on earlier work of the process, and a resumed
run continues bit for bit. The only difference from a forward through all layers is floating-point rounding.

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

MOST = 2**29  # most bytes that a process keeps, over all its finetunes
GROUP = 256  # tokens; smaller matrix products are slower per token

_kept: OrderedDict[Hashable, Tensor] = OrderedDict()


class Used(NamedTuple):
    """Rows, and how many rows a finetune takes from them in all (a repeated row counts each time)."""

    rows: Sequence[Encoded]
    num_taken: float


class _Place(NamedTuple):
    group: int
    start: int
    stop: int


class _Entered(Exception):
    """Raised to end a forward at the first adapted layer."""


class Below:
    """The frozen layers of one model. They are skipped for rows whose states are known.

    `identity` identifies the weights of these layers: equal identities must mean equal weights.
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
        """Keep the states of these rows. They are computed when first needed."""
        num_tokens = GROUP
        for row in rows:
            if num_tokens >= GROUP:
                self.groups.append([])
                num_tokens = 0
            self.groups[-1].append(row)
            self.places[id(row)] = _Place(len(self.groups) - 1, num_tokens, num_tokens := num_tokens + len(row.ids))

    def knows(self, batch: Batch) -> bool:
        """Whether the states of all rows of a batch are known."""
        return bool(batch.rows) and all(id(row) in self.places for row in batch.rows)

    @contextmanager
    def given(self, batch: Batch) -> Iterator[None]:
        """Context in which a forward of the batch starts at the first adapted layer."""
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
    """A `Below` for the lists of rows from which at least as many rows are taken as the list has (one group is
    computed even if only one of its rows is needed).

    None if there is no layer below the adapted ones, if something outside the adapted layers is trained too (lower
    layers may read it), if the states would take more than `MOST` bytes, or if the layers pass on more than hidden
    states.
    """
    config = states.base.config.get_text_config()
    num_layers = int(config.num_hidden_layers)
    lists = [rows for rows, num_taken in used if rows and num_taken >= len(rows)]
    num_tokens = sum(len(row.ids) for rows in lists for row in rows)
    num_bytes = num_tokens * int(config.hidden_size) * states.base.dtype.itemsize
    stacks = [m for m in states.inner.children() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if not (last_layers and last_layers < num_layers and lists and num_bytes <= MOST and stacks and states.takes_rows):
        return None
    first = num_layers - last_layers
    upper = {id(parameter) for layer in stacks[0][first:] for parameter in layer.parameters()}
    if any(parameter.requires_grad and id(parameter) not in upper for parameter in states.parameters()):
        return None  # e.g. Gemma 4's projection of the embeddings that every layer reads
    found = Below(states, stacks[0], first, identity)
    if not _same(found):
        return None
    for rows in lists:
        found.add(rows)
    return found


def forget() -> None:
    """Free the memory of all states that this process keeps."""
    _kept.clear()


@torch.no_grad()
def _same(below: Below) -> bool:
    """Whether the model gives the same result with the lower layers skipped. Layers may read other things that lower
    layers left."""
    row = Encoded("", [0, 1], 1)
    batch = collate([row], [0], [0], 1, row, "cpu")
    whole_PD = below.states.through(batch)
    try:
        given_PD = below._compute([row])
        below._compute([Encoded("", [2, 3, 4], 1)])  # overwrites what layers left besides hidden states
        below._given_PD = given_PD
        apart_PD = below.states.through(batch)
    except Exception:  # any error of a model whose layers were skipped
        return False
    finally:
        below._given_PD = None
    return torch.equal(whole_PD, apart_PD)
