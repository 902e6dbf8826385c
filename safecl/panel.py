"""The judges of a sweep: which judge answers which question, about which prompts, with which model.

Everything is read from what each judge class declares (`judges.Judge`), so this file holds no list of their names.
`problems` reports all errors at once. plan.py makes stages of the judges.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import safecl.judges as judges
from safecl.base import ConfigError, Json, strictly
from safecl.config import Data, Judge, Judges, Model, Sweep, url_problem
from safecl.store import canonical
from safecl.tasks._source import sha256

# Key of `judges` -> (role of the prompts whose answers are judged, key of judges.QUESTIONS that is asked).
ASKED = {"asr": ("attack", "harm"), "over_refusal": ("benign", "refusal")}


@dataclass(frozen=True, eq=False)
class Seat:
    """One judge of one question in a sweep.

    `asked`: a key of judges.QUESTIONS. `metric`: the metric that is its fraction of yes. `config`: its settings as
    canonical JSON. `inverted`: its True means no. Its answers come from `model` on an engine, from guards `trained`
    here, or from an `endpoint`; if none of these is set, it is a rule.
    """

    asked: str
    metric: str
    label: str
    judge: str
    config: str
    inverted: bool = False
    model: Model | None = None
    trained: bool = False
    endpoint: Judge | None = None

    @property
    def kind(self) -> type[judges.Judge]:
        return judges.load(self.judge)

    @property
    def remote(self) -> dict[str, Json]:
        """What a verdict of an endpoint depends on: the model that answers, not its address."""
        assert self.endpoint is not None
        tokenizer = self.endpoint.tokenizer
        read = None if tokenizer is None else sha256(Path(tokenizer).absolute() / "tokenizer.json")
        return {"model": str(self.endpoint.model), "version": self.endpoint.version, "tokenizer": read,
                "chat": self.endpoint.chat}  # fmt: skip

    @property
    def hints(self) -> dict[str, str]:
        """The address of the endpoint. It is in no identity."""
        assert self.endpoint is not None
        found = {"url": str(self.endpoint.endpoint), "at_once": str(self.endpoint.at_once)}
        found |= {} if self.endpoint.key_variable is None else {"key_variable": self.endpoint.key_variable}
        return found | (
            {} if self.endpoint.tokenizer is None else {"tokenizer": os.path.abspath(self.endpoint.tokenizer)}
        )


def panel(chosen: Judges) -> dict[str, tuple[Seat, ...]]:
    """The judges of each role of prompts (attack, benign). First the judges of the role's question, the deciding one
    first; then the judges that every sweep asks.

    Raises:
        ConfigError: the first error found.
    """
    found: dict[str, list[Seat]] = {}
    for question, (role, _) in ASKED.items():
        found[role] = [_seat(question, i, one, chosen) for i, one in enumerate(chosen.of(question))]
    for asked in judges.QUESTIONS:
        for name in judges.names():
            for role, metric in judges.load(name).always.items():
                # `always` refers to its last question. It answers the others only where a sweep chooses it.
                if asked == list(judges.load(name).answers)[-1]:
                    found[role].append(Seat(asked, metric, name, name, "{}"))
    return {role: tuple(seats) for role, seats in found.items()}


def named(metric: str, judge: str) -> Seat:
    """The judge of a metric that a sweep names, with its default config. It has no question.

    Raises:
        ConfigError: it needs a model, which only `evaluate.judges` can give.
    """
    if judges.load(judge).served:
        raise ConfigError(
            f"evaluate.metrics: {metric!r} is decided by judge {judge!r}, which needs a model; expected a judge by rule "
            "(a guard is named under evaluate.judges)"
        )
    return Seat("", metric, judge, judge, "{}")


def decision(chosen: Judges, question: str) -> Seat:
    """The deciding judge of a question: its verdicts are `asr` (or `over_refusal`)."""
    return _seat(question, 0, chosen.of(question)[0], chosen)


def seats(chosen: Judges) -> list[Seat]:
    """All judges that a sweep names, by question."""
    return [_seat(question, i, one, chosen) for question in ASKED for i, one in enumerate(chosen.of(question))]


def problems(chosen: Judges) -> list[str]:
    """Errors of a sweep's judges, one line each."""
    found: list[str] = []
    shared: dict[str, None] = {}  # judges that would use guard_model
    for question in ASKED:
        for i, one in enumerate(chosen.of(question)):
            try:
                seat = _seat(question, i, one, chosen)
            except ConfigError as error:
                found.append(f"evaluate.judges.{question}: {error}")
                continue
            if seat.model is not None and one.model is None and not seat.kind.chats:
                shared[seat.judge] = None
    if len(shared) > 1:
        found.append(
            f"evaluate.judges.guard_model: is one model, and cannot be that of {' and of '.join(shared)}: give each judge its "
            "own, as {judge: NAME, model: {name: ..., source: ...}}"
        )
    return found


