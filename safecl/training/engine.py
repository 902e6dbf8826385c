"""Gradients over ranks and the optimizer step. The only file that imports deepspeed.

`TorchEngine` is the reference: plain AdamW and one all-reduce of its own. On one rank, where there is nothing to share,
it is what `auto` takes (DeepSpeed adds 90 ms a step there). `DeepSpeedEngine` (ZeRO 0, 1, 2) is held
equal to it by a test. Both hold: losses are normalised over the global batch, so gradients are SUMMED over ranks; after
the last backward whole summed gradients are readable and writable; clipping is by the global norm, after any change.

What DeepSpeed needs (measured, 0.19.8): a second backward in ZeRO 1 and 2 overwrites unless the accumulation boundary
is set by hand; it averages over ranks, so the loss is scaled up by their number; its bfloat16 mode would cast the LoRA
factors, so it stays off (the frozen base is bfloat16 by itself); PyTorch's AdamW is handed in (DeepSpeed's own is
compiled on first use).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safecl.base import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS, EPSILON = (0.9, 0.999), 1e-8


class TorchEngine:
    """Data-parallel training of the trainable parameters of `module`, which maps a batch to hidden states.

    `needs_every_forward`: ranks exchange parameters within a forward or a backward, so each must run as many.
    """

    needs_every_forward = False

    def __init__(self, module: nn.Module, *, weight_decay: float, max_grad_norm: float, world_size: int = 1) -> None:
        self.module = module
        self.world_size = world_size
        self.max_grad_norm = max_grad_norm
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        wrong = [name for name, p in self.named.items() if p.dtype != torch.float32]
        if wrong or not self.named:
            raise AssertionError(f"expected float32 parameters, got {len(self.named)}, not float32: {wrong[:3]}")
        self.optimizer = torch.optim.AdamW(  # fused: one call in place of ten for each of hundreds of factors
            list(self.named.values()), lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay, fused=True
        )

    def forward(self, batch: Any) -> Tensor:
        """What the module makes of a batch: hidden states [P, D]."""
        hidden_PD: Tensor = self.module(batch)
        return hidden_PD

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients. `last`: of this accumulation; then gradients are summed over ranks. Every rank must call it
        the same number of times."""
        if loss.requires_grad:  # not where a rank has no rows
            loss.backward()  # type: ignore[no-untyped-call]
        if last:
            for p in self.named.values():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            if self.world_size > 1:
                grads = [p.grad for p in self.named.values() if p.grad is not None]
                flat = torch.cat([g.flatten() for g in grads])
                dist.all_reduce(flat)
                start = 0
                for grad in grads:
                    grad.copy_(flat[start : start + grad.numel()].view_as(grad))
                    start += grad.numel()

    def full_grad(self, parameter: nn.Parameter) -> Tensor:
        """The whole gradient, float32, summed over ranks: a copy. After the last backward, before the step."""
        assert parameter.grad is not None
        return parameter.grad.detach().clone()

    def set_full_grad(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Replace the gradient that the step will use (the same value on every rank)."""
        assert parameter.grad is not None
        parameter.grad.copy_(grad)

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter, detached; it may be the parameter's own memory. Every rank must call it."""
        return parameter.detach()

    def set_full_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replace a parameter outside the optimizer's step (the same value on every rank)."""
        with torch.no_grad():
            parameter.copy_(value)

    def clear_grads(self) -> None:
        """Forget gradients, so that the next backward starts afresh."""
        for p in self.named.values():
            p.grad = None

    def step(self, learning_rate: float) -> Tensor | float:
        """Clip, update, clear. Returns the global gradient norm before clipping."""
        norm: Tensor = torch.nn.utils.clip_grad_norm_(self.named.values(), self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.clear_grads()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Optimizer state as flat names, whole on every rank (all ranks must call it): `<moment>/<parameter>`, `step`.
        The same for every engine and number of ranks."""
        flat: dict[str, Tensor] = {}
        for name, p in self.named.items():
            if state := self.optimizer.state.get(p):
                flat["step"] = state["step"].clone()
                flat.update({f"{key}/{name}": state[key].clone() for key in MOMENTS})
        return flat

    def load_state(self, flat: Mapping[str, Tensor]) -> None:
        """Inverse of `state`, also into another engine or number of ranks."""
        if not flat:
            return
        for name, p in self.named.items():
            state = self.optimizer.state[p]
            state["step"] = flat["step"].clone()
            for key in MOMENTS:
                state[key] = flat[f"{key}/{name}"].to(p.device, copy=True)


class DeepSpeedEngine:
    """The same interface on DeepSpeed, ZeRO stage 0 to 3. A process group must exist.

    Raises:
        ConfigError: ZeRO 3, and a parameter does not divide evenly among the ranks.
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
        # Its shared-memory all-reduce for CPUs is compiled on first use (50 s, and needs a compiler): gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.module = module
        self.world_size, self.zero = world_size, zero
        self.max_grad_norm = max_grad_norm
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        parameters = list(self.named.values())
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
        if self.zero > 0:  # the copy that ZeRO steps
            safe_set_full_fp32_param(parameter, value)

    def clear_grads(self) -> None:
        self.engine.optimizer.zero_grad()

    def step(self, learning_rate: float) -> Tensor | float:
        for group in self._adam().param_groups:
            group["lr"] = learning_rate
        self.engine.set_gradient_accumulation_boundary(True)
        if self.zero == 0:  # without ZeRO, DeepSpeed keeps no norm: clip here, by the same rule
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
        # AdamW makes its state at the first step: make it empty, link it, then fill each rank's part.
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
    """Whether parameters are in shards outside their own module's forward (ZeRO 3)."""
    return zero == 3 and (kind == "deepspeed" or (kind == "auto" and world_size > 1))


def make(
    kind: str, module: nn.Module, *, weight_decay: float, max_grad_norm: float, world_size: int, zero: int
) -> Engine:
    """`torch`, `deepspeed` with its ZeRO stage, or `auto`: DeepSpeed where there is more than one rank to shard over."""
    if kind == "torch" or (kind == "auto" and world_size == 1):
        return TorchEngine(module, weight_decay=weight_decay, max_grad_norm=max_grad_norm, world_size=world_size)
    return DeepSpeedEngine(
        module, weight_decay=weight_decay, max_grad_norm=max_grad_norm, world_size=world_size, zero=zero
    )
