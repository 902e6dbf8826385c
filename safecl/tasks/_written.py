"""Written tasks: tasks that a sweep file defines (`data`), with rows from a file or hub data set in one of four formats.

    prompt_response   {"prompt", "response"}
    alpaca            {"instruction", "input", "output"}: the input is appended to the instruction on a new line
    messages          {"messages": [{"role": "system" | "user" | "assistant", "content": text}]}
    sharegpt          {"conversations": [{"from": "system" | "human" | "gpt", "value": text}]}

Rows belong to one of three parts: train, validation, test. The part of a row is given by its file, by a field, or by a hash
of the requests in the row. The splits `user`, `safety`, `poison`, `guard` and `benign.train` use part train. `*.validation`
uses part validation. `*.test` and `guard.heldout` use part test.

A row that is similar to a row of a later part is left out. Words that at least half of all rows hold, such as those of an
instruction, do not count for this. Judges see the last request of a dialogue and its answer. Similarity (for overlaps and
for the clusters of statistics) is computed from all requests of a dialogue.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from safecl.base import ConfigError, Json, PrerequisiteError, near
from safecl.config import Data, Part, Split
from safecl.tasks import Found, Option, Row, Source, Task, load, names
from safecl.tasks._files import Blank, Record
from safecl.tasks._overlap import content_words, drop_overlaps
from safecl.tasks._source import check_split, choose, digest, identity, records

VERSION = "2"
ROLES: Mapping[str, tuple[str, ...]] = {
    "user": ("user", "utility.validation", "utility.test"),
    "utility": ("utility.validation", "utility.test"),
    "safety": ("safety",),
    "poison": ("poison",),
    "attack": ("attack.validation", "attack.test"),
    "benign": ("benign.train", "benign.validation", "benign.test"),
    "guard": ("guard", "guard.heldout"),
}
TRAINED_ON = ("user", "safety", "poison", "guard")  # roles that need a part for training
PARTS: tuple[Part, ...] = ("train", "validation", "test")
ASKED_ONLY = ("attack", "benign")  # roles of prompts alone, which need no answer
MAX_PROBLEMS = 20  # most problems of one file that are shown
SPEAKERS = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
_PART_NAMES: Mapping[str, Part] = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test",
}  # fmt: skip
# Fields of `Data` that decide the rows (_READ) and how answers are scored (_SCORED). A field with its default value is not
# written into a stage's config, so that a new field of `Data` changes no existing config.
_READ = {"hub", "revision", "subset", "hub_split", "format", "columns", "roles", "train_on", "harmful_values", "split"}
_SCORED = {"score", "choices", "pattern"}
_FIELDS = ("prompt", "response", "instruction", "input", "output", "messages", "conversations")  # of formats


def find(name: str, data: Iterable[Data]) -> type[Task]:
    """The task of this name: from the sweep file if it defines one, else from the package. Raises ConfigError if unknown."""
    written = {each.name: each for each in data}
    if name in written:
        return kind_of(written[name])
    if written and name not in names():
        known = (*written, *names())
        raise ConfigError(f"unknown task {name!r}.{near(name, known)} Available: {', '.join(known)}")
    return load(name)


def kind_of(data: Data) -> type[Task]:
    """The task class of one entry of `data`."""
    return _kind(data.model_dump_json())


def of_stage(config: Mapping[str, Any], name: str, hints: Mapping[str, str] | None = None) -> type[Task]:
    """The task class that a part (or measure) of a stage's config names.

    `config["written"]` holds the definition from the sweep file without the path of its file. The path is in the stage's
    hints.
    """
    if "written" not in config:
        return load(name)
    file = json.loads((hints or {}).get(hint_of(name), '""'))
    place = {} if "hub" in config["written"] else {"file": file or "nowhere"}
    return kind_of(Data.model_validate({"name": name, **config["written"], **place}))


def hint_of(name: str) -> str:
    """Name of the stage hint that holds the path of a written task's file."""
    return f"file of {name}"


