"""LoRA fine-tuning by others, of the same rows in the same batches: TRL's SFTTrainer and Hugging Face's Trainer, on PEFT.

Nothing here imports safecl but for the learning rate's schedule. `rows` are (token ids, prompt's length) in the order in
which they are trained on, `batch_size` at a time. Both anchors get PyTorch's fused AdamW, which is their default.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Row = tuple[list[int], int]
VARIANTS = {  # what is tried of each anchor; all compute the same loss
    "trl": ("padded", "padding_free", "padded autocast", "padding_free autocast"),
    "hf": ("padded", "padded autocast"),
}


def peft_model(base: Any, adapter: Path | None, lora: dict[str, Any]) -> Any:
    """PEFT's own model over `base`, with the starting values in the PEFT folder `adapter` (none: PEFT's own)."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    last = lora["last_layers"]
    lower = "|".join(map(str, range(base.config.num_hidden_layers - last))) if last is not None else ""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"],
        target_modules="all-linear", exclude_modules=rf".*\.({lower})\..*" if lower else None,
    )  # fmt: skip
    model = get_peft_model(base, config)
    if adapter is not None:
        set_peft_model_state_dict(model, load_file(str(adapter / "adapter_model.safetensors")))
    return model


def train(
    kind: str,
    variant: str,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    batch_size: int,
    num_steps: int,
    training: dict[str, Any],
    rate: Callable[[int], float],
    scratch: Path,
    synchronise: Callable[[], None] = lambda: None,
    gradient_checkpointing: bool = False,
    warm: int = 1,
) -> dict[str, Any]:
    """Train by `kind` (trl, hf). `rate(step)`: the learning rate over its peak.

    Returns `losses` (one a step), and `seconds` and `cpu_s` (CPU seconds of this process) from the end of step `warm` to the
    end of the last.
    """
    from transformers import PrinterCallback, TrainerCallback

    ends: list[tuple[float, float]] = []
    losses: list[torch.Tensor] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (warm, state.max_steps):
                synchronise()
            ends.append((time.perf_counter(), time.process_time()))

    examples = [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids, prompt in rows]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=training["learning_rate"], weight_decay=training["weight_decay"], fused=True
    )
    settings: dict[str, Any] = {
        "output_dir": str(scratch), "per_device_train_batch_size": batch_size, "max_steps": num_steps,
        "max_grad_norm": training["max_grad_norm"], "train_sampling_strategy": "sequential", "save_strategy": "no",
        "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": not next(model.parameters()).is_cuda,
        "bf16": "autocast" in variant, "gradient_checkpointing": gradient_checkpointing, "seed": 0,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    common = {
        "model": model, "train_dataset": examples, "processing_class": tokenizer,
        "optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)), "callbacks": [Clock()],
    }  # fmt: skip
    trainer: Any
    if kind == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        class Sft(SFTTrainer):  # type: ignore[misc]
            def training_step(self, *arguments: Any, **named: Any) -> Any:
                losses.append(super().training_step(*arguments, **named).detach())
                return losses[-1]

        # loss_type nll is what chunked_nll was before 1.16: it is chunked.
        args = SFTConfig(
            **settings, loss_type="nll", max_length=None, packing=False, padding_free="padding_free" in variant
        )
        trainer = Sft(args=args, **{**common, "train_dataset": Dataset.from_list(examples)})
    else:
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        class Plain(Trainer):  # type: ignore[misc]
            def training_step(self, *arguments: Any, **named: Any) -> Any:
                losses.append(super().training_step(*arguments, **named).detach())
                return losses[-1]

        trainer = Plain(
            args=TrainingArguments(**settings), data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            **common,
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    (start, cpu_start), (end, cpu_end) = ends[warm - 1], ends[-1]
    return {"losses": [float(loss) for loss in losses], "seconds": end - start, "cpu_s": cpu_end - cpu_start}
