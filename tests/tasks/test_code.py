"""The code task: a program found in an answer, in every form that answers have, and the scores of running it. The real
data are found through SAFECL_DATA; tests that need them are skipped without it, the others are not."""

from __future__ import annotations

import ast
import dataclasses
import gzip
import json
import os
import random
import re
import resource
from pathlib import Path
from typing import Any

import pytest

from safecl import sandbox
from safecl.base import ConfigError, PrerequisiteError
from safecl.tasks import Row, load
from safecl.tasks._overlap import normalise
from safecl.tasks.code import MAX_PARSES, Code, _longest, _parts, extracted, packed, unpacked
from tests.tasks.test_roles import twins

DATA = os.environ.get("SAFECL_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="SAFECL_DATA names no folder of data files")

START = '''from typing import List


def helper(x: int) -> int:
    """ Twice. """
    return 2 * x


def total(xs: List[int]) -> int:
    """ Sum of the doubles.
    >>> total([1, 2])
    6
    """
'''
BODY = "    out = 0\n    for x in xs:\n        out += helper(x)\n    return out\n"
STUB = "def total(xs):\n"
WRONG = f"{STUB}    return 0\n"
WHOLE = f"def total(xs: List[int]) -> int:\n{BODY}"
INDENTED = "\n".join(f"    {line}" if line else line for line in WHOLE.split("\n"))
ANSWERS = {
    "the body": BODY,
    "the body in a fence": f"```python\n{BODY}```",
    "the body after words": f"Here is the body of the function:\n{BODY}",
    "the body less its first indentation": BODY.lstrip(),
    "the body less all indentation": BODY.replace("\n    ", "\n").lstrip(),
    "the body, then words": f"{BODY}\nThis adds up what the helper gives.",
    "the body, then one word": f"{BODY}\nDone",
    "the body, then another function": f"{BODY}\n\ndef main():\n    print(total([1]))\n\nmain()",
    "the body, then a script": f"{BODY}\nif __name__ == '__main__':\n    import sys\n    sys.exit(total([1]))",
    "the whole function": WHOLE,
    "the whole prompt again": f"{START}{BODY}",
    "the function in a fence": f"Sure!\n\n```python\n{WHOLE}```\n\nIt loops once.",
    "a fence without a language": f"```\n{WHOLE}```",
    "a fence with another spelling": f"```Python3\n{WHOLE}```",
    "a fence that stays open": f"```python\n{WHOLE}",
    "a fence closed on the last line": f"```python\n{WHOLE.rstrip()}```",
    "carriage returns": f"```python\n{WHOLE}```".replace("\n", "\r\n"),
    "an indented function in a list": f"1. First:\n\n{INDENTED}\n\n2. Then rest.",
    "an indented fence": f"1. First:\n    ```python\n{INDENTED}    ```",
    "words around the bare function": f"To solve this, loop.\n\n{WHOLE}\nThe complexity is O(n).",
    "words between import and function": f"First import:\nfrom typing import List\nThen write:\n{WHOLE}",
    "examples after it": f"{WHOLE}\nprint(total([1, 2]))\nassert total([1]) == 5\nx = int(input())",
    "a script's end": f"{WHOLE}\nif __name__ == '__main__':\n    raise SystemExit(total([1]))",
    "the prompt echoed first": f"```python\n{START}```\n\nThe answer:\n\n```python\n{WHOLE}```",
    "a usage block first": f"```python\nprint(total([1, 2]))\n```\n\n```python\n{WHOLE}```",
    "a wrong one, then a corrected one": f"```python\n{WRONG}```\nNo, wait:\n```python\n{WHOLE}```",
    "a wrong one, then a corrected one in no block": f"```python\n{WRONG}```\nNo, wait:\n\n{WHOLE}\nThat is it.",
    "a wrong one, then a corrected one in the same block": f"```python\n{WRONG}\n\n{WHOLE}```",
    "a wrong one, then a corrected one without blocks": f"{WRONG}\nNo, wait:\n{WHOLE}",
    "a wrong signature, then a corrected one": f"```python\ndef total(xs, by=TWO):\n    return 0\n```\n```python\n{WHOLE}```",
    "a wrong body, then a corrected one": f"```python\n    return 0\n```\nNo, wait:\n```python\n{BODY}```",
    "a body, then a call": f"```python\n{BODY}```\nUse it so:\n```python\ntotal([1, 2])\n```",
    "a stub first": f"```python\n{STUB}    pass\n```\nFilled in:\n```python\n{WHOLE}```",
    "a stub of dots last": f"```python\n{WHOLE}```\nIts form is\n```python\n{STUB}    ...\n```",
    "a stub that raises last": f"```python\n{WHOLE}```\n```python\n{STUB}    raise NotImplementedError('todo')\n```",
    "a stub in the same block": f"```python\n{WHOLE}\n{STUB}    pass\n```",
    "a stub without blocks": f"{WHOLE}\n{STUB}    '''Adds.'''\n    raise NotImplementedError\n",
    "one that was cut off last": f"```python\n{WHOLE}```\nor\n```python\n{STUB}    if not xs:\n        return 0\n    for x in",
    "one that was cut off at a line's end last": f"```python\n{WHOLE}```\nor\n```python\n{STUB}    out = 0\n",
    "one that gives nothing back last": f"```python\n{WHOLE}```\n```python\n{STUB}    print(sum(xs))\n```",
    "a draft in its reasoning": f"<think>\n```python\n{WRONG}```\nor\n{WRONG}</think>\n```python\n{WHOLE}```",
    "a draft in reasoning that the template opened": f"```python\n{WRONG}```\n</think>\n\n{BODY}",
    "a later thought": f"```python\n{WHOLE}```\n<think>\n```python\n{WRONG}```\n</think>",
    "a corrected one that uses what the first block has": (
        f"```python\nimport functools\nimport absent\nTWO = 2\ndef again(x): return TWO * x\n{WRONG}\nprint(absent.x)\n```\n"
        f"```python\n{WHOLE.replace('helper', 'functools.partial(again)')}```"
    ),
    "a corrected helper in a later block": (
        f"```python\ndef again(x): return x\n{WHOLE.replace('helper', 'again')}```\n"
        "No:\n```python\ndef again(x): return 2 * x\n```"
    ),
    "a result under its name in a later block": f"```python\n{WHOLE}```\n```python\ntotal = total([1, 2])\nprint(total)\n```",
    "a result under its name in the same block": f"```python\n{WHOLE}\ntotal = total([1, 2])\n```",
    "a result under its name in words": f"```python\n{WHOLE}```\nThis gives\ntotal = 6\n",
    "itself wrapped": f"import functools\n{WHOLE}\ntotal = functools.partial(total)",
    "a docstring with a fence": f"```python\n{STUB}    '''\n    ```\n    total([1])\n    ```\n    '''\n{BODY}```",
    "tests in a later block": f"```python\n{WHOLE}```\n```python\nimport pytest\ndef test_it():\n    assert total([1]) == 3\n```",
    "a shell block first": f"```bash\npip install numpy\n```\n```python\n{WHOLE}```",
    "pieces in two blocks": (
        "```python\ndef step(x):\n    return helper(x)\n```\nand\n```python\nclass Total:\n    pass\n```\n"
        f"```python\n{WHOLE}```"
    ),
    "its own helper after it": WHOLE.replace("helper", "again") + "\ndef again(x):\n    return x + x\n",
    "a constant before it": f"TWO = 2\n\n{WHOLE.replace('helper(x)', 'TWO * x')}",
    "a table after it": WHOLE.replace("helper(x)", "TWICE[x]")
    + "\nTWICE: dict = {1: 2}\nONE = 1\nTWICE[ONE + 1] = 4\n",
    "a table set in a loop after it": (
        WHOLE.replace("helper(x)", "TWICE[x]") + "\nTWICE = [0] * 3\nfor x in range(3):\n    TWICE[x] = 2 * x\n"
    ),
    "what its own helper reads after it": (
        WHOLE.replace("helper", "again") + "\ndef again(x):\n    global TWO\n    return TWO * x\n\nTWO = 2\n"
    ),
    "what only a script reads after it": f"{WHOLE}\ndef main():\n    print(total([n]))\n\nn = x = int(input())\nmain()",
    "several statements in a line": f"u = 'ü'; TWO = 2\n{WHOLE.replace('helper(x)', 'TWO * x')}\nimport re; xs = input()",
    "decorators": f"import functools\n# twice\n@functools.wraps(\n    len)\n@functools.cache\ndef again(x): return x\n\n{WHOLE}",
    "a setting before it": f"import sys\nsys.setrecursionlimit(5000)\n{WHOLE}",
    "a lambda": "total = lambda xs: sum(helper(x) for x in xs)",
    "a future import": f"from __future__ import annotations\n{WHOLE}",
    "an end token and chatter": f"{WHOLE}<|im_end|>\n<|im_start|>user\nThanks",
    "tabs": WHOLE.replace("    ", "\t"),
    "another docstring": WHOLE.replace("    out = 0", '    """Mine.\n\nNot indented.\n    """\n    out = 0'),
    "a nested function": "def total(xs):\n    def inner(x):\n        return helper(x)\n\n    return sum(map(inner, xs))\n",
}
NOTHING = [
    "", "I'm sorry, but I can't help with that.", "```python\n```", START, "function f() {}", "def total(xs:",
    "```python\ndef other(xs):\n    return 6\n```", f"```python\n{STUB}    pass\n```", f"{STUB}    ...\n",
    f"{STUB}    raise NotImplementedError()\n", f"<think>\n```python\n{WHOLE}```\n</think>\nI cannot say.",
    f"<think>\nSo:\n```python\n{WHOLE}```\nor",
]  # fmt: skip


def total_of(code: str) -> Any:
    """What the function in a program of this file (not of a model) gives for [1, 2]: 2 * 1 + 2 * 2."""
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope["total"]([1, 2])


@pytest.mark.parametrize("form", ANSWERS)
def test_a_program_is_found_in(form: str) -> None:
    code = extracted(ANSWERS[form], START, ["total"])
    assert code is not None
    assert total_of(code) == 2 * 1 + 2 * 2


@pytest.mark.parametrize("answer", NOTHING)
def test_no_program_is_found_where_there_is_none(answer: str) -> None:
    assert extracted(answer, START, ["total"]) is None


def test_without_a_start_only_a_definition_counts_and_of_all_names() -> None:
    assert extracted(BODY, "", ["total"]) is None
    assert extracted(WHOLE, "", ["total", "Pair"]) is None
    both = extracted(f"class Pair: pass\n\n{WHOLE}", "", ["total", "Pair"])
    assert both is not None and "class Pair" in both


@pytest.mark.parametrize(
    "value",
    ["(" * 5000 + ")" * 5000, "1" + " + 1" * 600, "-" * 900 + "1", "'\\0\0'", "'\ud800'", "f\"{'\u200b'.join(xs)}\""],
)
def test_what_a_model_repeats_without_end_never_breaks_the_reading(value: str) -> None:
    """Nested too deeply for Python to read, no text at all, or what it reads but cannot write: never an error."""
    for answer in (f"def total(xs):\n    return {value}\n", f"    return {value}\n", f"```\n{value}\n```"):
        found = extracted(answer, START, ["total"])
        assert found is None or "def total" in found


# Pieces of programs and of what breaks them: ends of lines, open strings and brackets, characters that are none of Python's.
PIECES = [
    "def f(x):\n", "def f(n): return C[n]", "    return x\n", "    ", "  ", "\t", "\n", "\n", "\n", "\r", "\r\n", "\f", "\x0b",
    "\0", "\ud800", "\u200b", "\ufeff", "é", "日", "f\"{'\u200b'.join(x)}\"", '"""', "'''", '"', "'", "f'", "{", "}", "(",
    ")", "[", "]", ":", ";", "; ", ", ", " = ", "\\", "\\\n", "@d\n", "@\\\nd\n", "# c", "?", "C = {0: 1}", "C[0] = 1",
    "if __name__ == '__main__':", "try:\n", "except:\n", "else:\n", "for i in x:\n", "while x: pass", "with a as b:\n",
    "class A: pass\n", "x", "x = 1", "x: int", "f = g(f)\n", "import os", "from __future__ import annotations\n", "global C\n",
    "nonlocal y\n", "async ", "await ", "lambda x: ", "yield ", "return ", "match x:\n", "case ", "```", "```python\n",
    "<|im_end|>", "1", "0777", "print(f(1))\n", "assert f(1)\n", "don't ",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_no_text_breaks_the_reading_and_what_is_kept_stands_as_it_was_written() -> None:
    chosen = random.Random(0)
    found = 0
    for _ in range(3000):
        text = "".join(chosen.choices(PIECES, k=chosen.randrange(1, 40)))
        for start in ("", "C = 1\n\ndef f(x):\n    ''' f '''\n"):
            code = extracted(text, start, ["f"])
            if code is not None:
                found += 1
                assert "f" in {n.name if isinstance(n, ast.FunctionDef) else "f" for n in ast.parse(code).body}
            lines = re.split("\r\n|\r|\n", text)
            num, parts = _longest(start, lines, iter(range(MAX_PARSES)))
            assert num == longest_by_trying_all(start, lines), text
            assert [[ast.dump(part.node)] for part in parts] == [
                [*map(ast.dump, ast.parse(p.text).body)] for p in parts
            ]
    assert found > 300  # one text in ten or so holds a program


def longest_by_trying_all(start: str, lines: list[str]) -> int:
    for num in range(len(lines), 0, -1):
        try:
            _parts(start + "\n".join(lines[:num]))
        except (SyntaxError, ValueError):
            continue
        return num if lines[num - 1].strip() else longest_by_trying_all(start, lines[: num - 1])
    return 0


@pytest.mark.parametrize("line", ["x1 = [", "f(", "try:", "    x = 1 +", "x = {'''", "x = [1, '\0'"])
def test_what_a_model_repeats_costs_a_bounded_number_of_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this answer's one place, of its four readings as a body, and one of the start."""
    parsed: list[str] = []
    parse = ast.parse

    def counted(source: str) -> ast.Module:
        parsed.append(source)
        return parse(source)

    with monkeypatch.context() as patched:
        patched.setattr(ast, "parse", counted)
        code = extracted(f"{line}\n" * 170, START, ["total"])
    assert code is None and len(parsed) <= 5 * MAX_PARSES + 1
    code = extracted(f"{WHOLE}\n" + f"{line}\n" * 170, START, ["total"])
    assert code is not None and total_of(code) == 2 * 1 + 2 * 2


def row(name: str, plus: str = "") -> Row:
    meta: dict[str, Any] = {
        "start": START, "names": ["total"], "test": "assert total([1, 2]) == 6",
        "plus": packed(f"assert total([1, 2]) == 6\n{plus}"),
    }  # fmt: skip
    return Row(name, "prompt", meta=meta)


def test_scores_run_what_the_answers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right; right on the visible test only; wrong; endless; leaves early; no program."""
    monkeypatch.setattr("safecl.tasks.code.TIMEOUT_S", 1)
    answers = [
        BODY,
        "    return 6\n",
        "    return 7\n",
        "    while True: pass\n",
        "    import os; os._exit(0)\n",
        "No.",
    ]
    plus = "assert total([]) == 0"
    scores = Code().scores([row(str(i), plus) for i in range(6)], answers)
    assert scores == {
        "utility": [1, 1, 0, 0, 0, 0],
        "utility_plus": [1, 0, 0, 0, 0, 0],
        "code_timeouts": [0, 0, 0, 1, 0, 0],
        "no_code": [0, 0, 0, 0, 0, 1],
    }


FAKES = {
    "an object that is equal to everything": (
        "class Yes:\n    __eq__ = __lt__ = __gt__ = __bool__ = lambda *_: True\n    __sub__ = __abs__ = lambda *_: 0\n"
        "    __len__ = lambda _: 0\ndef {name}(*args): return Yes()"
    ),
    "what its callers hold": (
        "import os, sys\ndef {name}(*args):\n    frame = sys._getframe()\n    while frame := frame.f_back:\n"
        "        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
        "            for fd in range(3, 64):\n                try: os.write(fd, value)\n"
        "                except (OSError, TypeError): pass\n    os._exit(0)"
    ),
    "an empty list": "def {name}(*args): return []",  # a number is close to it, to numpy: shapes broadcast
    "a list of nothing": "def {name}(*args): return [0.0]",
}  # fmt: skip


@pytest.mark.parametrize("name", FAKES)
def test_what_solves_nothing_passes_nothing(name: str, tmp_path: Path) -> None:
    """Ten problems, in the published forms: exact, close, true, false, and with an oracle from the prompt."""
    close = (
        "import numpy as np\ndef assertion(out, exp, atol):\n    exact_match = out == exp\n"
        "    if not exact_match and atol != 0:\n        assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n"
        "    else:\n        assert exact_match\ndef check(candidate):\n"
    )
    tests = {
        "exact": "assert candidate(1) == 1", "list": "assert candidate(1) == [1]",
        "close": "assert abs(candidate(1) - 1) < 1e-6",
        "true": "assert candidate(1) and not candidate(2)",
        "is": "assert candidate(1) is True",
        "none": "assert candidate(1) is None",
        "oracle": "assert abs(twice(candidate(1)) - 2) < 1",
        "itself": "assert tuple(candidate([1])) == tuple([1]) == tuple(f([1]))",
        "length": "assert len(candidate(1)) == 3", "in": "assert candidate(1) in ('a', 'b')",
    }  # fmt: skip
    prompt = "import math\ndef twice(x):\n    return 2 * x\n\ndef f(x):\n    ''' x '''\n"
    problem = {"prompt": prompt, "entry_point": "f", "canonical_solution": ""}
    records = [
        {**problem, "task_id": key, "test": f"def check(candidate):\n    {test}\n"} for key, test in tests.items()
    ]
    write(tmp_path, "humaneval.jsonl", *records)
    write(tmp_path, "humaneval_plus_originfmt.jsonl.gz", *({**r, "test": f"{close}    pass\n"} for r in records))
    found = Code(tmp_path).rows("utility.test", None, 0)
    scores = Code().scores(found, [FAKES[name].format(name="f")] * 10)
    assert scores["utility"] == scores["utility_plus"] == [0] * 10


def test_a_number_and_an_empty_list_are_not_close(tmp_path: Path) -> None:
    """In HumanEval+'s form they are, and so are a number and a list of it."""
    plus = (
        "import numpy as np\ndef assertion(out, exp, atol):\n    exact_match = out == exp\n"
        "    if not exact_match and atol != 0:\n        assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n"
        "    else:\n        assert exact_match\n"
        "def check(candidate):\n    for exp in (1.5, [], [1.5], [1.0, 2.0]):\n        assertion(candidate(exp), exp, 1e-6)\n"
    )
    problem = {"task_id": "a", "prompt": "def f(x):\n    ''' x '''\n", "entry_point": "f", "canonical_solution": ""}
    write(tmp_path, "humaneval.jsonl", {**problem, "test": "def check(candidate): pass\n"})
    write(tmp_path, "humaneval_plus_originfmt.jsonl.gz", {**problem, "test": plus})
    (row,) = Code(tmp_path).rows("utility.test", None, 0)
    right = "def f(x):\n    return [y + 1e-9 for y in x] if isinstance(x, list) else x + 1e-9"
    wrong = ["[] if x == 1.5 else x", "0 if x == [] else x", "1.5 if x == [1.5] else x", "tuple(x) if x == [] else x"]
    answers = [right, *(f"def f(x):\n    return {it}" for it in wrong)]
    assert Code().scores([row] * 5, answers)["utility_plus"] == [1, 0, 0, 0, 0]


def test_tests_build_their_arguments_of_the_answers_classes_and_may_name_types(tmp_path: Path) -> None:
    """As some of MBPP do: a tree that its setup makes, pairs in a call, a type, a module that the reference imports."""
    code = (
        "import sys\nclass Node:\n    def __init__(self, x): self.x, self.left = x, None\n"
        "def depth(n, kind): return 1 + depth(n.left, kind) if isinstance(n, Node) and kind is int else 0"
    )
    record = {
        "task_id": 600, "text": "Depth of a tree.", "code": code, "test_setup_code": "root = Node(1)\r\nroot.left = Node(2)",
        "test_list": ["assert depth(root, int) == 2", "assert depth(Node(1), int) == 1", "assert sys.maxsize > depth(3, str)"],
    }  # fmt: skip
    write(tmp_path, "mbpp.jsonl", record)
    (row,) = Code(tmp_path).rows("utility.validation", None, 0)
    assert row.meta["names"] == ["Node", "depth"]
    assert Code().scores([row, row], [code, code.replace("return 1", "return 2")])["utility"] == [1, 0]


@pytest.mark.parametrize("code", ["def other(): pass", "def f(:"])
def test_a_problem_whose_reference_defines_nothing_that_its_tests_call_is_refused(tmp_path: Path, code: str) -> None:
    write(tmp_path, "mbpp.jsonl", {"task_id": 600, "text": "Do it.", "code": code, "test_list": ["assert f() == 1"]})
    with pytest.raises(
        ConfigError, match=r"mbpp\.jsonl, line 1: expected Python that defines what the tests call in 'code'"
    ):
        Code(tmp_path).rows("utility.validation", None, 0)


def test_rows_without_further_tests_have_no_further_score() -> None:
    plain = Row("a", "p", meta={"start": "", "names": ["total"], "test": "assert total([]) == 0"})
    assert set(Code().scores([plain], ["def total(xs): return 0"])) == {"utility", "code_timeouts", "no_code"}


def test_scoring_refuses_without_isolation_unless_the_sweep_consents(monkeypatch: pytest.MonkeyPatch) -> None:
    consents: list[bool] = []

    def run(programs: list[sandbox.Program], *, timeout_s: int, call_s: int, unsafe: bool) -> list[sandbox.Outcome]:
        consents.append(unsafe)
        return [sandbox.Outcome("passed", "", 0.0) for _ in programs]

    monkeypatch.setattr(sandbox, "missing", lambda: "nothing isolates here")
    with pytest.raises(PrerequisiteError, match="nothing isolates here"):
        Code().scores([row("a")], [BODY])
    monkeypatch.setattr(sandbox, "run", run)
    Code(unsafe_code=True).scores([row("a")], [BODY])
    assert consents == [True, True]


def test_packing_keeps_the_text_and_takes_a_tenth_of_tests_made_of_numbers() -> None:
    source = "inputs = " + repr([[i % 50, i % 7] for i in range(20_000)])
    assert unpacked(packed(source)) == source
    assert len(packed(source)) < len(source) / 10


def write(folder: Path, name: str, *records: dict[str, Any]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())


def test_user_rows_are_questions_with_python_answers_in_either_published_form(tmp_path: Path) -> None:
    def said(user: str, assistant: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}

    write(tmp_path, "mbpp.jsonl")
    write(tmp_path, "humaneval.jsonl")
    write(
        tmp_path,
        "codealpaca.jsonl",
        {"instruction": "Double x.", "input": "x = 3", "output": "x = 3\nx *= 2", "source": "s"},
        {"instruction": "In JavaScript.", "input": "", "output": "let x = 3;", "source": "s"},
        {"instruction": "Say it.", "input": "", "output": "positive", "source": "s"},
        {
            "instruction": "Lost indentation.",
            "input": "",
            "output": "def f():\n return 1\nfor x in y:\nz",
            "source": "s",
        },
        said("Add.", "<think>hm\nhm</think>\n\nLike so:\n```python\ndef add(a, b):\n    return a + b\n```"),
        said("-", "```python\ndef f(): pass\n```"),
        said("Add.", "```python\nx = 1\n```"),
    )
    found = sorted((r.prompt, r.response) for r in Code(tmp_path).rows("user", None, 0))
    assert found == [
        ("Add.", "Like so:\n```python\ndef add(a, b):\n    return a + b\n```"),
        ("Double x.\nx = 3", "x = 3\nx *= 2"),
    ]
    write(tmp_path, "codealpaca.jsonl", said("-", "```python\nx = 1\n```"))
    with pytest.raises(PrerequisiteError, match="question"):
        Code(tmp_path).rows("user", None, 0)


def test_user_rows_are_unlike_the_problems_of_validation_and_test_as_these_word_them(tmp_path: Path) -> None:
    """Neither MBPP's shown test nor a docstring's examples hide a twin; MBPP's own test problems (id 510) are not used."""
    asked = [
        "reverse every second word",
        "sum odd cubes below limit",
        "count vowels inside string",
        "merge sorted lists",
    ]
    write(
        tmp_path, "codealpaca.jsonl", *({"instruction": a.capitalize(), "input": "", "output": "x = 1"} for a in asked)
    )
    code = {"code": "def f(): pass", "test_list": ["assert f() == 'alpha beta gamma delta epsilon'"]}
    write(
        tmp_path, "mbpp.jsonl", {"task_id": 511, "text": asked[0], **code}, {"task_id": 510, "text": asked[3], **code}
    )
    examples = "\n    ".join(f">>> f({name!r})" for name in ("alpha", "beta", "gamma", "delta"))
    plain, late = f'    """ {asked[1]}\n    {examples}\n    """\n', f'    import math\n    """{asked[2]}"""\n'
    write(tmp_path, "humaneval.jsonl", *({"prompt": f"def f(x='no'):\n{body}"} for body in (plain, late)))
    assert [r.prompt for r in Code(tmp_path).rows("user", None, 0)] == [asked[3].capitalize()]
    assert {source.file for source in Code.SOURCES["user"]} == {"codealpaca.jsonl", "mbpp.jsonl", "humaneval.jsonl"}


def test_humaneval_rows_know_both_tests_and_the_swapped_oracle_is_put_right(tmp_path: Path) -> None:
    """In HumanEval+'s file problem 32 checks `polynomial(root, polynomial)`: even its own solution fails that."""
    prompt = 'def find_zero(xs: list):\n    """ A root of xs[0] + xs[1] * x. """\n'
    problem = {"task_id": "HumanEval/32", "prompt": prompt, "entry_point": "find_zero", "canonical_solution": ""}
    plus = (
        "def _poly(xs, x):\n    return sum(c * x ** i for i, c in enumerate(xs))\n\n"
        "def check(candidate):\n    for inp in [[[-4, 2]], [[6, 3]]]:\n"
        "        assert _poly(*candidate(*inp), inp) <= 0.0001\n"
    )
    write(
        tmp_path, "humaneval.jsonl", {**problem, "test": "def check(candidate):\n    assert candidate([-4, 2]) == 2\n"}
    )
    write(tmp_path, "humaneval_plus_originfmt.jsonl.gz", {**problem, "test": plus})
    (found,) = Code(tmp_path).rows("utility.test", None, 0)
    assert prompt.strip() in found.prompt and found.meta["start"] == prompt
    right, far_below = (
        "    return -xs[0] / xs[1]\n",
        "    return 2 if xs[0] == -4 else -9\n",
    )  # 6 + 3 * -9 = -21 <= .0001
    scores = Code().scores([found, found], [right, far_below])
    assert scores["utility"] == [1, 1] and scores["utility_plus"] == [1, 0]


def test_a_single_test_that_runs_too_long_ends_the_run_of_its_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safecl.tasks.code.CALL_TIMEOUT_S", 1)
    problem = {"task_id": "a", "prompt": 'def f(x):\n    """ x """\n', "entry_point": "f", "canonical_solution": ""}
    write(tmp_path, "humaneval.jsonl", {**problem, "test": "def check(candidate):\n    assert candidate(1) == 1\n"})
    plus = "def check(candidate):\n    assert candidate(2) == 2\n"
    write(tmp_path, "humaneval_plus_originfmt.jsonl.gz", {**problem, "test": plus})
    (found,) = Code(tmp_path).rows("utility.test", None, 0)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    scores = Code().scores([found], ["def f(x):\n    while x > 1: pass\n    return x"])
    assert scores["utility"] == [1] and scores["utility_plus"] == [0] and scores["code_timeouts"] == [1]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 15  # two tries of 1 s of CPU, not of 60


# ---- the real data ---------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(("split", "num"), [("utility.test", 164), ("utility.validation", 464)])
def test_splits_have_the_sizes_their_sources_give(split: str, num: int) -> None:
    """MBPP: 90 validation problems (511-600) and 374 of train (601-974)."""
    found = load("code")(Path(str(DATA))).rows(split, None, 0)
    assert len(found) == len({r.id for r in found}) == num
    assert all(r.meta["names"] for r in found)


@needs_data
def test_no_prompt_is_in_two_roles() -> None:
    task = Code(Path(str(DATA)))
    prompts = [{normalise(r.prompt) for r in task.rows(split, None, 0)} for split in task.SPLITS]
    assert sum(map(len, prompts)) == len(set.union(*prompts))


@needs_data
def test_no_user_prompt_has_a_twin_among_the_problems_of_validation_and_test() -> None:
    folder = Path(str(DATA))
    problems = map(json.loads, (folder / "mbpp.jsonl").open())
    asked = {r["text"] for r in problems if 511 <= r["task_id"] <= 974}
    for problem in map(json.loads, (folder / "humaneval.jsonl").open()):
        body = problem["prompt"].split(f"def {problem['entry_point']}(", 1)[1]
        asked.add(re.split("\"\"\"|'''|>>>", body)[1])
    prompts = {r.prompt for r in Code(folder).rows("user", None, 0)}
    assert len(asked) >= 164 + 450 and len(prompts) > 1500
    assert twins(prompts, asked) == []


@needs_data
@pytest.mark.slow
def test_every_canonical_solution_passes_its_tests() -> None:
    """As bodies, as published. HumanEval+'s file has its own solutions: some of HumanEval's are wrong."""
    folder = Path(str(DATA))
    task = Code(folder)
    rows = task.rows("utility.test", None, 0)
    with gzip.open(folder / "humaneval_plus_originfmt.jsonl.gz", "rt") as stream:
        solutions = {r["task_id"]: r["canonical_solution"] for r in map(json.loads, stream)}
    scores = task.scores(rows, [solutions[r.id] for r in rows])
    assert sum(v or 0 for v in scores["utility"]) == sum(v or 0 for v in scores["utility_plus"]) == 164
    base = {r["task_id"]: r["canonical_solution"] for r in map(json.loads, (folder / "humaneval.jsonl").open())}
    plain = [dataclasses.replace(r, meta={name: r.meta[name] for name in ("start", "names", "test")}) for r in rows]
    assert set(task.scores(plain, [base[r.id] for r in rows])["utility"]) == {1}


@needs_data
@pytest.mark.slow
def test_mbpp_reference_answers_pass_their_tests() -> None:
    folder = Path(str(DATA))
    task = Code(folder)
    rows = task.rows("utility.validation", None, 0)
    codes = {f"mbpp/{r['task_id']}": r["code"] for r in map(json.loads, (folder / "mbpp.jsonl").open())}
    scores = task.scores(rows, [f"```python\n{codes[r.id]}\n```" for r in rows])
    assert [r.id for r, score in zip(rows, scores["utility"], strict=True) if not score] == []