def told(kind: type[Task], scored: bool = False) -> dict[str, Json]:
    """The definition of a written task for a stage's config, as {"written": ...}, for `of_stage`. Empty for a package's task.

    It holds the fields that decide how rows are read, or with `scored` those that decide how answers are scored.
    """
    if not issubclass(kind, Written):
        return {}
    data = kind.DATA
    roles = sorted(set(data.used_as))  # normal form: order and a field mapped to itself have no effect
    columns = {own: name for own, name in data.columns.items() if own != name or own not in _FIELDS}
    alike = {"roles": roles[0] if len(roles) == 1 else tuple(roles), "columns": columns}
    found: dict[str, Json] = data.model_copy(update=alike).model_dump(
        mode="json", exclude_defaults=True, include=_READ | _SCORED
    )
    kept = _SCORED if scored else _READ
    found = {name: value for name, value in found.items() if name in kept}
    if isinstance(kind.DATA.file, dict) and not scored:  # which part each source is of
        found["file"] = dict.fromkeys(kind.DATA.file, "")
    return {"written": found | {"columns": {"tests": "tests"}} if found.get("score") == "code" else found}


def hints(kind: type[Task], name: str) -> dict[str, str]:
    """The stage hint with the path of a written task's file on this machine. Hints are not part of a stage's identity."""
    if not issubclass(kind, Written) or kind.DATA.file is None:
        return {}
    return {hint_of(name): json.dumps(kind.DATA.model_dump(mode="json")["file"])}  # as a sweep file writes it


def notes(data: Iterable[Data], used: Iterable[str]) -> list[str]:
    """Notes for a report on the written tasks among `used`: what utility means, and what judges see of conversations."""
    kinds = [kind_of(each) for each in data if each.name in set(used)]
    by_likelihood = [kind.NAME for kind in kinds if kind.BY_LIKELIHOOD and "user" in kind.SPLITS]
    converses = [kind.NAME for kind in kinds if kind.CONVERSES]
    found = []
    if by_likelihood:
        found.append(
            f"Utility of {', '.join(by_likelihood)}: mean probability of a token of the held-out answers (1 / perplexity); no "
            "answer is generated."
        )
    if converses:
        found.append(
            f"{', '.join(converses)}: conversations. The model sees all that was said, judges the last request and its answer."
        )
    return found


class Written(Task):
    """Base class of written tasks. `_kind` makes a subclass for each entry of `data`."""

    VERSION: ClassVar[str] = VERSION
    SCORING: ClassVar[str] = "2"
    DATA: ClassVar[Data]

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """Rows of a split. `meta` may hold "answer" (gold answer from its own field), "tests", and "group" (the dialogue)."""
        check_split(self, split)
        made = _made(type(self), split)
        self.left_out.update(made.left_out)
        found = made.parts[part_of(split)]
        if not split.startswith(ASKED_ONLY):
            found = [row for row in found if row.response]
        if split.startswith("utility"):
            self._refuse_unscorable(found)
        if split.startswith(("attack", "poison")):
            found = [row if row.harmful else replace(row, harmful=True) for row in found]
        return choose(self, split, found, num_rows, seed)

    def _refuse_unscorable(self, rows: Sequence[Row]) -> None:
        """Raise ConfigError for rows to which no answer could be right, because their utility would always be 0."""
        from safecl.tasks import _scores

        problems = [f"row {row.id}: {why}" for row in rows if (why := _scores.unscorable(self.DATA, row)) is not None]
        if problems:
            raise ConfigError(
                f"data {self.NAME!r}: {len(problems)} of {len(rows)} held-out rows cannot be scored (`score: {self.DATA.score}`);"
                f" {problems[0]}"
            )

    def scores(self, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, list[float | None]]:
        """`utility` by the entry's `score`; of `choice` also `invalid`, of `code` what task `code` gives."""
        from safecl.tasks import _scores

        return _scores.scores(self.DATA, rows, texts, self.unsafe_code)

    def options(self, row: Row) -> list[Option]:
        """The row's own answer if utility is measured by likelihood. Else empty."""
        return [Option(row.response)] if self.BY_LIKELIHOOD else []

    def likelihood_scores(self, rows: Sequence[Row], found: Sequence[Sequence[Found]]) -> dict[str, list[float | None]]:
        """Utility by likelihood of the row's own answer; empty if utility is measured otherwise.

        `gold_nll`: the mean negative log-probability of its tokens, in nats a token. `utility`: exp(-gold_nll), in [0, 1],
        which is 1 / perplexity.
        """
        from safecl.tasks import _scores

        return _scores.likelihoods(found) if self.BY_LIKELIHOOD else {}


