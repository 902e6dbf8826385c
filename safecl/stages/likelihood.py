"""Likelihood: log-probabilities of a task's options under the final model. Writes likelihood.jsonl, one line a row.

    in    model (HF folder), rows; weights (finetune or finalize) unless the model is the base itself
    out   one line a row in row order: {"id", "options": [{"text", "logprob", "num_tokens"}]}, options as in `Task.options`

The forward pass is plain Hugging Face, with the weights as they are served: merged in float32 and rounded once to the base's
dtype. Only the output layer runs in float32. With logits rounded to bfloat16, more than twice as many comparisons of two
labels differ from those of a float32 model (12 of 300 instead of 5, SST-2 on SmolLM2-135M).

`logprob` is in nats, summed over the option's own tokens without the template's end token. It is null if the option's tokens
cannot follow the prompt's tokens unchanged, or if prompt and option do not fit. The last token of an option is never fed to
the model, so options of one token after the same prompt share a forward pass.

Config: `task`, `template`, `bos`, `dtype`, `max_tokens` (prompt + option; longer requests lose their beginning).
Shapes: B sequences, T tokens, D hidden, N option tokens of a batch.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safecl import labels
from safecl.base import Json
from safecl.stages import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from safecl.estimate import Estimator
    from safecl.store import Context, Stage
    from safecl.tasks import Option, Row
    from safecl.training.tokens import Encoded

VERSION = "4"
BATCH_TOKENS = 2048  # tokens of one forward pass, padding included


class Likelihood(Kind):
    runs = "trainer"
    unit = "options"
    fixed_s = 3.0

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        rows = of.length(stage.inputs["rows"])
        return of.passes(stage, 2 * rows.rows * (rows.prompt + rows.answer), backward=0.0)

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        return (
            f"likelihood {labels.answered(stage.inputs['rows'])}: {labels.weights(stage.inputs.get('weights'), models)}"
        )


def run(context: Context) -> dict[str, Json]:
    """Write the log-probabilities. Returns and raises what `measure` does."""
    device = "cuda" if context.execution.use_gpu else "cpu"
    return measure(dict(context.stage.config), context.inputs, context.out, device, context.report)


def measure(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, device: str = "cpu", report: Any = None
) -> dict[str, Json]:
    """Write the log-probabilities of the options of `inputs["rows"]` into `out`.

    Raises:
        ConfigError: no option fits into `max_tokens`.
        PrerequisiteError: the model's logits are not its output layer applied to the last hidden state.
    """
    from safecl.tasks._written import of_stage
    from safecl.training import batches

    task = of_stage(config, config["task"])()
    rows = batches.read_rows(inputs["rows"])
    options = [task.options(row) for row in rows]
    encoded = _encode(config, inputs["model"], rows, options)
    sequences: dict[tuple[int, ...], list[Encoded]] = {}  # tokens fed to the model -> options that share them
    for option in encoded.values():
        sequences.setdefault(tuple(option.ids[:-1]), []).append(option)
    found = _forward(config, inputs, list(sequences.values()), device, report)
    with (out / "likelihood.jsonl").open("w") as file:
        for i, row in enumerate(rows):
            names = [f"{i}/{j}" for j in range(len(options[i]))]
            line = [
                {"text": option.text, "logprob": found.get(name), "num_tokens": _num_tokens(encoded, name)}
                for name, option in zip(names, options[i], strict=True)
            ]
            file.write(json.dumps({"id": row.id, "options": line}) + "\n")
    num, fed = sum(map(len, options)), sum(map(len, sequences))
    return {"options": num, "left_out": num - len(found), "forwards": len(sequences), "tokens": fed}


def _num_tokens(encoded: Mapping[str, Encoded], name: str) -> int:
    return encoded[name].num_targets if name in encoded else 0


def _encode(
    config: Mapping[str, Any], model: Path, rows: Sequence[Row], options: Sequence[Sequence[Option]]
) -> dict[str, Encoded]:
    """`row/option` (numbers) -> tokens of prompt and option, as training and lm-eval join them, without the end token."""
    from safecl.tasks import Row
    from safecl.training import tokens

    tokenizer = tokens.Tokenizer(model)
    end = str(config["template"]["end"])
    bare = {**config["template"], "prompt": "{prompt}", "lead": "", "strip": False}
    num_end = len(tokenizer.ids([end])[0])
    encoded: dict[str, Encoded] = {}
    for template, is_bare in ((config["template"], False), (bare, True)):
        asked = [
            Row(f"{i}/{j}", row.prompt, option.text, before=row.before)
            if option.after is None
            else Row(f"{i}/{j}", option.after, option.text)
            for i, row in enumerate(rows)
            for j, option in enumerate(options[i])
            if (option.after is not None) == is_bare
        ]
        kept = tokens.encode(asked, tokenizer, template, config["bos"], config["max_tokens"])[0] if asked else []
        encoded |= {item.row_id: item._replace(ids=item.ids[:-num_end]) for item in kept}
    return encoded


def _forward(
    config: Mapping[str, Any], inputs: Mapping[str, Path], sequences: Sequence[list[Encoded]], device: str, report: Any
) -> dict[str, float]:
    """Log-probability of every option in nats, by the option's id."""
    import torch

    from safecl.serving import swap
    from safecl.training import batches, losses, model, tokens

    if device == "cpu":
        torch.set_num_threads(1)
    base = model.load(tokens.base_folder(inputs["model"]), config["dtype"], device)
    found: dict[str, float] = {}
    with torch.no_grad():
        if "weights" in inputs:
            folder = tokens.weights_folder(inputs["weights"])
            changed = swap.changes(folder)
            for name, tensor in swap.merged(tokens.base_folder(inputs["model"]), folder, dtype=base.dtype):
                if name in changed:
                    base.get_parameter(name).copy_(tensor)
        states, head = model.HiddenStates(base).eval(), losses.head_of(base)
        precise = head.in_float32()
        for group in _by_length(sequences):
            fed = [options[0]._replace(ids=options[0].ids[:-1]) for options in group]
            batch = batches.collate(fed, range(len(fed)), [0] * len(fed), 1, fed[0], device)
            rows = states(batch).split(batch.lengths)
            if not found:
                one = batches.collate(fed[:1], [0], [0], 1, fed[0], device)
                losses.check_head(head, states(one), base(input_ids=one.ids_P[None]).logits[0])
            places = [(hidden_TD, option) for hidden_TD, options in zip(rows, group, strict=True) for option in options]
            # The state before a token predicts it.
            hidden_ND = torch.cat([hidden_TD[o.num_prompt - 1 : len(o.ids) - 1] for hidden_TD, o in places])
            targets_N = torch.tensor([i for _, o in places for i in o.ids[o.num_prompt :]], device=device)
            logprobs_N = losses.log_probabilities(hidden_ND, precise, targets_N)
            done = 0
            for _, option in places:
                found[option.row_id] = float(logprobs_N[done : done + option.num_targets].double().sum())
                done += option.num_targets
            if report is not None:
                report(len(found), sum(map(len, sequences)), {})
    return found


def _by_length(sequences: Sequence[list[Encoded]]) -> Iterator[list[list[Encoded]]]:
    """Batches of at most BATCH_TOKENS tokens (or one sequence), shortest first."""
    group: list[list[Encoded]] = []
    for options in sorted(sequences, key=lambda options: len(options[0].ids)):
        if group and (len(group) + 1) * (len(options[0].ids) - 1) > BATCH_TOKENS:
            yield group
            group = []
        group.append(options)
    if group:
        yield group
