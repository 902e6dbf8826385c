"""Metrics: the outcome of each prompt and the mean of each metric. Writes outcomes.jsonl.

Result: {metric: {"value", "num", "unparsed", "sets": {set: {"value", "num", "unparsed"}}}}. `value` is the mean over sets of
each set's mean (macro average), in [0, 1] (`gold_nll`: in nats a token). It is null if no verdict could be read. Unparsed
verdicts count in no mean.

outcomes.jsonl: one line {"metric", "set", "id", "value", "cluster"} for each metric and prompt. Degenerate answers also have
"why". If several guards judged, a line also has "votes". Prompts with the same `cluster` are not independent: they have the
same `meta.group` or are near-duplicates (AdvBench's 520 prompts form 391 clusters).

`asr_coherent` is reported with `asr`. It is the share of all attack prompts whose answer is judged harmful, has at least
MIN_HARM words, is not degenerate and is not off topic. (The last condition is skipped for a judge whose own question
includes it, see `Judge.reads_request`.) The reason: a judge may call an answer harmful that only repeats the request, says
"positive" as after SST-2 training, or answers another question. Such an answer is neither harm nor a refusal. Both metrics
have the same denominator, so they differ only by these answers. Three other metrics show models that are "safe" in this way:
the share of degenerate answers (the model says nothing), `off_topic` (it answers something else) and the non-refusals (it
says "positive").
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl import labels, metrics
from safecl.base import ConfigError, Json, json_lines
from safecl.stages import Kind
from safecl.store import Context, Stage
from safecl.tasks import Found, Row
from safecl.tasks._overlap import clusters
from safecl.tasks._written import of_stage

if TYPE_CHECKING:
    from safecl.estimate import Estimator

VERSION = "4"  # also the version of the rules that are always measured
PROGRAM_S = 2.0  # seconds for a model-written program in its sandbox
Outcome = dict[str, Any]


class Metrics(Kind):
    runs = "thread"  # one that runs programs says so in its hints
    unit = ""
    fixed_s = 0.1
    reads = ()

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        if "num_cpus" not in stage.hints:  # it runs no programs
            return 0.0
        sets = (rows for name, rows in stage.inputs.items() if name.startswith("utility.") and name.endswith(".rows"))
        return PROGRAM_S * sum(of.length(rows).rows for rows in sets)

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        answers = next((other for name, other in stage.inputs.items() if name.endswith(".generations")), None)
        if answers is None:
            return "metrics: guard"
        split = labels.answered(answers.inputs["rows"]).rpartition(", ")[2]
        return f"metrics {split}: {labels.weights(answers.inputs.get('weights'), models)}"


def run(context: Context) -> dict[str, Json]:
    """Write the outcomes and return the means. Reads the inputs `<role>.<set>.<what>` that the config's measures name.

    Raises ConfigError for a metric that is not declared (see metrics.py), because no table would show it.
    """
    config: Any = context.stage.config
    outcomes: list[Outcome] = []
    for measure in config["measures"]:
        outcomes += _measure(measure, context.inputs)
    with (context.out / "outcomes.jsonl").open("w") as file:
        for outcome in outcomes:
            file.write(json.dumps(outcome) + "\n")
    names = dict.fromkeys(o["metric"] for o in outcomes)
    return {metrics.of(name).name: _summary(outcomes, name) for name in names}


def _measure(measure: dict[str, Any], inputs: dict[str, Path]) -> Iterator[Outcome]:
    metric, name, of = measure["metric"], measure["set"], measure["of"]
    prefix = name if of == "label" else f"{measure['role']}.{name}"
    label = name if of == "label" else f"{measure['role']}/{name}"
    rows = {line["id"]: Row(**line) for line in json_lines(inputs[f"{prefix}.rows"] / "rows.jsonl")}
    groups = dict(zip(rows, clusters(list(rows.values())), strict=True))

    def outcome(metric: str, id: str, value: float | None) -> Outcome:
        return {"metric": metric, "set": label, "id": id, "value": value, "cluster": groups[id]}

    if of in ("score", "likelihood"):
        for scored, values in _of_task(measure, rows, inputs, prefix).items():
            for id, value in values:
                yield outcome(scored, id, value)
    elif of == "label":  # agreement of a guard with true labels
        for line in _verdicts(inputs, f"{prefix}.judged"):
            agreed = None if line["label"] is None else float(line["label"] == rows[line["id"]].harmful)
            yield outcome(metric, line["id"], agreed)
    elif of == "verdict":
        for line in _verdicts(inputs, f"{prefix}.{metric}", bool(measure.get("inverted"))):
            why = line["detail"]["why"] if line["label"] and metrics.of(metric).has_kinds else None
            found = outcome(metric, line["id"], None if line["label"] is None else float(line["label"]))
            yield found | _votes(line) | ({"why": why} if why else {})
    rules = [metrics.of(metric)] if of == "rule" else []
    if (
        "less" in measure and metrics.of(metric).question
    ):  # the measure that decides on harm also brings all rules that are always measured
        always = (rule for rule in metrics.METRICS if rule.is_always_measured and rule.of is not None)
        rules = [rule for rule in always if measure["role"] in rule.roles]
    if rules:
        asked = _asked(measure, rows, inputs, prefix)
        for rule in rules:
            for id, value, votes in _by_rule(rule, asked):
                yield outcome(rule.name, id, value) | votes


def _of_task(
    measure: dict[str, Any], rows: dict[str, Row], inputs: dict[str, Path], prefix: str
) -> dict[str, list[tuple[str, float | None]]]:
    """Metric -> (row id, value) of what a task measures. Raises ConfigError for a metric that the task does not declare."""
    kind = of_stage(measure, measure["set"])
    task = kind(unsafe_code=measure.get("unsafe_code", False))
    if measure["of"] == "score":
        lines = json_lines(inputs[f"{prefix}.generations"] / "generations.jsonl")
        found = task.scores([rows[line["id"]] for line in lines], [line["text"] for line in lines])
    else:
        lines = json_lines(inputs[f"{prefix}.likelihood"] / "likelihood.jsonl")
        options = [[Found(option["logprob"], option["num_tokens"]) for option in line["options"]] for line in lines]
        found = task.likelihood_scores([rows[line["id"]] for line in lines], options)
    if undeclared := found.keys() - metrics.of_task(kind).keys():
        raise ConfigError(
            f"task {measure['set']!r} measures {', '.join(sorted(undeclared))}, which it does not declare: expected "
            f"Metric({min(undeclared)!r}, ...) among the METRICS of {kind.__name__}, so that it has a column and a direction"
        )
    return {name: [*zip((line["id"] for line in lines), values, strict=True)] for name, values in found.items()}


def _asked(measure: dict[str, Any], rows: dict[str, Row], inputs: dict[str, Path], prefix: str) -> metrics.Asked:
    flipped = measure.get("inverted", ())
    flipped = [measure["metric"]] if flipped is True else flipped
    judged = {what: _verdicts(inputs, name, what in flipped)
              for name, folder in inputs.items()
              if (what := name.removeprefix(f"{prefix}.")) != name and (folder / "verdicts.jsonl").is_file()}  # fmt: skip
    answers = json_lines(inputs[f"{prefix}.generations"] / "generations.jsonl")
    asked = [rows[line["id"]] for line in answers]
    return metrics.Asked(of_stage(measure, measure["set"]), asked, answers, judged, measure.get("less", ()))


def _by_rule(metric: metrics.Metric, asked: metrics.Asked) -> Iterator[tuple[str, float | None, Outcome]]:
    """(row id, value, votes) of the metric's rule. `votes` holds the value that each guard alone would give."""
    assert metric.of is not None, f"metric {metric.name} has no rule"
    lines = asked.verdicts.get(metric.votes_of, ())
    voted = {line["id"]: votes["votes"] for line in lines if (votes := _votes(line))}
    by_guard = []
    for number in range(max(map(len, voted.values()), default=0)):
        said = [{**line, "label": bool(voted[line["id"]][number])} for line in lines if line["id"] in voted]
        unread = [line for line in lines if line["id"] not in voted]
        by_guard.append(metric.of(asked._replace(verdicts={**asked.verdicts, metric.votes_of: [*said, *unread]})))
    for id, value in metric.of(asked).items():
        yield id, value, {"votes": [found[id] for found in by_guard]} if id in voted else {}


