"""Answers of a served model to rows' prompts -> generations.jsonl, in row order. Greedy unless the config has `sampling`.

One line each: {"id", "prompt", "text", "num_tokens", "finish": "stop" | "length"}, and of a
conversation "before": what stands before the request.

Where a finetune's answers to attack prompts are made, the engine is also asked for the log-probabilities of the rows that
the finetune left in `probe.json` beside what the trained model gave them, so that the record says whether the model that
was trained is the one that is served: `served_gap` (largest difference, nats a token), `served_mean`, `served_tokens`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl import labels
from safecl.base import Json, json_lines
from safecl.stages import Kind
from safecl.store import Context, Stage
from safecl.tasks import Row
from safecl.training.tokens import Tokenizer, encode_prompts

if TYPE_CHECKING:
    from safecl.estimate import Estimator
    from safecl.serving.messages import WeightsRef

VERSION = "2"


class Generate(Kind):
    runs = "thread"
    unit = "answers"
    fixed_s = 0.7
    engine = "candidate"

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        rows = of.length(stage.inputs["rows"])
        return of.decode(stage, rows.rows, rows.prompt, int(str(stage.config["max_new_tokens"])))

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        return (
            f"generate {labels.answered(stage.inputs['rows'])}: {labels.weights(stage.inputs.get('weights'), models)}"
        )


def run(context: Context) -> dict[str, Json]:
    """Raises PrerequisiteError if the engine cannot answer."""
    from safecl.serving.messages import Request, Sampling, WeightsRef

    config: Any = context.stage.config
    rows = json_lines(context.inputs["rows"] / "rows.jsonl")
    tokenizer = Tokenizer(context.inputs["model"])
    template, longest = config["template"], int(config["max_prompt_tokens"])
    prompts, num_cut = encode_prompts([Row(**row) for row in rows], tokenizer, template, config["bos"], longest)
    requests = [Request(row["id"], ids) for row, ids in zip(rows, prompts, strict=True)]
    weights = context.stage.inputs.get("weights", context.stage.inputs["model"])
    adapter = context.stage.inputs["weights"].ref if "weights" in context.inputs else None
    ref = WeightsRef(weights.key, context.stage.inputs["model"].ref, adapter)
    stop = stop_ids(tokenizer, [template["end"], *template["stop"]])
    sampling = Sampling(max_tokens=config["max_new_tokens"], stop_token_ids=stop, **config.get("sampling", {}))
    engine = engine_name("candidate", context)
    gap = _served_gap(context, engine, ref)
    start = time.monotonic()
    done = context.engines.generate(engine, ref, requests, sampling, lambda n, total: context.report(n, total, {}))
    seconds = time.monotonic() - start
    with (context.out / "generations.jsonl").open("w") as file:
        for row in rows:
            answer = done[row["id"]]
            line = {
                "id": row["id"],
                "prompt": row["prompt"],
                "text": answer.text,
                "num_tokens": len(answer.token_ids),
                "finish": answer.finish,
                **({"before": row["before"]} if row.get("before") else {}),
            }
            file.write(json.dumps(line) + "\n")
    tokens = sum(len(answer.token_ids) for answer in done.values())
    at_limit = sum(answer.finish == "length" for answer in done.values())
    facts: dict[str, Json] = {"num": len(done), "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1)}
    return {**facts, "at_length_limit": at_limit, "cut_prompts": num_cut, **gap}


def _served_gap(context: Context, engine: str, ref: WeightsRef) -> dict[str, Json]:
    """Trained against served log-probabilities; empty for rows of another role, and for weights without a probe."""
    from safecl.serving.messages import Request, Sampling

    probe = context.inputs.get("weights", Path()) / "probe.json"
    role = str(context.stage.inputs["rows"].config.get("role", ""))
    if not role.startswith("attack.") or not probe.is_file():
        return {}
    longest = context.execution.engine_max_tokens - 1
    rows = [(row["ids"][:longest], row["logprobs"]) for row in json.loads(probe.read_text())]
    requests = [Request(str(number), ids) for number, (ids, _) in enumerate(rows)]
    told = context.engines.generate(engine, ref, requests, Sampling(max_tokens=1, of_prompt=True))
    apart = [
        abs(place[0][1] - trained)
        for number, (_, logprobs) in enumerate(rows)
        for place, trained in zip(told[str(number)].likely, logprobs, strict=False)  # cut to what the engine takes
    ]
    if not apart:
        return {}
    return {"served_gap": max(apart), "served_mean": sum(apart) / len(apart), "served_tokens": len(apart)}


def stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[int, ...]:
    """Ids that end an answer: these tokens, and the model's own EOS tokens."""
    ids = {tokenizer.id_of(text) for text in stop} | set(tokenizer.eos_ids)
    return tuple(sorted(i for i in ids if i is not None))


def engine_name(role: str, context: Context) -> str:
    """Name of the engine group that serves this stage's base model in a role (`candidate`, `judge`)."""
    return f"{role}-{context.stage.inputs['model'].key[:8]}"
