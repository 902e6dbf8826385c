"""The parts of training that a method may use: `Run`, and the memory rows with theta_safe's states. It does not know
Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from safecl.base import json_lines
from safecl.config import Training
from safecl.training import batches, losses
from safecl.training.batches import Batch, stream
from safecl.training.engine import Engine
from safecl.training.model import HiddenStates, factors
from safecl.training.tokens import Encoded


class States(Sequence[Tensor]):
    """theta_safe's hidden states, one tensor [positions of the row, D] per row. They are read from disk when asked
    for, because a teacher's states may be larger than memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        from safetensors import safe_open

        opened: list[Any] = [safe_open(str(file), framework="pt") for file in files]
        self.file_of = {int(name): file for file in opened for name in file.keys()}  # noqa: SIM118  (no mapping)

    def __len__(self) -> int:
        return len(self.file_of)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self.file_of:
            raise IndexError(f"no states of row {index}")
        return self.file_of[index].get_tensor(str(index))


@dataclass
class Memory:
    """Rows with theta_safe's hidden states at some of their positions, as the memory stage makes them."""

    rows: list[Encoded]
    states: Sequence[Tensor]  # one per row; empty if none were asked for

    @staticmethod
    def load(folder: Path) -> Memory:
        """Read a memory stage's folder. States stay on disk until they are used."""
        from safetensors.torch import load_file

        data = load_file(str(folder / "memory.safetensors"))
        names = [row["id"] for row in json_lines(folder / "rows.jsonl")]
        lengths, prompts = data["num_tokens_R"].tolist(), data["num_prompt_R"].tolist()
        ids = [part.tolist() for part in data["ids_N"].split(lengths)]
        rows = [Encoded(name, row, prompt) for name, row, prompt in zip(names, ids, prompts, strict=True)]
        return Memory(rows, States(sorted(folder.glob("states-*.safetensors"))))