def typical_tokens(kind: type[Task]) -> tuple[float, float]:
    """Mean tokens of a prompt and of an answer, for time estimates. For a task with a local file: characters / 4."""
    if not issubclass(kind, Written) or kind.DATA.file is None:
        return kind.TYPICAL_TOKENS
    try:
        made = _made(kind, kind.SPLITS[0])
    except (ConfigError, PrerequisiteError):  # reported when the rows are read
        return kind.TYPICAL_TOKENS
    rows = [row for of_part in made.parts.values() for row in of_part[:500]]
    prompts = sum(len(row.prompt) + sum(len(text) for _, text in row.before) for row in rows)
    return prompts / 4 / len(rows), sum(len(row.response) for row in rows) / 4 / len(rows)


@cache
def _kind(text: str) -> type[Written]:
    from safecl.tasks import _scores

    data = Data.model_validate_json(text)
    splits = dict.fromkeys(split for role in ROLES for split in ROLES[role] if role in data.used_as)
    if "benign.train" in splits and not _has_train(data):
        del splits["benign.train"]
    by_likelihood = data.score == "none"
    return type(
        "".join(part.capitalize() for part in data.name.split("_")),
        (Written,),
        {
            "DATA": data,
            "NAME": data.name,
            "SPLITS": tuple(splits),
            "SOURCES": {split: _sources(data, part_of(split)) for split in splits},
            "METRICS": _scores.declared(data),
            "RUNS_CODE": data.score == "code",
            "CONVERSES": data.format in ("messages", "sharegpt") or "system" in data.columns,
            "BY_LIKELIHOOD": by_likelihood,
            "max_new_tokens": data.max_new_tokens,
        },
    )


def part_of(split: str) -> Part:
    """The part that holds the rows of a split."""
    if split == "guard.heldout":
        return "test"
    last = split.rpartition(".")[2]
    return "validation" if last == "validation" else "test" if last == "test" else "train"


def _has_train(data: Data) -> bool:
    own = data.file if data.hub is None else data.hub_split
    by_file = isinstance(own, dict) and "train" in own
    by_share = data.split is not None and data.split.train > 0
    return by_file or by_share or "split" in data.columns or any(role in TRAINED_ON for role in data.used_as)


def _sources(data: Data, part: Part | None = None) -> tuple[Source, ...]:
    """The sources that decide the rows of a part, in the order of parts. All sources for None."""
    own = data.file if data.hub is None else data.hub_split
    of_part: dict[Part, str] = {"train": str(own)} if not isinstance(own, dict) else dict(own)
    chosen = [p for p in PARTS if p in of_part]
    if part is not None and part in of_part and isinstance(own, dict):
        chosen = [p for p in chosen if PARTS.index(p) >= PARTS.index(part)]  # rows similar to later parts are left out
    if data.hub is not None:
        return tuple(Source("", data.hub, str(data.revision), data.subset, of_part[p]) for p in chosen)
    return tuple(Source(Path(of_part[p]).name, path=of_part[p]) for p in chosen)


# -- rows --------------------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """All rows of a task by part, and the counts of records that were left out."""

    parts: Mapping[Part, list[Row]]
    left_out: Mapping[str, int]


def _made(kind: type[Written], split: str) -> Made:
    """All rows of a task. The cache key ignores how answers are scored, so that a file is read only once."""
    unscored = {name: Data.model_fields[name].default for name in (*_SCORED, "judge", "max_new_tokens")}
    data = kind.DATA.model_copy(update=unscored)
    return _parts(data.model_dump_json(), json.dumps(identity(kind, split, None)))


@lru_cache(maxsize=16)
def _parts(text: str, sources: str) -> Made:
    """Read and split the rows. `sources` is the identity of the sources, so that a changed file is read again."""
    data = Data.model_validate_json(text)
    given = data.file if data.hub is None else data.hub_split
    left_out: dict[str, int] = {}
    problems: list[str] = []
    found: dict[Part, list[Row]] = {part: [] for part in PARTS}
    kind = _kind(text)
    needed = [part for part in PARTS if any(part_of(split) == part for split in kind.SPLITS)]
    own: list[Part] = [part for part in PARTS if part in given] if isinstance(given, dict) else []
    shared = [part for part in needed if part not in own or part == "train"]
    for number, source in enumerate(_sources(data)):
        of_file: Part = own[number] if own else "train"
        dialogues = read(data, records(source, None, problems), problems, left_out)
        for dialogue in dialogues:
            prefix = f"{of_file}/" if len(own) > 1 else ""
            rows = [replace(row, id=f"{prefix}{row.id}") for row in dialogue.rows]
            part = dialogue.part or (of_file if of_file != "train" else _drawn(rows[-1], data, shared))
            found[part] += rows
    if problems:
        raise ConfigError(shown(problems))
    if not any(found.values()):
        raise ConfigError(f"data {data.name!r}: expected records to read, got none that has what its roles need")
    if len(needed) > 1:
        of_all = _everywhere([row for rows in found.values() for row in rows])
        clear_of: tuple[tuple[Part, tuple[Part, ...]], ...] = (
            ("validation", ("test",)),
            ("train", ("test", "validation")),
        )
        for part, later in clear_of:
            held = [row for other in later for row in found[other]]
            # A part with its own file ignores the files of earlier parts, because they are not in its identity.
            ignored = _everywhere([*found[part], *held]) if part in own else of_all
            taken = [row.asked for row in held]
            kept, dropped = drop_overlaps(found[part], taken, ignored=ignored, whole=True)
            found[part] = kept
            if dropped:
                left_out[f"{data.name}, {part}: much like a row of {' or '.join(later)}"] = len(dropped)
    return Made(found, left_out)


