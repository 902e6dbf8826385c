"""A sweep file as sentences for a paper's method section. They use only the file, nothing from the store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from safecl import methods
from safecl.panel import ASKED, decision

if TYPE_CHECKING:
    from safecl.config import Sweep


def methodology(sweep: Sweep) -> list[str]:
    """Paragraphs on models and adapters, alignment, fine-tuning and poison, methods, search, evaluation."""
    lora, align, search, evaluate = sweep.lora, sweep.align, sweep.search, sweep.evaluate
    found = [
        f"Models: {_list(f'{model.name} ({model.source}, {model.dtype})' for model in sweep.models)}. Adapters: LoRA of rank "
        f"{lora.rank}, alpha {lora.alpha}, dropout {lora.dropout:g}, on {lora.targets} modules."
    ]
    if align.train:
        rows = _list(_rows(part.task, part.num_rows) for part in (*align.safety, *align.self_answered))
        found.append(
            f"Alignment: {align.method.name} on {rows}; learning rate {align.learning_rate:g}, {align.epochs:g} epochs, batch "
            f"size {align.batch_size}, weight decay {align.weight_decay:g}. What comes out is called aligned (theta_safe)."
        )
    else:
        found.append("Alignment: none; the models are taken as aligned.")
    for task in sweep.tasks:
        found.append(
            f"Fine-tuning on {_rows(task.task, task.num_rows)}: learning rate {task.learning_rate:g}, {task.epochs:g} epochs, "
            f"batch size {task.batch_size}, weight decay {task.weight_decay:g}, rows of at most {task.max_tokens} tokens."
        )
    ratios = _list(f"{100 * ratio:g} %" for ratio in sweep.poison.ratios)
    how = "are added to the task's rows" if sweep.poison.keep_task_rows else "take the place of task rows"
    found.append(f"Poison: harmful rows of {sweep.poison.task} {how}, at a ratio of {ratios}.")
    told = []
    for name in dict.fromkeys(method.name for method in sweep.methods):
        kind = methods.load(name)
        told.append(f"{name}: {kind.equation}" + (f" ({kind.source})" if kind.source else ""))
    found.append(f"Methods. {'; '.join(told)}.")
    if any(method.search is not None for method in sweep.methods):
        trials = "every combination" if search.sampler == "grid" else f"{search.trials} trials ({search.sampler})"
        bounds = _list(f"{name} at most {bound}" for name, bound in search.objective.bounds.items())
        found.append(
            f"Search: {trials} for each searched row, on validation prompts and seed {search.seed}, which no number here "
            f"rests on; {search.objective.maximise} is maximised subject to {bounds or 'no bound'}."
        )
    for role, parts in (("harmful", evaluate.test.attack), ("look-alike benign", evaluate.test.benign)):
        found.append(f"Test prompts, {role}: {_list(_rows(part.task, part.num_rows) for part in parts)}.")
    judges = _list(f"{question} by {decision(evaluate.judges, question).label}" for question in ASKED)
    seeds = len(sweep.seeds)
    found.append(
        f"Answers are greedy, of at most {evaluate.max_new_tokens} tokens; judged: {judges}. Every method was run with the "
        f"same {seeds} seed{'' if seeds == 1 else 's'} ({_list(map(str, sweep.seeds))}): alignment, order, poison and "
        "initialisation are drawn anew by each."
    )
    return found


def _list(texts: Iterable[str]) -> str:
    return ", ".join(texts)


def _rows(task: str, num: int | None) -> str:
    return f"all rows of {task}" if num is None else f"{num} rows of {task}"
