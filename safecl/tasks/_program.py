"""Reading a Python program out of a model's answer.

Answers hold programs in many forms: in fences or without, whole functions or continuations of the prompt, among prose,
examples and second attempts. `extracted` finds the program to run. Nothing here runs it.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from safecl.text import without_reasoning

MAX_PARSES = 400  # of one place in an answer with ast.parse; more than brackets (200) or blocks (100) can nest
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "</s>")  # an answer's text ends before these
# A completion of the prompt ends before these, because they leave the function. It is evalplus's list, without the entries
# that begin with another entry.
STOPS = ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ", "\nif __name__", "\nprint(")
IMPORTS = (ast.Import, ast.ImportFrom)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)  # the last two: nested too deeply
FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_WORDS = re.compile(r"(?:(?!def |class )\S[^\n]*\n|[ \t]*\n)+(?=[ \t]+\S)")  # lines before the first indented one
_BEGINS_CODE = re.compile(
    r"([ \t]*)(?:(?:from|import|def|class|async|for|if|try|with)\b|@\w|[A-Za-z_][\w.]*\s*[=(:\[])"
)


class Part(NamedTuple):
    """A statement at the top level of a program, with its text. `cut`: lines follow that look like more of the statement."""

    node: ast.stmt
    text: str
    cut: bool = False


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
    pieces: list[str] = FENCE.split(answer)
    fenced = pieces[1::2]
    places = [[_definitions(piece) for piece in pieces]]
    places += [[_definitions(place)] for place in ["\n".join(fenced), answer][len(fenced) < 2 :] if fenced]
    given = parsed(start)[:-1]
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
    bound = bindings(parts)
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
        except NOT_PYTHON as error:  # nothing that reaches the line of the error parses
            num = min(num, (getattr(error, "lineno", None) or before + num) - before) - 1
    return 0, []


STUB, BEGUN, COMPLETE = range(3)  # how much of a definition there is


def _defines(parts: Sequence[Part], names: Sequence[str], least: int) -> bool:
    bound = bindings(parts)
    return all(name in bound and _extent(bound[name]) >= least for name in names)


def bindings(parts: Sequence[Part]) -> dict[str, Part]:
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
        value, targets = part.node.value, written(part.node)
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
    idle = (ast.Pass, ast.ClassDef, *_FUNCTIONS, *IMPORTS)
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
    bound, read = bindings(flat), _read(flat, names) | {"*"}
    last = max(order[id(part)] for name, part in bindings(places[chosen]).items() if name in names)
    kept = []
    for i, (part, own) in enumerate(parts):
        name = part.node.name if isinstance(part.node, _FUNCTIONS) else ""
        better = bound.get(name, part)
        if better is not part and (not own or (name in names and order[id(better)] < i)):
            continue  # another definition replaces it
        if isinstance(part.node, ast.Assign) and _extent(part) == STUB and not written(part.node).isdisjoint(names):
            continue  # an example's result, under the function's own name
        needed = not read.isdisjoint(written(part.node))
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
        new = {name for part in parts if written(part.node) & new for name in _globals(part.text)} - found
    return found


def written(statement: ast.stmt) -> set[str]:
    """The names that a statement defines, imports or assigns (also in part, as in `a[0] = 1`). A call counts as none."""
    if isinstance(statement, IMPORTS):
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
    except NOT_PYTHON:
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


def parsed(source: str) -> list[Part]:
    """As `_parts`, but empty if it is not Python."""
    try:
        return _parts(source)
    except NOT_PYTHON:
        return []


def _parts(source: str) -> list[Part]:
    """The statements of a program (lines ending in \\n). Raises one of NOT_PYTHON."""
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