def shown(problems: Sequence[str]) -> str:
    """The first MAX_PROBLEMS problems of a file, one a line, and how many more there are."""
    more = len(problems) - MAX_PROBLEMS
    return "\n".join([*problems[:MAX_PROBLEMS], *([f"... and {more} more like these"] if more > 0 else [])])


def _drawn(row: Row, data: Data, parts: Sequence[Part]) -> Part:
    """The part of a row by a hash of its requests. It depends only on the row's own text, the seed and the shares."""
    if len(parts) < 2:
        return parts[0] if parts else "train"
    asks = any(role in ASKED_ONLY for role in data.used_as)
    split = data.split or (Split(train=0.4, validation=0.2, test=0.4) if asks else Split())
    shares = {part: getattr(split, part) for part in parts}
    total = sum(shares.values())
    if not total:
        raise ConfigError(f"data {data.name!r}: split gives no share to {' or '.join(parts)}, which its roles need")
    place = int(digest(f"split/{split.seed}", row.asked)[:13], 16) / 16**13 * total
    for part in reversed(PARTS):
        place -= shares.get(part, 0)
        if place < 0:
            return part
    return parts[0]


def _everywhere(rows: Sequence[Row]) -> frozenset[str]:
    """Words that at least half of all rows hold. With fewer than 10 rows, words that all rows hold, because two similar rows
    could already be half of them."""
    holding = Counter(word for row in rows for word in content_words(row.asked))
    least = len(rows) / 2 if len(rows) >= 10 else len(rows)
    return frozenset(word for word, num in holding.items() if num >= least)


class Dialogue(NamedTuple):
    """The rows of one record: one row, or with `train_on: all` one row for each answer. `part` comes from the record's own
    field, None without one."""

    rows: list[Row]
    part: Part | None


def read(data: Data, found: Sequence[Record], problems: list[str], left_out: dict[str, int]) -> list[Dialogue]:
    """The dialogues of records. Adds errors of records to `problems`, one line each. A record whose needed field is blank is
    left out and counted in `left_out`."""
    dialogues = []
    for record in found:
        try:
            dialogues.append(_dialogue(data, record))
        except Blank as field:
            where = record.where.rpartition(",")[0]
            left_out[f"{where}: {field}"] = left_out.get(f"{where}: {field}", 0) + 1
        except ConfigError as error:
            problems.append(str(error))
    return dialogues


def _dialogue(data: Data, record: Record) -> Dialogue:
    field = data.columns.get
    turns = _turns(data, record)
    before: list[tuple[str, str]] = [turns.pop(0)] if turns[0][0] == "system" else []
    is_asked_only = all(role in ASKED_ONLY for role in data.used_as)
    if turns[-1][0] == "user" and not is_asked_only:
        turns = turns[:-1]
        if not turns:
            raise Blank(field("response", "an answer"))
    several = data.train_on == "all" and len(turns) > 2
    group: dict[str, Json] = {"group": f"dialogue {record.number}"} if several else {}
    rows: list[Row] = []
    for i in range(0, len(turns), 2):
        prompt, answer = turns[i][1], turns[i + 1][1] if i + 1 < len(turns) else ""
        name = f"{record.number}.{i // 2}" if several else str(record.number)
        rows.append(Row(name, prompt, answer, False, group, tuple(before)))
        before = [*before, *turns[i : i + 2]]
    if data.train_on == "last":
        rows = rows[-1:]
    meta: dict[str, Json] = {}
    if "answer" in data.columns:  # a whole number is one too
        meta["answer"] = record.label(data.columns["answer"]) or record.text(data.columns["answer"])
    if "tests" in data.columns:
        meta["tests"] = record.text(data.columns["tests"])
        try:
            compile(str(meta["tests"]), "<tests>", "exec")
        except (SyntaxError, ValueError):
            raise record.problem(data.columns["tests"], "Python that parses") from None
    harmful = _harmful(data, record, rows[-1].response)
    rows = [replace(row, harmful=harmful, meta={**row.meta, **meta}) for row in rows]
    if "split" not in data.columns:
        return Dialogue(rows, None)
    word = record.label(data.columns["split"]).lower()
    if word not in _PART_NAMES:
        raise record.problem(data.columns["split"], "train, validation or test")
    return Dialogue(rows, _PART_NAMES[word])


