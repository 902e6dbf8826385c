"""Programs that solve nothing and want to pass, and what may pass between a program and its tests. The programs run inside
the sandbox only, and only once its limit on processes has been seen in force there."""

from __future__ import annotations

import enum
import json
import math
from collections import Counter, namedtuple
from collections.abc import Callable
from typing import Any

import pytest

from safecl import inside, sandbox
from safecl.inside import decoded, encoded
from safecl.sandbox import Program

# What is asked of f, each by another way of comparing: its argument's square, of a list those of its items.
CHECKS = [
    "f(3) == 9", "9 == f(3)", "not f(3) != 9", "f(3) in {9}", "f(3) in [9]", "{9: True}[f(3)]", "abs(f(1.5) - 2.25) < 1e-6",
    "f(1.5) - 2.25 == 0", "8 < f(3) < 10", "[f(3)] == [9]", "{'k': f(3)} == {'k': 9}", "f([1, 2]) == [1, 4]",
    "sorted(f([2, 1])) == [1, 4]", "tuple(f([1, 2])) == (1, 4)", "set(f([1, 2])) == {1, 4}", "str(f(3)) == '9'",
    "isinstance(f(3), int) and f(3) - 9 == 0", "len(f([1] * 7)) == 7", "f([2])[0] == 4", "max(f([1, 2])) == 4",
    "sum(x == y for x, y in zip(f([1, 2]), [1, 4])) == 2", "math.isclose(f(1.5), 2.25)", "'%d' % f(3) == '9'",
    "f(3).__eq__(9) is True", "hash(f(3)) == hash(9)",
    "all(map(lambda x, y: f(x) == y, [1, 2], [1, 4]))", "all(f(x) == x * x for x in [1, 2])",
]  # fmt: skip
NUMPYS = ["np.allclose(f(1.5), 2.25)", "np.array_equal(f([1, 2]), [1, 4])", "np.all(np.equal(f([1, 2]), [1, 4]))"]


def asking(checks: list[str], passed: str = "passed") -> str:
    """Tests that hold where `passed` does, an expression of the list of checks that were."""
    return f"""
import math
{"import numpy as np" if any("np." in check for check in checks) else ""}
passed = []
for check in {checks!r}:
    try:
        if eval(check):
            passed.append(check)
    except Exception:
        pass
assert {passed}, passed
"""


YES = """
class Yes:
    def yes(self, *args, **kwargs): return True
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __bool__ = __contains__ = __call__ = yes
    def __ne__(self, other): return False
    def __sub__(self, other): return 0.0
    __rsub__ = __add__ = __mul__ = __abs__ = __float__ = lambda self, *other: 0.0
    def __len__(self): return 7
    def __hash__(self): return 9
    def __int__(self): return 9
    __index__ = __int__
    def __str__(self): return "9"
    def __iter__(self): return iter([self] * 2)
    def __getitem__(self, key): return self
    def __getattr__(self, name): return self
    def __array__(self, *args): return self
    @property
    def __class__(self): return int
"""
EVERYWHERE = """
import gc, os, sys
def places():
    frames = [*sys._current_frames().values()]
    while frames:
        frame = frames.pop()
        yield frame.f_locals
        yield frame.f_globals
        frames += [frame.f_back] if frame.f_back else []
    for found in gc.get_objects():
        if isinstance(found, dict): yield found
    for module in [*sys.modules.values()]:
        yield vars(module)
def said():
    for place in places():
        for value in [*place.values()]:
            if isinstance(value, (bytes, str)) and 0 < len(value) < 99: yield value.encode() if isinstance(value, str) else value
"""
FDS = """
import os
def say(*words):
    for word in words:
        for fd in range(64):
            try: os.write(fd, word)
            except OSError: pass
"""


def replying(answer: str, before: str = "") -> str:
    """A program that writes answers of its own making: Python source of bytes."""
    return f"{FDS}{before}\ndef f(x):\n    say({answer})\n    os._exit(0)"


