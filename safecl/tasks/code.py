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
import builtins
import re
import symtable
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from safecl import sandbox
from safecl.base import ConfigError, Json, PrerequisiteError
from safecl.metrics import Metric
from safecl.tasks import Row, Source, Task
from safecl.tasks._files import Blank, Record
from safecl.tasks._overlap import drop_overlaps
from safecl.tasks._source import check_split, choose, first_of_each, made, records
from safecl.text import without_reasoning

TIMEOUT_S = 3  # HumanEval's limit. This and the next two limits are seconds of CPU time
PLUS_TIMEOUT_S = 60  # evalplus's limit for all of a problem's tests together
CALL_TIMEOUT_S = 4  # limit for one of HumanEval+'s tests (the slowest canonical solution needs about .3 s)
VALIDATION_IDS = range(511, 975)  # MBPP: 511-600 validation, 601-974 train
MAX_PARSES = 400  # of one place in an answer with ast.parse; more than brackets (200) or blocks (100) can nest
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "</s>")  # an answer's text ends before these
# A completion of the prompt ends before these, because they leave the function. It is evalplus's list, without the entries
# that begin with another entry.
STOPS = ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ", "\nif __name__", "\nprint(")

_USER = Source("codealpaca.jsonl", "nvidia/Nemotron-Post-Training-Dataset-v1", split="code[:1%]")  # of 1.9 million
_MBPP = Source("mbpp.jsonl", "google-research-datasets/mbpp", config="full", split="train+validation")
_HUMANEVAL = Source("humaneval.jsonl", "openai/openai_humaneval", split="test")
_PLUS = Source("humaneval_plus_originfmt.jsonl.gz", "evalplus/humanevalplus", split="test")
_IMPORTS = (ast.Import, ast.ImportFrom)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)  # the last two: nested too deeply
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_WORDS = re.compile(r"(?:(?!def |class )\S[^\n]*\n|[ \t]*\n)+(?=[ \t]+\S)")  # lines before the first indented one
_BEGINS_CODE = re.compile(
    r"([ \t]*)(?:(?:from|import|def|class|async|for|if|try|with)\b|@\w|[A-Za-z_][\w.]*\s*[=(:\[])"
)
# In this format, HumanEval+'s tests of problem 32 call their oracle with root and polynomial swapped, so that no answer can
# pass. evalplus itself requires |polynomial(root)| <= 1e-4.
_SWAPPED, _RIGHT = "_poly(*candidate(*inp), inp) <= 0.0001", "abs(_poly(*inp, candidate(*inp))) <= 0.0001"
# HumanEval+'s comparison of floats accepts any number in place of an empty list, and a list of one number in place of the
# number, because numpy broadcasts shapes. Later versions of evalplus require the expected type and length, as is done here.
_CLOSE = "assert np.allclose(out, exp,"
_ALIKE = f"assert type(out) is type(exp) and np.shape(out) == np.shape(exp)\n        {_CLOSE}"


class Part(NamedTuple):
    """A statement at the top level of a program, with its text. `cut`: lines follow that look like more of the statement."""

    node: ast.stmt
    text: str
    cut: bool = False


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


