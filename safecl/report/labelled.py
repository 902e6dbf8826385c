"""Human labels of a sweep's answers: draw a sample, keep the labels, and use them to measure the judge and correct rates.

A label belongs to an *answer* (the key of the stage that generated it, and the row's id), so it is valid in every sweep and
method that shows the answer. Each label is a note in the store, so all users of one store add to the same labels. The last
label of an answer counts.

The corrected rate of a row is prediction-powered (Angelopoulos et al. 2023, arXiv 2301.09633): the judge's rate on all answers
plus the mean of (label - verdict) over the labelled answers. It is unbiased for any judge, because labelled answers are drawn at
random from the row's answers, the same number from each set. The better the judge, the narrower the interval.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl import metrics
from safecl.base import ConfigError, Damaged
from safecl.panel import ASKED
from safecl.report.answers import answers
from safecl.report.tables import Detail, lead, number
from safecl.stats import Interval, Quality, quality

if TYPE_CHECKING:
    from safecl.grid import Job
    from safecl.project import Project
    from safecl.store import Store

MIN_LABELS = 10  # labels of a row; with fewer its rate is not corrected
_ANSWER = tuple[str, str]  # key of the generate stage, id of the row


class Item(NamedTuple):
    """An answer with a judge's verdict. `row` is its row's place in the table. `said` is the verdict."""

    row: int
    set: str
    answer: _ANSWER
    prompt: str
    text: str
    said: bool


class Found(NamedTuple):
    """Results of the labels for one question.

    `num` is the number of labelled answers. `judge` is the judge's quality on them. `rows` maps a row's place in the table to
    (corrected rate, number of its labelled answers).
    """

    question: str
    num: int
    judge: Quality
    rows: dict[int, tuple[Interval, int]]


def read(store: Store, question: str) -> dict[_ANSWER, bool]:
    """All labels in the store, by answer. Labels that were taken back or skipped are left out."""
    kept = store.notes(f"label-{question}-").values()
    return {(one["generation"], one["id"]): one["label"] for one in kept if one["label"] is not None}


def keep(store: Store, question: str, answer: _ANSWER, label: bool | None) -> None:
    """Add one label to the store. None takes an earlier label back."""
    generation, row = answer
    at = datetime.now(UTC).isoformat("T", "seconds")
    name = f"label-{question}-{generation[:16]}-{hashlib.sha256(row.encode()).hexdigest()[:16]}"
    store.note(name, {"generation": generation, "id": row, "label": label, "at": at})


def items(project: Project, question: str, only: Iterable[_ANSWER] | None = None) -> list[Item]:
    """Every judged answer of the table's rows, in the table's order. With `only`, only these answers."""
    wanted = None if only is None else set(only)
    metric = decided(question)
    found = []
    for place, (_, _, jobs, _) in enumerate(project.finals()):
        for job in jobs:
            with suppress(Damaged):
                found += _of(project, job, place, metric, wanted)
    return found


def decided(question: str) -> str:
    """The name of the metric that belongs to a question of judges. Raises ConfigError for an unknown question."""
    if question not in ASKED:
        raise ConfigError(f"no judge decides {question!r}; expected one of {', '.join(ASKED)}")
    return next(metric.name for metric in metrics.METRICS if metric.question == question)


def _of(project: Project, job: Job, place: int, metric: str, wanted: set[_ANSWER] | None) -> list[Item]:
    outcomes = project.outcomes(job)
    said = {(o["set"], o["id"]): o["value"] for o in outcomes or () if o["metric"] == metric and o["value"] is not None}
    found = []
    for line in answers(project, job) if said else ():
        set_, answer = f"{line['role']}/{line['set']}", (line["generation"], line["id"])
        if (set_, line["id"]) in said and (wanted is None or answer in wanted):
            prompt = "\n".join([*(f"{role}: {text}" for role, text in line["before"]), line["prompt"]])
            found.append(Item(place, set_, answer, prompt, line["answer"], said[set_, line["id"]] >= 0.5))
    return found


def draw(population: Sequence[Item], num: int, seed: int = 0) -> list[Item]:
    """Draw `num` answers of every row, the same number from each of its sets, in random order.

    The order does not show the row. Base and aligned belong to several rows, but each of their answers is drawn only once.
    """
    groups: dict[tuple[int, str], list[Item]] = {}
    for item in population:
        groups.setdefault((item.row, item.set), []).append(item)
    num_sets: dict[int, int] = {}
    for row, _ in groups:
        num_sets[row] = num_sets.get(row, 0) + 1
    rng = random.Random(f"labels {seed}")
    found: dict[_ANSWER, Item] = {}
    for (row, _), members in groups.items():
        for item in rng.sample(members, min(len(members), -(-num // num_sets[row]))):
            found.setdefault(item.answer, item)
    drawn = list(found.values())
    rng.shuffle(drawn)
    return drawn


def corrected(
    rate: Interval, pairs: Mapping[str, Sequence[tuple[bool, bool]]], confidence: float = 0.95
) -> Interval | None:
    """A judge's rate (the mean over sets), corrected by (label, verdict) pairs of answers drawn at random from each set.

    `rate` is in [0, 1] and has its own interval, for other prompts and seeds. Returns None if a set has fewer than two pairs.
    The interval of the result adds the variance of `rate` and that of the correction. The latter is estimated as if one more
    pair differed, because the judge may err on other answers even if no labelled pair differs.
    """
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    if not pairs or any(len(of_set) < 2 for of_set in pairs.values()):
        return None
    shift, variance, freedom = 0.0, 0.0, 0
    for of_set in pairs.values():
        errors = [float(label) - float(said) for label, said in of_set]
        num, mean = len(errors), sum(errors) / len(errors)
        spread = (sum((error - mean) ** 2 for error in errors) + 1) / (num - 1)
        shift += mean / len(pairs)
        variance += spread / num / len(pairs) ** 2
        freedom += num - 1
    half = float(stdtrit(freedom, (1 + confidence) / 2)) * math.sqrt(variance)
    value = rate.value + shift
    low, high = (math.hypot(half, end) for end in (rate.value - rate.low, rate.high - rate.value))
    clipped = [min(1.0, max(0.0, x)) for x in (value, value - low, value + high)]
    return Interval(*clipped)


def found(project: Project, rows: Sequence[Mapping[str, Any]]) -> list[Found]:
    """Results of the store's labels for these rows (all rows of a sweep, in order). Empty if there are no labels."""
    every = []
    for question in ASKED:
        labels = read(project.store, question)
        having = items(project, question, labels) if labels else []
        if not having:
            continue
        unique = list({item.answer: item for item in having}.values())
        judge = quality(
            [labels[item.answer] for item in unique],
            [item.said for item in unique],
            [item.prompt for item in unique],
        )
        made: dict[int, tuple[Interval, int]] = {}
        for place, row in enumerate(rows):
            entry = row["metrics"].get(decided(question))
            pairs: dict[str, list[tuple[bool, bool]]] = {}
            for item in having:
                if item.row == place:
                    pairs.setdefault(item.set, []).append((labels[item.answer], item.said))
            num = sum(map(len, pairs.values()))
            if entry is not None and num >= MIN_LABELS and set(pairs) >= set(entry.get("sets", pairs)):
                rate = corrected(Interval(entry["value"], entry["low"], entry["high"]), pairs)
                made |= {} if rate is None else {place: (rate, num)}
        every.append(Found(question, len(unique), judge, made))
    return every


