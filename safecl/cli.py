"""The commands of `safecl`. They hold no logic: each reads its arguments, calls one module and prints."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from safecl import ops_cli, review_cli
from safecl.judge_cli import judge_app
from safecl.options import AsJson, File, Limit, Set, opened, print_found, print_hanging, print_table, project_to_run
from safecl.review_cli import AcceptJudge, print_rows

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Which continual-learning method keeps a fine-tuned model safe, and what does that cost?

One sweep file goes in; a table with intervals, an MLflow experiment and a page with charts come out.

**First steps**

    safecl plan sweeps/quickstart.yaml     # what it would do, and for how long
    safecl run sweeps/quickstart.yaml      # do it; the same command continues
    safecl report sweeps/quickstart.yaml   # the table again, a page with charts

**Your own model and data**

    safecl doctor --data ROWS.jsonl --model MODEL     # what a model sees of it
    safecl init --data ROWS.jsonl --model MODEL       # writes sweep.yaml
    safecl plan sweep.yaml
""",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"safecl {version('safecl')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit")
    ] = False,
) -> None:
    pass


app.add_typer(judge_app, name="judge")


@app.command()
def run(
    file: File,
    set_: Set = [],  # noqa: B006
    limit: Limit = None,
    as_json: AsJson = False,
    max_hours: Annotated[
        float | None, typer.Option(min=0.0, help="Stop after so many hours, in a state that the same command continues")
    ] = None,
    accept_judge: AcceptJudge = False,
) -> None:
    """Run what is missing of a sweep and print its table.

    Finished stages are never run again, so the same command continues after a crash, a kill or Ctrl-C. Progress goes to
    the standard error stream, the table to standard output.
    """
    from safecl import driver

    project = project_to_run(file, set_, limit)
    failed = driver.run(project, lambda text: print(text, file=sys.stderr), max_hours, _run_again)
    print_rows(project, "json" if as_json else "table", accept_judge)
    if not failed:
        options = " with the same options" if set_ or limit else ""
        print(f"for a page with charts and answers: safecl report {file}{options}", file=sys.stderr)
        return
    for line in failed:
        print(f"missing: {line}", file=sys.stderr)
    print(
        f"{len(failed)} rows are not complete; the output is under {project.logs}. Run the same command to try again.",
        file=sys.stderr,
    )
    raise typer.Exit(1)


@app.command()
def plan(
    file: File,
    set_: Set = [],  # noqa: B006
    limit: Limit = None,
    as_json: AsJson = False,
    cluster: Annotated[
        Path | None,
        typer.Option(help="A file of node types (deploy/*.yaml), or a Ray cluster file: simulate the run there"),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(min=0.0, help="Of --cluster: how many devices are cheapest within so many hours")
    ] = None,
) -> None:
    """Print cells, trials and stages of a sweep, what is cached, and the hours left.

    Hours are estimates (tokens x parameters / this machine's speed), corrected by what past stages of the store took.

    With --cluster the run is simulated on that cluster, by the code that schedules a run: how long it takes, what its devices do,
    what it costs, and where more of them stop to help.
    """
    from safecl.overview import plan as make_plan
    from safecl.report.tables import duration

    if cluster is not None:
        from safecl import clusterfile, rehearse

        there = clusterfile.load(cluster)
        simulated = rehearse.on_cluster(opened(file, set_, limit, planned=True), there, deadline)
        print_found(simulated, as_json, rehearse.tables, rehearse.lines)
        return
    if deadline is not None:
        from safecl.base import ConfigError

        raise ConfigError("--deadline is of a cluster: name one with --cluster")
    project = opened(file, set_, limit, planned=True)
    found = make_plan(project)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print_table(
        "cells", ["cell", "searched", "trials"], [[c["cell"], c["searched"], str(c["trials"])] for c in found["cells"]]
    )
    columns = ["stage", "to run", "later", "cached", "shared", "time"]
    rows = [
        [kind, *(str(count[name]) for name in columns[1:5]), duration(3600 * count["hours"])]
        for kind, count in found["stages"].items()
    ]
    print_table("stages (later: of trials that the search will suggest)", columns, rows)
    auto = f" (auto: {found['auto']['why']})" if found["auto"] else ""
    told = [f"dtype: {', '.join(f'{name} {dtype}' for name, dtype in found['dtype'].items())}{auto}"]
    told += [*found["warnings"], *found["notes"]]
    if found["disk_gib"] >= 0.05:
        told.append(
            f"to be written: about {found['disk_gib']:.1f} GiB, {found['states_gib']:.1f} of them theta_safe's hidden states"
        )
    devices = f" ({found['device_hours']:.0f} GPU-hours{found['speed']})" if project.sweep.execution.use_gpu else ""
    searched = f"{found['open_trials']} more trials will be suggested by the search; " if found["open_trials"] else ""
    told.append(f"{searched}about {duration(3600 * found['hours'])} in all{devices}")
    for line in told:
        print_hanging("", line, indent=2)


