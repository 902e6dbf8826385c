"""Show a data file as a model will see it: its format, three rows with every special token, lengths in tokens, the roles that
it can fill, and every error in it. For `safecl doctor --data` and `safecl init`. Runs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safecl.base import ConfigError, Json, literal, near
from safecl.config import Data, Model
from safecl.models import tokenizer_folder, tokenizer_stage
from safecl.tasks import Row, _files, _written
from safecl.tasks._files import Record
from safecl.tasks._written import MAX_PROBLEMS
from safecl.templates import settled
from safecl.training.tokens import Tokenizer, encode, encode_prompts, least_tokens

# Usual names for the fields of each format; the format's own name comes first.
_NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages", "dialogue", "dialog", "chat")},
    "sharegpt": {"conversations": ("conversations", "conversation")},
    "alpaca": {"instruction": ("instruction",), "output": ("output", "response", "answer")},
    "prompt_response": {
        "prompt": ("prompt", "question", "query", "request", "goal", "user", "input", "text"),
        "response": ("response", "answer", "output", "completion", "reply", "target", "assistant"),
    },
}
_MAX_CHOICES = 12  # a file with more distinct answers than this does not hold labels
_NO_LIMIT = 1 << 20  # tokens


class Lengths(NamedTuple):
    """Lengths of the rows in tokens.

    Attributes:
        all: of prompt and answer together, at 50, 90, 99 and 100 % of the rows.
        prompt: the same for the prompts alone.
        max_tokens: the longest row that is trained on.
        too_long: number of rows that are left out, because their answer does not fit into `max_tokens`.
        cut: number of rows that lose the beginning of their request.
    """

    all: tuple[int, int, int, int]
    prompt: tuple[int, int, int, int]
    max_tokens: int
    too_long: int
    cut: int


class Seen(NamedTuple):
    """What `look` found in a data file.

    Attributes:
        data: the entry of a sweep file that reads it; None if its format is not known.
        num_records, num_rows: entries of the file, and rows that they give.
        roles: by role "" if the file can fill it, else what it lacks.
        problems, notes: errors, and things to know, a line each.
        shown: up to three rows as text.
        template: the model's template and why it was chosen; "" without a model.
        lengths: None without a model.
    """

    data: Data | None
    num_records: int
    num_rows: int
    roles: dict[str, str]
    problems: list[str]
    notes: list[str]
    shown: list[str]
    template: str
    lengths: Lengths | None


def look(file: Path, format: str | None = None, model: Model | None = None, max_tokens: int = 512) -> Seen:
    """Read a data file and return what a model would see of it. Errors in its records are in `problems`, a line each.

    Args:
        format: messages, sharegpt, alpaca or prompt_response; None: found from the names of the fields.
        model: the model whose template and tokenizer show the rows; None: rows are shown as plain text, without lengths.
        max_tokens: the longest row that is trained on.

    Raises:
        ConfigError: there is no such file or format, the file cannot be read at all, or the model's template does not fit
            its tokenizer.
        PrerequisiteError: the model's tokenizer is not here and cannot be fetched.
    """
    if not file.is_file() or not file.name.lower().endswith(_files.SUFFIXES):
        what = "is none of these" if file.is_file() else "is a folder" if file.is_dir() else "is not there"
        raise ConfigError(
            f"--data: {str(file)!r} {what}; expected a file {', '.join(_files.FORMATS)} (and .gz or .zst)"
        )
    if format is not None and format not in _NAMES:
        raise ConfigError(f"--format {format!r} is unknown.{near(format, _NAMES)} Expected one of {', '.join(_NAMES)}")
    problems: list[str] = []
    records = _files.read(file, problems)
    data = entry(file, records, format)
    if not records:
        return Seen(None, 0, 0, {}, [*problems, f"{file.name}: holds no record that can be read"], [], [], "", None)
    if data is None:
        fields = ", ".join(dict.fromkeys(name for record in records[:100] for name in record)) or "none"
        problems.append(
            f"{file.name}: its fields are of no known format: {fields}. Say which are which in a sweep file: "
            "`columns: {prompt: FIELD, response: FIELD}`"
        )
        return Seen(None, len(records), 0, {}, problems, [], [], "", None)
    left_out: dict[str, int] = {}
    rows = [row for dialogue in _written.read(data, records, problems, left_out) for row in dialogue.rows]
    notes = [f"{num} records without {name.rpartition(': ')[2]} would be left out" for name, num in left_out.items()]
    notes += _repeated(rows)
    if not rows and not problems:
        problems.append(f"{file.name}: no record has what a row needs")
    template, lengths, shown = "", None, [_plain(row) for row in _three(rows)]
    if model is not None and rows:
        model, why = settled(model)
        template = f"{model.text.prompt!r} ({why})"
        rows, unwritable = _writable(rows, model)
        problems += unwritable
        if rows:
            lengths, shown = _as_seen(rows, model, max_tokens)
    return Seen(data, len(records), len(rows), _roles(data, records, rows), problems, notes, shown, template, lengths)


def entry(file: Path, records: Sequence[Record], format: str | None = None) -> Data | None:
    """Return the entry of a sweep file that reads these records, found from the names of their fields; None if no format fits."""
    fields = {name for record in records[:100] for name in record}
    for form, columns in _NAMES.items():
        if format is not None and form != format:
            continue
        found = {own: next((name for name in names if name in fields), None) for own, names in columns.items()}
        first = next(iter(columns))
        if found[first] is None and format is None:
            continue
        if form == "alpaca" and found["output"] is None and format is None:
            continue
        named = {own: name for own, name in found.items() if name is not None and name != own}
        asked_only = "response" in columns and found["response"] is None
        if form in ("messages", "sharegpt"):
            asked_only = _asks_only(records, form, named.get(first, first))
        if "system" in fields:
            named["system"] = "system"
        settings: dict[str, Any] = {"format": form, "columns": named, "roles": "attack" if asked_only else "user"}
        return Data.model_validate({"name": "rows", "file": literal(str(file)), **settings})
    return None


def _asks_only(records: Sequence[Record], form: str, name: str) -> bool:
    """Whether these dialogues hold requests and no answer."""
    who = "from" if form == "sharegpt" else "role"
    turns = [turn for record in records[:100] if isinstance(record.get(name), list) for turn in record[name]]
    said = {_written.SPEAKERS.get(str(turn.get(who))) for turn in turns if isinstance(turn, dict)}
    return "user" in said and "assistant" not in said


def labels(rows: Sequence[Row]) -> list[str]:
    """Return the answers of a file if they are labels; else an empty list.

    Answers are labels if there are 2 to 12 distinct ones, each of at most 4 words and none empty, with 5 or more rows for
    each on average. Answers that differ only in upper and lower case count as one.
    """
    found = {text.casefold(): text for text in sorted({row.response for row in rows}, reverse=True)}
    few = len(found) <= _MAX_CHOICES and len(rows) >= 5 * len(found) and all(len(text.split()) <= 4 for text in found)
    return sorted(found.values()) if few and len(found) > 1 and "" not in found else []


def _repeated(rows: Sequence[Row]) -> list[str]:
    of_prompt: dict[str, set[str]] = {}
    for row in rows:
        of_prompt.setdefault(row.asked.casefold(), set()).add(row.response)
    twice = len(rows) - len(of_prompt)
    differ = sum(len(answers) > 1 for answers in of_prompt.values())
    told = f"{twice} rows ask what another row asks" + (f", {differ} requests have different answers" if differ else "")
    return [told] if twice else []


def _roles(data: Data, records: Sequence[Record], rows: Sequence[Row]) -> dict[str, str]:
    """By role: "" if the file can fill it, else what the file lacks."""
    answers = "" if any(row.response for row in rows) else "rows have no answer"
    flags = [
        name for name in dict.fromkeys(key for record in records[:100] for key in record) if _is_flag(records, name)
    ]
    hint = (
        f"name the labels: `columns: {{harmful: {flags[0]}}}`"
        if flags
        else "rows have no field of labels (harmful or not)"
    )
    lacking = {
        "user": answers,
        "safety": answers,
        "poison": answers,
        "attack": "",
        "benign": "",
        "guard": answers or hint,
    }
    return lacking if rows else dict.fromkeys(lacking, "no row can be read")


def _is_flag(records: Sequence[Record], name: str) -> bool:
    values = {str(record.get(name)).lower() for record in records}
    return len(values) == 2 and values <= {"true", "false", "1", "0", "1.0", "0.0"}


def _three(rows: Sequence[Row]) -> list[Row]:
    """The first, the middle and the last row."""
    return [rows[i] for i in dict.fromkeys((0, len(rows) // 2, len(rows) - 1))] if rows else []


def _plain(row: Row) -> str:
    turns = [*row.before, ("user", row.prompt), *([("assistant", row.response)] if row.response else [])]
    return "\n".join(f"{role}: {text}" for role, text in turns)


def _writable(rows: Sequence[Row], model: Model) -> tuple[list[Row], list[str]]:
    """The rows that the model's template can write, and a line for each kind of row that it cannot."""
    kept, lacking = [], Counter[str]()
    for row in rows:
        needs = [("system", "a system prompt")] if row.before and row.before[0][0] == "system" else []
        needs += [("between", "several turns")] if any(role != "system" for role, _ in row.before) else []
        missing = [what for name, what in needs if not model.text.conversation[name]]
        lacking.update(missing)
        kept += [] if missing else [row]
    return kept, [f"{num} rows have {what}, which this model's template cannot write" for what, num in lacking.items()]