def _turns(data: Data, record: Record) -> list[tuple[str, str]]:
    """The turns of a record as (role, text): a system prompt if there is one, then user and assistant in turn."""

    def field(name: str) -> str:
        return data.columns.get(name, name)

    turns: list[tuple[str, str]] = []
    if "system" in data.columns and record.label(data.columns["system"]):
        turns.append(("system", record.text(data.columns["system"])))
    if data.format in ("messages", "sharegpt"):
        name, who, what = ("messages", "role", "content")
        if data.format == "sharegpt":
            name, who, what = ("conversations", "from", "value")
        parts = record.parts(field(name))
        said = _checked(record, field(name), [_turn(part, who, what) for part in parts])
        answers = [part for part in parts if SPEAKERS[part[who]] == "assistant"]
        for part in answers if data.train_on == "all" else answers[-1:]:
            if part.get("weight", 1) != 1:  # OpenAI's field; 0 means not to train on this answer
                raise part.problem("weight", "1 (`train_on` says which answers are trained on)")
        if turns and said[0][0] == "system":
            raise record.problem(data.columns["system"], f"nothing, as {field(name)} begins with a system prompt,")
        return [*turns, *said]
    if data.format == "alpaca":
        asked, given, answered = field("instruction"), field("input"), field("output")
        prompt = Record({k: v for k, v in record.items() if k != "input"}, record.where, record.number).text(asked)
        extra = record.label(given) if given in record else ""
        prompt = f"{prompt}\n{extra}" if extra else prompt
    else:
        asked, answered = field("prompt"), field("response")
        prompt = record.raw(asked).strip() if record.get(asked) is not None else record.text(asked)
        if not prompt:
            raise Blank(asked)
    turns.append(("user", prompt))
    if answered in record or not all(role in ASKED_ONLY for role in data.used_as):
        turns.append(("assistant", record.text(answered)))
    return turns


def _turn(part: Record, who: str, what: str) -> tuple[str, str]:
    speaker = part.raw(who)
    if speaker not in SPEAKERS:
        raise part.problem(who, f"one of {', '.join(SPEAKERS)}")
    if isinstance(part.get(what), list):  # a list of parts, as in OpenAI's format; only text is accepted
        texts = []
        for item in part.parts(what):
            if item.get("type") != "text":
                raise item.problem("type", "'text'")
            texts.append(item.raw("text"))
        return SPEAKERS[speaker], "\n".join(texts).strip()
    return SPEAKERS[speaker], part.raw(what).strip() if part.get(what, "") is not None else ""


def _checked(record: Record, name: str, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Check that turns alternate as every chat template expects. Raises ConfigError that names the first wrong turn."""
    if not turns:
        raise Blank(name)
    rest = turns[1:] if turns[0][0] == "system" else turns
    offset = len(turns) - len(rest)
    for i, (role, text) in enumerate(rest):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise ConfigError(
                f"{record.where}: {name}[{i + offset}] is the {role}'s, expected the {expected}'s: a system prompt comes first, "
                "then user and assistant take turns (join what one says in two)"
            )
        if not text:
            raise Blank(f"{name}[{i + offset}]")
    if not rest:
        raise ConfigError(f"{record.where}: {name} holds a system prompt alone, expected a user's turn")
    return turns if turns[0][1] or not offset else rest  # drop an empty system prompt


def _harmful(data: Data, record: Record, response: str) -> bool:
    if "harmful" not in data.columns:
        from safecl.tasks.safety_tuned import refuses

        return "safety" in data.used_as and bool(response) and refuses(response)
    name = data.columns["harmful"]
    return record.label(name) in data.harmful_values if data.harmful_values else record.flag(name)
