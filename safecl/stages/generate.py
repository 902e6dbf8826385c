"""Answers of a served model to rows' prompts -> generations.jsonl, in row order. Greedy unless the config has `sampling`.

One line each: {"id", "prompt", "text", "num_tokens", "finish": "stop" | "length"}.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from safecl.base import Json
from safecl.store import Context
from safecl.training.tokens import Tokenizer, base_folder, encode_prompts, weights_folder

VERSION = "2"


def run(context: Context) -> dict[str, Json]:
    """Raises PrerequisiteError if the engine cannot answer."""
    from safecl.serving.messages import Request, Sampling, WeightsRef

    config: Any = context.stage.config
    rows = [json.loads(line) for line in (context.inputs["rows"] / "rows.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer(context.inputs["model"])
    template, longest = config["template"], int(config["max_prompt_tokens"])
    prompts, num_cut = encode_prompts([row["prompt"] for row in rows], tokenizer, template, config["bos"], longest)
    requests = [Request(row["id"], ids) for row, ids in zip(rows, prompts, strict=True)]
    weights = context.stage.inputs.get("weights", context.stage.inputs["model"])
    adapter = str(weights_folder(context.inputs["weights"])) if "weights" in context.inputs else None
    ref = WeightsRef(weights.key, str(base_folder(context.inputs["model"])), adapter)
    stop = stop_ids(tokenizer, [template["end"], *template["stop"]])
    sampling = Sampling(max_tokens=config["max_new_tokens"], stop_token_ids=stop, **config.get("sampling", {}))
    start = time.monotonic()
    done = context.engines.generate(
        engine_name("candidate", context), ref, requests, sampling, lambda n, total: context.report(n, total, {})
    )
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
            }
            file.write(json.dumps(line) + "\n")
    tokens = sum(len(answer.token_ids) for answer in done.values())
    at_limit = sum(answer.finish == "length" for answer in done.values())
    rate = round(tokens / seconds, 1)
    facts: dict[str, Json] = {"num": len(done), "tokens": tokens, "tokens_per_s": rate, "at_length_limit": at_limit}
    return {**facts, "cut_prompts": num_cut}


def stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[int, ...]:
    """Ids that end an answer: these tokens, and the model's own EOS tokens."""
    ids = {tokenizer.id_of(text) for text in stop} | set(tokenizer.eos_ids)
    return tuple(sorted(i for i in ids if i is not None))


def engine_name(role: str, context: Context) -> str:
    """Name of the engine group that serves this stage's base model in a role (`candidate`, `judge`)."""
    return f"{role}-{context.stage.inputs['model'].key[:8]}"