@app.command()
def status(
    file: File,
    set_: Set = [],  # noqa: B006
    limit: Limit = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print it anew every 10 s until the run ends")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how far a sweep is: its cells, and its run, live and afterwards. Reads only the store, from any terminal.

    `weights` is the key of a row's weights (first seed), for `safecl export` and `safecl show`. For the run it shows, by
    kind, how many stages wait for inputs, wait for their turn (`ready`), run and are done. It also shows how much of the
    cluster is held, the time left, the money spent so far (`execution.device_price`), and each failure with its cause, node
    and log.
    """
    import time

    from safecl import live
    from safecl.overview import status as read_status

    while True:
        project = opened(file, set_, limit, reads=True)
        run = live.state(project.store, project.sweep.name, project.sweep.execution)
        cells = read_status(project, run)
        if as_json:
            print(json.dumps({"cells": cells, "run": run}, indent=1), flush=True)
        else:
            print_table("status", list(cells[0]), [list(row.values()) for row in cells])
            if run is not None and run["stages"]:
                states = ("waiting", "ready", "running", "done")
                rows = [[kind, *(str(nums.get(name, 0)) for name in states)] for kind, nums in run["stages"].items()]
                print_table("stages of its runs", ["stage", *states], rows)
            for line in live.lines(run):
                print_hanging("", line, indent=2)
        if not follow or run is None or run["how"] != "under way":
            return
        time.sleep(10.0)
        print(flush=True)


@app.command()
def power(
    file: File,
    set_: Set = [],  # noqa: B006
    limit: Limit = None,
    as_json: AsJson = False,
    noise: Annotated[float | None, typer.Option(help="sd of a difference between seeds, e.g. 0.05")] = None,
    discordant: Annotated[
        float | None, typer.Option(help="Share of prompts that two methods answer differently")
    ] = None,
    detect: Annotated[float | None, typer.Option(help="Say what it would take for this difference, e.g. 0.1")] = None,
) -> None:
    """Print which difference between two methods a sweep can detect, and what it would need for a given one. Runs nothing.

    If the noise is not given, it is read from the store's finished rows (two methods with two common seeds).
    """
    from safecl import power as of

    found = of.power(opened(file, set_, limit, reads=True), noise, discordant, detect)
    print_found(found, as_json, of.tables, of.notes)


@app.command(name="schema")
def schema_() -> None:
    """Print the JSON schema of a sweep file, for editors: what each key is, its type and default.

    `safecl schema > sweep.schema.json`, and in the sweep file's first line:
    `# yaml-language-server: $schema=sweep.schema.json`
    """
    from safecl import schema

    print(json.dumps(schema.sweep_file(), indent=1))


@app.command()
def export(
    key: Annotated[str, typer.Argument(help="The beginning of the key of a row's weights (`safecl status` prints it)")],
    out: Annotated[Path, typer.Argument(help="A new folder")],
    merged: Annotated[bool, typer.Option(help="The whole model, not the adapter alone")] = False,
    root: str = "runs",
) -> None:
    """Write a trial's weights as a PEFT adapter or a merged model, for transformers, PEFT and vLLM."""
    from safecl.export import export as write
    from safecl.store import Store

    print(write(Store(root), key, out, merged))


@app.command()
def ls(
    what: Annotated[str, typer.Argument(help="methods, tasks, judges or metrics")] = "methods",
    file: Annotated[Path | None, typer.Argument(help="A sweep file: its plugins and data are listed too")] = None,
    as_json: AsJson = False,
) -> None:
    """List methods (with their equations), tasks (what they are, and their splits), judges (with their questions) or
    metrics (with what they are measured of), and where they come from."""
    from safecl.overview import listing
    from safecl.sweepfile import load

    rows = listing(what, () if file is None else load(file, []).data)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if what == "metrics":
        print_table(what, list(rows[0]), [list(row.values()) for row in rows])
        return
    for row in rows:  # too much text for columns
        (_, name), (_, first), *others = row.items()
        print_hanging(f"{name:13} ", first, indent=16)
        for key, value in others:
            print_hanging(f"{'':13} {key}: ", value, indent=16)


@app.command()
def doctor(
    root: Annotated[str, typer.Option(help="Where results would be stored: a folder or a URL")] = "runs",
    data_dir: Annotated[Path | None, typer.Option(help="A folder of local data files to look through")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A data file of yours: what a model would see of it, and what is wrong with it")
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="Of --data: messages, sharegpt, alpaca or prompt_response")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Of --data: whose template and tokens are shown")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub id")] = None,
    template: Annotated[str, typer.Option(help="Of --model: auto, or a name as in a sweep file")] = "auto",
    max_tokens: Annotated[int, typer.Option(min=8, help="Of --data: the longest row that is trained on")] = 512,
    as_json: AsJson = False,
) -> None:
    """Say what this machine can run, and the remedy for what it cannot. Exits 2 if something essential is missing.

    With --data FILE: what a model would see of that file, and all that is wrong with it; exits 2 if anything is.
    """
    from safecl.base import ConfigError

    if data is not None:
        from safecl import datafile

        chosen = None if model is None else _model(model, revision, template)
        seen = datafile.look(data, format_, chosen, max_tokens)
        print(json.dumps(datafile.as_json(seen), indent=1) if as_json else "\n".join(datafile.lines(seen)))
        if seen.problems:
            raise typer.Exit(2)
        return
    if of_data := [
        name for name, value in (("--format", format_), ("--model", model), ("--revision", revision)) if value
    ]:
        raise ConfigError(f"{of_data[0]} is of a data file: name one with --data")
    from safecl.doctor import examine

    found = examine(root, data_dir)
    if as_json:
        print(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        words = {True: "ok", False: "MISSING", None: "-"}
        for finding in found:
            print_hanging(f"{words[finding.ok]:8} {finding.what:15} ", finding.found, indent=25)
            if not finding.ok and finding.remedy:
                print_hanging(f"{'':8} {'':15} remedy: ", finding.remedy, indent=25)
    if any(finding.ok is False for finding in found):
        raise typer.Exit(2)


def _model(source: str, revision: str | None, template: str) -> Any:
    """The model that the options name. Raises ConfigError for anything that is wrong with it."""
    from pydantic import ValidationError

    from safecl.base import ConfigError, literal, strictly
    from safecl.check import folder_problems, source_problem
    from safecl.config import Model
    from safecl.sweepfile import explained

    written = literal(source) if Path(source).exists() else source  # a $ that the shell left belongs to the name
    given = {"name": "model", "source": written, "revision": revision, "template": template}
    try:
        found = strictly(Model, given)
    except ValidationError as error:
        raise ConfigError("; ".join(f"--{line}" for line in explained(error, given, Model))) from None
    problem = source_problem(found.source, revision)
    if problems := [problem] if problem else folder_problems(found.source):
        raise ConfigError("; ".join(f"--model {source!r}: {told}" for told in problems))
    return found


@app.command()
def init(
    model: Annotated[
        str | None, typer.Option(help="`wheel:PACKAGE`, a folder, or a hub id with --revision", show_default=False)
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Rows to fine-tune on", show_default=False)] = None,
    goal: Annotated[
        str | None,
        typer.Option(help="look (SFT and DER), compare (six methods) or tune (search DER)", show_default=False),
    ] = None,
    attack: Annotated[Path | None, typer.Option(help="Harmful requests, with answers also poison")] = None,
    aligned: Annotated[
        bool, typer.Option("--aligned", help="The model is aligned already: start from it as it is (`align: none`)")
    ] = False,
    out: Annotated[Path, typer.Option(help="The sweep file to write")] = Path("sweep.yaml"),
    revision: Annotated[str | None, typer.Option(help="Commit of a hub id")] = None,
    template: Annotated[str, typer.Option(help="Of the model: auto, or a name as in a sweep file")] = "auto",
) -> None:
    """Write a small commented sweep file from a model, a data file and a goal; `safecl plan` takes it as it is.

    What is not given is asked for.
    """
    from safecl.base import ConfigError
    from safecl.init import sweep

    try:
        model = model or typer.prompt("Model (a folder, wheel:PACKAGE, or a hub id)")
        data = data or Path(typer.prompt("Data file to fine-tune on"))
        goal = goal or typer.prompt("Goal (look, compare or tune)", default="look")
    except typer.Abort:
        if sys.stdin.isatty():  # Ctrl-C
            raise
        raise ConfigError("nobody is here to be asked: name --model, --data and --goal") from None
    if out.exists():
        raise ConfigError(f"--out: {str(out)!r} is there already; name a new file")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out: there is no folder {str(out.parent)!r}; make it, or name another")
    text = sweep(_model(model, revision, template), data, goal, attack, out, aligned)
    out.write_text(text, encoding="utf-8")
    try:
        _ = opened(out, [], None, planned=True).expected  # as `plan` does: roles may leave each other too few rows
    except ConfigError as error:
        raise ConfigError(f"{out} is written, and needs a change before `safecl plan` takes it:\n{error}") from None
    print(f"{out}\nnext: safecl plan {out}")


def _run_again() -> None:
    """Replace this process by a new start of the same command, because the local cluster was lost.

    Returns without a restart after five restarts that followed each other within 10 minutes each.
    """
    import os
    import time

    from safecl.driver import BEGUN_ANEW

    num, last = (float(part) for part in os.environ.get(BEGUN_ANEW, "0 0").split())
    num = 1 if time.time() - last > 600 else num + 1
    if num > 5:
        return
    os.environ[BEGUN_ANEW] = f"{num} {time.time()}"
    print("the local Ray cluster was lost: starting it again", file=sys.stderr, flush=True)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


review_cli.add_to(app)
ops_cli.add_to(app)


def main() -> None:
    """Run the command line. An error that a user can mend prints no traceback and exits 2; Ctrl-C exits 130, SIGTERM 143."""
    gc.set_threshold(
        50_000, 10, 10
    )  # a sweep's stages live until the end: the garbage collector's looks at them took an eighth of the time
    try:
        # Without its standalone mode typer returns the code of an Exit (130 for Ctrl-C) instead of raising it.
        code = app(standalone_mode=False, prog_name="safecl") or 0
    except (KeyboardInterrupt, typer.Abort):  # before or after typer's own
        code = 130
    except SystemExit as ended:  # SIGTERM
        code = ended.code
    except Exception as error:
        if (told := _mendable(error)) is not None:
            print(told, file=sys.stderr)
            sys.exit(2)
        if not _is_of_cluster(error):
            raise
        said = str(error).strip().partition("\n")[0]
        print(f"the Ray cluster, or a part of it, was lost: {said}; the same command continues", file=sys.stderr)
        sys.exit(1)
    if code in (130, 143):
        print("stopped; run the same command to continue from what is finished", file=sys.stderr)
    sys.exit(code)


def _mendable(error: Exception) -> str | None:
    """The message for an error that a user can mend; None for a bug, which keeps its traceback."""
    from safecl.base import ConfigError, PrerequisiteError, Unreachable

    if isinstance(error, Unreachable):
        return (
            f"prerequisite error: {error}. Is its name right, and the driver's settings for keys, region and endpoint?"
        )
    if isinstance(error, ConfigError | PrerequisiteError):
        return f"{type(error).__name__.removesuffix('Error').lower()} error: {error}"
    if hasattr(error, "format_message"):  # typer's own
        return _usage(error)
    named = getattr(error, "filename", None)
    if isinstance(error, OSError) and named and any(_holds(argument, str(named)) for argument in sys.argv[1:]):
        return f"config error: {named}: {error.strerror}"
    return None


def _is_of_cluster(error: Exception) -> bool:
    """Whether Ray lost what this process was talking to."""
    from safecl.faults import kind_of

    of_ray = any(kind.__module__.partition(".")[0] == "ray" for kind in type(error).__mro__)
    return of_ray and kind_of(error) == "infrastructure"


def _usage(error: Any) -> str:
    """A line on a wrong command line, with the option that was probably meant."""
    from safecl.base import near

    context: Any = getattr(error, "ctx", None)
    verb = "safecl" if context is None else context.command_path
    if type(error).__name__ == "NoArgsIsHelpError":
        print(context.get_help())
        return f"usage error: no command given. See '{verb} --help'"
    told, hint = " ".join(str(error.format_message()).split()).rstrip("."), ""
    if (option := getattr(error, "option_name", None)) is not None and told.startswith("No such"):
        told = f"No such option: {option}"
        hint = near(option, [name for parameter in context.command.params for name in parameter.opts])
    stop = "" if told.endswith("?") else "."
    return f"usage error: {told}{stop}{hint} See '{verb} --help'"


def _holds(argument: str, path: str) -> bool:
    """Whether a path is, or lies inside, the path of this command-line argument (alone or as the value of an option)."""
    value = argument.rpartition("=")[2]
    return bool(value) and Path(path).absolute().is_relative_to(Path(value).absolute())


if __name__ == "__main__":
    main()
