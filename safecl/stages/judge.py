"""Verdicts of one judge -> verdicts.jsonl, in row order: {"id", "label": true | false | null, "raw", "detail"}.

Judged are the generations in `generations`, or without them the rows' own answers (labelled pairs that measure a
guard). Unparsed is null: counted, never "safe"; more than 1 % of them fail the stage.
"""

from __future__ import annotations

import json
from typing import Any

from safecl.base import Json
from safecl.judges import Judge, Verdict, load
from safecl.store import Context
from safecl.training.tokens import Tokenizer, base_folder, weights_folder

VERSION = "1"
MAX_UNPARSED = 0.01  # share of verdicts


def run(context: Context) -> dict[str, Json]:
    """Raises RuntimeError if more than MAX_UNPARSED of the verdicts cannot be read."""
    config: Any = context.stage.config
    kind = load(config["judge"])
    judge = kind(kind.Config(**config["config"]))
    rows = [json.loads(line) for line in (context.inputs["rows"] / "rows.jsonl").read_text().splitlines()]
    answers = {row["id"]: row["response"] for row in rows}
    if "generations" in context.inputs:
        text = (context.inputs["generations"] / "generations.jsonl").read_text()
        answers = {line["id"]: line["text"] for line in map(json.loads, text.splitlines())}
    pairs = [(row["prompt"], answers[row["id"]]) for row in rows]
    verdicts = _ask(context, judge, pairs) if judge.served else [judge.rule(*pair) for pair in pairs]
    with (context.out / "verdicts.jsonl").open("w") as file:
        for row, verdict in zip(rows, verdicts, strict=True):
            line = {"id": row["id"], "label": verdict.label, "raw": verdict.raw, "detail": verdict.detail}
            file.write(json.dumps(line) + "\n")
    unparsed = [verdict.raw for verdict in verdicts if verdict.label is None]
    if len(unparsed) > MAX_UNPARSED * len(verdicts):
        raise RuntimeError(
            f"judge {config['judge']}: {len(unparsed)} of {len(verdicts)} verdicts cannot be read, expected at most "
            f"{MAX_UNPARSED:.0%}; the first: {unparsed[0]!r}. Is this model a guard that speaks this template?"
        )
    return {"num": len(verdicts), "true": sum(v.label is True for v in verdicts), "unparsed": len(unparsed)}


def _ask(context: Context, judge: Judge, pairs: list[tuple[str, str]]) -> list[Verdict]:
    from safecl.serving.messages import Request, Sampling, WeightsRef

    tokenizer = Tokenizer(context.inputs["model"])
    texts = [judge.prompt(request, response) for request, response in pairs]
    # The template writes its own BOS, so the tokenizer must not add a second one.
    requests = [Request(str(i), ids) for i, ids in enumerate(tokenizer.ids(texts))]
    weights = context.stage.inputs.get("weights", context.stage.inputs["model"])
    adapter = str(weights_folder(context.inputs["weights"])) if "weights" in context.inputs else None
    ref = WeightsRef(weights.key, str(base_folder(context.inputs["model"])), adapter)
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    done = context.engines.generate(
        f"judge-{context.stage.inputs['model'].key[:8]}",
        ref,
        requests,
        Sampling(max_tokens=judge.max_tokens, stop_token_ids=stop),
        lambda n, total: context.report(n, total, {}),
    )
    return [judge.parse(done[request.id].text) for request in requests]
