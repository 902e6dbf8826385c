"""Answers of a served model to rows' prompts -> generations.jsonl, in row order. Greedy unless the config has `sampling`.

One line each: {"id", "prompt", "text", "num_tokens", "finish": "stop" | "length"}.
"""

from __future__ import annotations

import json
import time
from typing import Any

from safecl.base import Json
from safecl.store import Context
from safecl.training.tokens import Tokenizer, base_folder, encode_prompt, weights_folder

VERSION = "1"


def run(context: Context) -> dict[str, Json]:
    """Raises PrerequisiteError if the engine cannot answer."""
    from safecl.serving.messages import Request, Sampling, WeightsRef

    config: Any = context.stage.config
    rows = [json.loads(line) for line in (context.inputs["rows"] / "rows.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer(context.inputs["model"])
    template, longest = config["template"], int(config["max_prompt_tokens"])
    requests = [
        Request(row["id"], encode_prompt(row["prompt"], tokenizer, template, config["bos"], longest)) for row in rows
    ]
    weights = context.stage.inputs.get("weights", context.stage.inputs["model"])
    adapter = str(weights_folder(context.inputs["weights"])) if "weights" in context.inputs else None
    ref = WeightsRef(weights.key, str(base_folder(context.inputs["model"])), adapter)
    stop = stop_ids(tokenizer, template["stop"])
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
    return {"num": len(done), "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1), "at_length_limit": at_limit}


def stop_ids(tokenizer: Tokenizer, stop: list[str]) -> tuple[int, ...]:
    """Ids of the stop tokens that this tokenizer knows as single tokens, with its own EOS."""
    ids = {tokenizer.id_of(text) for text in stop} | {tokenizer.eos_id}
    return tuple(sorted(i for i in ids if i is not None))


def engine_name(role: str, context: Context) -> str:
    """Name of the engine group that serves this stage's base model in a role (`candidate`, `judge`)."""
    return f"{role}-{context.stage.inputs['model'].key[:8]}"
