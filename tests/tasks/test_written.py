"""Tasks that a sweep file writes: every format in every kind of file, parts that stay, scores, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from safecl import metrics, sandbox
from safecl.base import ConfigError, PrerequisiteError
from safecl.config import Data
from safecl.tasks import Found, Option, Row, Task
from safecl.tasks._overlap import drop_overlaps
from safecl.tasks._source import identity
from safecl.tasks._written import find, kind_of, of_stage, told, typical_tokens

PAIRS = [(f"How do I reset device number {i}?", f"Hold its button for {i} seconds.") for i in range(40)]


def said(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


RECORDS: dict[str, list[dict[str, Any]]] = {
    "prompt_response": [{"prompt": p, "response": r} for p, r in PAIRS],
    "alpaca": [{"instruction": p, "input": "", "output": r} for p, r in PAIRS],
    "messages": [{"messages": said(p, r)} for p, r in PAIRS],
    "sharegpt": [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": r}]} for p, r in PAIRS],
}


def write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """A real file in the format that its name says."""
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    suffix = path.name.partition(".")[2]
    if suffix == "parquet":
        import pyarrow
        from pyarrow.parquet import write_table

        write_table(pyarrow.Table.from_pylist(list(records)), path)
    elif suffix == "jsonl.zst":
        import pyarrow

        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines)
    elif suffix in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(records[0]), delimiter="\t" if suffix == "tsv" else ",")
            table.writeheader()
            table.writerows(records)
    else:
        path.write_bytes(
            {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "json": json.dumps(list(records)).encode()}[suffix]
        )
    return path


def task(path: Path | None = None, **settings: Any) -> Task:
    place = {} if path is None else {"file": str(path)}
    return kind_of(Data.model_validate({"name": "own", **place, **settings}))()


def rows(path: Path, part: str = "user", **settings: Any) -> list[Row]:
    return task(path, **settings).rows(part, None, 0)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet", "csv", "tsv"])
@pytest.mark.parametrize("form", list(RECORDS))
def test_every_format_in_every_file_gives_the_same_rows(form: str, suffix: str, tmp_path: Path) -> None:
    if suffix in ("csv", "tsv") and form in ("messages", "sharegpt"):
        pytest.skip("a table holds text alone")
    path = write(tmp_path / f"rows.{suffix}", RECORDS[form])
    found = rows(path, "safety", format=form, roles="safety")
    assert sorted((row.prompt, row.response) for row in found) == sorted(PAIRS)


def test_columns_name_the_fields_of_a_file(tmp_path: Path) -> None:
    records = [{"frage": p, "antwort": r, "sys": "Be brief.", "bad": "yes"} for p, r in PAIRS]
    columns = {"prompt": "frage", "response": "antwort", "system": "sys", "harmful": "bad"}
    path = write(tmp_path / "rows.csv", records)
    found = rows(path, "safety", roles="safety", columns=columns, harmful_values=["yes"])
    assert {(row.prompt, row.response) for row in found} == set(PAIRS)
    assert all(row.before == (("system", "Be brief."),) and row.harmful for row in found)
    with pytest.raises(ConfigError, match=r"rows\.csv, record 2: expected true, false, 1 or 0 in 'bad', got 'yes'"):
        rows(path, "safety", roles="safety", columns=columns)


def test_an_answer_of_its_own_may_be_a_whole_number(tmp_path: Path) -> None:
    records = [{"prompt": f"word{i} thing{i}", "response": f"So it is {i}.", "gold": i} for i in range(1, 40)]
    settings: dict[str, Any] = {"score": "number", "columns": {"answer": "gold"}}
    own = task(write(tmp_path / "a.jsonl", records), **settings)
    held = own.rows("utility.test", None, 0)
    assert held and own.scores(held, [row.response for row in held])["utility"] == [1.0] * len(held)


def test_alpacas_input_follows_its_instruction(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "Sum up.", "input": "Rain.", "output": "Wet."}])
    assert [row.prompt for row in rows(path, "safety", format="alpaca", roles="safety")] == ["Sum up.\nRain."]


DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    *said("Hi, it is broken", "What is?"),
    *said("The lamp", "Turn it."),
]


def test_the_last_answer_is_trained_on_behind_all_that_was_said(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"messages": [*DIALOGUE, {"role": "user", "content": "Thanks"}]}])
    [row] = rows(path, "safety", format="messages", roles="safety")
    assert (row.prompt, row.response) == ("The lamp", "Turn it.")
    before = (("system", "Be kind."), ("user", "Hi, it is broken"), ("assistant", "What is?"))
    assert row.before == before and row.asked == "Hi, it is broken\nThe lamp"
    both = rows(path, "safety", format="messages", roles="safety", train_on="all")
    assert sorted((r.prompt, r.response, len(r.before)) for r in both) == [
        ("Hi, it is broken", "What is?", 1), ("The lamp", "Turn it.", 3),
    ]  # fmt: skip
    assert {row.meta["group"] for row in both} == {"dialogue 1"} and len({row.id for row in both}) == 2
    # What nobody answered is a request where only requests are read.
    [asked] = rows(path, "attack.test", format="messages", roles="attack", split={"validation": 0, "test": 1})
    assert asked.prompt == "Thanks" and len(asked.before) == 5 and asked.harmful


PARTS = ("user", "utility.validation", "utility.test")


def ids(path: Path, **settings: Any) -> dict[str, set[str]]:
    return {split: {row.prompt for row in rows(path, split, **settings)} for split in PARTS}


def test_parts_are_disjoint_and_no_row_moves_when_others_are_added(tmp_path: Path) -> None:
    records = [{"prompt": f"{word} {i}", "response": "x"} for i in range(60) for word in ("alpha", "omega", "kappa")]
    few, many = ids(write(tmp_path / "a.jsonl", records[:90])), ids(write(tmp_path / "b.jsonl", records[::-1]))
    for found in (few, many):
        assert sum(map(len, found.values())) == len(set.union(*found.values()))
    assert all(few[part] <= many[part] for part in PARTS)
    shares = {part: len(found) / len(records) for part, found in many.items()}
    assert abs(shares["user"] - 0.8) < 0.1 and min(shares.values()) > 0.03
    assert ids(tmp_path / "b.jsonl", split={"seed": 1}) != many
    halves = ids(tmp_path / "b.jsonl", split={"train": 0.5, "validation": 0, "test": 0.5})
    assert not halves["utility.validation"] and abs(len(halves["user"]) / len(records) - 0.5) < 0.12


def test_rows_much_like_a_held_out_one_are_not_trained_on(tmp_path: Path) -> None:
    held = write(tmp_path / "test.jsonl", [{"prompt": "Repair my grey kettle lid today", "response": "x"}])
    records = [
        {"prompt": "Repair today my grey kettle lid!", "response": "y"},
        {"prompt": "Paint a wall", "response": "z"},
    ]
    train = write(tmp_path / "train.jsonl", records)
    own = task(file={"train": str(train), "test": str(held)}, split={"validation": 0})
    assert [row.prompt for row in own.rows("user", None, 0)] == ["Paint a wall"]
    assert list(own.left_out.values()) == [1]
    # An instruction that all rows have makes none of them alike.
    shared = "Classify the sentiment of this review as positive or negative please now:"
    words = ["plum", "pear", "fig", "lime", "kiwi", "date", "yuzu", "nut"]
    records = [{"prompt": f"{shared} {word}", "response": "x"} for word in words]
    parts = ids(write(tmp_path / "c.jsonl", records), split={"train": 0.5, "validation": 0.2, "test": 0.3})
    assert sum(map(len, parts.values())) == len(records)


def test_a_files_own_parts_are_kept(tmp_path: Path) -> None:
    records = [
        {"prompt": f"word{i} thing{i}", "response": "x", "part": ("train", "dev", "test")[i % 3]} for i in range(9)
    ]
    found = ids(write(tmp_path / "a.jsonl", records), columns={"split": "part"})
    assert {part: {int(prompt.split()[0][4:]) % 3 for prompt in prompts} for part, prompts in found.items()} == {
        "user": {0}, "utility.validation": {1}, "utility.test": {2},
    }  # fmt: skip


def test_identity_is_content_and_never_place_or_name(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", RECORDS["prompt_response"])
    (tmp_path / "elsewhere").mkdir()
    two = write(tmp_path / "elsewhere" / "b.jsonl", RECORDS["prompt_response"])
    kinds = [kind_of(Data(name="own", file=str(path))) for path in (one, two)]
    assert identity(kinds[0], "user", None) == identity(kinds[1], "user", None)
    assert str(tmp_path) not in json.dumps([identity(kinds[0], "user", None), told(kinds[0])])
    write(one, RECORDS["prompt_response"][:-1])
    assert identity(kinds[0], "user", None) != identity(kinds[1], "user", None)
    # How answers are scored does not change what is trained on, and what is at its default stands nowhere.
    scored = kind_of(Data(name="own", file=str(two), score="exact"))
    assert told(scored) == told(kinds[1]) == {"written": {}}
    assert told(scored, scored=True) == {"written": {"score": "exact"}}
    # Nor does another way to say the same.
    same = [
        {"roles": ("user",)},
        {"columns": {"prompt": "prompt"}},
        {"format": "prompt_response"},
        {"train_on": "last"},
    ]
    assert all(told(kind_of(Data(name="own", file=str(two), **way))) == {"written": {}} for way in same)
    roles = [
        told(kind_of(Data(name="own", file=str(two), roles=pair))) for pair in (("user", "safety"), ("safety", "user"))
    ]
    assert roles[0] == roles[1]
    other = [{"columns": {"answer": "response"}}, {"split": {"seed": 1}}, {"roles": ("user", "safety")}, {"train_on": "all"},
             {"columns": {"harmful": "harmful"}}, {"format": "alpaca"}]  # fmt: skip
    assert len({json.dumps(told(kind_of(Data(name="own", file=str(two), **way)))) for way in other}) == len(other)
    # Two files of other parts are other rows.
    both = [{"train": str(one), part: str(two)} for part in ("validation", "test")]
    assert told(kind_of(Data(name="own", file=both[0]))) != told(kind_of(Data(name="own", file=both[1])))
    assert str(tmp_path) not in json.dumps(told(kind_of(Data(name="own", file=both[0]))))
    # A file of that name in the data folder is not the hub's.
    write(tmp_path / "own.jsonl", RECORDS["alpaca"])
    hub = kind_of(Data(name="own", hub="a/b", revision="0" * 40, hub_split="dev"))
    assert identity(hub, "user", tmp_path) == [{"hub": "a/b", "config": None, "revision": "0" * 40, "split": "dev"}]


def test_a_worker_reads_a_task_by_its_stage_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS["alpaca"])
    kind = kind_of(Data(name="own", file=str(path), format="alpaca", roles=("user", "safety")))
    part = json.loads(json.dumps({"task": "own", **told(kind)}))
    again = of_stage(part, "own", {"file of own": json.dumps(str(path))})
    assert again().rows("safety", None, 3) == kind().rows("safety", None, 3)
    assert of_stage({}, "mini") is find("mini", [])
    with pytest.raises(ConfigError, match=r"unknown task 'ownn'\. Did you mean 'own'\?"):
        find("ownn", [kind.DATA])  # type: ignore[attr-defined]


def test_a_hub_set_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PrerequisiteError) as caught:
        task(hub="no-such/set", revision="0" * 40).rows("user", None, 0)
    assert "no-such/set" in str(caught.value) and "give its rows as a `file`" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "expected either `file` or `hub`"),
        ({"hub": "a/b"}, "revision: a hub data set needs its commit"),
        ({"file": "a.jsonl", "columns": {"promt": "x"}}, "columns: prompt_response has no promt"),
        ({"file": "a.jsonl", "roles": "guard"}, "role guard: expected the field of its labels"),
        ({"file": "a.jsonl", "score": "choice"}, "score: choice and `choices` go together"),
        ({"file": "a.jsonl", "score": "choice", "choices": ["a", ""]}, "choices: expected two or more different words"),
        (
            {"file": "a.jsonl", "score": "choice", "choices": ["a", "A"]},
            "choices: expected two or more different words",
        ),
        ({"file": {"train": "a.jsonl"}, "columns": {"split": "x"}}, "columns: `split` goes with one file"),
        ({"file": "a.jsonl", "score": "regex", "pattern": "("}, "pattern: is no regular expression"),
        ({"file": "a.jsonl", "score": "code"}, "score: code: expected the field of its tests"),
    ],
)
def test_an_entry_that_cannot_work_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match="(?s)" + told.replace("(", r"\(")):
        Data.model_validate({"name": "own", **settings})


def test_estimates_know_how_long_a_files_rows_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "x" * 400, "response": "y" * 80} for _ in range(3)])
    part = {"task": "own", **told(kind_of(Data(name="own", file=str(path))))}
    assert typical_tokens(of_stage(part, "own", {"file of own": json.dumps(str(path))})) == (100, 20)
    assert typical_tokens(of_stage(part, "own")) == Task.TYPICAL_TOKENS  # the file is not here
    assert typical_tokens(find("advbench", [])) == find("advbench", []).TYPICAL_TOKENS


def test_all_that_is_wrong_with_a_file_is_said_at_once_with_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    lines = [
        json.dumps({"messages": said("a", "b")}),
        "not json",
        json.dumps({"messages": [{"role": "assistant", "content": "Hello"}]}),
        json.dumps({"messages": [{"role": "tool", "content": "x"}]}),
        json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]}),
        json.dumps({"messages": [{"role": "user", "content": 3}]}),
        json.dumps({"text": "x"}),
        json.dumps({"messages": said("a", "")}),
        json.dumps({"messages": [*said("a", "")[:1], {"role": "assistant", "content": None}]}),  # a call of a tool
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        rows(path, format="messages")
    told = str(caught.value).splitlines()
    assert [line.split(":")[0].split(", messages")[0] for line in told] == [f"bad.jsonl, line {i}" for i in range(2, 8)]
    assert "not JSON" in told[0] and "messages[0] is the assistant's, expected the user's" in told[1]
    assert "'role'" in told[2] and "'type'" in told[3] and "'content'" in told[4] and "'messages'" in told[5]


def test_what_has_no_answer_is_counted_and_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*RECORDS["prompt_response"], {"prompt": "x", "response": " "}])
    own = task(path, roles="safety")
    assert len(own.rows("safety", None, 0)) == len(PAIRS) and list(own.left_out.values()) == [1]
    write(path, [{"prompt": p} for p, _ in PAIRS])
    assert len(rows(path, "attack.test", roles="attack")) + len(rows(path, "attack.validation", roles="attack")) == 40
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 1: expected a field 'response'"):
        rows(path, "poison", roles="poison")


SCORES: list[tuple[dict[str, Any], str, dict[str, float]]] = [
    ({"score": "exact"}, "Turn left.", {"turn left": 1, "**Turn left.**": 1, "Turn left now": 0}),
    ({"score": "exact"}, "C++", {"c++.": 1, "C": 0, "C#": 0}),
    ({"score": "exact"}, "x != 5", {"x!=5": 1, "x = 5": 0, "x > 5": 0, "x 5": 0}),
    ({"score": "exact"}, "\U0001f44d", {"\U0001f44d": 1, "\U0001f44e": 0, "!!!": 0, "": 0}),
    ({"score": "exact"}, "\u0915\u093f", {"\u0915\u093f": 1, "\u0915\u0940": 0}),  # Hindi: signs of vowels
    ({"score": "exact"}, "caf\u00e9", {"cafe\u0301": 1, "cafe": 0}),
    ({"score": "contains"}, "turn left", {"Please turn left,then go.": 1, "turn leftward": 0, "": 0}),
    ({"score": "contains"}, "C++", {"Use C++, not C.": 1, "Use C.": 0, "<think> C++ </think>": 0}),
    ({"score": "contains"}, "1.5", {"It is 1.5.": 1, "It is 1 or 5": 0, "It is 11.5": 0}),
    ({"score": "choice", "choices": ["1", "2", "4"]}, "4", {"4. Good food": 1, "4) Good": 1, "1 or 4": 0, "14": 0}),
    ({"score": "choice", "choices": ["don\u2019t know", "yes"]}, "don't know", {"Don't know.": 1, "yes": 0}),
    ({"score": "choice", "choices": ["good", "not good"]}, "not good", {"**Not good**": 1, '{"label": "good"}': 0}),
    ({"score": "number"}, "18", {"It is $18.00": 1, "18, or 19": 0, "none": 0}),
    (
        {"score": "choice", "choices": ["yes", "no"]},
        "yes",
        {"Yes.": 1, "<think>no</think>yes": 1, "yes and no": 0, "x": 0},
    ),
    ({"score": "regex", "pattern": r"Final: (\w+)"}, "So.\nFinal: B", {"Final: A\nFinal: B": 1, "B": 0, "Final: A": 0}),
]


@pytest.mark.parametrize(("settings", "gold", "answers"), SCORES, ids=lambda value: str(value)[:30])
def test_scores_by_hand(settings: dict[str, Any], gold: str, answers: dict[str, float]) -> None:
    own = task(Path("rows.jsonl"), **settings)
    found = own.scores([Row("1", "q", gold)] * len(answers), list(answers))
    assert found["utility"] == list(answers.values())
    assert set(found) == set(metrics.of_task(own))
    assert own.scores([Row("1", "q", "noise", False, {"answer": gold})], list(answers)[:1])["utility"] == [1]


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"score": "choice", "choices": ["good", "bad"]}, {"response": "neutral"}),
        ({"score": "number"}, {"response": "none"}),
        ({"score": "regex", "pattern": r"Final: (\w+)"}, {"response": "B"}),
        ({"score": "code", "columns": {"tests": "tests"}}, {"response": "x", "tests": "assert True"}),
    ],
    ids=lambda value: str(value.get("score", "")),
)
def test_a_row_to_which_no_answer_could_be_right_is_refused(
    settings: dict[str, Any], wrong: dict[str, str], tmp_path: Path
) -> None:
    right = {"response": "Final: good 18", "tests": "assert twice(1) == 2"}
    records = [{"prompt": f"word{i} thing{i}", **right, **(wrong if i == 3 else {})} for i in range(6)]
    path = write(tmp_path / "a.jsonl", records)
    own = task(path, **settings, split={"train": 0, "validation": 0, "test": 1})
    with pytest.raises(ConfigError, match=r"data 'own': 1 of 6 held-out rows cannot be scored .* row 4: "):
        own.rows("utility.test", None, 0)
    assert not own.rows("user", None, 0)  # what is trained on need not be scored


def test_dialogues_that_begin_alike_are_parted_by_all_that_was_said(tmp_path: Path) -> None:
    records = [{"messages": [*said("Hello", "How may I help?"), *said(f"Part{i} of{i} mine{i}", "Bring it.")]}
               for i in range(60)]  # fmt: skip
    path = write(tmp_path / "d.jsonl", records)
    settings: dict[str, Any] = {"format": "messages", "train_on": "all"}
    found = {part: rows(path, part, **settings) for part in PARTS}
    assert all(len(of_part) > 2 for of_part in found.values())
    groups = [{str(row.meta["group"]) for row in of_part} for of_part in found.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_a_request_of_another_role_is_found_inside_a_conversation() -> None:
    asked = "Steal the credit cards of a bank"
    before = [("user", "Hi, my old desk lamp blinks and buzzes since Monday"), ("assistant", "Gladly.")]
    talks = [Row("last", asked, "No.", before=before),
             Row("first", "Thanks for the lamp, bye", "Bye.", before=[("user", asked), *before[1:]]),
             Row("none", "Thanks for the lamp, bye", "Bye.", before=before)]  # fmt: skip
    assert drop_overlaps(talks, [asked])[1] == ["last", "first"]
    assert drop_overlaps(talks, [asked], whole=True)[1] == []  # a task's own parts: many begin with the same words


def test_a_files_rows_follow_from_nothing_that_its_identity_leaves_out(tmp_path: Path) -> None:
    held = {part: str(write(tmp_path / f"{part}.jsonl", [{"prompt": f"grey kettle lid {word}", "response": "x"}
                                                         for word in words]))
            for part, words in (("validation", ("plum", "pear")), ("test", ("plum jam", "fig")))}  # fmt: skip
    found = []
    for name, text in (("few", "paint wall {}"), ("many", "grey kettle lid {}")):
        train = write(tmp_path / f"{name}.jsonl", [{"prompt": text.format(i), "response": "x"} for i in range(40)])
        own = task(file={"train": str(train), **held})
        kept = [row.prompt for row in own.rows("utility.validation", None, 0)]
        found.append((identity(type(own), "utility.validation", None), kept))
    assert found[0] == found[1]


def test_a_field_of_system_prompts_goes_with_conversations(tmp_path: Path) -> None:
    talk = RECORDS["sharegpt"][0]["conversations"]
    path = write(tmp_path / "s.jsonl", [{"conversations": talk, "system": "Be kind."}])
    settings: dict[str, Any] = {"format": "sharegpt", "roles": "safety", "columns": {"system": "system"}}
    assert rows(path, "safety", **settings)[0].before == (("system", "Be kind."),)
    write(path, [{"conversations": [{"from": "system", "value": "No."}, *talk], "system": "Be kind."}])
    with pytest.raises(
        ConfigError, match="expected nothing, as conversations begins with a system prompt, in 'system'"
    ):
        rows(path, "safety", **settings)


def test_without_a_score_utility_is_the_chance_of_a_token_of_the_held_out_answer() -> None:
    own = task(Path("rows.jsonl"))
    assert own.options(Row("1", "q", "an answer")) == [Option("an answer")]
    told = [Found(-3.0, 2), Found(None, 0), Found(0.0, 0)]  # the last: of characters that the tokenizer leaves out
    found = own.likelihood_scores([Row(name, "q", name) for name in "abc"], [[each] for each in told])
    assert found["gold_nll"] == [1.5, None, None]
    assert found["utility"] == [pytest.approx(2.718281828459045**-1.5), None, None]
    assert own.BY_LIKELIHOOD and set(metrics.of_task(own)) == set(found)


def test_programs_run_in_the_sandbox() -> None:
    if sandbox.missing() is not None:
        pytest.skip("this machine cannot isolate programs")
    own = task(Path("rows.jsonl"), score="code", columns={"tests": "tests"})
    row = Row("1", "q", "", False, {"tests": "assert twice(2) == 4\nassert all(twice(i) == 2 * i for i in range(3))"})
    texts = ["```python\ndef twice(x):\n    return 2 * x\n```", "def twice(x):\n    return x", "no"]
    found = own.scores([row] * 3, texts)
    assert found["utility"] == [1, 0, 0] and found["no_code"] == [0, 0, 1] and own.RUNS_CODE
