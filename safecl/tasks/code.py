"""Python programs (the paper's Code task): learned from NemotronCode, measured by running HumanEval and HumanEval+.

User rows are problems with Python answers. The paper's source is the `code` split of NVIDIA's Nemotron post-training
data; a data folder may hold either that or CodeAlpaca, a small stand-in, as codealpaca.jsonl in its published fields.
Rows whose answer holds no Python that parses are left out: CodeAlpaca has other languages and lost indentation; so are
those much like a problem of validation or test, as these word it. Validation is MBPP (its validation and train problems,
one of its tests shown), never HumanEval.

Scoring runs each answer in one sandbox and its tests in another: `utility` is pass@1 on HumanEval's tests (3 s, as in its
own harness), `utility_plus` on those and HumanEval+'s (evalplus), `code_timeouts` the share that ended by the clock in
either, `no_code` the share of answers that held no program to run. Source: evaluation.md 3.5.
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

TIMEOUT_S = 3  # HumanEval's; of CPU time here, as all three
PLUS_TIMEOUT_S = 60  # evalplus's cap for all of a problem's tests together
CALL_TIMEOUT_S = 4  # for one of HumanEval+'s tests (the slowest canonical solution needs about .3 s)
VALIDATION_IDS = range(511, 975)  # MBPP: 511-600 validation, 601-974 train
MAX_PARSES = 400  # of one place in an answer; more than open brackets (200) or blocks (100) can be nested
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "</s>")  # an answer's text ends before these
# Where a completion of the prompt leaves the function it completes: evalplus's list, less what these begin with.
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
# HumanEval+'s tests of problem 32 in this format call their oracle with root and polynomial swapped, so that no answer
# can pass; evalplus itself asks for |polynomial(root)| <= 1e-4.
_SWAPPED, _RIGHT = "_poly(*candidate(*inp), inp) <= 0.0001", "abs(_poly(*inp, candidate(*inp))) <= 0.0001"
# Its comparison of floats takes any number for an empty list, and any list of one for a number: numpy's shapes broadcast.
# Later versions of evalplus ask for the type and length of what is expected, as here.
_CLOSE = "assert np.allclose(out, exp,"
_ALIKE = f"assert type(out) is type(exp) and np.shape(out) == np.shape(exp)\n        {_CLOSE}"


class Part(NamedTuple):
    """A statement at the top level of a program, with its text; `cut` if lines follow that look like more of it."""

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
        """`meta` of a utility row: "start" (the code an answer may continue), "names" (what its tests need defined),
        "test" (source that raises unless they are right), of HumanEval "plus" (likewise, see `packed`), of MBPP "setup"
        (source that makes of the answer's classes what its tests call the answer with)."""
        check_split(self, split)
        found = {
            "user": self._user,
            "utility.validation": lambda: made(self, _MBPP, _mbpp_row),
            "utility.test": self._humaneval,
        }[split]()
        return choose(self, split, found, num_rows, seed)

    def scores(self, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, list[float | None]]:
        """Raises PrerequisiteError where programs cannot be isolated and the sweep does not consent to that."""
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
        """A sandbox's verdict per program with its tests; "none" where there is no program."""
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
    """Text as base64 of its zlib form: HumanEval+'s tests are 11 MB of mostly numbers, a tenth of that so."""
    return base64.b64encode(zlib.compress(source.encode())).decode()


def unpacked(form: str) -> str:
    """The text that `packed` was given."""
    return zlib.decompress(base64.b64decode(form)).decode()


def extracted(answer: str, start: str, names: Sequence[str]) -> str | None:
    """The program in a model's answer, or None if there is none that defines all of `names`.

    What stands in reasoning is none. The last place that defines them wins: a fenced block or the text between two; then
    all blocks together, then the whole text. A function that was cut off or gives nothing back counts only where no
    other is. What the place takes from elsewhere in the answer (a helper, an import, a constant) is taken along. Where
    nothing defines them, the answer is a continuation of `start`, with its indentation as it is, lost on the first line,
    or lost throughout. Definitions get what `start` has before its last function, so that an answer need not repeat
    imports. What follows the last needed definition are examples: of it only further definitions and imports stay, and
    what sets a name that needed ones read. Never raises, whatever the text.
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
    """The statements of all stretches of a text that are Python, each from a line that can begin a statement to the last
    one with which it parses."""
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
    """A function's body as answers write it: as it is, after words, less the first line's indentation, less all. The
    right reading is the one with which most lines belong to the function."""
    yield place
    words = _WORDS.match(place)
    if words is not None:
        yield place[words.end() :]
    yield "    " + place.lstrip()
    yield textwrap.indent(textwrap.dedent(place).strip("\n"), "    ")


def _continued(start: str, body: str, names: Sequence[str], least: int) -> tuple[int, list[Part]]:
    """(last line of the function, statements) of the prompt and its continuation; (0, []) if it adds nothing to it."""
    for stop in STOPS:
        body = body.split(stop, 1)[0]
    _, parts = _longest(start, body.split("\n"), iter(range(MAX_PARSES)))
    if not _defines(parts, names, least):
        return 0, []
    bound = _bound(parts)
    return max(bound[name].node.end_lineno or 0 for name in names), parts


def _longest(start: str, lines: list[str], tries: Iterator[int]) -> tuple[int, list[Part]]:
    """(number of lines, statements) of the most lines that parse after `start`; (0, []) if not even one does. Each call
    of ast.parse takes one of `tries`, so that endless repetition cannot make extraction slow."""
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
    """Name -> the statement that defines or assigns it: the last of those with most of a definition."""
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
    """A stub does nothing: it has strings, imports, further definitions and what stands for code to be written only. A
    function is but begun where it was cut off, or gives nothing back. To assign a result is to define nothing."""
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
    """Whether a function's statements return or yield something, those of functions inside it aside."""
    stack: list[ast.AST] = [*body]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom) or (isinstance(node, ast.Return) and node.value is not None):
            return True
        if not isinstance(node, (*_FUNCTIONS, ast.Lambda, ast.ClassDef)):
            stack += ast.iter_child_nodes(node)
    return False


