"""The code task: its rows, and the scores of running the programs that test_program.py finds in answers. The real data are
found through SAFECL_DATA; tests that need them are skipped without it, the others are not."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest

from safecl import sandbox
from safecl.base import ConfigError, PrerequisiteError
from safecl.tasks import Row, load
from safecl.tasks._overlap import normalise
from safecl.tasks.code import Code, packed, unpacked
from tests.tasks.test_program import BODY, START
from tests.tasks.test_roles import twins

DATA = os.environ.get("SAFECL_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="SAFECL_DATA names no folder of data files")


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
