"""Commands for runs on other machines, and for stores: submit, cancel, logs, trace, gc, du. No logic, as in cli.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from safecl.options import AsJson, File, Limit, Set, print_hanging, print_table

Files = Annotated[list[Path], typer.Argument(help="Sweep files", show_default=False)]
Root = Annotated[str, typer.Option(help="The store: a folder or a URL (`execution.root` of the sweep)")]


def submit(
    file: File,
    set_: Set = [],  # noqa: B006
    limit: Limit = None,
    address: Annotated[
        str,
        typer.Option(
            help="Ray's dashboard: http://HOST:8265",
            envvar="RAY_API_SERVER_ADDRESS",
            show_default="http://127.0.0.1:8265",
        ),
    ] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow its output until it ends")] = True,
    max_hours: Annotated[float | None, typer.Option(min=0.0, help="As of `safecl run`")] = None,
    env: Annotated[
        list[str], typer.Option(help="`NAME=value` or `NAME` (this terminal's), for the run. Repeatable")
    ] = [],  # noqa: B006
) -> None:
    """Run a sweep on a Ray cluster as a job: the driver runs there, and this terminal may be closed.

    The sweep file travels with what it names by relative places (plugins, data); an absolute place or a URL must be one
    that the cluster has. `execution.root` is such a place. A second `submit` continues, as `safecl run` does.

        safecl submit sweeps/quickstart.yaml --set execution.root=s3://BUCKET/safecl
        safecl status sweeps/quickstart.yaml --set execution.root=s3://BUCKET/safecl     # from anywhere
        safecl cancel sweeps/quickstart.yaml --set execution.root=s3://BUCKET/safecl

    Follows the output and exits as the run does: 0, or 1 where it failed. Ctrl-C leaves the job running.
    """
    from safecl import submit as room
    from safecl.sweepfile import load, raw_of

    load(file, set_, limit)  # errors of the sweep file are reported here, not by the job
    options = [*(["--limit", str(limit)] if limit else []), *(["--max-hours", str(max_hours)] if max_hours else [])]
    job = room.submit(address, raw_of(file, set_), file, options, dict(map(_variable, env)))
    print(f"job {job} on {address}", file=sys.stderr)
    if not wait:
        print(job)
        print(f"its output: ray job logs --address {address} --follow {job}", file=sys.stderr)
        return
    try:
        how = room.follow(address, job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\nthe job goes on; its output: ray job logs --address {address} --follow {job}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"job {job}: {how}", file=sys.stderr)
    if how != "SUCCEEDED":
        raise typer.Exit(1)


def _variable(given: str) -> tuple[str, str]:
    from safecl.base import ConfigError

    name, equals, value = given.partition("=")
    if not equals and name not in os.environ:
        raise ConfigError(
            f"--env {given!r}: is not set in this terminal; expected NAME=value, or the name of one that is"
        )
    return name, value if equals else os.environ[name]


def cancel(
    file: File,
    set_: Set = [],  # noqa: B006
    limit: Limit = None,
    wait_s: Annotated[float, typer.Option("--wait", min=0.0, help="Seconds to wait until it has stopped")] = 120.0,
) -> None:
    """Stop a sweep's run, wherever its driver is. Training saves checkpoints first; `safecl run` continues from there.

    Works by a note in the store, so it needs the same `execution.root`, and no access to the driver's machine. A driver
    looks every 5 s. Exits 2 if nothing runs, 1 if the run has not stopped within --wait.
    """
    from safecl import cancel as room
    from safecl.store import Store
    from safecl.sweepfile import load

    sweep = load(file, set_, limit)
    if not room.cancel(Store(sweep.execution.root), sweep.name, wait_s, lambda text: print(text, file=sys.stderr)):
        print(
            f"it has not stopped within {wait_s:g} s; it was asked, and `safecl status` shows how it goes",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    print("stopped; the same `safecl run` or `safecl submit` continues", file=sys.stderr)


def trace(
    file: File,
    set_: Set = [],  # noqa: B006
    limit: Limit = None,
    out: Annotated[Path | None, typer.Option(help="Where to write it (default: NAME.trace.json here)")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a sweep's runs as a trace for ui.perfetto.dev or chrome://tracing, and print who waited for what.

    One row a device, engine and process; each stage a slice with its key, its rows of the table and how long it waited for
    inputs and for its turn. Reads the store only, also while the sweep runs.
    """
    from safecl import trace as room
    from safecl.base import PrerequisiteError
    from safecl.project import Project, load

    project = Project(load(file, set_, limit), reads=True)
    found = room.spans(project.store, project.sweep.name)
    if not found:
        raise PrerequisiteError(
            f"no run of sweep {project.sweep.name!r} has left times in the store at {project.store.root!r}"
        )
    target = out or Path(f"{project.sweep.name}.trace.json")
    if not target.absolute().parent.is_dir():
        from safecl.base import ConfigError

        raise ConfigError(f"--out: there is no folder {str(target.parent)!r}; make it, or name another")
    made = room.chrome(found, room.cells_of(project, {span["key"] for span in found}))
    target.write_text(json.dumps(made), encoding="utf-8")
    lines = room.summary(found)
    if as_json:
        print(json.dumps({"file": str(target), "stages": len(found), "summary": lines}, indent=1))
        return
    for line in lines:
        print_hanging("", line, indent=2)
    print(f"trace: {target} (open it in https://ui.perfetto.dev)", file=sys.stderr)