def extracted(answer: str, start: str, names: Sequence[str]) -> str | None:
    """The program in a model's answer. None if the answer has no program that defines all of `names`.

    Text inside reasoning is ignored. These places are tried in order, and the first that defines all names is used: each
    fenced block and each text between two blocks, the last one first; then all blocks together; then the whole text. A
    function that is cut off or returns nothing is used only if there is no complete one. Helpers, imports and constants that
    the place needs from elsewhere in the answer are added.

    If no place defines the names, the answer is read as a continuation of `start`: with its indentation unchanged, with the
    first line's indentation lost, or with all indentation lost. The program also gets what `start` has before its last
    function, so an answer need not repeat imports. Statements after the last needed definition are taken as examples. Of
    these, only definitions, imports, and assignments to names that the needed definitions read are kept. Never raises.
    """
    for end in ENDS:
        answer = answer.split(end, 1)[0]
    answer = re.sub("\r\n?", "\n", without_reasoning(answer))  # Python takes all three for the end of a line
    pieces: list[str] = _FENCE.split(answer)
    fenced = pieces[1::2]
    places = [[_definitions(piece) for piece in pieces]]
    places += [[_definitions(place)] for place in ["\n".join(fenced), answer][len(fenced) < 2 :] if fenced]
    given = _parsed(start)[:-1]
    for least in (COMPLETE, BEGUN):
        for place in places:
            for i in reversed(range(len(place))):
                if _defines(place[i], names, least):
                    return _source([given, *place], i + 1, names)
    bodies = [*reversed(fenced), "\n".join(fenced), answer] if len(fenced) > 1 else [*fenced, answer]
    for least in (COMPLETE, BEGUN):
        for block in bodies if start else ():
            continued = max((_continued(start, body, names, least) for body in _bodies(block)), key=lambda it: it[0])
            if continued[0]:
                return _source([continued[1]], 0, names)
    return None


def _definitions(place: str) -> list[Part]:
    """The statements of all stretches of Python in a text. A stretch starts at a line that can begin a statement and is as
    long as possible while it parses."""
    lines, found, i = place.split("\n"), list[Part](), 0
    tries = iter(range(MAX_PARSES))
    while i < len(lines):
        begins = _BEGINS_CODE.match(lines[i])
        length = 0
        if begins is not None:
            stretch = [line.removeprefix(begins[1]) for line in lines[i:]]
            length, parts = _longest("", stretch, tries)
            after = next((line for line in stretch[length:] if line.strip()), "")
            if parts and after[:1] in (" ", "\t"):
                parts[-1] = parts[-1]._replace(cut=True)
            found += parts
        i += max(length, 1)
    return found


def _bodies(place: str) -> Iterator[str]:
    """Possible readings of an answer as a function's body: unchanged, without leading prose, with the first line indented
    again, with all lines indented again. The right one is the one with which most lines belong to the function."""
    yield place
    words = _WORDS.match(place)
    if words is not None:
        yield place[words.end() :]
    yield "    " + place.lstrip()
    yield textwrap.indent(textwrap.dedent(place).strip("\n"), "    ")


def _continued(start: str, body: str, names: Sequence[str], least: int) -> tuple[int, list[Part]]:
    """(last line of the function, statements) of the prompt and its continuation. (0, []) if `names` are not defined."""
    for stop in STOPS:
        body = body.split(stop, 1)[0]
    _, parts = _longest(start, body.split("\n"), iter(range(MAX_PARSES)))
    if not _defines(parts, names, least):
        return 0, []
    bound = _bound(parts)
    return max(bound[name].node.end_lineno or 0 for name in names), parts


def _longest(start: str, lines: list[str], tries: Iterator[int]) -> tuple[int, list[Part]]:
    """(number of lines, statements) of the most lines that parse after `start`. (0, []) if not even one line parses. At most
    MAX_PARSES calls of ast.parse are made (`tries`), so that endless repetition cannot make extraction slow."""
    num, before = len(lines), start.count("\n")
    for _ in tries:
        while num > 0 and not lines[num - 1].strip():
            num -= 1
        if num <= 0:
            break
        try:
            return num, _parts(start + "\n".join(lines[:num]))
        except _NOT_PYTHON as error:  # nothing that reaches the line of the error parses
            num = min(num, (getattr(error, "lineno", None) or before + num) - before) - 1
    return 0, []


STUB, BEGUN, COMPLETE = range(3)  # how much of a definition there is


def _defines(parts: Sequence[Part], names: Sequence[str], least: int) -> bool:
    bound = _bound(parts)
    return all(name in bound and _extent(bound[name]) >= least for name in names)


