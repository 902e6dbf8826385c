"""Data sets: one file each, class name = file name in CamelCase, found by `load(name)`.

A split says what its rows may be used for, so that no row can serve two roles by mistake:

    safety               alignment rows: harmful requests with refusals, benign requests with help
    user                 fine-tuning rows of a utility task
    poison               harmful requests with compliance, mixed into user rows
    benign.train         benign prompts that the base model answers itself, for safety sets without benign rows
    attack.validation    harmful prompts the search may read       attack.test      those the tables read
    benign.train         look-alike benign prompts that alignment may use, answered by the model itself
    benign.validation    look-alike benign prompts, likewise       benign.test
    utility.validation   prompts of a utility task, likewise       utility.test
    guard                labelled (request, answer) pairs that train the small guard
    guard.heldout        labelled pairs that measure it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

from safecl import registry
from safecl.base import Json


@dataclass(frozen=True)
class Row:
    """One example. `id` is unique within its task and stable over time; `harmful` is of the request (in guard splits:
    of the answer); `meta` holds what scoring needs (a gold answer, a group) and is JSON. `before`: what stands before the
    request, as (role, text): a system prompt, then requests and answers in turn."""

    id: str
    prompt: str
    response: str = ""
    harmful: bool = False
    meta: dict[str, Json] = field(default_factory=dict)
    before: Sequence[Sequence[str]] = ()

    @property
    def asked(self) -> str:
        """All that a person said: what tells one conversation from another."""
        return "\n".join([*(text for role, text in self.before if role == "user"), self.prompt])

    def as_json(self) -> dict[str, Json]:
        """The fields of a line of rows.jsonl."""
        found = asdict(self)
        return found if self.before else {name: value for name, value in found.items() if name != "before"}


class Option(NamedTuple):
    """A text whose log-probability is asked for. It follows the row's prompt in the model's own template, or, where
    `after` is given, that text as it stands: another harness's prompt."""

    text: str
    after: str | None = None


class Found(NamedTuple):
    """An option's log-probability in nats, summed over its tokens; None where it could not be measured."""

    logprob: float | None
    num_tokens: int


@dataclass(frozen=True)
class Source:
    """Where rows come from: a file in the sweep's data folder, or a hub data set at a commit. `file` is the name looked
    for in the data folder, also with the ending of another format or case (`_files.find`); `hub` an id, `config`/`split`
    its parts, `revision` a commit or tag."""

    file: str
    hub: str = ""
    revision: str = ""
    config: str | None = None
    split: str = "train"
    gated: bool = False
    page: str = ""  # where a person gets a source that is not on the hub
    headerless: bool = False  # CSV files of one category each, without a header; a folder of them locally
    options: tuple[tuple[str, str | bool], ...] = ()  # further arguments of `datasets.load_dataset`
    path: str = ""  # of a task that a sweep file writes: the file itself, wherever it lies


class Task:
    """A data set. Subclasses set the class attributes and write `rows` (and `score` if they are a utility task)."""

    MUST: ClassVar[tuple[str, ...]] = ("SPLITS", "rows")  # what every task declares
    NAME: ClassVar[str] = ""  # of a task that a sweep file writes; the others' is their file's
    VERSION: ClassVar[str] = "1"  # of the rows
    SCORING: ClassVar[str] = "1"  # version of `scores`, `options` and `likelihood_scores`
    SPLITS: ClassVar[tuple[str, ...]] = ()
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {}  # split -> its sources; empty for a generated suite
    SCORES: ClassVar[tuple[str, ...]] = ("utility",)  # what `scores` gives of validation answers
    RUNS_CODE: ClassVar[bool] = False  # whether scoring runs what the model wrote
    TYPICAL_TOKENS: ClassVar[tuple[int, int]] = (60, 100)  # of a prompt and an answer, for estimates of time
    CONVERSES: ClassVar[bool] = False  # whether rows may have system prompts or several turns
    # Utility is the likelihood of options, of validation prompts too: no answer is generated.
    BY_LIKELIHOOD: ClassVar[bool] = False
    max_new_tokens: ClassVar[int] = 64  # how long an answer to this task's utility prompts may be

    def __init__(self, folder: Path | None = None, unsafe_code: bool = False) -> None:
        self.folder = folder  # the sweep's data folder; None means the hub
        self.unsafe_code = unsafe_code  # consent to run the model's programs where this machine cannot isolate them
        # "file: field" -> how many records `rows` left out because they have nothing in a field that is needed
        self.left_out: dict[str, int] = {}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """The rows of a split: all of them for `num_rows=None`, else a seeded sample that is a prefix of any larger
        sample with the same seed. Test splits are drawn with a fixed order that ignores the seed.

        Raises:
            PrerequisiteError: a source is missing (one line: what, where to get it, how to point at a copy).
            ConfigError: the split does not exist or holds fewer rows than asked for, or a record is not what the task
                reads (one line: file, record, field, what was expected, what is there).
        """
        raise NotImplementedError

    def score(self, row: Row, text: str) -> float:
        """Utility of an answer in [0, 1]. Only utility tasks define it."""
        raise NotImplementedError(f"{type(self).__name__} is not a utility task")

    def scores(self, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, list[float | None]]:
        """Everything measured of the answers: metric -> a value a row, in order. `utility` is the one searched for; others
        stand beside it. None: could not be read."""
        return {"utility": [self.score(row, text) for row, text in zip(rows, texts, strict=True)]}

    def options(self, row: Row) -> list[Option]:
        """Texts whose log-probability under a tuned model says what its greedy answer hides. None by default: a task
        without options has no likelihood stage."""
        return []

    def likelihood_scores(self, rows: Sequence[Row], found: Sequence[Sequence[Found]]) -> dict[str, list[float | None]]:
        """As `scores`, of the options' log-probabilities (a row's in the order of `options`). Measured on test prompts
        only, so no search can read them."""
        return {}


def names() -> tuple[str, ...]:
    """Names of all tasks, sorted, without importing any."""
    return registry.names("tasks")


def load(name: str) -> type[Task]:
    """The task class called `name` (`sst2` -> `safecl/tasks/sst2.py`, class `Sst2`)."""
    return registry.load("tasks", name)
