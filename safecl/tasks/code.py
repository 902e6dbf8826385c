"""Python programs (the paper's Code task): learned from NemotronCode, measured by running HumanEval and HumanEval+.

User rows are problems with Python answers. The paper's source is the `code` split of NVIDIA's Nemotron post-training data. A
data folder may hold either that or CodeAlpaca, a small substitute, as codealpaca.jsonl with its published fields. Two kinds
of rows are left out. First, rows whose answer holds no Python that parses: CodeAlpaca has answers in other languages and
answers that lost their indentation. Second, rows whose question is similar to a problem of validation or test. Validation is
MBPP (its validation and train problems, with one of its tests shown), never HumanEval.

Scoring runs each answer in one sandbox and its tests in another. Metrics: `utility` is pass@1 on the tests of HumanEval (3 s,
as in its own harness) or MBPP. `utility_plus` is pass@1 on the tests of both HumanEval and HumanEval+ (evalplus).
`code_timeouts` is the share of answers that reached a time limit in either. `no_code` is the share of answers that hold no
program to run.
"""

from __future__ import annotations

import ast
import base64
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar

from safecl import sandbox
from safecl.base import ConfigError, Json, PrerequisiteError
from safecl.metrics import Metric
from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Blank, Record
from safecl.tasks._overlap import drop_overlaps
from safecl.tasks._program import FENCE, IMPORTS, NOT_PYTHON, bindings, extracted, parsed, written
from safecl.tasks._source import check_split, choose, first_of_each, made, records
from safecl.text import without_reasoning

TIMEOUT_S = 3  # HumanEval's limit. This and the next two limits are seconds of CPU time
PLUS_TIMEOUT_S = 60  # evalplus's limit for all of a problem's tests together
CALL_TIMEOUT_S = 4  # limit for one of HumanEval+'s tests (the slowest canonical solution needs about .3 s)
VALIDATION_IDS = range(511, 975)  # MBPP: 511-600 validation, 601-974 train

_USER = Source("codealpaca.jsonl", "nvidia/Nemotron-Post-Training-Dataset-v1", split="code[:1%]")  # of 1.9 million
_MBPP = Source("mbpp.jsonl", "google-research-datasets/mbpp", config="full", split="train+validation")
_HUMANEVAL = Source("humaneval.jsonl", "openai/openai_humaneval", split="test")
_PLUS = Source("humaneval_plus_originfmt.jsonl.gz", "evalplus/humanevalplus", split="test")
# In this format, HumanEval+'s tests of problem 32 call their oracle with root and polynomial swapped, so that no answer can
# pass. evalplus itself requires |polynomial(root)| <= 1e-4.
_SWAPPED, _RIGHT = "_poly(*candidate(*inp), inp) <= 0.0001", "abs(_poly(*inp, candidate(*inp))) <= 0.0001"
# HumanEval+'s comparison of floats accepts any number in place of an empty list, and a list of one number in place of the
# number, because numpy broadcasts shapes. Later versions of evalplus require the expected type and length, as is done here.
_CLOSE = "assert np.allclose(out, exp,"
_ALIKE = f"assert type(out) is type(exp) and np.shape(out) == np.shape(exp)\n        {_CLOSE}"


