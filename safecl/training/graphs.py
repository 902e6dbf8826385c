"""A forward and its backward as CUDA graphs: two calls start the thousands of kernels of a step.

A layer is about a hundred small operations. Starting one from Python takes longer than a GPU needs for it: in a step
of a 2B model the GPU waited nine tenths of the time for its host. A graph computes the same kernels on the same
addresses, for one shape: a number of tokens, of rows, and of tokens of the longest row. So these numbers are rounded
up. Missing tokens are filled with an extra row whose states are not used and whose gradient is 0. A shape is captured
when it comes for the second time. The first time it is computed kernel by kernel, with the same filler.

    hidden_PD = replay of the forward on copied-in ids, places and bounds
    grad     += replay of the backward on a copied-in gradient of hidden_PD

All graphs share one pool of memory, so only one forward at a time may wait for its backward. A second forward
meanwhile is computed without a graph. So is every model that cannot be captured, because it reads a number from the
device during the forward (mostly models with experts).

Shapes: P tokens, B rows (with the filler), D hidden.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safecl.training import attention, fused, lora

if TYPE_CHECKING:
    from safecl.training.batches import Batch
    from safecl.training.model import HiddenStates

MOST = 32  # most captured shapes: a graph of thousands of kernels takes driver memory too
LEAST = 64  # fewest tokens of a shape
SPARE = (
    1.5  # all graphs take at most this times the memory of the largest: a larger one cannot reuse smaller ones' memory
)


def rounded(number: int, steps: int) -> int:
    """`number` rounded up to one of `steps` even steps between a power of two and the next."""
    step = max(1, 1 << max(0, (number - 1).bit_length() - 1 - (steps.bit_length() - 1)))
    return -(-number // step) * step


class _Captured:
    """The two graphs of one shape, and the tensors that they read and write."""

    def __init__(self, states: HiddenStates, grad: Tensor, shape: tuple[int, int, int], pool: Any) -> None:
        num_tokens, num_rows, longest = shape
        self.given = torch.zeros(3, num_tokens, dtype=torch.long, device=grad.device)  # ids, places, dropout seeds
        self.bounds = torch.zeros(num_rows + 1, dtype=torch.int32, device=grad.device)
        self.graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        ids_P, places_P, seeds_P = self.given
        states.rows.set([], (seeds_P, places_P))
        with _generator_aside(grad.device), _fresh_leaves(states) as parameters:
            with torch.cuda.graph(self.graphs[0], pool=pool, capture_error_mode="thread_local"):
                hidden_PD = states.end_to_end(ids_P, places_P, self.bounds, longest)
            self.outer_PD = torch.zeros_like(hidden_PD)
            with torch.cuda.graph(self.graphs[1], pool=pool, capture_error_mode="thread_local"):
                found = torch.autograd.grad(hidden_PD, parameters, self.outer_PD, allow_unused=True)
                pairs = zip(parameters, found, strict=True)
                grad.add_(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]))
        self.hidden_PD = hidden_PD.detach()


@contextmanager
def _fresh_leaves(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Context in which the module has other parameters on the same memory. PyTorch ties a leaf to the stream of the
    forward that first used it, and another stream than the capture's would break the capture."""
    places = [
        (owner, name)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if p is not None and p.requires_grad
    ]
    own = [owner._parameters[name] for owner, name in places]
    fresh = [nn.Parameter(p.detach()) for p in own if p is not None]
    try:
        for (owner, name), p in zip(places, fresh, strict=True):
            owner._parameters[name] = p
        yield fresh
    finally:
        for (owner, name), old in zip(places, own, strict=True):
            owner._parameters[name] = old


@contextmanager
def _generator_aside(device: torch.device) -> Iterator[None]:
    """Context with another state of PyTorch's own generator, because a failed capture makes the state unusable."""
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    own = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(own)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, captured: _Captured, num_tokens: int, waiting: _Waiting) -> Tensor:
        captured.graphs[0].replay()
        ctx.captured, ctx.num_tokens, ctx.waiting = captured, num_tokens, waiting
        return captured.hidden_PD[:num_tokens].clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, None, None, None]:
        if ctx.waiting.done:
            raise RuntimeError("a second backward through one forward: its states are gone")
        ctx.waiting.done = True
        captured: _Captured = ctx.captured
        ctx.captured = None  # so that keeping the loss does not keep the graphs' memory
        captured.outer_PD[: ctx.num_tokens].copy_(outer[0])
        captured.outer_PD[ctx.num_tokens :].zero_()
        captured.graphs[1].replay()
        return None, None, None, None


