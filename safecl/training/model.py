"""The frozen base, its LoRA adapters, and per-row dropout.

One base, in its own dtype; LoRA factors in float32. There is no teacher beside the student: what a method needs of
theta_safe is a cached stage (hidden states, Fisher information).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safecl.base import ConfigError, Json, PrerequisiteError
from safecl.training import weights
from safecl.training.batches import Batch, stream
from safecl.training.tokens import base_folder

HEADS = ("lm_head", "embed_tokens", "wte", "embed_out", "output_layer")


def load(folder: Path, dtype: str, device: str = "cpu") -> Any:
    """The frozen base model in `dtype` ("bfloat16" or "float32")."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    base = base_folder(folder)
    if not (base / "config.json").exists():
        raise PrerequisiteError(f"no model in {base}: expected config.json and safetensors in Hugging Face format")
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=getattr(torch, dtype)).to(device)
    model.config.use_cache = False
    return model.requires_grad_(False)


def with_adapter(model: Any, lora: Mapping[str, Json], seed: int, continue_from: Path | None = None) -> Any:
    """PEFT model with a trainable float32 adapter `default`: a fresh one (B = 0, A from the stream "adapter"), or the
    one in `continue_from` (a PEFT folder) trained on.

    Raises:
        ConfigError: the adapter to continue has another shape than `lora`, or LoRA would sit on embedding or head.
    """
    from peft import LoraConfig

    targets, last = lora["targets"], lora.get("last_layers")
    num_layers = int(model.config.num_hidden_layers)
    lower = "|".join(str(i) for i in range(num_layers - int(last))) if last is not None else ""  # type: ignore[arg-type]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=targets if isinstance(targets, str) else list(targets),  # type: ignore[arg-type]
        exclude_modules=rf".*\.({lower})\..*" if lower else None,
        bias="none",
    )
    return _attach(model, config, seed, continue_from)


def with_continued(model: Any, folder: Path) -> Any:
    """PEFT model with the adapter of a PEFT folder as `default`, its whole shape read from there, without dropout."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode, config.lora_dropout = False, 0.0
    return _attach(model, config, 0, folder)


def fold(model: Any, folder: Path) -> None:
    """Add the adapter of a PEFT folder to the base's own weights, in float32, rounded once to the base's dtype."""
    deltas = weights.load(folder)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name in deltas:
                module.weight.copy_(module.weight.float() + deltas[name].delta().to(module.weight.device))
    if odd := set(deltas) - {name for name, _ in model.named_modules()}:
        raise ConfigError(f"adapter {folder}: adapts {sorted(odd)[0]!r}, which this model has not")


def theta_safe(model: Any, folder: Path, adapter: str) -> HiddenStates:
    """theta_safe in eval mode, as the finetune that starts from it computes it: the adapter beside the base
    (`continue`) or folded into it (`stack`)."""
    if adapter == "stack":
        fold(model, folder)
        return HiddenStates(model).eval()
    return HiddenStates(with_continued(model, folder)).eval()


def _attach(model: Any, config: Any, seed: int, continue_from: Path | None) -> Any:
    from peft import get_peft_model
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "adapter"))
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    _refuse_heads(peft_model)
    if continue_from is not None:
        _same_shape(continue_from, config)
        tensors = load_file(str(continue_from / "adapter_model.safetensors"))
        load_factors(peft_model, tensors, "default")
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        parameter.requires_grad_("lora_" in name and ".default." in name)
    return peft_model


def _refuse_heads(peft_model: Any) -> None:
    base = peft_model.get_base_model()
    outer = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    for name, module in base.named_modules():
        wrapped = hasattr(module, "modules_to_save") or hasattr(module, "lora_A")
        if wrapped and (id(module) in outer or name.rsplit(".", 1)[-1] in HEADS):
            raise ConfigError(
                f"lora.targets puts an adapter on {name!r}: the embedding and the output layer stay frozen in safecl "
                "(DER's exact logit distance needs it); name inner layers only, e.g. q_proj, v_proj, or all-linear"
            )


def _same_shape(folder: Path, config: Any) -> None:
    theirs = json.loads((folder / "adapter_config.json").read_text())
    for key, ours in (("r", config.r), ("lora_alpha", config.lora_alpha)):
        if theirs.get(key) != ours:
            raise ConfigError(f"adapter {folder}: {key} is {theirs.get(key)}, expected {ours}; stages share `lora`")
    if theirs.get("modules_to_save"):
        raise ConfigError(f"adapter {folder}: modules_to_save is {theirs['modules_to_save']}; expected none")


def factors(peft_model: Any, adapter: str = "default") -> dict[str, nn.Parameter]:
    """LoRA factors by the names PEFT writes to disk (`base_model.model.<module>.lora_A.weight`), not copied."""
    mark = f".{adapter}."
    return {name.replace(mark, "."): p for name, p in peft_model.named_parameters() if "lora_" in name and mark in name}


def load_factors(peft_model: Any, tensors: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Copy tensors into an adapter; the names must match exactly, both ways."""
    ours = factors(peft_model, adapter)
    if set(ours) != set(tensors):
        odd = sorted(set(ours) ^ set(tensors))
        raise ConfigError(
            f"adapter does not fit this model: {len(odd)} names differ, e.g. {odd[0]!r}; expected the same lora.targets"
        )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(tensors[name])


