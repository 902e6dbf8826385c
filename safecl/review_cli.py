"""Commands for finished work: report, view, label, compare, best, show, ui, promote. No logic, as in cli.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from safecl.options import AsJson, File, Limit, Set, opened, print_table

AcceptJudge = Annotated[
    bool,
    typer.Option("--accept-judge", help="Print ASR even where the guard is no better than chance on held-out pairs"),
]


def print_rows(project: Any, form: str, accept_judge: bool) -> None:
    """Print a project's rows in one of the formats of report/forms.py. On a terminal, tables are as wide as the
    terminal."""
    from safecl.base import ConfigError, near
    from safecl.report import forms
    from safecl.report.facts import readable

    if form not in forms.FORMS:
        raise ConfigError(
            f"--format: no form {form!r}.{near(form, forms.FORMS)} Expected one of {', '.join(forms.FORMS)}"
        )
    rows, found = readable(project, accept_judge)
    if form != "table" or not sys.stdout.isatty():
        print(forms.FORMS[form](rows, found), end="")
        return
    from rich.console import Console

    console = Console()
    if found.doubt:
        console.print(found.doubt, style="bold", markup=False)
    for table in forms.terminal(rows, found, console.width):
        console.print(table)


def report(
    file: File,
    set_: Set = [],  # noqa: B006
    limit: Limit = None,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the page (default: report/NAME under execution.root)")
    ] = None,
    accept_judge: AcceptJudge = False,
    form: Annotated[
        str, typer.Option("--format", help="table, markdown (with every table of the page), latex, csv or json")
    ] = "table",
) -> None:
    """Print the table from the store and write one self-contained page with charts and answers. Runs nothing."""
    from safecl.overview import write_report

    project = opened(file, set_, limit, reads=True)
    print_rows(project, "json" if as_json else form, accept_judge)
    page = write_report(project, out, accept_judge)
    print(f"page: {page}", file=sys.stderr)


def view(
    file: File,
    set_: Set = [],  # noqa: B006
    limit: Limit = None,
    out: Annotated[Path | None, typer.Option(help="Where to write it, as for `safecl report`")] = None,
    accept_judge: AcceptJudge = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 0,
) -> None:
    """Write the page as `safecl report` does and serve it with its answers on this machine's own address, until Ctrl-C."""
    from safecl.overview import write_report
    from safecl.report import serve

    page = write_report(opened(file, set_, limit, reads=True), out, accept_judge)
    _serve(serve.server(page.parent, port))


def show(
    name: Annotated[
        str, typer.Argument(help="The beginning of a stage's key, or words of its name: `finetune der seed 0`")
    ],
    root: str = "runs",
) -> None:
    """Print a stage's name, folder and record: config, inputs, result, cost, library versions. Of several, a line each."""
    from safecl.base import ConfigError
    from safecl.review import find
    from safecl.store import Store

    store = Store(root)
    found = find(store, name)
    if not found:
        raise ConfigError(
            f"no stage under {root!r} has a key that begins with {name!r}, or a name with these words; name the store with "
            "--root"
        )
    for label, record in found:
        print(
            f"{record['key'][:12]}  {label}  {store.folder(record)}", file=sys.stderr if len(found) == 1 else sys.stdout
        )
    if len(found) == 1:
        print(json.dumps(found[0][1], indent=1))


def best(
    file: File,
    set_: Set = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="The sweep file to write (default: print it)")] = None,
) -> None:
    """Print the sweep file with every search replaced by what it chose. Runs nothing."""
    import yaml

    from safecl.base import ConfigError
    from safecl.review import best as chosen

    content, left = chosen(opened(file, set_, None, reads=True), file, set_)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    for line in left:
        print(f"left out: {line}", file=sys.stderr)
    if out is None:
        print(text, end="")
        return
    if out.exists():
        raise ConfigError(f"--out: {str(out)!r} is there already; name a new file")
    out.write_text(text, encoding="utf-8")
    print(out)