def scorer(data: Data, every: Judges) -> Seat:
    """The judge that scores utility for a task written in the sweep file. Raises ConfigError for an error in it."""
    assert data.judge is not None, "config.Data checks this"
    chosen = Judge(judge=data.judge) if isinstance(data.judge, str) else data.judge
    kind = judges.load(chosen.name)
    config = canonical(_settings(kind, {}, chosen.settings))
    answering = _answering(chosen.name, kind, chosen, every)
    if answering.get("trained"):
        raise ConfigError(f"judge {chosen.name!r}: guards are trained on labels of harm, so they answer asr alone")
    return Seat("utility", "utility", chosen.label or chosen.name, chosen.name, config, **answering)


def scorers(sweep: Sweep) -> dict[int, Data]:
    """The entries of `data` whose utility a judge scores, by their index."""
    return {i: data for i, data in enumerate(sweep.data) if data.judge is not None}


def all_seats(sweep: Sweep) -> list[Seat]:
    """The judges that a sweep names, including those that score its tasks' utility."""
    used = {task.task for task in sweep.tasks}
    scoring = [scorer(data, sweep.evaluate.judges) for data in scorers(sweep).values() if data.name in used]
    return [*seats(sweep.evaluate.judges), *scoring]


def trained(chosen: Judges) -> Seat | None:
    """The judge for which the guards trained here answer. If there are several, the deciding one."""
    return next((seat for seat in seats(chosen) if seat.trained), None)


def _seat(question: str, number: int, chosen: Judge, every: Judges) -> Seat:
    """One judge of a question. Raises ConfigError with the error of its entry."""
    name, (_, asked) = chosen.name, ASKED[question]
    kind = judges.load(name)
    if asked not in kind.answers:
        having = [other for other in judges.names() if asked in judges.load(other).answers]
        means = judges.QUESTIONS[asked]
        raise ConfigError(f"judge {name!r} is not asked whether {means}. Judges that are: {', '.join(having)}")
    label = chosen.label or name
    metric = f"{question}:{label}" if number else question
    ask = kind.answers[asked]
    settings = _settings(kind, ask.config, chosen.settings)
    meant = next((q for q, own in kind.answers.items() if own.config and own.config.items() <= settings.items()), asked)
    if meant != asked or not ask.config.items() <= settings.items():
        told = ", ".join(sorted({*ask.config, *kind.answers[meant].config} & chosen.settings.keys()))
        raise ConfigError(
            f"judge {name!r}: its config ({told}) asks something else than whether {judges.QUESTIONS[asked]}; leave it out"
        )
    config = canonical(settings)
    seat = Seat(asked, metric, label, name, config, ask.inverted, **_answering(name, kind, chosen, every))
    if seat.trained:
        if asked != "harm":
            raise ConfigError(f"judge {name!r}: guards are trained on labels of harm, so they answer asr alone")
        try:
            kind(kind.Config(**json.loads(config))).target(True)
        except NotImplementedError:
            raise ConfigError(
                f"judge {name!r} cannot be trained here: no answer of its can be written for a label"
            ) from None
    return seat


def _settings(kind: type[judges.Judge], asked: Mapping[str, Json], given: Mapping[str, Json]) -> dict[str, Json]:
    """The judge's config without its default values."""
    try:
        strictly(kind.Config, {**asked, **given})
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))} {item['msg']}".strip() for item in error.errors())
        raise ConfigError(told.replace("Value error, ", "")) from None
    return {**asked, **given}


def _answering(name: str, kind: type[judges.Judge], chosen: Judge, every: Judges) -> dict[str, Any]:
    """The source of a judge's answers, as arguments of Seat."""
    if not kind.served:
        if chosen.model is not None or chosen.endpoint is not None:
            raise ConfigError(
                f"judge {name!r} is a rule: it reads no model's answer, so leave out `model` and `endpoint`"
            )
        return {}
    if chosen.endpoint is not None:
        if problem := url_problem(chosen.endpoint):
            raise ConfigError(f"judge {name!r}: endpoint: {problem}")
        if chosen.chat and not kind.chats:
            raise ConfigError(
                f"judge {name!r} has a template of its own, control tokens and all: it needs `chat: false`"
            )
        if chosen.tokenizer is not None and not (Path(chosen.tokenizer) / "tokenizer.json").is_file():
            raise ConfigError(f"tokenizer {chosen.tokenizer!r}: expected a folder with tokenizer.json")
        return {"endpoint": chosen}
    if chosen.model == "guard" or (kind.trained and chosen.model is None):
        if every.guard is None:
            raise ConfigError(
                f"judge {name!r} is trained here, but judges.guard is not given: expected its training rows"
            )
        return {"trained": True}
    model = every.guard_model if chosen.model is None else chosen.model
    if model is None:
        known = f", for instance {kind.published[0]}" if kind.published else ""
        raise ConfigError(
            f"judge {name!r} reads a model's answer, and none is given: name its `model`, an `endpoint`, or "
            f"judges.guard_model{known}"
        )
    assert isinstance(model, Model)
    others = [other for other in judges.names() if model.source in judges.load(other).published]
    if others and name not in others and not kind.chats:
        raise ConfigError(f"{model.source} is the model of judge {others[0]!r}: it does not read {name}'s template")
    return {"model": model}
