"""A program found in an answer, in every form that answers have. What running it scores: test_code.py."""

from __future__ import annotations

import ast
import random
import re
from typing import Any

import pytest

from safecl.tasks._program import MAX_PARSES, _longest, _parts, extracted

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
