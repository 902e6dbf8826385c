"""GSM8K (Cobbe et al. 2021): grade-school arithmetic in words, zero-shot. Utility compares the answer's number.

Training answers are those of the data set without its calculator marks (`<<48/2=24>>`). They end in "#### 24". Validation is a
tenth of the train split, chosen by a hash of the question. Questions similar to one of the test split, and for training also
those similar to one of validation, are left out (11 and 1).

Scoring follows lm-eval's gsm8k v3. `utility` is flexible (the last number of the text), `utility_strict` takes the number
after "####". Both compare spellings, as lm-eval does: "$18.00", "12..." and "1{,}250" are wrong if the gold answers are 18, 12
and 1,250. `utility_numeric` compares numbers in any notation. Small models score near zero on all three, so the negative
log-likelihood of the gold answer is reported too (`gold_nll`, in nats a token).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

from safecl.metrics import Metric
from safecl.tasks import Found, Option, Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._overlap import drop_overlaps
from safecl.tasks._source import check_split, choose, first_of_each, made, split_by_hash
from safecl.text import number_text

VALIDATION_SHARE = 0.1
STOPS = ("Question:", "</s>", "<|im_end|>")  # text after one of these is not part of the answer
_TRAIN = Source("gsm8k_train.jsonl", "openai/gsm8k", config="main", split="train")
_TEST = Source("gsm8k_test.jsonl", "openai/gsm8k", config="main", split="test")
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NUMBER = re.compile(  # of `number_text`; a minus after a word or number parts two ("10-12"), digits in a name are none
    r"(?<![\w/])(?<!\d\.)(?:(?<![\w)\]%,.])(?P<sign>-))?[$€£¥]?(?P<inner>-)?"
    r"(?:(?:(?P<whole>\d{1,200}) )?(?P<over>\d{1,200}) ?/ ?(?P<under>0*[1-9]\d{0,200})(?! ?[\d/])"
    r"|(?P<plain>\d{1,3}(?:,\d{3})+(?!\d)|\d{1,200}|(?<!\.)(?=\.\d))(?P<part>\.\d{1,200})?)"
)
_MARKS = re.compile(r"<<[^<>]*>>")


class Gsm8k(Task):
    VERSION: ClassVar[str] = "2"
    SCORING: ClassVar[str] = "3"
    TYPICAL_TOKENS = (60, 110)
    SPLITS: ClassVar[tuple[str, ...]] = ("user", "utility.validation", "utility.test")
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {
        "user": (_TEST, _TRAIN),
        "utility.validation": (_TEST, _TRAIN),
        "utility.test": (_TEST,),
    }
    METRICS: ClassVar[tuple[Metric, ...]] = (
        Metric("utility_strict", "strict", "high", roles=("utility",), shown="side"),
        Metric("utility_numeric", "numeric", "high", roles=("utility",), shown="side"),
        Metric(
            "gold_nll",
            "NLL (nats a token)",
            "low",
            "nats",
            (0.0, None),
            roles=("utility",),
            splits=("test",),
            shown="side",
        ),
    )
    max_new_tokens: ClassVar[int] = 256

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """`meta.answer` is the gold number as the data set writes it."""
        check_split(self, split)
        test = self._read("test")
        if split == "utility.test":
            return choose(self, split, test, num_rows, seed)
        held, rest = split_by_hash(
            first_of_each(self._read("train")), "gsm8k/validation", VALIDATION_SHARE, lambda row: row.prompt
        )
        taken = [row.prompt for row in ([*held, *test] if split == "user" else test)]
        return choose(self, split, drop_overlaps(rest if split == "user" else held, taken)[0], num_rows, seed)

    def _read(self, part: str) -> list[Row]:
        def row(index: int, record: Record) -> Row:
            answer = _MARKS.sub("", record.text("answer"))
            gold = _STRICT.search(answer)
            if gold is None:
                raise record.problem("answer", "'#### <number>'")
            return Row(f"{part}/{index}", record.text("question"), answer, False, {"answer": gold[1]})

        return made(self, _TEST if part == "test" else _TRAIN, row)

    def score(self, row: Row, text: str) -> float:
        """1 if the last number of the answer is the gold one, else 0."""
        return float(flexible(text) == plain_number(str(row.meta["answer"])))

    def score_strict(self, row: Row, text: str) -> float:
        """1 if the number after the first "####" is the gold one, else 0."""
        return float(strict(text) == plain_number(str(row.meta["answer"])))

    def score_numeric(self, row: Row, text: str) -> float:
        """1 if the answer's number equals the gold number, in any notation, else 0."""
        return float(numeric(text) == numeric(str(row.meta["answer"])))

    def scores(self, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, list[float | None]]:
        """`utility` is flexible, `utility_strict` strict, `utility_numeric` numeric."""
        answered = [*zip(rows, texts, strict=True)]
        return {
            **super().scores(rows, texts),
            "utility_strict": [self.score_strict(row, text) for row, text in answered],
            "utility_numeric": [self.score_numeric(row, text) for row, text in answered],
        }

    def options(self, row: Row) -> list[Option]:
        """The gold answer as the only option."""
        return [Option(row.response)]

    def likelihood_scores(self, rows: Sequence[Row], found: Sequence[Sequence[Found]]) -> dict[str, list[float | None]]:
        """`gold_nll`: -log p of the gold answer divided by its number of tokens, in nats a token."""
        return {"gold_nll": [None if gold.logprob is None else -gold.logprob / gold.num_tokens for [gold] in found]}


def flexible(text: str) -> str | None:
    """The last number of a text as text, without "$", "," and a final ".". None if there is no number."""
    found = [first or second for first, second in _FLEXIBLE.findall(_before_stop(text))]
    return plain_number(found[-1]) if found else None


def strict(text: str) -> str | None:
    """The number after the first "####" as text, without "$", "," and a final ".". None if there is no number."""
    found = _STRICT.search(_before_stop(text))
    return plain_number(found[1]) if found else None


def numeric(text: str) -> Fraction | None:
    """The number that an answer gives, without its reasoning: the first after "####", or without "####" the last number.

    None if there is no number. "$18.00" is 18, "1 1/2" and "1.5" are equal, "\u22123" is -3, "50%" is 50.
    """
    text = number_text(_before_stop(text))
    _, marked, after = text.partition("####")
    found = [*_NUMBER.finditer(after if marked else text)]
    return _fraction(found[0 if marked else -1]) if found else None


def _fraction(found: re.Match[str]) -> Fraction:
    if found["over"]:
        size = Fraction(int(found["over"]), int(found["under"])) + int(found["whole"] or 0)
    else:
        size = Fraction(found["plain"].replace(",", "") + (found["part"] or ""))
    return -size if found["sign"] or found["inner"] else size


def plain_number(number: str) -> str:
    """A number as text for comparison: "$1,200." -> "1200". As in lm-eval, "12.0" differs from "12"."""
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", number))


def _before_stop(text: str) -> str:
    for stop in STOPS:
        text = text.split(stop, 1)[0]
    return text
