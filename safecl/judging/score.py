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

CHUNK = 256  # pairs asked at once; limits the memory of their prompts


class Judged(NamedTuple):
    """Verdicts of each judge, in the order of `pairs`. `model` is the identity of the served judges' model (None: no model)."""

    pairs: list[Pair]
    judges: dict[str, Judge]
    verdicts: dict[str, list[Verdict]]
    model: Json

    def source(self, text: str) -> dict[str, Json]:
        """What decides the verdicts of judge `text` in addition to its name and config: its version and model."""
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
    """Judge every pair of a file with every judge, and write the verdicts to `out`.

    Verdicts that `out` already holds are not asked again. `needed` are fields that every line must have. Everything is
    checked first; then `served` (the model) is started, only if a served judge has pairs left to judge.

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
    """The rate of each judge, and the agreement of two judges.

    For each judge: its question, the share of True (in [0, 1]) with Wilson's 95 % interval, and the number of unparsed
    verdicts. With a validation (the result of `validate`) also the corrected rate. For two judges also their agreement. If
    one of them finds refusals and the other harm, the second judge's labels are inverted first (`turned`). `evidence` is
    false if both judges are rules.
    """
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
            # Two rules may overlook the same things, so their agreement is no evidence that either is right.
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
    """The judged rate, corrected by a table of counts of other rows: `corrected`, or null and `why_not`."""
    hits, alarms, misses, passes = cells
    right, wrong = (hits, hits + misses), (passes, passes + alarms)
    if not (said[1] and right[1] and wrong[1]):
        return {"corrected": None, "why_not": "it takes verdicts, and validation rows of both kinds"}
    try:
        return {"corrected": stats.rogan_gladen(said, right, wrong)._asdict()}
    except stats.NotCorrectable as error:
        return {"corrected": None, "why_not": str(error)}


def load_validation(path: Path) -> dict[str, Any]:
    """Read a file with the output of `safecl judge validate --json`. Raises ConfigError if it is another kind of file."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if all({"all", "source"} <= entry.keys() for entry in found["judges"].values()):
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(f"--validation {str(path)!r}: expected a file that `safecl judge validate --json` printed")


def unreadable(judged: Judged) -> str | None:
    """An error message if too many verdicts of a judge are unparsed, else None."""
    found = (judges.unreadable(text, verdicts, "--max-tokens") for text, verdicts in judged.verdicts.items())
    return next(filter(None, found), None)


def validate(judged: Judged, label: str, positive: Sequence[str], by: str | None = None) -> dict[str, Any]:
    """Compare each judge with the human labels in field `label`. A value in `positive` means True, any other value False.

    The result has stats.Quality with its table of counts for each judge and group (`all`, and each value of field `by`). The
    `corrected` rate of a group is its judged rate, corrected by Rogan and Gladen's estimator with the sensitivity and
    specificity in all *other* groups. Its distance from `truth` shows how good such a correction is on this data.

    Raises ConfigError for a line without the label, or if a value in `positive` occurs in no line.
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
    """Counts of hits (true positives), false alarms, misses and passes (true negatives)."""
    pairs = [(truth[i], verdicts[i].label) for i in picked]
    return [pairs.count(cell) for cell in ((True, True), (False, True), (True, False), (False, False))]
