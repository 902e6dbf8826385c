"""Verdicts of one judge -> verdicts.jsonl, in row order: {"id", "label": true | false | null, "raw", "detail",
"score": in [0, 1] | null}.

Judged are the generations in `generations`, or without them the rows' own answers (labelled pairs that measure a
guard). Unparsed is null: counted, never "safe"; more than 1 % of them fail the stage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl.base import Json
from safecl.judges import Judge, Verdict, load
from safecl.store import Context
from safecl.training.tokens import Tokenizer, base_folder, weights_folder

if TYPE_CHECKING:
    from safecl.serving.messages import WeightsRef

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
            file.write(json.dumps({"id": row["id"], **verdict._asdict()}) + "\n")
    unparsed = [verdict.raw for verdict in verdicts if verdict.label is None]
    if len(unparsed) > MAX_UNPARSED * len(verdicts):
        raise RuntimeError(
            f"judge {config['judge']}: {len(unparsed)} of {len(verdicts)} verdicts cannot be read, expected at most "
            f"{MAX_UNPARSED:.0%}; the first: {unparsed[0]!r}. Is this model a guard that speaks this template?"
        )
    return {"num": len(verdicts), "true": sum(v.label is True for v in verdicts), "unparsed": len(unparsed)}


def _ask(context: Context, judge: Judge, pairs: list[tuple[str, str]]) -> list[Verdict]:
    from safecl.serving.messages import WeightsRef

    model = context.stage.inputs["model"]
    weights = context.stage.inputs.get("weights", model)
    adapter = str(weights_folder(context.inputs["weights"])) if "weights" in context.inputs else None
    ref = WeightsRef(weights.key, str(base_folder(context.inputs["model"])), adapter)
    return ask(judge, pairs, context.engines, f"judge-{model.key[:8]}", ref, lambda n, all: context.report(n, all, {}))


def ask(
    judge: Judge,
    pairs: Sequence[tuple[str, str]],
    engines: Any,
    name: str,
    weights: WeightsRef,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """A served judge's verdicts on (request, response) pairs, in order, from the engines called `name`."""
    from safecl.serving.messages import Request, Sampling

    tokenizer = Tokenizer(Path(weights.base))
    # The template writes its own BOS, so the tokenizer must not add a second one.
    prompts = tokenizer.prompt_ids([judge.pieces(*pair) for pair in pairs])
    requests = [Request(str(i), ids) for i, ids in enumerate(prompts)]
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    sampling = Sampling(max_tokens=judge.max_tokens, stop_token_ids=stop, logprobs=judge.logprobs)
    done = engines.generate(name, weights, requests, sampling, on_progress)
    return [judge.read(done[request.id].text, done[request.id].likely) for request in requests]
