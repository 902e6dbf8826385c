"""Judge: verdicts of one judge. Writes verdicts.jsonl, one line a row in row order.

A line is {"id", "label": true | false | null, "raw", "detail", "score": in [0, 1] | null}.

It judges the answers of the input `generations`, or without that input the rows' own answers (labelled pairs that measure a
guard). `label` is null if the verdict is unparsed or the pair is too long for the engine. Such verdicts are counted and never
taken as "safe". If they are more than 1 % of all, the stage fails.

If there are several guards (inputs `weights`, `weights.1`, ...), they vote: `label` is the majority's, `score` is the mean,
and `detail.votes` holds the label of each guard.

With `remote` ({"model", "version", "tokenizer", "chat"}) in the config an OpenAI-compatible endpoint answers. Its URL is in
the stage's hints, which are not part of the stage's identity. `answered_by` in the result is the model name that the server
reports.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl import judges, labels, sizes
from safecl.base import Json, PrerequisiteError, json_lines
from safecl.judges import Judge, Piece, Verdict, load
from safecl.serving.endpoint import KEY_VARIABLE, Endpoint
from safecl.serving.messages import Sampling
from safecl.stages import Kind
from safecl.store import Context, Stage
from safecl.training.tokens import Tokenizer, base_folder

if TYPE_CHECKING:
    from safecl.estimate import Estimator
    from safecl.serving.messages import WeightsRef

VERSION = "3"
PUBLISHED_TOKENS = 100  # tokens of a published guard's template, not counting the beginning that all prompts share
ENDPOINT_S = 0.1  # seconds for a pair at an endpoint, with some requests at once
ASKING_S = 0.7  # seconds that asking an engine takes in addition to the engine's work


class Judging(Kind):
    runs = "thread"
    unit = "verdicts"
    fixed_s = 0.05
    engine = "judge"
    apart_by = "judge"
    reads = ("rows", "model", "generations", "weights")

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        rows = of.length(stage.inputs["rows"])
        if "model" not in stage.inputs:
            return rows.rows * (ENDPOINT_S if "remote" in stage.config else 1e-4)
        answers = stage.inputs.get("generations")
        answer = rows.answer if answers is None else min(60.0, float(str(answers.config["max_new_tokens"])))
        guards = [name for name in stage.inputs if name.partition(".")[0] == "weights"]  # each answers all of it
        own = sizes.GUARD_TOKENS if guards else PUBLISHED_TOKENS
        return ASKING_S + max(1, len(guards)) * of.decode(stage, rows.rows, own + rows.prompt + answer, 3)

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        answers = stage.inputs.get("generations")
        if answers is None:  # the rows' own: a guard's held-out pairs, or what users bring
            of = "own answers" if stage.inputs["rows"].config["role"] == "user" else "held-out pairs"
        else:
            of = labels.weights(answers.inputs.get("weights"), models)
        return f"judge {stage.config['judge']} {labels.answered(stage.inputs['rows'])}: {of}"


def run(context: Context) -> dict[str, Json]:
    """Write the verdicts. Returns their counts.

    Raises:
        RuntimeError: more than judges.MAX_UNPARSED of the verdicts are unparsed.
        PrerequisiteError: the share is exceeded only because of pairs that are too long for the engine. The trial is not
            at fault.
    """
    config: Any = context.stage.config
    kind = load(config["judge"])
    judge = kind(kind.Config(**config["config"]))
    rows = json_lines(context.inputs["rows"] / "rows.jsonl")
    answers = {row["id"]: row["response"] for row in rows}
    if "generations" in context.inputs:
        answers = {line["id"]: line["text"] for line in json_lines(context.inputs["generations"] / "generations.jsonl")}
    pairs = [(row["prompt"], answers[row["id"]]) for row in rows]
    more: dict[str, Json] = {}
    if "remote" in config:
        verdicts, more["answered_by"] = _ask_there(context, judge, pairs)
    else:
        verdicts = _ask(context, judge, pairs) if judge.served else [judge.rule(*pair) for pair in pairs]
    with (context.out / "verdicts.jsonl").open("w") as file:
        for row, verdict in zip(rows, verdicts, strict=True):
            file.write(json.dumps({"id": row["id"], **verdict._asdict()}) + "\n")
    unparsed = [verdict for verdict in verdicts if verdict.label is None]
    if (problem := judges.unreadable(config["judge"], verdicts, "execution.engine_max_tokens")) is not None:
        num_asked = sum("limit" not in verdict.detail for verdict in unparsed)
        raise (RuntimeError if num_asked > judges.MAX_UNPARSED * len(verdicts) else PrerequisiteError)(problem)
    return {"num": len(verdicts), "true": sum(v.label is True for v in verdicts), "unparsed": len(unparsed), **more}


def _ask_there(context: Context, judge: Judge, pairs: list[tuple[str, str]]) -> tuple[list[Verdict], Json]:
    """Verdicts of an endpoint's model, and the model name that the server reports."""
    remote: Any = context.stage.config["remote"]
    hints = context.stage.hints
    found: dict[str, Verdict] = {}

    def on_done(key: str, verdict: Verdict) -> None:
        found[key] = verdict
        context.report(len(found), len(pairs), {})

    by = ask_endpoint(judge, {str(i): pair for i, pair in enumerate(pairs)}, *endpoint_of(remote, hints), on_done)
    return [found[str(i)] for i in range(len(pairs))], list(by)