@dataclass
class Run:
    """A running finetune, as a method sees it on one rank."""

    hidden_states: HiddenStates
    head: losses.Head
    engine: Engine
    config: Training
    seed: int
    rows: list[Encoded]
    memory_rows: Memory | None = None
    memory_batch_size: int | None = None  # rows per draw, over all ranks; None: the user batch size
    inputs: dict[str, Path] = field(default_factory=dict)  # folders of the method's own inputs, by name
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int = 8
    device: str = "cpu"
    is_fresh: bool = False  # the adapter does not start from theta_safe's
    indices: list[int] = field(default_factory=list)  # indices into `rows` of the current global batch
    kept: dict[str, Tensor] = field(
        default_factory=dict
    )  # a method's own state, saved with checkpoints; equal on ranks
    step: int = 0  # optimizer steps done
    num_steps: int = 0
    part: int = 0  # number of the current micro-batch, of num_parts
    num_parts: int = 1
    metrics: dict[str, Tensor | float] = field(default_factory=dict)  # on the device until the step's end
    shared: dict[str, Tensor | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.hidden_states.peft_model

    # -- what a method calls -------------------------------------------------------------------------------------------

    def forward(self, *given: Batch) -> tuple[Tensor, ...]:
        """Hidden states [P, D] of each batch by the trained adapter, with dropout, from one forward of all their
        rows.

        A batch without rows is left out of the forward, and its states are zeros. If every rank must run each forward
        (the engine's `needs_every_forward`) and no batch has rows, one without rows is run.
        """
        real = [batch for batch in given if batch.rows]
        if not real and self.engine.needs_every_forward:
            real = [given[0]]
        states: dict[int, Tensor] = {}
        if real:
            whole_PD = self.engine.forward(real[0] if len(real) == 1 else batches.join(real))
            parts = torch.split(whole_PD, [len(batch.ids_P) for batch in real])
            states = {id(batch): part_PD for batch, part_PD in zip(real, parts, strict=True)}
        width = self.head.weight_VD.shape[1]
        return tuple(
            states[id(batch)] if id(batch) in states else self.head.weight_VD.new_zeros(len(batch.ids_P), width)
            for batch in given
        )

    def cross_entropy(self, batch: Batch, hidden_PD: Tensor | None = None) -> Tensor:
        """Sum of the cross-entropies of this micro-batch's response tokens / the global batch's number of them, in
        nats. It runs its own forward, unless `hidden_PD` gives the hidden states of one."""
        if hidden_PD is None:
            [hidden_PD] = self.forward(batch)
        mask_P, targets_N = losses.targets(batch.labels_P)
        return losses.cross_entropy_sum(hidden_PD[mask_P], self.head, targets_N) / batch.num_targets

    def draw(self, name: str = "memory") -> Batch:
        """This micro-batch's part of the memory rows drawn for this step (without replacement, from the stream
        `name`).

        `states_ND` holds theta_safe's hidden states, if the memory has them. `num_targets` counts the response tokens
        of the whole draw. If there are fewer rows than ranks times micro-batches, this part may have no row and then
        no target.
        """
        assert self.memory_rows is not None, "this method draws memory rows: `requires` must name a memory stage"
        num = len(self.memory_rows.rows)
        size = min(num, self.memory_batch_size or self.config.batch_size)
        chosen = batches.permutation(stream(self.seed, name, self.step), num)[:size]
        place = self.rank * self.num_parts + self.part
        mine = chosen[place :: self.world_size * self.num_parts]
        all_rows, states = self.memory_rows.rows, self.memory_rows.states
        seeds = [stream(self.seed, f"{name}.dropout", self.step, i) for i in mine]
        rows = [all_rows[i] for i in mine]
        num_targets = sum(all_rows[i].num_targets for i in chosen)
        batch = batches.collate(rows, mine, seeds, num_targets, all_rows[chosen[0]], self.device)
        if len(states):
            batch.states_ND = torch.cat([states[i] for i in mine] or [states[0][:0]]).to(self.device)
        return batch

    def log(self, name: str, value: Tensor | float) -> None:
        """Add to a metric. Parts are summed over micro-batches and ranks, like the loss. Every rank must log the same
        names."""
        self.metrics[name] = self.metrics.get(name, 0.0) + value

    def log_whole(self, name: str, value: Tensor | float) -> None:
        """Log a metric of the step that is already the same on every rank."""
        self.shared[name] = value

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by the names that PEFT writes to disk. theta_safe's adapter and its Fisher use the
        same names."""
        return factors(self.model)

    def values(self) -> dict[str, Tensor]:
        """The parameters' current values by name, whole on every rank (all must call it). Copy what must outlive a
        step."""
        return {name: self.engine.full_parameter(p) for name, p in self.parameters().items()}

    # The next functions take or return one vector [n] of all parameters. theta, its gradient, theta_safe and the Fisher
    # information have the same order. Every rank must call them.

    def theta(self) -> Tensor:
        """The parameters' current values, [n]. Copy what must outlive a step."""
        return self.engine.flat_parameters()

    def set_theta(self, theta_n: Tensor) -> None:
        """Replace the parameters outside the optimizer's step by theta_n [n]."""
        self.engine.set_flat_parameters(theta_n)

    def gradient(self) -> Tensor:
        """The whole gradient, [n], after the last backward. Copy what must outlive the step."""
        return self.engine.flat_grad()

    def set_gradient(self, gradient_n: Tensor) -> None:
        """Replace the gradient that the step will use. Call it in `after_backward`."""
        self.engine.set_flat_grad(gradient_n)

    def add_gradient(self, extra_n: Tensor) -> None:
        """Add a gradient that comes from no row, such as that of a penalty on the parameters. Call it in
        `after_backward`."""
        self.set_gradient(self.gradient() + extra_n)

    def sizes(self) -> list[int]:
        """Number of elements of each parameter, in the vector's order."""
        return self.engine.sizes

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One vector [n] of tensors that are given by the names of `parameters`.

        Raises:
            RuntimeError: the names are not exactly those of the trained parameters.
        """
        if set(tensors) != set(self.parameters()):
            odd = sorted(set(tensors) ^ set(self.parameters()))
            raise RuntimeError(f"these are of other parameters than are trained: {odd[:3]}")
        return torch.cat([tensors[name].flatten() for name in self.parameters()]).to(self.device)

    def theta_safe(self) -> Tensor:
        """theta_safe in the trained factors, [n]. Call it in `prepare`. A fresh adapter (`adapter: stack`, `align:
        none`) gives its own start: its B is 0 there, so the model is theta_safe."""
        from safetensors.torch import load_file

        if self.is_fresh:
            return self.kept.setdefault("theta_safe", self.theta().clone())
        return self.flat(load_file(str(self.inputs["safe"] / "adapter" / "adapter_model.safetensors")))

    def fisher(self, normalise: str) -> Tensor:
        """The diagonal Fisher information of theta_safe, [n]. With `normalise` = "mean" it is divided by its mean."""
        from safetensors.torch import load_file

        found_n = self.flat(load_file(str(self.inputs["fisher"] / "fisher.safetensors")))
        return found_n / found_n.mean(dtype=torch.float64).float() if normalise == "mean" else found_n

    def teacher_states(self) -> Callable[[Sequence[int]], list[Tensor]]:
        """A function from indices into `rows` to theta_safe's hidden states on these rows, read from the input
        `teacher`.

        Raises:
            RuntimeError: the teacher saw other tokens of a row than are trained on.
        """
        memory = Memory.load(self.inputs["teacher"])
        by_id = {row.row_id: i for i, row in enumerate(memory.rows)}
        found = [by_id[row.row_id] for row in self.rows]
        wrong = [row.row_id for row, i in zip(self.rows, found, strict=True) if memory.rows[i].ids != row.ids]
        if wrong:
            raise RuntimeError(f"the teacher saw other tokens of row {wrong[0]!r} than are trained on")
        return lambda indices: [memory.states[found[i]] for i in indices]

    def num_positions(self, rule: str) -> int:
        """Number of positions in the whole current global batch, by a rule of `losses.positions`."""
        rows = (self.rows[i] for i in self.indices)
        return sum(losses.num_positions(row.num_prompt, len(row.ids), rule) for row in rows)

    def generator(self, name: str, *position: int) -> torch.Generator:
        """A random generator of this step on the device, the same on every rank."""
        return torch.Generator(self.device).manual_seed(stream(self.seed, name, self.step, *position))

    # -- the loop ------------------------------------------------------------------------------------------------------

    def share(self, indices: Sequence[int], step: int) -> Batch:
        """This rank's part of a global batch of user rows."""
        seeds = [stream(self.seed, "dropout", step, place) for place in range(len(indices))]
        return batches.share(
            self.rows,
            indices,
            seeds,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
            device=self.device,
        )

    def each_part(self, batch: Batch) -> Iterator[tuple[Batch, bool]]:
        """The micro-batches of a rank's part, each with whether it is the last."""
        self.num_parts = len(batch.parts)
        for self.part, part in enumerate(batch.parts):
            yield part, self.part == self.num_parts - 1

    def sum_over_ranks(self, values: Sequence[Tensor | float]) -> list[float]:
        """Element-wise sum over ranks (all must call it). It is the only point of a step at which the host waits for
        the device."""
        tensor = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.world_size > 1:
            dist.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        return found