FAKES = {
    "an object equal to everything": f"{YES}\ndef f(x): return Yes()",
    "such an object in a list": f"{YES}\ndef f(x): return [Yes(), Yes()]",
    "such objects everywhere in a list": f"{YES}\ndef f(x): return [Yes()] * 7",
    "such an object in a tuple": f"{YES}\ndef f(x): return (Yes(), Yes())",
    "such an object in a dict": f"{YES}\ndef f(x): return {{0: Yes(), 1: Yes()}}",
    "such an object from an iterator": f"{YES}\ndef f(x): return iter([Yes(), Yes()])",
    "such an object in numpy's array": f"{YES}\nimport numpy as np\ndef f(x): return np.array([Yes(), Yes()], dtype=object)",
    "such an object as numpy's number": f"{YES}\nimport numpy as np\ndef f(x): return np.array(Yes(), dtype=object)",
    "a masked array": "import numpy as np\ndef f(x): return np.ma.masked_all(np.shape(x))",
    "the masked constant": "import numpy as np\ndef f(x): return np.ma.masked",
    "a class that is equal to everything": (
        "class Meta(type):\n    def __eq__(self, other): return True\n    def __hash__(self): return 9\n"
        "class A(metaclass=Meta): pass\ndef f(x): return A"
    ),
    **{
        f"a subclass of {base}": (
            f"{YES}\nclass Like({base}):\n    __eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n"
            "    __lt__ = __gt__ = __eq__\n    __hash__ = lambda self: 9\n    __len__ = lambda self: 7\n"
            "    __sub__ = __abs__ = lambda self, *other: 0\n    __str__ = lambda self: '9'\n"
            f"    __iter__ = lambda self: iter([1, 4])\ndef f(x): return Like({value})"
        )
        for base, value in (("int", ""), ("float", ""), ("str", ""), ("bytes", ""), ("complex", ""))
    },
    "a subclass of list of such": f"{YES}\nclass Like(list):\n    __eq__ = lambda *a: True\ndef f(x): return Like([Yes()] * 7)",
    "a subclass of dict": f"{YES}\nclass Like(dict):\n    __eq__ = __contains__ = lambda *a: 1\ndef f(x): return Like(k=Yes())",
    "what it finds in frames and memory": f"{EVERYWHERE}{FDS}\ndef f(x):\n    say(*said())\n    os._exit(0)",
    "what it finds while it is imported": f"{EVERYWHERE}{FDS}\nsay(*said())\nos._exit(0)",
    "the words of the tests' process": replying("b's', b'p', b'sp', b'g'"),
    "those words before it is asked": f"{FDS}\nsay(b's', b'p', b'sp')\ndef f(x): os._exit(0)",
    "an answer of nothing": replying("b'[true, null]\\n' * 99"),
    "an answer of true": replying("b'[true, true]\\n' * 99"),
    "no JSON": replying("b'yes\\n'"),
    "an end in mid-answer": replying("b'[true'"),
    "an unknown kind": replying('b\'[true, {"eval": "9"}]\\n\''),
    "a stranger without a number": replying("b'[true, {\"stranger\": {}}]\\n'"),
    "the function itself": replying('b\'[true, {"stranger": "f"}]\\n\''),
    "two kinds at once": replying('b\'[true, {"int": "9", "float": "9"}]\\n\''),
    "an end of all loops": replying('b\'[false, "StopIteration", ""]\\n\' * 99'),
    "an exit": replying("b'[false, \"SystemExit\", 0]\\n' * 99"),
    "brackets without end": replying("b'[' * 200000 + b'\\n'"),
    "an endless answer": "import os\ndef f(x):\n    while True:\n        for fd in range(3, 64):\n            try: os.write(fd, b'[' * 65536)\n            except OSError: pass",  # noqa: E501
    "an answer beyond all numbers": replying("b'[true, 1e999]\\n' * 99"),
    "an answer of many digits": replying("b'[true, ' + b'9' * 100000 + b']\\n'"),
    "no number": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
    "a huge number": "def f(x): return 1 << 10 ** 7",
    "a list in lists": "def f(x):\n    found = []\n    for _ in range(10 ** 5): found = [found]\n    return found",
    "a list in itself": "def f(x):\n    found = []\n    found.append(found)\n    return found",
    "an endless iterator": "import itertools\ndef f(x): return itertools.repeat(9, 10 ** 7)",
    "nothing": "def f(x): pass",
    "itself": "def f(x): return f",
    "a function": "def f(x): return lambda *a: True",
    "an exception": "def f(x): raise AssertionError",
    "an end of the loop": "def f(x): raise StopIteration",
    "an exit in the call": "def f(x): raise SystemExit(0)",
    "an exit at once": "import os; os._exit(0)\ndef f(x): return x * x",
    "an exit later": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    "a signal": "import signal\nsignal.signal(signal.SIGALRM, lambda *a: f)\ndef f(x): signal.setitimer(0, .01); signal.pause()",
    "a thread": "import threading\ndef f(x):\n    threading.Thread(target=print).start()\n    return x * x",
    "other builtins": (
        "import builtins, json, operator, sys\n"
        "for name in ('all', 'any', 'isinstance', 'abs', 'len', 'sorted', 'eval', 'exec', 'compile'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\n"
        "builtins.AssertionError = Warning\njson.dumps = lambda *a, **k: '[true, true]'\noperator.eq = lambda *a: True\n"
        "sys.excepthook = lambda *a: None\ndef f(x): return 0"
    ),
    "other code in the runner": (
        "import sys\nmain = sys.modules['__main__']\nmain.tests = main.main = lambda *a: None\nmain.PASSED = main.GONE\n"
        "main.encoded = lambda *a: {'stranger': 'f'}\ndef f(x): return main.Stranger(f, 'f')"
    ),
    "arguments that it changes": "def f(x):\n    x[:] = [1, 1]\n    return x",
    "the first process's descriptors": (
        "import ctypes, os\ncall = ctypes.CDLL(None).syscall\ndef f(x):\n    first = call(434, 1, 0)\n"
        "    return [os.read(call(438, first, fd, 0), 99) for fd in range(64)]"
    ),
    "its own source": "import os\ndef f(x):\n    for fd in (0, *range(5, 64)): print(os.pread(fd, 99, 0))\n    return x * x",
}
HONEST = "def f(x): return [y * y for y in x] if isinstance(x, list) else x * x"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, sandbox.Outcome]:
    assert sandbox.missing() is None  # its own probe looks for the limit on processes first
    checks = [[*CHECKS, *NUMPYS] if "numpy" in source or YES in source else CHECKS for source in FAKES.values()]
    programs = [Program(source, asking(asked), ["f"]) for source, asked in zip(FAKES.values(), checks, strict=True)]
    return dict(zip(FAKES, sandbox.run(programs, timeout_s=1), strict=True))


