"""Generate: answers of a served model to the rows' prompts. Greedy unless the config has `sampling`.

Writes generations.jsonl, one line a row in row order: {"id", "prompt", "text", "num_tokens", "finish": "stop" | "length"}.
The line of a conversation also has "before", the turns before the request.

For attack prompts to a finetuned model it also checks that the served model is the trained one. The finetune stage left
`probe.json`: a few rows with the trained model's log-probabilities. The engine gives its own log-probabilities of the same
tokens. The result has `served_gap` (largest absolute difference, nats), `served_mean` (mean absolute difference, nats) and
`served_tokens` (number of tokens compared).
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
    """Write the answers. Returns counts and speed. Raises PrerequisiteError if the engine cannot answer."""
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
    """Compare trained and served log-probabilities. Empty for rows of a role other than attack, or without a probe."""
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
    """Token ids that end an answer: those of the texts in `stop` and the model's own EOS tokens."""
    ids = {tokenizer.id_of(text) for text in stop} | set(tokenizer.eos_ids)
    return tuple(sorted(i for i in ids if i is not None))


def engine_name(role: str, context: Context) -> str:
    """Name of the engine group that serves this stage's base model in a role (`candidate`, `judge`)."""
    return f"{role}-{context.stage.inputs['model'].key[:8]}"