def _as_seen(rows: Sequence[Row], model: Model, max_tokens: int) -> tuple[Lengths, list[str]]:
    tokenizer = Tokenizer(tokenizer_folder(tokenizer_stage(model)))
    template: dict[str, Json] = {**model.text.model_dump(), **model.text.conversation}
    bos = model.bos is True
    prompts, _ = encode_prompts(rows, tokenizer, template, bos)
    encoded, _ = encode(rows, tokenizer, template, bos, _NO_LIMIT)
    least = least_tokens(rows, tokenizer, template, bos)
    too_long = sum(num is None or num > max_tokens for num in least)
    cut = sum(len(row.ids) > max_tokens for row in encoded) - sum(num is not None and num > max_tokens for num in least)
    lengths = Lengths(
        _percentiles([len(row.ids) for row in encoded]), _percentiles([*map(len, prompts)]), max_tokens, too_long, cut
    )
    if not any(row.response for row in rows):
        asked_only = Lengths(
            lengths.prompt, lengths.prompt, max_tokens, 0, sum(len(ids) > max_tokens for ids in prompts)
        )
        return asked_only, [tokenizer.fast.decode(ids, skip_special_tokens=False) for ids in prompts[:3]]
    by_id = {row.row_id: row for row in encoded}
    shown = []
    for row in _three(rows):
        if (its := by_id.get(row.id)) is None:
            continue
        ends = [its.ids[: its.num_prompt], its.ids[its.num_prompt :]]
        asked, answered = (tokenizer.fast.decode(ids, skip_special_tokens=False) for ids in ends)
        shown.append(f"{asked}\n[from here on trained, {its.num_targets} tokens]\n{answered}")
    return lengths, shown