@pytest.mark.parametrize("name", FAKES)
def test_no_check_is_passed_by(name: str, outcomes: dict[str, sandbox.Outcome]) -> None:
    assert outcomes[name].verdict != "passed", name


def test_every_check_is_passed_by_what_is_right() -> None:
    every = [*CHECKS, *NUMPYS]
    (outcome,) = sandbox.run([Program(HONEST, asking(every, f"passed == {every!r}"), ["f"])], timeout_s=5)
    assert outcome.verdict == "passed", outcome.detail


def test_a_program_has_no_test_and_no_expected_result_in_its_process() -> None:
    """Seen from inside: no text of the tests is among what the program's process holds."""
    source = (
        "import gc\nown = ['mine_alone']\n"
        "def f(word):\n    held = (it for of in gc.get_objects() for it in gc.get_referents(of))\n"
        "    return sum(isinstance(it, str) and word[::-1] in it for it in held)"
    )
    for word, seen in (("kept_apart", False), ("mine_alone", True)):
        checks = f"kept_apart = ['kept_apart']\nassert bool(f({word[::-1]!r})) is {seen}"
        (outcome,) = sandbox.run([Program(source, checks, ["f"])], timeout_s=5)
        assert outcome.verdict == "passed", outcome.detail


def test_what_tests_pass_in_comes_back_as_it_was_and_stays_their_own() -> None:
    tests = """
class Own: pass
values = [None, True, 0, -7, 1 << 200, -(1 << 64), 1.5, -0.0, float('inf'), 1e300, 2j, '', 'é\\ud800\\n', b'\\0', (), (1, (2,)),
          [], [[]], {}, {1: 'a', (1,): [2]}, {1, 'b'}, frozenset({1}), int, 'x' * 100000]
for value in values:
    back = f(value)
    assert type(back) is type(value) and back == value and str(back) == str(value), value
assert [f([1], keep=True), f([2], keep=True)] == [[1], [2]]
given = [1, [2]]
f(given)[1].append(3)
assert given == [1, [2]] and str(f(float('nan'))) == 'nan'
for wrong in (Own(), lambda: 0, Own, [Own()]):
    try: f(wrong)
    except TypeError: continue
    raise AssertionError(wrong)
assert f(x=3) == 3
"""
    source = "kept = []\ndef f(x, keep=False):\n    if not keep: return x\n    kept[:] = x\n    return kept"
    (outcome,) = sandbox.run([Program(source, tests, ["f"])], timeout_s=5)
    assert outcome.verdict == "passed", outcome.detail