def _ask(context: Context, judge: Judge, pairs: list[tuple[str, str]]) -> list[Verdict]:
    trained = sorted(name for name in context.inputs if name.partition(".")[0] == "weights")
    guards: list[str | None] = [*trained] or [None]
    votes: list[list[Verdict]] = [[] for _ in pairs]
    for name in guards:

        def on_done(key: str, verdict: Verdict) -> None:
            votes[int(key)].append(verdict)
            context.report(sum(map(len, votes)), len(pairs) * len(guards), {})

        ask(judge, {str(i): pair for i, pair in enumerate(pairs)}, _reach(context, name), on_done)
    return [_majority(of_pair) for of_pair in votes]


def _reach(context: Context, guard: str | None) -> Reach:
    """How to reach the model of the input `guard`. None stands for the base model itself."""
    from safecl.serving.messages import WeightsRef

    model, base = context.stage.inputs["model"], base_folder(context.inputs["model"])
    weights = model if guard is None else context.stage.inputs[guard]
    ref = WeightsRef(weights.key, model.ref, None if guard is None else weights.ref)
    trained: Any = weights.config.get("template")  # of a guard trained here, whose answers end as its rows do
    end = None if trained is None else str(trained["end"])
    limit = context.execution.engine_max_tokens
    return Reach(context.engines, f"judge-{model.key[:8]}", ref, limit, Tokenizer(base), end)


def _majority(votes: list[Verdict]) -> Verdict:
    """The verdict of several guards. A tie is decided by the mean score. If one vote is unparsed, so is the verdict."""
    if len(votes) == 1:
        return votes[0]
    labels: list[Json] = [vote.label for vote in votes]
    scores = [vote.score for vote in votes if vote.score is not None]
    score = sum(scores) / len(votes) if len(scores) == len(votes) else None
    unread = next((vote for vote in votes if vote.label is None), None)
    if unread is not None:
        return unread._replace(detail={**unread.detail, "votes": labels})
    lead = 2 * sum(label is True for label in labels) - len(labels)
    label = lead > 0 if lead else (score or 0) > 0.5
    return Verdict(label, " | ".join(vote.raw for vote in votes), {"votes": labels}, score)


class Reach(NamedTuple):
    """How a judge's model is reached.

    `limit` is the largest number of tokens of a prompt with its answer. `end` is the text of a token that ends an answer, in
    addition to the model's own EOS tokens.
    """

    engines: Any  # serving.client.Engines
    name: str
    weights: WeightsRef
    limit: int
    tokenizer: Tokenizer
    end: str | None = None


