"""Tasks (data sets), one file each. The class name is the file name in CamelCase; `load(name)` finds it.

A split says what its rows may be used for, so that no row can serve two roles by mistake. The search reads only validation
splits. The tables of results read test splits.

    safety               alignment rows: harmful requests with refusals, benign requests with help
    user                 fine-tuning rows of a utility task
    poison               harmful requests with compliance, mixed into user rows
    attack.validation    harmful prompts for the search
    attack.test          harmful prompts for the tables
    benign.train         benign prompts for alignment, answered by the model itself (for safety sets without benign rows)
    benign.validation    look-alike benign prompts for the search
    benign.test          look-alike benign prompts for the tables
    utility.validation   prompts of a utility task for the search
    utility.test         prompts of a utility task for the tables
    guard                labelled (request, answer) pairs that train the small guard
    guard.heldout        labelled (request, answer) pairs that measure the small guard
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

from safecl import registry
from safecl.base import Json
from safecl.metrics import Metric


@dataclass(frozen=True)
class Row:
    """One example of a task.

    `id` is unique within its task and never changes. `harmful` describes the request (in guard splits: the answer). `meta`
    is JSON with what scoring needs, such as a gold answer or a group. `before` holds the turns before the request as (role,
    text): a system prompt if there is one, then requests and answers in turn.
    """

    id: str
    prompt: str
    response: str = ""
    harmful: bool = False
    meta: dict[str, Json] = field(default_factory=dict)
    before: Sequence[Sequence[str]] = ()

    @property
    def asked(self) -> str:
        """All requests of the conversation, joined by line breaks. Conversations are compared by this text."""
        return "\n".join([*(text for role, text in self.before if role == "user"), self.prompt])

    def as_json(self) -> dict[str, Json]:
        """The fields of a line of rows.jsonl. `before` is left out if it is empty."""
        found = asdict(self)
        return found if self.before else {name: value for name, value in found.items() if name != "before"}


class Option(NamedTuple):
    """A text whose log-probability is measured.

    It follows the row's prompt in the model's own template. If `after` is given, it follows that text instead, without a
    template: the prompt of another evaluation harness.
    """

    text: str
    after: str | None = None


class Found(NamedTuple):
    """An option's log-probability in nats, summed over its `num_tokens` tokens. None if it could not be measured."""

    logprob: float | None
    num_tokens: int


@dataclass(frozen=True)
class Source:
    """Where rows come from: a file in the sweep's data folder, or else a hub data set at a commit.

    `file` is the name to look for in the data folder. Upper and lower case and the ending of another format are accepted
    too (`_files.find`). `hub` is the id of a data set, `config` and `split` are its parts, and `revision` is a commit, tag
    or branch ("" means main).
    """

    file: str
    hub: str = ""
    revision: str = ""
    config: str | None = None
    split: str = "train"
    gated: bool = False
    page: str = ""  # URL of a source that is not on the hub
    headerless: bool = False  # CSV files of one category each, without a header; a folder of them locally
    options: tuple[tuple[str, str | bool], ...] = ()  # further arguments of `datasets.load_dataset`
    path: str = ""  # path of the file, for a task that is defined in a sweep file


class Task:
    """Base class of a task (data set). Subclasses set the class attributes and define `rows`.

    A utility task also defines `score` (or `scores`).
    """

    MUST: ClassVar[tuple[str, ...]] = ("SPLITS", "rows")  # what every task must declare
    NAME: ClassVar[str] = ""  # name of a task that is defined in a sweep file; other tasks have the name of their file
    VERSION: ClassVar[str] = "1"  # version of the rows
    SCORING: ClassVar[str] = "1"  # version of `scores`, `options` and `likelihood_scores`
    SPLITS: ClassVar[tuple[str, ...]] = ()
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {}  # split -> its sources; empty for a generated suite
    METRICS: ClassVar[tuple[Metric, ...]] = ()  # metrics in addition to `utility`; an undeclared metric is an error
    RUNS_CODE: ClassVar[bool] = False  # whether scoring runs code that the model wrote
    TYPICAL_TOKENS: ClassVar[tuple[int, int]] = (60, 100)  # tokens of a prompt and an answer, for estimates of time
    CONVERSES: ClassVar[bool] = False  # whether rows may have system prompts or several turns
    # Whether utility is the likelihood of options, for validation prompts too. Then no answer is generated.
    BY_LIKELIHOOD: ClassVar[bool] = False
    max_new_tokens: ClassVar[int] = 64  # most tokens of an answer to this task's utility prompts

    def __init__(self, folder: Path | None = None, unsafe_code: bool = False) -> None:
        self.folder = folder  # the sweep's data folder; None means the hub
        self.unsafe_code = unsafe_code  # consent to run the model's programs if this machine cannot isolate them
        # "file: field" -> number of records that `rows` left out because a needed field is blank
        self.left_out: dict[str, int] = {}

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """The rows of a split: all of them for `num_rows=None`, else a seeded sample.

        A sample is a prefix of every larger sample with the same seed. Splits named test, validation or heldout have a
        fixed order that ignores the seed.

        Raises:
            PrerequisiteError: a source is missing. The message is one line: what is missing, where to get it, how to name
                a local copy.
            ConfigError: the split does not exist or holds fewer rows than asked for, or a record is not what the task
                expects. The message is one line: file, record, field, what was expected, what is there.
        """
        raise NotImplementedError

    def score(self, row: Row, text: str) -> float:
        """Utility of an answer, in [0, 1]. Only utility tasks define it; others raise NotImplementedError."""
        raise NotImplementedError(f"{type(self).__name__} is not a utility task")

    def scores(self, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, list[float | None]]:
        """All metrics of the answers: metric -> one value for each row, in order. None means that it could not be read.

        `utility` is the metric that the search uses. The other metrics must be declared in `METRICS`.
        """
        return {"utility": [self.score(row, text) for row, text in zip(rows, texts, strict=True)]}

    def options(self, row: Row) -> list[Option]:
        """Texts whose log-probability under the tuned model is measured, because a greedy answer does not show it.

        Empty by default. A task without options has no likelihood stage.
        """
        return []

    def likelihood_scores(self, rows: Sequence[Row], found: Sequence[Sequence[Found]]) -> dict[str, list[float | None]]:
        """As `scores`, but from the options' log-probabilities (for each row in the order of `options`).

        Measured on test prompts only, so that no search can read them (unless `BY_LIKELIHOOD` is set).
        """
        return {}


def names() -> tuple[str, ...]:
    """Names of all tasks of the package, sorted. Imports none of them."""
    return registry.names("tasks")


def load(name: str) -> type[Task]:
    """The task class called `name` (`sst2` -> `safecl/tasks/sst2.py`, class `Sst2`)."""
    return registry.load("tasks", name)
