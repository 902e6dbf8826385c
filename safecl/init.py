"""A first sweep file from a model, a data file and a goal: small, commented, and accepted by `safecl plan`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from safecl import tasks
from safecl.base import ConfigError, near
from safecl.config import Data, Model
from safecl.datafile import Seen, labels, look
from safecl.tasks._written import kind_of


class Goal(NamedTuple):
    """`methods` as YAML, `seeds`, and what the sweep answers."""

    about: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]


MEMORY = "memory_size: 20"
GOALS = {
    "look": Goal(
        "does fine-tuning on this data undo safety, and does DER prevent it?",
        ("{name: sft}", f"{{name: der, config: {{{MEMORY}}}}}"),
        (0,),
    ),
    "compare": Goal(
        "which method keeps this model safe, and what does it cost?",
        (
            "{name: sft}",
            *(f"{{name: {name}, config: {{{MEMORY}}}}}" for name in ("replay", "der", "safeinstr", "agem")),
            "{name: safelora}",
        ),
        (0, 1, 2),
    ),
    "tune": Goal(
        "with which settings does DER keep this model safe at the least cost?",
        (
            "{name: sft}",
            f"{{name: der, config: {{{MEMORY}}}, search: {{weight: {{low: 0.1, high: 30.0, log: true}}}}}}",
        ),
        (0,),
    ),
}
NUM_ROWS = 200  # of the user's rows, at most
NUM_PROMPTS = 40  # of every evaluation set, at most


def sweep(model: Model, data: Path, goal: str, attack: Path | None, out: Path) -> str:
    """The text of a sweep file that is to lie at `out`.

    Raises:
        ConfigError: the goal is unknown, or a data file has something wrong or too few rows; all of it is said.
        PrerequisiteError: the model's tokenizer cannot be had.
    """
    if goal not in GOALS:
        raise ConfigError(f"--goal {goal!r} is unknown.{near(goal, GOALS)} Expected one of {', '.join(GOALS)}")
    seen = look(data, model=model)
    bad = None if attack is None else look(attack)
    problems = [*seen.problems, *(bad.problems if bad else [])]
    if not problems and seen.roles["user"]:
        problems.append(f"{data.name}: {seen.roles['user']}, so nothing can be trained on it")
    if problems:
        raise ConfigError("\n".join([*problems, "see `safecl doctor --data FILE`"]))
    assert seen.data is not None and seen.lengths is not None, "its problems were raised"
    own = _own(seen, data, out)
    attacks = None if bad is None or attack is None else _bad(bad, attack, out, own.name)
    return _text(model, own, seen, attacks, GOALS[goal], out)


def _own(seen: Seen, file: Path, out: Path) -> Data:
    """The entry of the user's rows, with how its answers are scored where they are labels."""
    assert seen.data is not None
    kind = kind_of(seen.data)
    chosen = labels([row for split in kind.SPLITS for row in kind().rows(split, None, 0)])
    more = {"score": "choice", "choices": tuple(chosen), "max_new_tokens": 16} if chosen else {}
    return seen.data.model_copy(update={"name": _name(file, "own"), "file": _beside(file, out), **more})


def _bad(seen: Seen, file: Path, out: Path, own: str) -> Data:
    """The entry of the attack file: of its requests, and of poison too where it has answers. `own`: the name of the other."""
    assert seen.data is not None
    roles = "attack" if seen.roles["poison"] else ("poison", "attack")
    return seen.data.model_copy(
        update={"name": _name(file, "attacks", own), "file": _beside(file, out), "roles": roles}
    )


def _name(file: Path, otherwise: str, *taken: str) -> str:
    found = re.sub(r"[^a-z0-9]+", "_", file.name.partition(".")[0].lower()).strip("_")
    is_free = found not in (*tasks.names(), *taken)
    return found if re.fullmatch(r"[a-z][a-z0-9_]*", found) and is_free else otherwise


def _beside(file: Path, out: Path) -> str:
    """A place relative to the sweep file, or the whole one where it lies elsewhere."""
    whole = file.absolute()
    return str(whole.relative_to(out.absolute().parent)) if whole.is_relative_to(out.absolute().parent) else str(whole)


def _entry(data: Data) -> str:
    given = data.model_dump(mode="json", exclude_defaults=True)
    return ", ".join(f"{key}: {_flow(value)}" for key, value in given.items())


def _flow(value: object) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    is_word = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in _WORDS
    return str(value) if is_word else json.dumps(value, ensure_ascii=False)


_WORDS = ("true", "false", "null", "yes", "no", "on", "off")  # quoted, whoever reads the file


def _counts(data: Data, file: Path, splits: tuple[str, ...]) -> dict[str, int]:
    kind = kind_of(data.model_copy(update={"file": str(file)}))
    found = {split: len(kind().rows(split, None, 0)) for split in splits}
    if empty := [split for split, num in found.items() if not num]:
        raise ConfigError(f"{file.name}: too few rows: none is left for {' or '.join(empty)}; bring more of them")
    return found