def test_exceptions_keep_their_names_and_objects_of_the_programs_classes_can_be_passed_back() -> None:
    source = (
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef f(pairs): return [p.a + p.b for p in pairs]\n"
        "def g(name): raise getattr(__builtins__, 'get', None)(name)('why') if isinstance(__builtins__, dict) else Pair"
    )
    tests = """
assert f([Pair(1, 2), Pair(3, b=4)]) == [3, 7]
for kind in (ValueError, KeyError, ZeroDivisionError):
    try: g(kind.__name__)
    except kind as error: assert error.args == ('why',)
    else: raise AssertionError
try: missing()
except NameError: pass
else: raise AssertionError
"""
    (outcome,) = sandbox.run([Program(source, tests, ["f", "g", "Pair", "missing"])], timeout_s=5)
    assert outcome.verdict == "passed", outcome.detail


@pytest.mark.parametrize("name", ["no JSON", "an end in mid-answer", "an unknown kind", "brackets without end"])
def test_an_answer_that_is_none_ends_the_tests_though_they_wait_for_an_exception(name: str) -> None:
    waiting = "try: f(1)\nexcept Exception: pass\nelse: raise AssertionError"
    raises = Program("def f(x): raise ValueError", waiting, ["f"])
    outcomes = sandbox.run([Program(FAKES[name], waiting, ["f"]), raises], timeout_s=5)
    assert [outcome.verdict for outcome in outcomes] == ["failed", "passed"]


def test_a_call_that_takes_too_long_ends_the_run() -> None:
    source = "def f(x):\n    while x: pass"
    outcome = sandbox._run(Program(source, "f(0)\nf(1)", ["f"]), 60, 1, sandbox.MEMORY_BYTES, isolated=True)
    assert outcome.verdict == "timeout" and outcome.seconds < 30


Point = namedtuple("Point", "x y")


class Colour(str, enum.Enum):  # noqa: UP042  StrEnum's text is its value: this one's is not
    RED = "red"


class Flag(enum.IntFlag):
    A = 1


def passed_on(value: object) -> Any:
    kept: list[object] = []

    def keep(value: object) -> int:
        kept.append(value)
        return len(kept) - 1

    return decoded(json.loads(json.dumps(encoded(value, keep), allow_nan=False)), kept.__getitem__)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Counter("aab"), {"a": 2, "b": 1}), (Point(1, 2), (1, 2)), (Colour.RED, "red"), (Flag.A, 1),
        (bytearray(b"a"), b"a"), ([Point(1, Colour.RED)], [(1, "red")]),
    ],
)  # fmt: skip
def test_an_object_of_a_class_of_a_plain_one_is_what_that_holds(value: object, plain: object) -> None:
    found = passed_on(value)
    assert found == plain and type(found) is type(plain)


def test_numpys_numbers_are_numbers_and_what_is_iterated_is_its_items() -> None:
    np = pytest.importorskip("numpy")
    assert [type(passed_on(it)) for it in (np.int64(3), np.float32(0.5), np.bool_(True), np.array(3))] == [
        int,
        float,
        bool,
        int,
    ]
    for many in (np.array([1, 2]), (i for i in (1, 2)), range(1, 3), {1: 0, 2: 0}.keys()):
        found = passed_on(many)
        assert found != [1, 2] and list(found) == [1, 2]
    assert passed_on(kept := object()) is kept  # is held where it is, and found again there


@pytest.mark.parametrize(
    "form",
    [{}, {"a": 1}, {"int": "9", "float": "9"}, {"int": 9}, {"int": "x"}, {"dict": [[1]]}, {"dict": [[[], 1]]}, {"set": [[]]},
     {"tuple": 3}, {"bytes": "zz"}, {"float": "x"}, {"complex": ["1"]}, {"type": "object"}, {"type": "eval"}, {"type": []}],
)  # fmt: skip
def test_what_stands_for_nothing_is_refused(form: object) -> None:
    with pytest.raises((ValueError, TypeError, LookupError)):
        decoded(form, lambda reference: reference)


COMPARISONS: list[Callable[[Any], object]] = [
    lambda it: it == it, lambda it: it != 1, lambda it: (it,) == (1,), bool, hash, str, repr, len, list, abs, float, int,
    lambda it: it < 1, lambda it: it in [1], lambda it: it + 1, lambda it: it[0], math.isnan, lambda it: f"{it}",
]  # fmt: skip


@pytest.mark.parametrize("use", COMPARISONS)
def test_a_stranger_answers_nothing(use: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError):
        use(inside.Stranger(lambda *call: 1, 0))