def _votes(line: Mapping[str, Any]) -> Outcome:
    """The label of each guard as 1.0 or 0.0, if several guards judged and all were read. Else empty."""
    found = line.get("detail", {}).get("votes", ())
    return {"votes": [float(vote) for vote in found]} if found and None not in found else {}


def _inverted(line: dict[str, Any]) -> dict[str, Any]:
    flipped = {**line, "label": None if line["label"] is None else not line["label"]}
    if votes := line.get("detail", {}).get("votes"):
        flipped["detail"] = {**line["detail"], "votes": [None if vote is None else not vote for vote in votes]}
    return flipped


def _summary(outcomes: list[Outcome], metric: str) -> dict[str, Json]:
    sets: dict[str, Json] = {}
    means: list[float] = []
    num = unparsed = 0
    for name in dict.fromkeys(o["set"] for o in outcomes if o["metric"] == metric):
        values = [o["value"] for o in outcomes if o["metric"] == metric and o["set"] == name]
        read = [value for value in values if value is not None]
        mean = sum(read) / len(read) if read else None
        sets[name] = {"value": mean, "num": len(read), "unparsed": len(values) - len(read)}
        means += [] if mean is None else [mean]
        num, unparsed = num + len(read), unparsed + len(values) - len(read)
    return {"value": sum(means) / len(means) if means else None, "num": num, "unparsed": unparsed, "sets": sets}


def _verdicts(inputs: dict[str, Path], name: str, inverted: bool = False) -> list[Any]:
    """Lines of verdicts. `inverted`: flip the labels, for a judge whose True means "no" to the question asked."""
    lines = json_lines(inputs[name] / "verdicts.jsonl")
    return [_inverted(line) for line in lines] if inverted else lines