def ask(
    judge: Judge, pairs: Mapping[str, tuple[str, str]], reach: Reach, on_done: Callable[[str, Verdict], None]
) -> None:
    """Ask a served judge about (request, response) pairs. Passes each verdict to `on_done` with the pair's key as it arrives.

    A pair that is longer than `reach.limit` is not sent. Its verdict has `label` None.
    """
    from safecl.serving.messages import Request

    # The template writes its own BOS, so the tokenizer must not add a second one.
    prompts = reach.tokenizer.prompt_ids([judge.pieces(*pair) for pair in pairs.values()])
    requests = []
    for key, ids in zip(pairs, prompts, strict=True):
        num_tokens = len(ids) + judge.max_tokens
        if num_tokens > reach.limit:
            why = f"too long: {num_tokens} tokens with the judge's answer, at most {reach.limit}"
            on_done(key, Verdict(None, why, {"limit": reach.limit}))
        else:
            requests.append(Request(key, ids))
    end = None if reach.end is None else reach.tokenizer.id_of(reach.end)
    stop = tuple(sorted({*reach.tokenizer.eos_ids, *([] if end is None else [end])}))
    sampling = Sampling(max_tokens=judge.max_tokens, stop_token_ids=stop, logprobs=judge.logprobs, remembered=True)
    reach.engines.generate(
        reach.name,
        reach.weights,
        requests,
        sampling,
        on_done=lambda done: on_done(done.id, judge.read(done.text, done.likely)),
    )


def endpoint_of(remote: Any, hints: Mapping[str, str], max_tries: int = 8) -> tuple[Endpoint, Tokenizer | None]:
    """The endpoint that a stage's `remote` and hints name, and the tokenizer for its prompts (None: it is sent text).

    Raises PrerequisiteError if the environment variable that should hold the key is not set.
    """
    variable = hints.get("key_variable", KEY_VARIABLE)
    if "key_variable" in hints and not os.environ.get(variable):
        raise PrerequisiteError(
            f"endpoint {hints['url']}: the environment variable {variable} with its key is not set here"
        )
    endpoint = Endpoint(
        hints["url"], remote["model"], int(hints["at_once"]), max_tries, chat=remote["chat"], key_variable=variable
    )
    return endpoint, Tokenizer(base_folder(Path(hints["tokenizer"]))) if "tokenizer" in hints else None


# Texts that look like special tokens of chat templates. An endpoint that is sent text may read them as special tokens.
_SPECIAL = re.compile(r"<(?=\|[^<>|\s]+\|>|/?(?:s|bos|eos|unk|pad|start_of_turn|end_of_turn)>)")


def ask_endpoint(
    judge: Judge,
    pairs: Mapping[str, tuple[str, str]],
    endpoint: Endpoint,
    tokenizer: Tokenizer | None,
    on_done: Callable[[str, Verdict], None],
) -> tuple[str, ...]:
    """Ask an endpoint's model about (request, response) pairs, as `ask` does. Returns the model names that the server reports.

    With a `tokenizer` the prompts are exact token ids. Without one they are text, and a space is inserted into everything in
    the candidate's text that looks like a special token.
    """
    pieces = [judge.pieces(*pair) for pair in pairs.values()]
    prompts: list[Any] = [as_text(p) for p in pieces] if tokenizer is None else tokenizer.prompt_ids(pieces)
    done = endpoint.generate(
        dict(zip(pairs, prompts, strict=True)),
        Sampling(max_tokens=judge.max_tokens, logprobs=judge.logprobs),
        lambda done: on_done(done.id, judge.read(done.text, done.likely)),
        lambda id, why: on_done(id, Verdict(None, why, {"limit": "unknown"})),
    )
    return tuple(sorted({completion.weights_key for completion in done.values()}))


def as_text(pieces: Sequence[Piece]) -> str:
    """A prompt as text, for a server that tokenises it. Special tokens in text that is not the template's are broken up."""
    return "".join(piece.text if piece.own else _SPECIAL.sub("< ", piece.text) for piece in pieces)