class _Waiting:
    """A forward whose backward has not run yet. It is freed when its states are."""

    done = False


class Graphs:
    """The captured forwards of one model. `grad` holds the gradients of its trained parameters, in the parameters'
    order."""

    def __init__(self, states: HiddenStates, grad: Tensor) -> None:
        self.states, self.grad = states, grad
        self.seen: set[Any] = set()
        self.captured: dict[Any, _Captured] = {}
        self.anchor = torch.zeros((), device=grad.device, requires_grad=True)
        self.waiting: weakref.ref[_Waiting] | None = None
        self.pool: Any = None
        self.largest = self.held = 0  # in tokens: the largest shape, and the sum of shapes that took new memory
        self.pads: bool | None = None  # whether attention pads rows; the first forward shows it
        # Without kernels each row's dropout has its own generator, which the host seeds. That cannot be captured.
        drops = any(isinstance(module, lora.RowDropout) and module.cut > 0 for module in states.modules())
        self.works = states.takes_rows and not (drops and fused.kernels_for(grad) is None)

    def forward(self, batch: Batch) -> Tensor | None:
        """Hidden states [P, D], or None if this forward is to be computed without a graph."""
        last = None if self.waiting is None else self.waiting()
        if not self.works or not torch.is_grad_enabled() or (last is not None and not last.done):
            return None
        shape = self._shape(batch)
        captured = self.captured.get(shape)
        if captured is None and shape in self.seen:
            if len(self.captured) >= MOST or not self._capture(shape):
                return None
            captured = self.captured[shape]
        num_tokens, spare = sum(batch.lengths), shape[0] - sum(batch.lengths)
        lengths, seeds = [*batch.lengths, spare], [*batch.dropout_seeds, 0]
        filler = torch.arange(spare, device=batch.ids_P.device)
        given = (
            torch.cat([batch.ids_P, filler * 0]),
            torch.cat([batch.positions_P, filler]),
            torch.tensor(seeds).repeat_interleave(torch.tensor(lengths)).to(batch.ids_P.device),
            torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(batch.ids_P.device),
        )
        if captured is None:
            return self._computed(given, shape[2], list(zip(seeds, lengths, strict=True)), batch)[:num_tokens]
        for address, value in zip((*captured.given, captured.bounds), given, strict=True):
            address.copy_(value)
        waiting = _Waiting()
        self.waiting = weakref.ref(waiting)
        found: Tensor = _Replay.apply(self.anchor, captured, num_tokens, waiting)  # type: ignore[no-untyped-call]
        return found

    def _shape(self, batch: Batch) -> tuple[int, int, int]:
        """(tokens, rows, tokens of the longest row) of the graph for a batch."""
        num_tokens = sum(batch.lengths)
        padded = max(LEAST, rounded(num_tokens, 8))
        # Flash attention takes any length up to all tokens. Padded rows are computed up to the longest one.
        longest = padded if self.pads is False else rounded(max(*batch.lengths, padded - num_tokens, LEAST), 2)
        return padded, len(batch.lengths) + 1, longest

    def _computed(self, given: Any, longest: int, rows: list[tuple[int, int]], batch: Batch) -> Tensor:
        """What the graph will compute, kernel by kernel, so that everything made or compiled on first use exists
        before the capture."""
        ids_P, places_P, seeds_P, bounds = given
        self.states.rows.set(rows, (seeds_P, places_P))
        with attention.padded() as found:
            hidden_PD = self.states.end_to_end(ids_P, places_P, bounds, longest)
        self.pads = bool(found)
        self.seen.add(self._shape(batch))
        return hidden_PD

    def _capture(self, shape: tuple[int, int, int]) -> bool:
        if shape[0] > self.largest:
            if self.pool is None or self.held + shape[0] > SPARE * shape[0]:  # a new pool for the new largest shape
                torch.cuda.synchronize()
                self.captured.clear()
                self.pool, self.held = torch.cuda.graph_pool_handle(), 0
            self.largest, self.held = shape[0], self.held + shape[0]
        stream = torch.cuda.current_stream()
        try:
            self.captured[shape] = _Captured(self.states, self.grad, shape, self.pool)
        except Exception as error:  # anything that a graph cannot capture; too little memory too
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize()
            self.works = False
            self.captured.clear()
            first = error.__context__ or error  # ending a broken capture raises another error
            message = (str(first).splitlines() or [""])[0][:200]
            warnings.warn(f"training without CUDA graphs, slower ({type(first).__name__}: {message})", stacklevel=2)
        return self.works
