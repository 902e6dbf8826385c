"""Python programs (the paper's Code task): learned from NemotronCode, measured by running HumanEval and HumanEval+.

User rows are problems with Python answers. The paper's source is the `code` split of NVIDIA's Nemotron post-training
data; a data folder may hold either that or CodeAlpaca, a small stand-in, as codealpaca.jsonl in its published fields.
Rows whose answer holds no Python that parses are left out: CodeAlpaca has other languages and lost indentation. Validation
is MBPP (its validation and train problems, one of its tests shown), never HumanEval.

Scoring runs each answer in the sandbox: `utility` is pass@1 on HumanEval's tests (3 s, as in its own harness),
`utility_plus` on those and HumanEval+'s (evalplus), `code_timeouts` the share that ended by the clock in either,
`no_code` the share of answers that held no program to run. Source: evaluation.md 3.5.
"""

from __future__ import annotations

import ast
import base64
import re
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from safecl import sandbox
from safecl.base import Json, PrerequisiteError
from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Record
from safecl.tasks._source import check_split, choose, first_of_each, records, text

TIMEOUT_S = 3  # HumanEval's; of CPU time here, as all three
PLUS_TIMEOUT_S = 60  # evalplus's cap for all of a problem's tests together
CALL_TIMEOUT_S = 4  # for one of HumanEval+'s tests (the slowest canonical solution needs about .3 s)
VALIDATION_IDS = range(511, 975)  # MBPP: 511-600 validation, 601-974 train
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "</s>")  # an answer's text ends before these
# Where a completion of the prompt leaves the function it completes: evalplus's list, less what these begin with.
STOPS = ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ", "\nif __name__", "\nprint(")

_USER = Source("codealpaca.jsonl", "nvidia/Nemotron-Post-Training-Dataset-v1", split="code[:1%]")  # of 1.9 million
_MBPP = Source("mbpp.jsonl", "google-research-datasets/mbpp", config="full", split="train+validation")
_HUMANEVAL = Source("humaneval.jsonl", "openai/openai_humaneval", split="test")
_PLUS = Source("humaneval_plus_originfmt.jsonl.gz", "evalplus/humanevalplus", split="test")
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_WORDS = re.compile(r"(?:(?!def |class )\S[^\n]*\n|[ \t]*\n)+(?=[ \t]+\S)")  # lines before the first indented one
_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_BEGINS_CODE = re.compile(
    r"([ \t]*)(?:(?:from|import|def|class|async|for|if|try|with)\b|@\w|[A-Za-z_][\w.]*\s*[=(:\[])"
)
# HumanEval+'s tests of problem 32 in this format call their oracle with root and polynomial swapped, so that no answer
# can pass; evalplus itself asks for |polynomial(root)| <= 1e-4.
_SWAPPED, _RIGHT = "_poly(*candidate(*inp), inp) <= 0.0001", "abs(_poly(*inp, candidate(*inp))) <= 0.0001"
# A limit for each single test, as evalplus has. It ends the program as the limit on all of them does: no candidate can
# catch it, and the verdict is a timeout.
_LIMITED = """
def _limited(candidate):
    import os, signal
    signal.signal(signal.SIGPROF, lambda number, frame: os.kill(os.getpid(), signal.SIGXCPU))
    def call(*args):
        signal.setitimer(signal.ITIMER_PROF, {seconds})
        try:
            return candidate(*args)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return call
check(_limited({name}))
"""


class Code(Task):
    VERSION: ClassVar[str] = "1"
    SPLITS: ClassVar[tuple[str, ...]] = ("user", "utility.validation", "utility.test")
    SOURCES: ClassVar[dict[str, tuple[Source, ...]]] = {
        "user": (_USER,),
        "utility.validation": (_MBPP,),
        "utility.test": (_HUMANEVAL, _PLUS),
    }
    RUNS_CODE: ClassVar[bool] = True
    max_new_tokens: ClassVar[int] = 512

    def rows(self, split: str, num_rows: int | None, seed: int) -> list[Row]:
        """`meta` of a utility row: "start" (the code an answer may continue), "names" (what its tests need defined),
        "test" (source that raises unless they are right) and, of HumanEval, "plus" (likewise, see `packed`)."""
        check_split(self, split)
        found = {"user": self._user, "utility.validation": self._mbpp, "utility.test": self._humaneval}[split]()
        return choose(self, split, found, num_rows, seed)

    def scores(self, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, list[float | None]]:
        """Raises PrerequisiteError where programs cannot be isolated and the sweep does not consent to that."""
        found: list[Any] = [
            extracted(answer, str(row.meta["start"]), _names(row)) for row, answer in zip(rows, texts, strict=True)
        ]
        base = self._verdicts(found, [str(row.meta["test"]) for row in rows], TIMEOUT_S)
        late = [verdict == "timeout" for verdict in base]
        scores: dict[str, list[float | None]] = {"utility": [float(verdict == "passed") for verdict in base]}
        if all("plus" in row.meta for row in rows):
            passed = [code if verdict == "passed" else None for code, verdict in zip(found, base, strict=True)]
            plus = self._verdicts(passed, [unpacked(str(row.meta["plus"])) for row in rows], PLUS_TIMEOUT_S)
            scores["utility_plus"] = [float(verdict == "passed") for verdict in plus]
            late = [before or verdict == "timeout" for before, verdict in zip(late, plus, strict=True)]
        scores["code_timeouts"] = [float(value) for value in late]
        scores["no_code"] = [float(code is None) for code in found]
        return scores

    def _verdicts(self, codes: Sequence[str | None], tests: Sequence[str], timeout_s: int) -> list[str]:
        """A sandbox's verdict per program with its tests; "none" where there is no program."""
        given = [i for i, code in enumerate(codes) if code is not None]
        done = sandbox.run([f"{codes[i]}\n{tests[i]}" for i in given], timeout_s=timeout_s, unsafe=self.unsafe_code)
        verdicts = dict(zip(given, (outcome.verdict for outcome in done), strict=True))
        return [verdicts.get(i, "none") for i in range(len(codes))]

    def _user(self) -> list[Row]:
        found = []
        for index, record in enumerate(records(_USER, self.folder)):
            prompt, answer = _asked_and_answered(record)
            code = "\n".join(_FENCE.findall(answer)) or answer
            if prompt not in ("", "-") and any(not isinstance(s, ast.Expr) for s in _parsed(code) or ()):
                found.append(Row(f"user/{index}", prompt, answer))
        if not found:
            raise PrerequisiteError(
                f"data set {_USER.hub}: no record has both a question and a Python answer (it leaves questions out as '-' "
                f"where their licence asks for it); put such records into {_USER.file} of execution.data_dir"
            )
        return first_of_each(found)

    def _mbpp(self) -> list[Row]:
        found = []
        for record in records(_MBPP, self.folder):
            if record["task_id"] not in VALIDATION_IDS:
                continue
            tests = [str(test) for test in record["test_list"]]
            needed = {node.id for test in tests for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
            names: list[Json] = [*sorted(needed & set(_bound(_parsed(str(record["code"])) or ())))]
            test = "\n".join([str(record.get("test_setup_code") or ""), *tests])
            prompt = f"{text(record, 'text')} The code must pass this test:\n```python\n{tests[0]}\n```"
            meta: dict[str, Json] = {"start": "", "names": names, "test": test}
            found.append(Row(f"mbpp/{record['task_id']}", prompt, meta=meta))
        return found

    def _humaneval(self) -> list[Row]:
        problems = records(_HUMANEVAL, self.folder)
        plus = {record["task_id"]: str(record["test"]) for record in records(_PLUS, self.folder)}
        found = []
        for record in problems:
            start, name = str(record["prompt"]), str(record["entry_point"])
            if record["task_id"] not in plus:
                raise PrerequisiteError(f"{_PLUS.file}: holds no tests for {record['task_id']}; fetch it again")
            limited = _LIMITED.format(seconds=CALL_TIMEOUT_S, name=name)
            found.append(
                Row(
                    str(record["task_id"]),
                    "Please provide a self-contained Python script that solves the following problem in a markdown code "
                    f"block:\n```python\n{start.strip()}\n```",
                    meta={
                        "start": start,
                        "names": [name],
                        "test": f"{record['test']}\ncheck({name})\n",
                        "plus": packed(plus[record["task_id"]].replace(_SWAPPED, _RIGHT) + limited),
                    },
                )
            )
        return found


def packed(source: str) -> str:
    """Text as base64 of its zlib form: HumanEval+'s tests are 11 MB of mostly numbers, a tenth of that so."""
    return base64.b64encode(zlib.compress(source.encode())).decode()


def unpacked(form: str) -> str:
    """The text that `packed` was given."""
    return zlib.decompress(base64.b64decode(form)).decode()


def extracted(answer: str, start: str, names: Sequence[str]) -> str | None:
    """The program in a model's answer, or None if there is none that defines all of `names`.

    Looked for in each fenced block, in all of them together, then in the whole text: definitions (whatever stands
    before, between or after them), else the continuation of `start`, with its indentation as it is, lost on the first
    line, or lost throughout. Definitions get what `start` has before its last function, so that an answer need not
    repeat imports. Of other statements only those before the last needed definition stay: what follows are examples.
    """
    for end in ENDS:
        answer = answer.split(end, 1)[0]
    answer = answer.replace("\r\n", "\n")
    fenced: list[str] = _FENCE.findall(answer)
    places = [*fenced, "\n".join(fenced), answer] if len(fenced) > 1 else [*fenced, answer]
    given = (_parsed(start) or [])[:-1]
    for place in places:
        found = _definitions(place)
        if _defines(found, names):
            return _source([*given, *found], names)
    for place in places if start else ():
        continued = max((_continued(start, body, names) for body in _bodies(place)), key=lambda found: found[0])
        if continued[0]:
            return _source(continued[1], names)
    return None


def _definitions(place: str) -> list[ast.stmt]:
    """The statements of all stretches of a text that are Python, each from a line that can begin a statement to the last
    one with which it parses."""
    lines, found, i = place.split("\n"), list[ast.stmt](), 0
    while i < len(lines):
        begins = _BEGINS_CODE.match(lines[i])
        length = 0
        if begins is not None:
            stretch = [line.removeprefix(begins[1]) for line in lines[i:]]
            length, statements = _longest("", stretch)
            found += statements
        i += max(length, 1)
    return found


def _bodies(place: str) -> Iterator[str]:
    """A function's body as answers write it: as it is, after words, less the first line's indentation, less all. The
    right reading is the one with which most lines belong to the function."""
    yield place
    words = _WORDS.match(place)
    if words is not None:
        yield place[words.end() :]
    yield "    " + place.lstrip()
    yield textwrap.indent(textwrap.dedent(place).strip("\n"), "    ")


def _continued(start: str, body: str, names: Sequence[str]) -> tuple[int, list[ast.stmt]]:
    """(last line of the function, statements) of the prompt and its continuation; (0, []) if it adds nothing to it."""
    for stop in STOPS:
        body = body.split(stop, 1)[0]
    _, statements = _longest(start, body.split("\n"))
    if not _defines(statements, names):
        return 0, []
    bound = _bound(statements)
    return max(bound[name].end_lineno or 0 for name in names), statements


def _longest(start: str, lines: list[str]) -> tuple[int, list[ast.stmt]]:
    """(number of lines, statements) of the most lines that parse after `start`; (0, []) if not even one does."""
    for num in range(len(lines), 0, -1):
        if lines[num - 1].strip() and (found := _parsed(start + "\n".join(lines[:num]))) is not None:
            return num, found
    return 0, []


def _defines(statements: Sequence[ast.stmt], names: Sequence[str]) -> bool:
    """Whether all names are bound, none of them by a function that does nothing."""
    bound = _bound(statements)
    return all(name in bound and not _is_empty(bound[name]) for name in names)


def _bound(statements: Sequence[ast.stmt]) -> dict[str, ast.stmt]:
    """Name -> the last statement that defines or assigns it."""
    found: dict[str, ast.stmt] = {}
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            found |= {target.id: statement for target in statement.targets if isinstance(target, ast.Name)}
    return found


def _is_empty(statement: ast.stmt) -> bool:
    """A function that does nothing: strings, imports and further definitions only."""
    idle = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    return isinstance(statement, ast.FunctionDef) and all(
        isinstance(s, idle) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in statement.body
    )


def _source(statements: Sequence[ast.stmt], names: Sequence[str]) -> str | None:
    """The statements worth keeping as text; None if they are nested too deeply to be written out."""
    bound = _bound(statements)
    last = max(statements.index(bound[name]) for name in names)
    lasting = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    try:
        kept = [s for i, s in enumerate(statements) if isinstance(s, lasting) or (i <= last and _is_work(s))]
        kept.sort(key=lambda s: not (isinstance(s, ast.ImportFrom) and s.module == "__future__"))  # they must be first
        return "\n".join(ast.unparse(statement) for statement in kept)
    except RecursionError:
        return None


def _is_work(statement: ast.stmt) -> bool:
    """Not a word of prose that happens to parse, an example's assertion, or what only a script would do."""
    if isinstance(statement, ast.If):
        return "__name__" not in ast.unparse(statement.test)
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    return not isinstance(statement, ast.Assert | ast.AnnAssign) or getattr(statement, "value", None) is not None


def _parsed(source: str) -> list[ast.stmt] | None:
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
        return None


def _asked_and_answered(record: Record) -> tuple[str, str]:
    if "messages" in record:
        said = {message["role"]: str(message["content"]).strip() for message in reversed(record["messages"])}
        return said.get("user", ""), _THOUGHT.sub("", said.get("assistant", ""))
    given = str(record.get("input") or "").strip()
    asked = text(record, "instruction")
    return f"{asked}\n{given}" if given else asked, text(record, "output")


def _names(row: Row) -> list[str]:
    names: Any = row.meta["names"]
    return [str(name) for name in names]