def compare(
    first: File,
    second: Annotated[
        Path, typer.Argument(help="Another sweep file, or the same with other --second", show_default=False)
    ],
    set_: Set = [],  # noqa: B006
    second_set: Annotated[list[str], typer.Option("--second", help="As --set, of the second alone")] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Compare two sweeps: settings, data, weights, numbers, and paired tests of their common rows. Runs nothing."""
    from safecl import review

    projects = [opened(first, set_, None, reads=True), opened(second, [*set_, *second_set], None, reads=True)]
    found = review.compare(*projects)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for title, columns, rows in review.told(found):
        print_table(title, columns, rows)


def label(
    file: File,
    set_: Set = [],  # noqa: B006
    question: Annotated[str, typer.Option(help="asr or over_refusal: what the judge decides that you check")] = "asr",
    num: Annotated[int, typer.Option(min=2, help="Answers of every row, drawn at random")] = 12,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 0,
    export: Annotated[
        Path | None,
        typer.Option(help="Write what is labelled to this file, for `safecl judge validate`, and serve nothing"),
    ] = None,
) -> None:
    """Serve a page on which a person labels answers, blind to method and verdict. `safecl report` then prints how good the
    judge is, and rates corrected by the labels.
    """
    from safecl.base import ConfigError
    from safecl.report import labelled, labelling

    project = opened(file, set_, None, reads=True)
    if export is not None:
        if export.exists():
            raise ConfigError(f"--export: {str(export)!r} is there already; name a new file")
        found = labelled.pairs(project, question)
        export.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in found), encoding="utf-8")
        print(
            f"{len(found)} labelled answers: safecl judge validate {export} --judge NAME --label label --positive true"
        )
        return
    drawn = labelled.draw(labelled.items(project, question), num)
    if not drawn:
        raise ConfigError(f"no row of this sweep has answers that were judged for {question}; run it first")
    _serve(labelling.server(project.store, project.sweep.name, question, drawn, port))


def ui(
    file: Annotated[Path | None, typer.Argument(help="A sweep file, whose tracking_uri and store are shown")] = None,
    set_: Set = [],  # noqa: B006
    root: Annotated[str, typer.Option(help="The store, without a sweep file")] = "runs",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of MLflow; 0: a free one")] = 0,
) -> None:
    """Start MLflow on this machine's own address, and optuna-dashboard where it is installed; print their addresses; end them
    at Ctrl-C. A tracking server that runs is pointed at.
    """
    import signal

    from safecl.base import sqlite_url
    from safecl.store import Store
    from safecl.sweepfile import load
    from safecl.tracking import ui as pages

    execution = None if file is None else load(file, set_).execution
    local = Store(root if execution is None else execution.root).local
    tracking, studies = (None, None) if execution is None else (execution.tracking_uri, execution.study_uri)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with (
            pages.opened(tracking or sqlite_url(local / "mlflow.db"), local / "logs", port) as mlflow,
            pages.dashboard(studies or sqlite_url(local / "study.db"), local / "logs") as optuna,
        ):
            print(f"MLflow: {mlflow}  (Ctrl-C ends it)", flush=True)
            if optuna is not None:
                print(f"Optuna: {optuna}", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass


def promote(
    file: File,
    set_: Set = [],  # noqa: B006
    row: Annotated[str, typer.Option(help="Words of a row's label, as `sst2 p=0.1`: the best of these rows")] = "",
    name: Annotated[
        str | None, typer.Option(help="Of the registered model (default: safecl-NAME of the sweep)")
    ] = None,
    alias: Annotated[str, typer.Option(help="Of the version in MLflow: `models:/NAME@best`")] = "best",
    merged: Annotated[bool, typer.Option(help="Write the whole model to MLflow, not the adapter alone")] = False,
) -> None:
    """Register the best finished row in MLflow under an alias: its first seed's weights are written there, with their card.

    The best: of the rows that meet the search's bounds on test prompts the one with the most of what it maximises.
    """
    from safecl.base import sqlite_url
    from safecl.tracking.promote import promote as register

    project = opened(file, set_, None, reads=True)
    uri = project.sweep.execution.tracking_uri or sqlite_url(project.store.local / "mlflow.db")
    found = register(project, uri, row, name, alias, merged)
    print(f"models:/{found.name}@{alias} is version {found.version}: {found.title}")
    if not found.feasible:
        print("it does not meet the bounds; no finished row does, and it violates them least", file=sys.stderr)


def _serve(server: Any) -> None:
    from safecl.report import serve

    print(f"{serve.address(server)}  (Ctrl-C ends it)", flush=True)
    with server:
        server.serve_forever()


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    for verb in (report, view, label, compare, best, show, ui, promote):
        app.command()(verb)
