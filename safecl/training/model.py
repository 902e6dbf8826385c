"""The frozen base, its LoRA adapters, and both together as a function from a batch to hidden states.

There is one base, in its own dtype. LoRA factors are float32. No teacher is loaded beside the student: what a method
needs of theta_safe is a cached stage (hidden states, Fisher information).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safecl import model_files
from safecl.base import ConfigError, Json, PrerequisiteError
from safecl.training import attention, lora, norms, weights
from safecl.training import fused as kernels
from safecl.training.batches import Batch, collate, stream
from safecl.training.tokens import Encoded, base_folder

if TYPE_CHECKING:
    from safecl.training.below import Below

PADDED = ("minimax", "zaya")  # models whose results differ, or may differ, with rows laid end to end
HEADS = ("lm_head", "embed_tokens", "wte", "embed_out", "output_layer")


def load(folder: Path, dtype: str, device: str = "cpu") -> Any:
    """The frozen base model of a folder, in `dtype` ("bfloat16" or "float32").

    Raises:
        PrerequisiteError: the folder has no model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    base = base_folder(folder)
    if not (base / "config.json").exists():
        raise PrerequisiteError(f"no model in {base}: expected config.json and safetensors in Hugging Face format")
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=getattr(torch, dtype)).to(device)
    _drop_nothing(model)
    model.config.use_cache = False
    model.requires_grad_(False)
    if model._supports_attention_backend and not _rows_see_themselves_alone(model, device):
        model.set_attn_implementation("eager")  # the model's own code; transformers' default drops soft caps and sinks
    return model


def _drop_nothing(model: Any) -> None:
    """Switch off the base's own dropout. Its masks would depend on what the process has drawn before, not on the
    seed."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _rows_see_themselves_alone(model: Any, device: str) -> bool:
    """Whether the rows of a batch may lie end to end; attention.py is then set as the model's attention.

    Attention must be the only part that joins tokens, it must be given the rows' bounds, and it must need nothing
    that attention.py lacks. Otherwise rows are padded: for models with convolutions or a running state, or with
    windows that are part of a mask (PhiMoE, Qwen2-MoE).
    """
    config = model.config.get_text_config()
    kinds = list(getattr(config, "layer_types", None) or ())
    other = set(kinds) - {"full_attention", "sliding_attention"} or getattr(model, "_is_stateful", False)
    if other or config.model_type in PADDED:
        return False
    model.set_attn_implementation(attention.NAME)
    row = Encoded("", [0, 1], 1)
    batch = collate([row, row], [0, 1], [0, 0], 1, row, device)
    try:
        with torch.no_grad(), attention.windows() as found:  # a forward shows what the model asks for
            _end_to_end(getattr(model, model.base_model_prefix), batch)
    except attention.NotHere:
        return False
    num_windows = sum(window is not None for window in found)
    if kinds:
        return num_windows == kinds.count("sliding_attention")
    return num_windows > 0 or getattr(config, "sliding_window", None) is None


def with_adapter(model: Any, lora: Mapping[str, Json], seed: int, continue_from: Path | None = None) -> Any:
    """PEFT model with a trainable float32 adapter `default`. It is fresh (B = 0, A from the stream "adapter"), or
    starts from the adapter in `continue_from` (a PEFT folder).

    Raises:
        ConfigError: the adapter to continue has another shape than `lora`, LoRA would sit on embedding or head, or `lora` does
            not fit the model: a target that is no module, more layers than there are, layers that are not Linear.
    """
    from peft import LoraConfig

    targets, last = lora["targets"], lora.get("last_layers")
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    names = [name for name, module in model.named_modules() if getattr(module, "weight", torch.empty(0)).ndim == 2]
    chosen: Any = None if isinstance(targets, str) else targets
    if wrong := model_files.misfits(model_files.Layers(tuple(names), num_layers), chosen, last):  # type: ignore[arg-type]
        raise ConfigError("\n".join(f"lora.{problem}" for problem in wrong))
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
    """PEFT model with the adapter of a PEFT folder as `default`. Its shape is read from the folder; it has no
    dropout."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode, config.lora_dropout = False, 0.0
    return _attach(model, config, 0, folder)


def fold(model: Any, folder: Path) -> None:
    """Add the adapter of a PEFT folder to the base's own weights, in float32, rounded once to the base's dtype.

    Raises:
        ConfigError: the adapter has a module that the model lacks, or one that is not Linear.
    """
    deltas = weights.load(folder)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name in deltas:
                _require_linear(name, module)
                module.weight.copy_(module.weight.float() + deltas[name].delta().to(module.weight.device))
    if odd := set(deltas) - {name for name, _ in model.named_modules()}:
        raise ConfigError(f"adapter {folder}: adapts {sorted(odd)[0]!r}, which this model has not")


def theta_safe(model: Any, folder: Path | None, adapter: str, fused: bool = True) -> HiddenStates:
    """theta_safe in eval mode, computed as in the finetune that starts from it: with the adapter beside the base
    (`continue`) or folded into it (`stack`). Without `folder` it is the model itself."""
    if folder is None or adapter == "stack":
        if folder is not None:
            fold(model, folder)
        return HiddenStates(model, fused).eval()
    return HiddenStates(with_continued(model, folder), fused).eval()