def _source(places: Sequence[Sequence[Part]], chosen: int, names: Sequence[str]) -> str:
    """The statements worth keeping, as they were written: not every one that parses can be unparsed. Of the chosen place
    and the prompt (the first) whatever is no example, of others what these read."""
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
            continue  # another takes its place
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
    """Not a word of prose that happens to parse, an example's assertion, or what only a script would do."""
    if isinstance(statement, ast.If):
        return all(getattr(node, "id", None) != "__name__" for node in ast.walk(statement.test))
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    return not isinstance(statement, ast.Assert | ast.AnnAssign) or getattr(statement, "value", None) is not None


def _read(parts: Sequence[Part], names: Sequence[str]) -> set[str]:
    """`names`, and the names of the module that what sets them reads, itself or through what sets those."""
    found, new = set[str](), set(names)
    while new:
        found |= new
        new = {name for part in parts if _written(part.node) & new for name in _globals(part.text)} - found
    return found


def _written(statement: ast.stmt) -> set[str]:
    """The names that a statement defines, imports, assigns, or assigns to a part of. A call tells nothing: it writes none."""
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
    """The names of its module that a program reads in any of its scopes; none where Python refuses it."""
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
    """What tests need an answer to define: names that they read and do not define themselves."""
    top = symtable.symtable(test, "<tests>", "exec")
    own = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    return sorted(_globals(test) - own - set(dir(builtins)))


def _parsed(source: str) -> list[Part]:
    """As `_parts`; none if it is not Python."""
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
    """What a HumanEval problem asks for: the last text in its prompt (of one, no first statement), up to its examples."""
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
    """None for a question that its licence keeps back ("-"), and for an answer without Python."""
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
    """An answer's program and what tests it. The tests have what the prompt defines before the function that it asks for
    (an oracle, imports), of the answer only calls."""
    setup = str(row.meta.get("setup", ""))
    given = [part.text for part in _parsed(str(row.meta["start"]))[:-1]]
    made = {
        node.id for node in ast.walk(ast.parse(setup)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return sandbox.Program(f"{code}\n{setup}", "\n".join([*given, tests]), [*_names(row), *sorted(made)])


def _names(row: Row) -> list[str]:
    names: Any = row.meta["names"]
    return [str(name) for name in names]
