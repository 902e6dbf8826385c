"""SST-2 (Socher et al. 2013; GLUE): sentiment of phrases from film reviews. Utility compares the generated word.

The instruction is that of git-disl. Training rows are phrases, and many phrases are parts of others. So validation takes whole
groups of phrases that contain one another (as runs of words). Groups are taken in the order of a hash, up to a tenth of the
train split. A group that does not fit any more stays in training. The one very large group, linked by single words such as
"film", therefore always stays in training. Test is the 872 sentences of the GLUE validation split. Phrases similar to a test
sentence, and for training also those similar to a validation phrase, are left out. Phrases are compared without the
instruction, which all prompts share.

The generated word depends on the sentiment and on whether the model keeps to the format. The likelier label depends only on
the sentiment. So both are measured, the likelier label in two ways: in the model's own template (`utility_likelihood`), and
without a template as in task sst2 of lm-evaluation-harness (`utility_harness`), for comparison with published numbers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from safecl.metrics import Metric
from safecl.tasks import Found, Option, Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._overlap import drop_overlaps
from safecl.tasks._source import check_split, choose, digest, groups, made
from safecl.text import without_reasoning

VALIDATION_SHARE = 0.1
INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative."
LABELS = ("negative", "positive")
HARNESS = "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:"
_TRAIN = Source("sst2_train.jsonl", "nyu-mll/glue", config="sst2", split="train")
_TEST = Source("sst2_validation.jsonl", "nyu-mll/glue", config="sst2", split="validation")


class Sst2(Task):
    VERSION: ClassVar[str] = "2"
    SCORING: ClassVar[str] = "3"
    TYPICAL_TOKENS = (35, 3)
    SPLITS: ClassVar[tuple[str, ...]] = ("user", "utility.validation", "utility.test")
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {
        "user": (_TEST, _TRAIN),
        "utility.validation": (_TEST, _TRAIN),
        "utility.test": (_TEST,),
    }
    METRICS: ClassVar[tuple[Metric, ...]] = (
        Metric("utility_likelihood", "likelihood", "high", roles=("utility",), splits=("test",), shown="side"),
        Metric(
            "utility_harness", "likelihood (lm-eval prompt)", "high", roles=("utility",), splits=("test",), shown="side"
        ),
        Metric("invalid", "invalid", "low", roles=("utility",), shown="side"),
    )
    max_new_tokens: ClassVar[int] = 8

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """Rows of a split. `meta.label` is positive or negative; `meta.sentence` is the phrase."""
        check_split(self, split)
        test = made(self, _TEST, lambda index, record: _row("test", index, record))
        if split == "utility.test":
            return choose(self, split, test, num_rows, seed)
        train = made(self, _TRAIN, lambda index, record: _row("train", index, record))
        places = _held_out([_phrase(row) for row in train])
        held = [row for i, row in enumerate(train) if i in places]
        found = held if split == "utility.validation" else [row for i, row in enumerate(train) if i not in places]
        taken = [*test, *(held if split == "user" else [])]
        alike = drop_overlaps([replace(row, prompt=_phrase(row)) for row in found], map(_phrase, taken))[1]
        dropped = set(alike)
        return choose(self, split, [row for row in found if row.id not in dropped], num_rows, seed)

    def score(self, row: Row, text: str) -> float:
        """1 if the answer names the row's label and not the other label, else 0. An answer with neither is wrong."""
        return float(answered(text) == row.meta["label"])

    def scores(self, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, list[float | None]]:
        """`utility`, and `invalid`: 1 for an answer that names no single label."""
        return {**super().scores(rows, texts), "invalid": [float(answered(text) is None) for text in texts]}

    def options(self, row: Row) -> list[Option]:
        """Both labels in the model's template, then both after lm-evaluation-harness's prompt."""
        after = HARNESS.format(sentence=row.meta["sentence"])
        return [*(Option(label) for label in LABELS), *(Option(f" {label}", after) for label in LABELS)]

    def likelihood_scores(self, rows: Sequence[Row], found: Sequence[Sequence[Found]]) -> dict[str, list[float | None]]:
        """1 if the row's label is the likelier one, else 0: `utility_likelihood` and `utility_harness`."""
        return {
            "utility_likelihood": [_likelier(row, options[:2]) for row, options in zip(rows, found, strict=True)],
            "utility_harness": [_likelier(row, options[2:]) for row, options in zip(rows, found, strict=True)],
        }


def answered(text: str) -> str | None:
    """The one label that a text names (in any case, as a whole word) after its reasoning. None if it names none or both."""
    named = set(re.findall(r"\b(positive|negative)\b", without_reasoning(text).lower()))
    return named.pop() if len(named) == 1 else None


def _likelier(row: Row, options: Sequence[Found]) -> float | None:
    """1 if the row's label has the greater log-probability, else 0. None if not measured. Of equal ones the first counts, as in
    lm-eval."""
    negative, positive = (option.logprob for option in options)
    if negative is None or positive is None:
        return None
    return float(LABELS[positive > negative] == row.meta["label"])


def _row(prefix: str, index: int, record: Record) -> Row:
    sentence, label = record.text("sentence"), LABELS[record.flag("label")]
    prompt = f"{INSTRUCTION}\n\n{sentence}"
    return Row(f"{prefix}/{index}", prompt, label, False, {"label": label, "sentence": sentence})


def _phrase(row: Row) -> str:
    return str(row.meta["sentence"])


def _held_out(sentences: list[str]) -> set[int]:
    """Indices of validation phrases. No phrase of training contains one of them or is contained in one."""
    found = groups(len(sentences), _containing([tuple(s.lower().split()) for s in sentences]))
    found.sort(key=lambda group: digest("sst2/validation", sentences[group[0]]))
    room = round(VALIDATION_SHARE * len(sentences))
    held: set[int] = set()
    for group in found:
        if len(group) <= room - len(held):
            held.update(group)
    return held


def _containing(phrases: list[tuple[str, ...]]) -> Iterator[tuple[int, int]]:
    """Pairs (i, j) where phrase i contains phrase j as a run of words, or is equal to it."""
    where: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, phrase in enumerate(phrases):
        where[phrase].append(index)
    for index, phrase in enumerate(phrases):
        for start in range(len(phrase)):
            for stop in range(start + 1, len(phrase) + 1):
                yield from ((index, other) for other in where.get(phrase[start:stop], ()) if other != index)