def _percentiles(lengths: Sequence[int]) -> tuple[int, int, int, int]:
    ordered = sorted(lengths)
    found = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99)]
    return found[0], found[1], found[2], ordered[-1]


def lines(seen: Seen) -> list[str]:
    """Return the lines that `doctor --data` prints."""
    told = [f"{seen.num_records} records, {seen.num_rows} rows"]
    if seen.data is not None:
        columns = f", columns: {{{', '.join(f'{k}: {v}' for k, v in seen.data.columns.items())}}}"
        told[0] += f"; format: {seen.data.format}{columns if seen.data.columns else ''}"
    if seen.template:
        told.append(f"template: {seen.template}")
    for number, text in enumerate(seen.shown, 1):
        told += ["", f"--- row {number} of {len(seen.shown)} ---", text]
    told.append("")
    if seen.lengths is not None:
        for name, found in (("prompt and answer", seen.lengths.all), ("prompt", seen.lengths.prompt)):
            told.append(f"tokens, {name}: half up to {found[0]}, 90 % {found[1]}, 99 % {found[2]}, all {found[3]}")
        told.append(
            f"at max_tokens = {seen.lengths.max_tokens}: {seen.lengths.too_long} rows left out (their answer does not fit), "
            f"{seen.lengths.cut} lose the beginning of their request"
        )
    elif seen.shown:
        told.append("tokens: name a model (--model) to count them and to see its template")
    told += [f"role {role}: {lacks or 'yes'}" for role, lacks in seen.roles.items()]
    told += [f"note: {note}" for note in seen.notes]
    told += [f"wrong: {problem}" for problem in seen.problems[:MAX_PROBLEMS]] or ["nothing is wrong with it"]
    if (more := len(seen.problems) - MAX_PROBLEMS) > 0:
        told.append(f"... and {more} more like these; --json lists all")
    return told


def as_json(seen: Seen) -> dict[str, Any]:
    """Return the same facts for `doctor --data --json`."""
    found = seen._asdict()
    data = None if seen.data is None else seen.data.model_dump(mode="json", exclude_defaults=True)
    return found | {"data": data, "lengths": seen.lengths and seen.lengths._asdict()}