class Code(Task):
    VERSION: ClassVar[str] = "3"
    SCORING: ClassVar[str] = "3"
    TYPICAL_TOKENS = (130, 110)
    SPLITS: ClassVar[tuple[str, ...]] = ("user", "utility.validation", "utility.test")
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {
        "user": (_USER, _MBPP, _HUMANEVAL),
        "utility.validation": (_MBPP,),
        "utility.test": (_HUMANEVAL, _PLUS),
    }
    RUNS_CODE: ClassVar[bool] = True
    METRICS: ClassVar[tuple[Metric, ...]] = (
        Metric("utility_plus", "plus", "high", roles=("utility",), splits=("test",), shown="side"),
        Metric("code_timeouts", "time-outs", "low", roles=("utility",), shown="side"),
        Metric("no_code", "no code", "low", roles=("utility",), shown="side"),
    )
    max_new_tokens: ClassVar[int] = 512

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """The rows of a split.

        `meta` of a utility row holds "start" (code that an answer may continue), "names" (names that the answer must define)
        and "test" (source that raises unless the answer is right). HumanEval rows also have "plus" (HumanEval+'s tests as
        "test", see `packed`). Some MBPP rows have "setup" (source that uses the answer's classes to make arguments for the
        tests).
        """
        check_split(self, split)
        found = {
            "user": self._user,
            "utility.validation": lambda: made(self, _MBPP, _mbpp_row),
            "utility.test": self._humaneval,
        }[split]()
        return choose(self, split, found, num_rows, seed)

    def scores(self, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, list[float | None]]:
        """The metrics of the answers, each 0 or 1 for a row (see the module's docstring).

        Raises PrerequisiteError if this machine cannot isolate programs and the sweep does not consent to run them anyway.
        """
        found: list[Any] = [
            extracted(answer, str(row.meta["start"]), _names(row)) for row, answer in zip(rows, texts, strict=True)
        ]
        base = self._verdicts(rows, found, [str(row.meta["test"]) for row in rows], TIMEOUT_S)
        late = [verdict == "timeout" for verdict in base]
        scores: dict[str, list[float | None]] = {"utility": [float(verdict == "passed") for verdict in base]}
        if all("plus" in row.meta for row in rows):
            passed = [code if verdict == "passed" else None for code, verdict in zip(found, base, strict=True)]
            tests = [unpacked(str(row.meta["plus"])) for row in rows]
            plus = self._verdicts(rows, passed, tests, PLUS_TIMEOUT_S, CALL_TIMEOUT_S)
            scores["utility_plus"] = [float(verdict == "passed") for verdict in plus]
            late = [before or verdict == "timeout" for before, verdict in zip(late, plus, strict=True)]
        scores["code_timeouts"] = [float(value) for value in late]
        scores["no_code"] = [float(code is None) for code in found]
        return scores

    def _verdicts(
        self, rows: Sequence[Row], codes: Sequence[str | None], tests: Sequence[str], timeout_s: int, call_s: int = 0
    ) -> list[str]:
        """The sandbox's verdict for each program with its tests. "none" if there is no program."""
        given = [i for i, code in enumerate(codes) if code is not None]
        programs = [_program(rows[i], str(codes[i]), tests[i]) for i in given]
        done = sandbox.run(programs, timeout_s=timeout_s, call_s=call_s, unsafe=self.unsafe_code)
        verdicts = dict(zip(given, (outcome.verdict for outcome in done), strict=True))
        return [verdicts.get(i, "none") for i in range(len(codes))]

    def _user(self) -> list[Row]:
        found = made(self, _USER, _user_row)
        if not found:
            raise PrerequisiteError(
                f"data set {_USER.hub}: no record has both a question and a Python answer (it leaves questions out as '-' "
                f"where their licence asks for it); put such records into {_USER.file} of execution.data_dir"
            )
        held = [record.text("text") for record in records(_MBPP, self.folder) if _is_validation(record)]
        held += [_described(record) for record in records(_HUMANEVAL, self.folder)]
        return drop_overlaps(first_of_each(found), held)[0]

    def _humaneval(self) -> list[Row]:
        found = made(self, _HUMANEVAL, _problem)
        plus = {record.label("task_id"): record.raw("test") for record in records(_PLUS, self.folder)}
        for row in found:
            if row.id not in plus:
                raise ConfigError(f"{_PLUS.file}: holds no tests for {row.id}; fetch it again")
            further = plus[row.id].replace(_SWAPPED, _RIGHT).replace(_CLOSE, _ALIKE)
            row.meta["plus"] = packed(f"{further}\ncheck({_names(row)[0]})\n")
        return found