def _projects(files: list[Path], settings: list[str], limit: int | None) -> tuple[list[Any], Any]:
    from safecl.keep import one_store
    from safecl.project import Project, load

    projects = [Project(load(file, settings, limit), reads=True) for file in files]
    return projects, one_store(projects)


def gc(
    files: Files,
    set_: Set = [],  # noqa: B006
    limit: Limit = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this nothing is changed")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what none of these sweeps needs from their store. Shows what that is; removes with --yes.

    Kept is every stage that a row, a search's trial (finished, under way or to come) or a guard of a named sweep rests on.
    So name all sweeps whose results you want to keep, with the options they were run with. Stages stay, and only leftovers
    of processes that are gone are removed, while any sweep is being run in the store, and where the study of a search that
    is not finished lies on another machine.
    """
    from safecl import keep

    projects, store = _projects(files, set_, limit)
    needed = keep.needed(projects)
    running, unseen = keep.live(store), keep.unseen(projects)
    spare = [] if running or unseen else [held for held in keep.stages(store) if held.key not in needed]
    spare += keep.leftovers(store, needed)
    if yes:
        for held in spare:
            keep.remove(store, held)
    total = sum(held.bytes for held in spare)
    if as_json:
        print(json.dumps({"removed": yes, "bytes": total, "found": [held._asdict() for held in spare]}, indent=1))
        return
    kinds: dict[str, list[int]] = {}
    for held in spare:
        kinds.setdefault(held.kind, []).append(held.bytes)
    if kinds:
        rows = [[kind, str(len(sizes)), keep.readable(sum(sizes))] for kind, sizes in sorted(kinds.items())]
        print_table("removed" if yes else "not needed by these sweeps", ["what", "number", "size"], rows)
    for told in running:
        print(
            f"stages stay: sweep {told['sweep']!r} is being run in this store by process {told['pid']} on {told['host']}"
        )
    for name in unseen:
        print(
            f"stages stay: what sweep {name!r} searches is not finished, and its study is on the machine that ran it "
            "(execution.study_uri is null): gc there, or when the search is finished"
        )
    word = "freed" if yes else "would be freed; --yes removes it"
    print(f"{keep.readable(total)} {word}" if spare else "nothing to remove")


def du(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Sweep files: also say what of it none of them needs")
    ] = None,
    set_: Set = [],  # noqa: B006
    limit: Limit = None,
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Print what a store holds, by kind of stage, in number and size. With sweep files: how much none of them needs."""
    from safecl import keep
    from safecl.base import ConfigError
    from safecl.store import Store

    needed = None
    if files:
        projects, store = _projects(files, set_, limit)
        needed = keep.needed(projects)
    else:
        store = Store(root)
        if store.remote is None and not (store.local / "store").is_dir():
            raise ConfigError(f"no store at {root!r}; name it with --root, or name a sweep file")
    found = keep.table(store, needed)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    columns = ["what", "number", "size"] + ([] if needed is None else ["not needed", "size"])
    rows = [
        [row["what"], str(row["num"]), keep.readable(row["bytes"])]
        + ([] if needed is None else [str(row.get("unneeded_num", "-")), keep.readable(row.get("unneeded_bytes", 0))])
        for row in found
    ]
    rows.append(["all", "", keep.readable(sum(row["bytes"] for row in found))] + ([] if needed is None else ["", ""]))
    print_table(f"store at {store.root}", columns, rows)


def logs(
    key: Annotated[
        str | None, typer.Argument(help="The beginning of a stage's key, or a name of the list; none: list them")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on printing until the stage ends, or Ctrl-C")
    ] = False,
    num: Annotated[
        int, typer.Option(min=1, help="How many are listed, and how many lines of one are printed first")
    ] = 200,
    root: Root = "runs",
) -> None:
    """Print the log of a stage by its key, from whichever node it ran on; without a key, list logs, the newest last.

    `safecl status` names the keys of stages that run or failed. Logs lie beside the store: this machine's first, then
    those that other nodes put there.
    """
    from safecl import tail as room
    from safecl.store import Store

    store = Store(root)
    if key is None:
        for name, size in room.listing(store)[-num:]:
            print(f"{name}  {size} bytes")
        return
    for text in room.lines(store, key, num, follow):
        print(text, flush=True)


def add_to(app: typer.Typer) -> None:
    """Add these commands to `safecl`."""
    for verb in (submit, cancel, logs, trace, gc, du):
        app.command()(verb)
