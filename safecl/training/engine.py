"""Gradients over ranks, and the optimizer step. The only file that imports deepspeed.

`TorchEngine` is the reference: plain AdamW with one all-reduce of its own. `auto` chooses it for one rank, where
there is nothing to shard (DeepSpeed adds 90 ms a step there). `DeepSpeedEngine` (ZeRO 0 to 3) must give the same
results; a test compares them. For both: losses are normalised over the global batch, so gradients are SUMMED over
ranks. After the last backward the whole summed gradient can be read and written. Clipping is by the global norm,
after any such change.

DeepSpeed's special needs (measured with 0.19.8). In ZeRO 1 and 2 a second backward overwrites the first one's
gradients, unless the accumulation boundary is set by hand. DeepSpeed averages over ranks, so the loss is multiplied
by their number. Its bfloat16 mode would cast the LoRA factors, so it stays off (the frozen base is bfloat16 anyway).
It is given PyTorch's AdamW, because its own is compiled on first use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safecl.base import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS, EPSILON = (0.9, 0.999), 1e-8


class TorchEngine:
    """Data-parallel training of the trainable parameters of `module`, which maps a batch to hidden states.

    `needs_every_forward`: True if ranks exchange parameters within a forward or a backward, so that every rank must
    run the same number of them.
    """

    needs_every_forward = False

    def __init__(
        self, module: nn.Module, *, weight_decay: float, max_grad_norm: float, world_size: int = 1, graphs: bool = False
    ) -> None:
        self.module = module
        self.world_size = world_size
        self.max_grad_norm = max_grad_norm
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        wrong = [name for name, p in self.named.items() if p.dtype != torch.float32]
        if wrong or not self.named:
            raise AssertionError(f"expected float32 parameters, got {len(self.named)}, not float32: {wrong[:3]}")
        # All parameters lie in one tensor and all gradients in another. Each parameter and its gradient are views of
        # these. So clipping, AdamW, the sum over ranks and the methods' changes take one operation each, not one per
        # LoRA factor.
        self.flat = nn.Parameter(torch.cat([p.detach().flatten() for p in self.named.values()]))
        self.grad = self.flat.grad = torch.zeros_like(self.flat)
        self.sizes = [p.numel() for p in self.named.values()]
        for p, value, grad in zip(
            self.named.values(), self._split(self.flat.data), self._split(self.grad), strict=True
        ):
            p.data, p.grad = value.view_as(p), grad.view_as(p)
        self.optimizer = torch.optim.AdamW(
            [self.flat], lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay, fused=True
        )
        self.graphs: Any = None
        if graphs:
            from safecl.training.graphs import Graphs

            self.graphs = Graphs(module, self.grad)  # type: ignore[arg-type]

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return torch.split(flat, self.sizes)

    def forward(self, batch: Any) -> Tensor:
        """The module's output for a batch: hidden states [P, D]."""
        if self.graphs is not None and (found_PD := self.graphs.forward(batch)) is not None:
            return found_PD  # type: ignore[no-any-return]
        hidden_PD: Tensor = self.module(batch)
        return hidden_PD

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients. `last`: this is the last backward of an accumulation; gradients are then summed over ranks.
        Every rank must call it the same number of times."""
        if loss.requires_grad:  # False if this rank has no rows
            loss.backward()  # type: ignore[no-untyped-call]
        if last and self.world_size > 1:
            dist.all_reduce(self.grad)

    def full_grad(self, parameter: nn.Parameter) -> Tensor:
        """A copy of the parameter's whole gradient, float32, summed over ranks. Valid after the last backward, before
        the step."""
        assert parameter.grad is not None
        return parameter.grad.detach().clone()

    def set_full_grad(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Replace the gradient that the step will use. Pass the same value on every rank."""
        assert parameter.grad is not None
        parameter.grad.copy_(grad)

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter, detached. It may share the parameter's memory. Every rank must call it."""
        return parameter.detach()

    def set_full_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replace a parameter outside the optimizer's step. Pass the same value on every rank."""
        with torch.no_grad():
            parameter.copy_(value)

    def flat_grad(self) -> Tensor:
        """All whole gradients as one vector [n], in the order of `named`. It may share their memory."""
        return self.grad

    def set_flat_grad(self, grad: Tensor) -> None:
        """Replace all gradients that the step will use, by one vector [n]."""
        self.grad.copy_(grad)

    def flat_parameters(self) -> Tensor:
        """All whole parameters as one vector [n], detached. It may share their memory. Every rank must call it."""
        return self.flat.detach()

    def set_flat_parameters(self, values: Tensor) -> None:
        """Replace all parameters outside the optimizer's step, by one vector [n]."""
        with torch.no_grad():
            self.flat.copy_(values)

    def release(self) -> None:
        """Free what is needed only for further steps."""
        if self.graphs is not None:
            self.graphs = None
            torch.cuda.empty_cache()

    def clear_grads(self) -> None:
        """Set gradients to zero, so that the next backward starts a new sum."""
        self.grad.zero_()

    def step(self, learning_rate: float) -> Tensor | float:
        """Clip, update, clear gradients. Returns the global gradient norm before clipping."""
        # Norm of the tensors' norms. A float32 sum over one long vector would be off by 2e-4 on a CPU.
        norm: Tensor = torch.nn.utils.get_total_norm(self._split(self.grad))
        torch.nn.utils.clip_grads_with_norm_([self.flat], self.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.clear_grads()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Optimizer state by flat names, `<moment>/<parameter>` and `step`, whole on every rank (all ranks must call
        it). The format is the same for every engine and number of ranks."""
        state = self.optimizer.state.get(self.flat)
        if not state:
            return {}
        found = {"step": state["step"].clone()}
        for key in MOMENTS:
            for (name, p), part in zip(self.named.items(), self._split(state[key]), strict=True):
                found[f"{key}/{name}"] = part.view_as(p).clone()
        return found

    def load_state(self, flat: Mapping[str, Tensor]) -> None:
        """Load what `state` returned, also from another engine or number of ranks."""
        if not flat:
            return
        state = self.optimizer.state[self.flat]
        state["step"] = flat["step"].to(self.flat.device, copy=True)  # the device that the fused step needs
        for key in MOMENTS:
            state[key] = torch.cat([flat[f"{key}/{name}"].flatten() for name in self.named]).to(self.flat.device)


class DeepSpeedEngine:
    """The interface of `TorchEngine` on DeepSpeed, ZeRO stage 0 to 3. A process group must exist.

    Raises:
        ConfigError: with ZeRO 3, a parameter does not divide evenly among the ranks.
    """

    needs_every_forward = True

    def __init__(
        self, module: nn.Module, *, weight_decay: float, max_grad_norm: float, world_size: int = 1, zero: int = 1
    ) -> None:
        import logging
        import os
        import warnings

        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)
        # Its shared-memory all-reduce for CPUs is compiled on first use (50 s, and needs a compiler). Use gloo's
        # instead.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.module = module
        self.world_size, self.zero = world_size, zero
        self.max_grad_norm = max_grad_norm
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        parameters = list(self.named.values())
        self.shapes = [p.shape for p in parameters]  # taken before ZeRO 3 shards them
        self.sizes = [shape.numel() for shape in self.shapes]
        if zero == 3 and (odd := [name for name, p in self.named.items() if p.numel() % world_size]):
            raise ConfigError(
                f"execution.zero 3 shards every LoRA factor evenly: {odd[0]} does not divide among {world_size} workers; "
                "choose another execution.num_workers, or zero 2"
            )
        optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay)
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": max_grad_norm,
                "steps_per_print": 10**9,
                "zero_optimization": {
                    "stage": zero,
                    "reduce_bucket_size": sum(p.numel() for p in parameters),  # its default buffer takes 2 GB
                    "overlap_comm": False,
                },
            },
        )
        wrong = [name for name, p in self.named.items() if p.dtype != torch.float32]
        if wrong:
            raise AssertionError(f"DeepSpeed changed trained parameters to another type: {wrong[:3]}; expected float32")

    def forward(self, batch: Any) -> Tensor:
        hidden_PD: Tensor = self.engine(batch)
        return hidden_PD

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world_size)

    def full_grad(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_grad

        grad: Tensor = safe_get_full_grad(parameter)
        return grad.detach().float().clone()

    def set_full_grad(self, parameter: nn.Parameter, grad: Tensor) -> None:
        from deepspeed.utils import safe_set_full_grad

        safe_set_full_grad(parameter, grad)

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        value: Tensor = safe_get_full_fp32_param(parameter) if self.zero == 3 else parameter
        return value.detach()

    def set_full_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        whole = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.zero == 3)
        with torch.no_grad(), whole:
            parameter.copy_(value)
        if self.zero > 0:  # ZeRO updates a copy of its own
            safe_set_full_fp32_param(parameter, value)

    def flat_grad(self) -> Tensor:
        return torch.cat([self.full_grad(p).flatten() for p in self.named.values()])

    def set_flat_grad(self, grad: Tensor) -> None:
        for p, part in self._parts(grad):
            self.set_full_grad(p, part)

    def flat_parameters(self) -> Tensor:
        return torch.cat([self.full_parameter(p).flatten() for p in self.named.values()])

    def set_flat_parameters(self, values: Tensor) -> None:
        for p, part in self._parts(values):
            self.set_full_parameter(p, part)

    def _parts(self, flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        start = 0
        for p, shape in zip(self.named.values(), self.shapes, strict=True):
            yield p, flat[start : start + shape.numel()].view(shape)
            start += shape.numel()

    def release(self) -> None:
        pass

    def clear_grads(self) -> None:
        self.engine.optimizer.zero_grad()

    def step(self, learning_rate: float) -> Tensor | float:
        for group in self._adam().param_groups:
            group["lr"] = learning_rate
        self.engine.set_gradient_accumulation_boundary(True)
        if self.zero == 0:  # without ZeRO, DeepSpeed returns no norm: clip here, by the same rule
            norm = float(torch.nn.utils.clip_grad_norm_(self.named.values(), self.max_grad_norm))
            self.engine.step()
        else:
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm())
        return norm

    def state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        adam = self._adam()
        if not adam.state:
            return {}
        step = next(iter(adam.state.values()))["step"]
        flat = {"step": step.clone() if isinstance(step, Tensor) else torch.tensor(float(step))}
        for name, p in self.named.items():
            for key in MOMENTS:
                value = adam.state[p][key] if self.zero == 0 else safe_get_full_optimizer_state(p, key)
                flat[f"{key}/{name}"] = value.detach().clone()
        return flat

    def load_state(self, flat: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        adam = self._adam()
        if not flat:
            return
        if self.zero == 0:
            for name, p in self.named.items():
                adam.state[p] = {"step": flat["step"].clone()}
                adam.state[p].update({key: flat[f"{key}/{name}"].to(p.device, copy=True) for key in MOMENTS})
            return
        # AdamW makes its state at the first step. So make it here, all zero, link it, then fill each rank's part.
        for group in adam.param_groups:
            for flat_part in group["params"]:
                adam.state[flat_part] = {"step": flat["step"].clone()}
                adam.state[flat_part].update({key: torch.zeros_like(flat_part) for key in MOMENTS})
        if self.zero < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, p in self.named.items():
            for key in MOMENTS:
                safe_set_full_optimizer_state(p, flat[f"{key}/{name}"].to(p.device), key)

    def _adam(self) -> torch.optim.Optimizer:
        optimizer = self.engine.optimizer
        found: torch.optim.Optimizer = optimizer if self.zero == 0 else optimizer.optimizer
        return found


Engine = TorchEngine | DeepSpeedEngine


def shards_the_model(kind: str, zero: int, world_size: int) -> bool:
    """Whether parameters are sharded outside their own module's forward (ZeRO 3)."""
    return zero == 3 and (kind == "deepspeed" or (kind == "auto" and world_size > 1))


def make(
    kind: str,
    module: nn.Module,
    *,
    weight_decay: float,
    max_grad_norm: float,
    world_size: int,
    zero: int,
    graphs: bool = False,
) -> Engine:
    """The engine called `kind`: `torch`, `deepspeed` (with the ZeRO stage `zero`), or `auto` (DeepSpeed for more than
    one rank). `graphs`: the torch engine may capture forward and backward as CUDA graphs (graphs.py)."""
    if kind == "torch" or (kind == "auto" and world_size == 1):
        return TorchEngine(
            module, weight_decay=weight_decay, max_grad_norm=max_grad_norm, world_size=world_size, graphs=graphs
        )
    return DeepSpeedEngine(
        module, weight_decay=weight_decay, max_grad_norm=max_grad_norm, world_size=world_size, zero=zero
    )