def _bound(parts: Sequence[Part]) -> dict[str, Part]:
    """Name -> the statement that defines or assigns it. Of several, the most complete (`_extent`), and of those the last."""
    found: dict[str, Part] = {}
    for part in parts:
        names = list[str]()
        if isinstance(part.node, (*_FUNCTIONS, ast.ClassDef)):
            names = [part.node.name]
        elif isinstance(part.node, ast.Assign):
            names = [target.id for target in part.node.targets if isinstance(target, ast.Name)]
        found |= {name: part for name in names if name not in found or _extent(part) >= _extent(found[name])}
    return found


def _extent(part: Part) -> int:
    """How complete a definition is.

    STUB: it does nothing. It holds only strings, imports, inner definitions and placeholders for code to be written. BEGUN: a
    function that was cut off or returns nothing. COMPLETE: anything else. The assignment of a result is a STUB, because it
    defines nothing.
    """
    if isinstance(part.node, ast.Assign):
        value, targets = part.node.value, _written(part.node)
        if isinstance(value, ast.Call | ast.Name | ast.Attribute):
            return STUB if getattr(getattr(value, "func", None), "id", None) in targets else BEGUN
        return COMPLETE if isinstance(value, ast.Lambda) else STUB
    if not isinstance(part.node, _FUNCTIONS):
        return COMPLETE
    if all(_is_idle(statement) for statement in part.node.body):
        return STUB
    return BEGUN if part.cut or not _gives(part.node.body) else COMPLETE


def _is_idle(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise | ast.Return):
        value = statement.exc if isinstance(statement, ast.Raise) else statement.value
        return getattr(getattr(value, "func", value), "id", None) in ("NotImplementedError", "NotImplemented")
    idle = (ast.Pass, ast.ClassDef, *_FUNCTIONS, *_IMPORTS)
    return isinstance(statement, idle) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _gives(body: Sequence[ast.AST]) -> bool:
    """Whether a function's statements return or yield something. Functions inside it do not count."""
    stack: list[ast.AST] = [*body]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom) or (isinstance(node, ast.Return) and node.value is not None):
            return True
        if not isinstance(node, (*_FUNCTIONS, ast.Lambda, ast.ClassDef)):
            stack += ast.iter_child_nodes(node)
    return False


def _source(places: Sequence[Sequence[Part]], chosen: int, names: Sequence[str]) -> str:
    """The source of the statements to keep, as they were written (some statements parse but cannot be unparsed). Kept are all
    statements of the prompt (the first place) and of the chosen place that are not examples, and the statements of other
    places that those need."""
    parts = [(part, index in (0, chosen)) for index, place in enumerate(places) for part in place]
    flat = [part for part, _ in parts]
    order = {id(part): i for i, part in enumerate(flat)}
    bound, read = _bound(flat), _read(flat, names) | {"*"}
    last = max(order[id(part)] for name, part in _bound(places[chosen]).items() if name in names)
    kept = []
    for i, (part, own) in enumerate(parts):
        name = part.node.name if isinstance(part.node, _FUNCTIONS) else ""
        better = bound.get(name, part)
        if better is not part and (not own or (name in names and order[id(better)] < i)):
            continue  # another definition replaces it
        if isinstance(part.node, ast.Assign) and _extent(part) == STUB and not _written(part.node).isdisjoint(names):
            continue  # an example's result, under the function's own name
        needed = not read.isdisjoint(_written(part.node))
        if _is_work(part.node) and (needed or (own and (i <= last or _lasts(part.node)))):
            kept.append(part)
    # __future__ must be first
    kept.sort(key=lambda part: not (isinstance(part.node, ast.ImportFrom) and part.node.module == "__future__"))
    return "\n".join(part.text for part in kept)