def packed(source: str) -> str:
    """Compress a text with zlib and encode it as base64. HumanEval+'s tests are 11 MB of mostly numbers; this form needs a
    tenth of that."""
    return base64.b64encode(zlib.compress(source.encode())).decode()


def unpacked(form: str) -> str:
    """The text that `packed` was given."""
    return zlib.decompress(base64.b64decode(form)).decode()


def _described(record: Record) -> str:
    """The task of a HumanEval problem in words: the last text in its prompt, up to its examples. (In one problem it is not
    the function's first statement.)"""
    tree = _tree(record, "prompt", record.raw("prompt"))
    said = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return str(said[-1] if said else "").split(">>>", 1)[0]


def _problem(_: int, record: Record) -> Row:
    """A HumanEval problem, without HumanEval+'s tests."""
    start, name = record.raw("prompt"), record.text("entry_point")
    return Row(
        record.label("task_id"),
        "Please provide a self-contained Python script that solves the following problem in a markdown code "
        f"block:\n```python\n{start.strip()}\n```",
        meta={"start": start, "names": [name], "test": f"{record.raw('test')}\ncheck({name})\n"},
    )


def _user_row(index: int, record: Record) -> Row | None:
    """A user row. None if the question is withheld because of its licence ("-"), or if the answer holds no Python."""
    if "messages" in record:
        said = {message.label("role"): message for message in reversed(record.parts("messages"))}
        if not {"user", "assistant"} <= said.keys():
            raise Blank("messages")
        prompt, answer = said["user"].text("content"), without_reasoning(said["assistant"].text("content")).strip()
    else:
        prompt, answer = record.text("instruction"), record.text("output", "response")
    code = "\n".join(FENCE.findall(answer)) or answer
    is_python = any(not isinstance(part.node, ast.Expr) for part in parsed(code))
    return Row(f"user/{index}", prompt, answer) if is_python and prompt != "-" else None


def _mbpp_row(_: int, record: Record) -> Row | None:
    if not _is_validation(record):
        return None
    tests = record.texts("test_list")
    if not tests:
        raise record.problem("test_list", "at least one test")
    trees = [_tree(record, "test_list", test) for test in tests]
    needed = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    reference = parsed(record.raw("code").replace("\r\n", "\n"))
    imports = [part.text for part in reference if isinstance(part.node, IMPORTS) and written(part.node) & needed]
    names: list[Json] = [*sorted(needed & set(bindings(reference)))]
    if not names:
        raise record.problem("code", "Python that defines what the tests call")
    setup = record.raw("test_setup_code") if record.get("test_setup_code") else ""
    prompt = f"{record.text('text')} The code must pass this test:\n```python\n{tests[0]}\n```"
    meta: dict[str, Json] = {"start": "", "names": names, "test": "\n".join([*imports, *tests])}
    if setup:
        meta["setup"] = setup
    return Row(f"mbpp/{record.label('task_id')}", prompt, meta=meta)


def _is_validation(record: Record) -> bool:
    number = record.label("task_id")
    if not number.isdecimal():
        raise record.problem("task_id", "a whole number")
    return int(number) in VALIDATION_IDS


def _tree(record: Record, name: str, source: str) -> ast.AST:
    try:
        return ast.parse(source)
    except NOT_PYTHON:
        raise record.problem(name, "Python that parses") from None


def _program(row: Row, code: str, tests: str) -> sandbox.Program:
    """An answer's program with its tests. The tests also get what the prompt defines before the requested function (an
    oracle, imports). They use the answer only by calling it."""
    setup = str(row.meta.get("setup", ""))
    given = [part.text for part in parsed(str(row.meta["start"]))[:-1]]
    made = {
        node.id for node in ast.walk(ast.parse(setup)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return sandbox.Program(f"{code}\n{setup}", "\n".join([*given, tests]), [*_names(row), *sorted(made)])


def _names(row: Row) -> list[str]:
    names: Any = row.meta["names"]
    return [str(name) for name in names]