def save_adapter(peft_model: Any, folder: Path, values: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter `default` (with these values of its factors, where the model's own are sharded) as a PEFT folder
    (adapter_config.json, adapter_model.safetensors, float32)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().float().cpu().contiguous() for name, p in (values or factors(peft_model)).items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = peft_model.peft_config["default"].to_dict()
    config.update(inference_mode=True, base_model_name_or_path="")
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    plain.update({k: getattr(v, "value", v) for k, v in plain.items()})
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True, default=str))


class RowDropout(nn.Module):
    """LoRA dropout whose mask depends on (row seed, module) alone: two ranks draw what one would, a forward more or
    less changes nobody else's mask, and a resumed run needs no random state."""

    def __init__(self, probability: float, module_index: int, rows: list[tuple[int, int]]) -> None:
        super().__init__()
        self.probability, self.module_index = probability, module_index
        self.rows = rows  # shared by all modules: (seed, length) of each row of the running forward

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        if len(self.rows) != len(x):
            raise RuntimeError(f"dropout has seeds for {len(self.rows)} rows, got a batch of {len(x)}")
        # 16 random bits an element, four to a 64-bit draw: 6 times faster than bernoulli_ on a CPU.
        cut = round(self.probability * 2**16)
        mask = torch.zeros_like(x)
        generator = torch.Generator(device=x.device)
        for b, (seed, length) in enumerate(self.rows):
            generator.manual_seed((seed + self.module_index * 0x9E3779B97F4A7C15) % 2**63)
            kept = mask[b, :length]
            draws = torch.empty(-(-kept.numel() // 4), dtype=torch.int64, device=x.device)
            draws.random_(-(2**63), None, generator=generator)
            kept.copy_((draws.view(torch.int16)[: kept.numel()] >= cut - 2**15).view_as(kept))
        return x * mask.mul_(2**16 / (2**16 - cut))


class HiddenStates(nn.Module):
    """The PEFT model (or a plain one) as a function to last hidden states [B, T, D] (after the final norm), without the
    output layer."""

    def __init__(self, peft_model: Any) -> None:
        super().__init__()
        self.peft_model = peft_model
        self.dropout_rows: list[tuple[int, int]] = []
        index = 0
        for module in peft_model.modules():
            drop = getattr(module, "lora_dropout", None)
            if isinstance(drop, nn.ModuleDict) and "default" in drop and isinstance(drop["default"], nn.Dropout):
                drop["default"] = RowDropout(drop["default"].p, index, self.dropout_rows)
                index += 1

    def forward(self, ids_BT: Tensor, attention_BT: Tensor, positions_BT: Tensor) -> Tensor:
        base = getattr(self.peft_model, "get_base_model", lambda: self.peft_model)()
        inner = getattr(base, base.base_model_prefix)
        # Without padding no mask is passed: attention then takes its faster causal path.
        mask = None if bool(attention_BT.all()) else attention_BT
        out = inner(input_ids=ids_BT, attention_mask=mask, position_ids=positions_BT, use_cache=False)
        hidden_BTD: Tensor = out.last_hidden_state
        return hidden_BTD

    def seed_dropout(self, batch: Batch) -> None:
        """Give the next forward its rows' dropout seeds."""
        self.dropout_rows[:] = list(zip(batch.dropout_seeds, batch.lengths, strict=True))


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of what is trained, in a fixed order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm over all tensors together."""
    return float(torch.stack([t.detach().float().square().sum() for t in tensors]).sum().sqrt())
