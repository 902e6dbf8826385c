"""`safecl judge score` and `validate`: verdicts on a file of pairs, their rates, and how they agree with human labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from safecl import judges, stats
from safecl.base import ConfigError, Json
from safecl.judges import Judge, Verdict
from safecl.judging.pairs import Pair, Verdicts, key, parse_judge, read
from safecl.judging.served import Served

CHUNK = 256  # pairs asked at once: bounds what their prompts hold of memory


class Judged(NamedTuple):
    """Verdicts of each judge, in the order of `pairs`; `model` is the identity of the served ones' model."""

    pairs: list[Pair]
    judges: dict[str, Judge]
    verdicts: dict[str, list[Verdict]]
    model: Json

    def source(self, text: str) -> dict[str, Json]:
        """What else than its name and config decides the verdicts of judge `text`."""
        judge = self.judges[text]
        return {"version": judge.VERSION, "model": self.model if judge.served else None}


def judge_file(
    path: Path,
    judges: Sequence[str],
    served: AbstractContextManager[Served] | None,
    out: Path,
    fields: tuple[str, str] = ("prompt", "response"),
    needed: Sequence[str | None] = (),
) -> Judged:
    """Every judge's verdict on every pair of the file, written to `out`. What `out` holds already is not asked again.

    `needed`: fields that every line must have. `served` is entered only if a served judge has something left to answer;
    everything is checked before that.

    Raises:
        ConfigError: a bad line, an unknown judge, or a served judge without a model.
    """
    pairs = read(path, *fields)
    for field in needed:
        if field is not None:
            for pair in pairs:
                _value(pair, field)
    chosen = [parse_judge(text) for text in judges]
    if len(set(judges)) < len(judges):
        raise ConfigError(f"--judge: expected different judges, got {', '.join(judges)}")
    for name, judge in chosen:
        if judge.served and served is None:
            raise ConfigError(f"judge {name!r} reads a model's answer: name one with --model, or --endpoint")
    model = getattr(served, "identity", None)
    keys = {text: [key(*found, model, pair) for pair in pairs] for text, found in zip(judges, chosen, strict=True)}
    found = Verdicts(out, getattr(served, "limit", None))
    try:
        todo = {text: {k: pair for k, pair in zip(keys[text], pairs, strict=True) if k not in found} for text in judges}
        asks = [text for text, (_, judge) in zip(judges, chosen, strict=True) if judge.served and todo[text]]
        with served if served is not None and asks else nullcontext(None) as reached:
            for text, (_, judge) in zip(judges, chosen, strict=True):
                _answer(text, judge, todo[text], reached, found)
    except BaseException:
        found.close()
        raise
    found.close((pair, [keys[text][i] for text in judges]) for i, pair in enumerate(pairs))
    verdicts = {text: [found[k] for k in keys[text]] for text in judges}
    return Judged(pairs, dict(zip(judges, (judge for _, judge in chosen), strict=True)), verdicts, model)


def _answer(text: str, judge: Judge, todo: dict[str, Pair], served: Served | None, found: Verdicts) -> None:
    if served is None or not judge.served:
        for k, pair in todo.items():
            found.add(k, text, judge.rule(pair.request, pair.response))
        return
    waiting = list(todo.items())
    for start in range(0, len(waiting), CHUNK):
        part = {k: (pair.request, pair.response) for k, pair in waiting[start : start + CHUNK]}
        served.ask(judge, part, lambda k, verdict: found.add(k, text, verdict))


def rates(judged: Judged, validation: dict[str, Any] | None = None) -> dict[str, Any]:
    """Per judge: its question, the share of True with Wilson's interval, and how many could not be read; with a
    validation (`validate`'s result), the rate corrected by it. Two judges: their agreement; where one of them finds
    refusals and the other harm, the second's labels are turned round (`turned`); `evidence` is false of two rules."""
    found: dict[str, Any] = {}
    for text, verdicts in judged.verdicts.items():
        labels = [verdict.label for verdict in verdicts if verdict.label is not None]
        rate = stats.wilson(sum(labels), len(labels)) if labels else None
        found[text] = {
            "question": judged.judges[text].question,
            "num": len(labels),
            "unparsed": len(verdicts) - len(labels),
            "rate": None if rate is None else rate._asdict(),
        }
        scores = [verdict.score for verdict in verdicts if verdict.score is not None]
        if scores:
            found[text]["mean_score"] = sum(scores) / len(scores)
        if validation is not None:
            found[text] |= _corrected(labels, text, judged.source(text), validation)
    result: dict[str, Any] = {"judges": found}
    if len(judged.verdicts) == 2:
        first, second = ([verdict.label for verdict in verdicts] for verdicts in judged.verdicts.values())
        turned = len({judge.finds_refusals for judge in judged.judges.values()}) == 2
        if turned:
            second = [None if label is None else not label for label in second]
        if any(a is not None and b is not None for a, b in zip(first, second, strict=True)):
            found_both = stats.agreement(first, second, [pair.request for pair in judged.pairs])
            # Two rules share what both overlook, so that they agree says nothing of either.
            evidence = any(judge.served for judge in judged.judges.values())
            result["agreement"] = {**stats.as_json(found_both), "turned": turned, "evidence": evidence}
    return result