def _text(model: Model, own: Data, seen: Seen, bad: Data | None, goal: Goal, out: Path) -> str:
    assert seen.lengths is not None
    own_file = (out.absolute().parent / str(own.file)).absolute()
    num = _counts(own, own_file, ("user", "utility.validation", "utility.test"))
    small = model.source.startswith("wheel:")
    rates = ("8.0e-3", "4.0e-3") if small else ("2.0e-4", "2.0e-4")
    longest = max(64, -(-seen.lengths.all[2] // 32) * 32)
    room = max(256, -(-seen.lengths.prompt[3] // 64) * 64)
    poison, attacks, told = (
        "mini",
        dict.fromkeys(("validation", "test"), ("mini", NUM_PROMPTS)),
        "mini's, as yours are not given",
    )
    if bad is not None:
        bad_file = (out.absolute().parent / str(bad.file)).absolute()
        having = _counts(bad, bad_file, ("attack.validation", "attack.test"))
        attacks = {part: (bad.name, min(NUM_PROMPTS, having[f"attack.{part}"])) for part in attacks}
        poison = bad.name if "poison" in bad.used_as else "mini"
        told = "yours"
    entries = "\n".join(f"  - {{{_entry(data)}}}" for data in (own, bad) if data is not None)
    revision = f"\n    revision: {model.revision}" if model.revision else ""
    scored = "1 / perplexity of held-out answers" if own.score == "none" else f"by the rule `{own.score}`"
    prompts = {
        part: f"attack: [{{task: {attacks[part][0]}, num_rows: {attacks[part][1]}}}]\n"
        f"    benign: [{{task: mini, num_rows: 24}}]\n    utility_rows: {min(NUM_PROMPTS, num[f'utility.{part}'])}"
        for part in attacks
    }
    methods = "\n".join(f"  - {method}" for method in goal.methods)
    name = re.sub(r"[^a-z0-9_-]+", "-", out.stem.lower()).strip("-_") or "sweep"
    return f"""# {goal.about[0].upper()}{goal.about[1:]}
#   safecl plan {out.name}     what it would do, and for how long
#   safecl run {out.name}      do it; the same command continues
# Small on purpose. Every key is in safecl/config.py with its default; errors name what was meant.
name: {name}
about: {json.dumps(goal.about, ensure_ascii=False)}

models:
  - name: model
    source: {_flow(model.source)}{revision}
    template: {_flow(model.template) if isinstance(model.template, str) else "auto"}  # auto: the tokenizer's own chat template

# Your files. Roles: user (with its held-out part as utility), safety, poison, attack, benign, guard.
# The parts for training, validation and test follow from a hash of each row, 80 : 10 : 10; `split: {{...}}` changes that.
# `score` says how held-out answers are scored: none (their perplexity), exact, choice, number, regex, contains, code.
data:
{entries}

# Which layers are adapted: the upper ones alone are faster on a CPU. Without `last_layers`: all.
lora: {{rank: 8, alpha: 16, dropout: 0.0, last_layers: 12}}

# Stage one makes the model safe: harmful requests with refusals, benign ones with help. `mini` is generated by safecl;
# put your own rows (role safety) in its place for a real result.
align:
  safety: [{{task: mini, num_rows: 400}}]
  epochs: 1
  batch_size: 4
  learning_rate: {rates[0]}  # 1e-4 to 2e-4 for models of billions of parameters
  weight_decay: 0.0
  max_tokens: 128

# Stage two is what your users do: fine-tune on your rows. Utility: {scored}.
tasks:
  - task: {own.name}
    num_rows: {min(NUM_ROWS, num["user"])}  # of {num["user"]}
    epochs: 1
    batch_size: 4
    learning_rate: {rates[1]}
    weight_decay: 0.0
    max_tokens: {longest}  # 99 % of your rows are within

# The share of rows that are harmful with compliance; 0.0 is your data as it is.
poison: {{task: {poison}, ratios: [0.0, 0.1]}}

methods:
{methods}

seeds: [{", ".join(map(str, goal.seeds))}]  # three or more, to say that one method is better than another

# A search reads validation prompts only, the tables read test prompts only. Attack prompts: {told}.
evaluate:
  validation:
    {prompts["validation"]}
  test:
    {prompts["test"]}
  max_new_tokens: 48
  max_prompt_tokens: {room}
  judges:  # a guard trained here; `asr: llamaguard` with guard_model names a published one
    asr: guard
    guard:
      rows: [{{task: mini, num_rows: 128}}]
      heldout: [{{task: mini, num_rows: 40}}]
      lora: {{rank: 8, alpha: 16, dropout: 0.0, last_layers: 12}}
      epochs: 1
      batch_size: 2
      learning_rate: {"2.0e-3" if small else "2.0e-4"}
      weight_decay: 0.0
      max_tokens: 256

search: {{trials: 8}}

execution:
  num_judge_replicas: 0  # the guard shares the model's engine
  engine_max_tokens: {max(512, room + own.max_new_tokens, room + 128)}
  engine_memory_gib: 0.5
"""