def _attach(model: Any, config: Any, seed: int, continue_from: Path | None) -> Any:
    from peft import get_peft_model
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "adapter"))
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    _refuse_heads(peft_model)
    for name, module in peft_model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            _require_linear(name, module.get_base_layer())
    if continue_from is not None:
        _same_shape(continue_from, config)
        tensors = load_file(str(continue_from / "adapter_model.safetensors"))
        load_factors(peft_model, tensors, "default")
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        parameter.requires_grad_("lora_" in name and ".default." in name)
    return peft_model


def _require_linear(name: str, layer: nn.Module) -> None:
    """Raise ConfigError unless the layer is nn.Linear. GPT-2's Conv1D holds its weight transposed, so a delta of a
    square weight would be added transposed without an error."""
    if not isinstance(layer, nn.Linear):
        raise ConfigError(
            f"lora.targets puts an adapter on {name!r}, a {type(layer).__name__}: expected linear layers, whose weights engines "
            "and files hold as [out, in]"
        )


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
    """LoRA factors (not copies) by the names that PEFT writes to disk, `base_model.model.<module>.lora_A.weight`."""
    mark = f".{adapter}."
    return {name.replace(mark, "."): p for name, p in peft_model.named_parameters() if "lora_" in name and mark in name}


def load_factors(peft_model: Any, tensors: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Copy tensors into an adapter.

    Raises:
        ConfigError: the names are not exactly those of the adapter's factors.
    """
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
    """Write the adapter `default` as a PEFT folder (adapter_config.json, adapter_model.safetensors, float32).
    `values`: values of its factors, needed if the model's own are sharded."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().float().cpu().contiguous() for name, p in (values or factors(peft_model)).items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = peft_model.peft_config["default"].to_dict()
    config.update(inference_mode=True, base_model_name_or_path="")
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    plain.update({k: getattr(v, "value", v) for k, v in plain.items()})
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True, default=str))


class HiddenStates(nn.Module):
    """The PEFT model (or a plain one) as a function from a batch to its tokens' last hidden states [P, D], after the
    final norm and without the output layer.

    Rows lie end to end, and each attends only to itself. A model that does not take its attention from transformers'
    registry gets padded rows. `fused`: LoRA layers and norms compute as one node each (lora.py, norms.py). Pass False
    if hooks on the model's own modules must see their inputs and outputs (Fisher information, ZeRO 3).
    """

    def __init__(self, peft_model: Any, fused: bool = True) -> None:
        super().__init__()
        self.peft_model = peft_model
        self.base = getattr(peft_model, "get_base_model", lambda: peft_model)()
        self.below: Below | None = None  # known outputs of the frozen lower layers, for some rows
        self.rows = lora.Rows()  # of the running forward
        lora.seed_dropout(peft_model, self.rows)
        if fused:
            lora.fuse(peft_model)
            norms.fuse(self.base)
            kernels.fuse(self.base)

    def forward(self, batch: Batch) -> Tensor:
        if not self.takes_rows:
            return self._padded(self.inner, batch)
        known = self.below is not None and self.below.knows(batch)
        with self.below.given(batch) if self.below is not None and known else nullcontext():
            return self.through(batch)

    def through(self, batch: Batch) -> Tensor:
        """Hidden states [P, D] through all layers, for rows that lie end to end."""
        self.rows.set(zip(batch.dropout_seeds, batch.lengths, strict=True))
        return _end_to_end(self.inner, batch)

    @property
    def inner(self) -> Any:
        """The base model without its output layer."""
        return getattr(self.base, self.base.base_model_prefix)

    @property
    def takes_rows(self) -> bool:
        """Whether rows may lie end to end."""
        return bool(self.base.config._attn_implementation == attention.NAME)

    def end_to_end(self, ids_P: Tensor, places_P: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """`through` from tensors only: token ids, places in the row, bounds on the device, and the most tokens of a
        row. Set `rows` before."""
        return _end_to_end_of(self.inner, ids_P, places_P, bounds, longest)

    def _padded(self, inner: Any, batch: Batch) -> Tensor:
        width = max(batch.lengths)
        self.rows.set((seed, width) for seed in batch.dropout_seeds)  # adapted layers get the padding too
        real_BT = torch.arange(width) < torch.tensor(batch.lengths)[:, None]
        ids_BT = torch.zeros(real_BT.shape, dtype=torch.long).to(batch.ids_P)
        ids_BT[real_BT] = batch.ids_P
        positions_BT = torch.arange(width, device=ids_BT.device).expand_as(ids_BT)
        out = inner(
            input_ids=ids_BT, attention_mask=real_BT.long().to(ids_BT), position_ids=positions_BT, use_cache=False
        )
        hidden_PD: Tensor = out.last_hidden_state[real_BT]
        return hidden_PD


def _end_to_end(inner: Any, batch: Batch) -> Tensor:
    bounds = torch.tensor([0, *batch.lengths]).cumsum(0, dtype=torch.int32)
    bounds = bounds.to(batch.ids_P.device) if batch.ids_P.is_cuda else bounds
    return _end_to_end_of(inner, batch.ids_P, batch.positions_P, bounds, max(batch.lengths))


def _end_to_end_of(inner: Any, ids_P: Tensor, places_P: Tensor, bounds: Tensor, longest: int) -> Tensor:
    with attention.packed():
        out = inner(
            input_ids=ids_P[None],
            position_ids=places_P[None],
            cu_seq_lens_q=bounds,
            max_length_q=longest,
            use_cache=False,
        )
    hidden_PD: Tensor = out.last_hidden_state.squeeze(0)
    return hidden_PD


def norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm of all tensors together."""
    return float(torch.stack([t.detach().float().square().sum() for t in tensors]).sum().sqrt())