def _corrected(
    labels: list[bool], text: str, source: dict[str, Json], validation: dict[str, Any]
) -> dict[str, dict[str, float] | str | None]:
    entry = validation.get("judges", {}).get(text)
    if entry is None:
        raise ConfigError(
            f"--validation holds no judge {text!r}: expected one of {', '.join(validation.get('judges', ()))}"
        )
    if entry["source"] != source:
        raise ConfigError(
            f"--validation measured another judge {text!r}: expected {json.dumps(source)}, got "
            f"{json.dumps(entry['source'])}; validate this one"
        )
    return _fixed((sum(labels), len(labels)), (entry["all"] or {}).get("cells", (0, 0, 0, 0)))


def _fixed(said: tuple[int, int], cells: Sequence[int]) -> dict[str, dict[str, float] | str | None]:
    """The rate said, corrected by the table of counts of other rows: `corrected`, and `why_not` where it is null."""
    hits, alarms, misses, passes = cells
    right, wrong = (hits, hits + misses), (passes, passes + alarms)
    if not (said[1] and right[1] and wrong[1]):
        return {"corrected": None, "why_not": "it takes verdicts, and validation rows of both kinds"}
    try:
        return {"corrected": stats.rogan_gladen(said, right, wrong)._asdict()}
    except stats.NotCorrectable as error:
        return {"corrected": None, "why_not": str(error)}


def load_validation(path: Path) -> dict[str, Any]:
    """What `safecl judge validate --json` printed, from a file. Raises ConfigError."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if all({"all", "source"} <= entry.keys() for entry in found["judges"].values()):
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(f"--validation {str(path)!r}: expected a file that `safecl judge validate --json` printed")


def unreadable(judged: Judged) -> str | None:
    """What to say if too many of a judge's verdicts cannot be read."""
    found = (judges.unreadable(text, verdicts, "--max-tokens") for text, verdicts in judged.verdicts.items())
    return next(filter(None, found), None)


def validate(judged: Judged, label: str, positive: Sequence[str], by: str | None = None) -> dict[str, Any]:
    """Each judge against the human labels in field `label`: True is a value among `positive`, anything else is not.

    Per judge and group (`all`, and each value of field `by`): stats.Quality with its table of counts. A group's
    `corrected` rate is what Rogan and Gladen's estimator makes of its judged rate with the sensitivity and specificity
    seen in all *other* groups; beside `truth`, it shows what such a correction is worth here.

    Raises ConfigError for a line without the label, or if no line has a positive one.
    """
    told = [_value(pair, label) for pair in judged.pairs]
    counts = {value: told.count(value) for value in sorted(set(told))}
    if missing := [value for value in positive if value not in counts]:
        raise ConfigError(f"--positive {','.join(missing)}: no line has it; values of {label!r}: {counts}")
    truth = [value in positive for value in told]
    groups = [None if by is None else _value(pair, by) for pair in judged.pairs]
    result: dict[str, Any] = {"label": label, "positive": list(positive), "values": counts, "judges": {}}
    for text, verdicts in judged.verdicts.items():
        entry: dict[str, Any] = {
            "question": judged.judges[text].question,
            "source": judged.source(text),
            "all": _quality(judged, truth, verdicts, None),
        }
        if by is not None:
            names = list(dict.fromkeys(str(group) for group in groups))
            entry["by"] = {
                name: _quality(judged, truth, verdicts, [group == name for group in groups]) for name in names
            }
        result["judges"][text] = entry
    return result


def _value(pair: Pair, field: str) -> str:
    if field not in pair.row:
        raise ConfigError(f"line {pair.line} has no field {field!r}: expected one of {', '.join(pair.row)}")
    value = pair.row[field]
    if not isinstance(value, str | bool | int | float | None) or value != value:
        raise pair.row.problem(field, "a label: text, a number, true or false")
    return value if isinstance(value, str) else json.dumps(value)


def _quality(
    judged: Judged, truth: list[bool], verdicts: list[Verdict], inside: list[bool] | None
) -> dict[str, Any] | None:
    picked = [i for i in range(len(truth)) if inside is None or inside[i]]
    if all(verdicts[i].label is None for i in picked):
        return None
    found = stats.quality(
        [truth[i] for i in picked],
        [verdicts[i].label for i in picked],
        [judged.pairs[i].request for i in picked],
        [verdicts[i].score for i in picked],
    )
    entry = stats.as_json(found)
    entry["cells"] = _cells(truth, verdicts, picked)
    if inside is not None:
        outside = _cells(truth, verdicts, [i for i in range(len(truth)) if not inside[i]])
        said = entry["cells"][0] + entry["cells"][1]
        entry |= _fixed((said, found.num), outside)
    return entry


def _cells(truth: list[bool], verdicts: list[Verdict], picked: list[int]) -> list[int]:
    """Counts of hits, false alarms, misses and passes."""
    pairs = [(truth[i], verdicts[i].label) for i in picked]
    return [pairs.count(cell) for cell in ((True, True), (False, True), (True, False), (False, False))]