def _lasts(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _is_work(statement: ast.stmt) -> bool:
    """Whether a statement is part of a program: not prose that happens to parse, an example's assertion, or a script's main
    block."""
    if isinstance(statement, ast.If):
        return all(getattr(node, "id", None) != "__name__" for node in ast.walk(statement.test))
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    return not isinstance(statement, ast.Assert | ast.AnnAssign) or getattr(statement, "value", None) is not None


def _read(parts: Sequence[Part], names: Sequence[str]) -> set[str]:
    """`names`, and all module-level names that their definitions read, directly or through other definitions."""
    found, new = set[str](), set(names)
    while new:
        found |= new
        new = {name for part in parts if _written(part.node) & new for name in _globals(part.text)} - found
    return found


def _written(statement: ast.stmt) -> set[str]:
    """The names that a statement defines, imports or assigns (also in part, as in `a[0] = 1`). A call counts as none."""
    if isinstance(statement, _IMPORTS):
        return {alias.asname or alias.name.split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    found = set[str]()
    for node in () if isinstance(statement, ast.Expr) else ast.walk(statement):
        if isinstance(getattr(node, "ctx", None), ast.Store):
            while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
                node = node.value
            if isinstance(node, ast.Name):
                found.add(node.id)
    return found


def _globals(source: str) -> set[str]:
    """The module-level names that a program reads in any of its scopes. Empty if it is not valid Python."""
    try:
        tables = [symtable.symtable(source, "<answer>", "exec")]
    except _NOT_PYTHON:
        return set()
    found = set[str]()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        symbols = [symbol for symbol in table.get_symbols() if symbol.is_global()]
        found |= {symbol.get_name() for symbol in symbols if symbol.is_referenced() or symbol.is_declared_global()}
    return found


def tested_names(test: str) -> list[str]:
    """The names that an answer must define: those that the tests read and do not define. Builtins are left out."""
    top = symtable.symtable(test, "<tests>", "exec")
    own = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    return sorted(_globals(test) - own - set(dir(builtins)))


def _parsed(source: str) -> list[Part]:
    """As `_parts`, but empty if it is not Python."""
    try:
        return _parts(source)
    except _NOT_PYTHON:
        return []


def _parts(source: str) -> list[Part]:
    """The statements of a program (lines ending in \\n). Raises one of _NOT_PYTHON."""
    lines = source.encode().split(b"\n")  # columns count bytes
    found, end = list[Part](), 0
    for node in ast.parse(source).body:
        # A decorator stands before what it decorates, on lines of its own.
        first, column = (end, 0) if getattr(node, "decorator_list", None) else (node.lineno - 1, node.col_offset)
        end = node.end_lineno or 0
        cut = lines[first:end]
        cut[-1] = cut[-1][: node.end_col_offset]
        cut[0] = cut[0][column:]
        found.append(Part(node, b"\n".join(cut).decode()))
    return found


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
    code = "\n".join(_FENCE.findall(answer)) or answer
    is_python = any(not isinstance(part.node, ast.Expr) for part in _parsed(code))
    return Row(f"user/{index}", prompt, answer) if is_python and prompt != "-" else None


def _mbpp_row(_: int, record: Record) -> Row | None:
    if not _is_validation(record):
        return None
    tests = record.texts("test_list")
    if not tests:
        raise record.problem("test_list", "at least one test")
    trees = [_tree(record, "test_list", test) for test in tests]
    needed = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    reference = _parsed(record.raw("code").replace("\r\n", "\n"))
    imports = [part.text for part in reference if isinstance(part.node, _IMPORTS) and _written(part.node) & needed]
    names: list[Json] = [*sorted(needed & set(_bound(reference)))]
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
    except _NOT_PYTHON:
        raise record.problem(name, "Python that parses") from None


def _program(row: Row, code: str, tests: str) -> sandbox.Program:
    """An answer's program with its tests. The tests also get what the prompt defines before the requested function (an
    oracle, imports). They use the answer only by calling it."""
    setup = str(row.meta.get("setup", ""))
    given = [part.text for part in _parsed(str(row.meta["start"]))[:-1]]
    made = {
        node.id for node in ast.walk(ast.parse(setup)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return sandbox.Program(f"{code}\n{setup}", "\n".join([*given, tests]), [*_names(row), *sorted(made)])


def _names(row: Row) -> list[str]:
    names: Any = row.meta["names"]
    return [str(name) for name in names]
