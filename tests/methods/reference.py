"""Fine-tuning in plain PyTorch, transformers and PEFT, for comparison: nothing here is of safecl but the rows it was dealt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from safecl.stages import finetune
from safecl.testing import world as contract
from safecl.testing.world import World
from safecl.training import batches

Rows = Sequence[tuple[list[int], int]]  # token ids and length of the prompt
RATE, WARM, DECAY, CLIP = 2e-3, 0.1, 0.1, 1.0  # of contract.config


def dealt(world: World, settings: dict[str, Any]) -> list[dict[str, Rows]]:
    """The user batch and the memory draw of every step."""
    run = finetune.make_run(settings, world.inputs(settings["method"]), contract.execution()).run
    found = []
    order = batches.order(run.seed, len(run.rows), run.config.batch_size, run.config.epochs)
    for run.step, run.indices in enumerate(order):
        drawn = {"user": [run.rows[i] for i in run.indices]}
        if run.memory_rows is not None:
            drawn["memory"] = run.draw().rows
        found.append({name: [(row.ids, row.num_prompt) for row in rows] for name, rows in drawn.items()})
    return found


def log_probabilities(model: Any, rows: Rows) -> list[torch.Tensor]:
    """Of each row the log-probabilities [answer tokens, vocabulary] of each answer token, by the model's own logits."""
    found = []
    for ids, num_prompt in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        found.append(torch.log_softmax(logits, -1)[num_prompt - 1 : -1])
    return found


def targets(rows: Rows) -> list[torch.Tensor]:
    return [torch.tensor(ids[num_prompt:]) for ids, num_prompt in rows]


def cross_entropy(model: Any, rows: Rows) -> torch.Tensor:
    """Mean over all answer tokens of -log p."""
    pairs = zip(log_probabilities(model, rows), targets(rows), strict=True)
    return -torch.cat([chances.gather(1, wanted[:, None])[:, 0] for chances, wanted in pairs]).mean()


def student(world: World) -> Any:
    """theta_safe with its adapter open to training, without dropout."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(world.model)
    return PeftModel.from_pretrained(base, str(world.safe / "adapter"), is_trainable=True).eval()


def train(
    world: World,
    steps: Sequence[dict[str, Rows]],
    backward: Callable[[Any, dict[str, Rows], list[torch.nn.Parameter]], None],
) -> dict[str, torch.Tensor]:
    """AdamW with a warm-up and a cosine; `backward` leaves a step's gradient. The final factors by name."""
    model = student(world)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    warm = math.ceil(WARM * len(steps))
    for step, rows in enumerate(steps):
        optimizer.zero_grad()
        backward(model, rows, trained)
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        done = (step - warm) / max(1, len(steps) - warm)
        rate = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate
        optimizer.step()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {n.replace(".default", ""): p.detach() for n, p in zip(names, trained, strict=True)}