def pairs(project: Project, question: str) -> list[dict[str, str | bool]]:
    """The labelled answers of a sweep for `safecl judge validate`: `prompt`, `response`, `label` and `judge` (the verdict)."""
    labels = read(project.store, question)
    unique = {item.answer: item for item in items(project, question, labels)} if labels else {}
    return [
        {"prompt": item.prompt, "response": item.text, "label": labels[answer], "judge": item.said}
        for answer, item in unique.items()
    ]


def told(found: Sequence[Found], rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, list[Detail]]]:
    """Lines on the judges, and for each `model / task` tables with each row's rate as judged and as corrected."""
    lines: list[str] = []
    details: dict[str, list[Detail]] = {}
    for each in found:
        title = metrics.of(decided(each.question)).title
        share = "{:.1%} [{:.1%}, {:.1%}]".format(*each.judge.accuracy)
        lines.append(
            f"A person labelled {each.num} answers for {title}: its judge agrees in {share} of those it could read."
        )
        made: dict[str, list[list[str]]] = {}
        for place, (rate, num) in each.rows.items():
            row = rows[place]
            judged = number(row["metrics"][decided(each.question)])
            line = [*lead(row), judged, number(rate._asdict()), str(num)]
            made.setdefault(f"{row['model']} / {row['task']}", []).append(line)
        for where, cells in made.items():
            head = ["method", "poison", f"{title}, judged", "corrected", "labels"]
            name = f"{title} corrected by a person's labels (prediction-powered, valid whatever the judge)"
            details.setdefault(where, []).append(Detail(name, head, cells, in_every_form=True, of_judges=True))
    return lines, details
