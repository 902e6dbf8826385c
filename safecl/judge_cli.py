"""The commands of `safecl judge`. No logic, as in cli.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from safecl.options import AsJson, File, Limit, Set, print_table, project_to_run

judge_app = typer.Typer(no_args_is_help=True, help="Judge files of answers, and measure judges against human labels.")

Pairs = Annotated[Path, typer.Argument(help="A data file with a prompt and a response a record", show_default=False)]
JudgeNames = Annotated[
    list[str], typer.Option("--judge", help='NAME, or NAME:{"key": value}; twice: both, and their agreement')
]
Plugins = Annotated[list[str], typer.Option("--plugin", help="A Python file with a judge of your own")]
ModelSource = Annotated[
    str | None, typer.Option("--model", help="A served judge's model: a folder, `wheel:PACKAGE`, or a hub id")
]
Revision = Annotated[str | None, typer.Option(help="Commit of a hub id")]
EndpointUrl = Annotated[str | None, typer.Option("--endpoint", help="An OpenAI-compatible URL (.../v1) that serves it")]
EndpointModel = Annotated[str | None, typer.Option(help="The endpoint's name of the model")]
TokenizerFolder = Annotated[
    Path | None, typer.Option(help="The model's tokenizer: the endpoint is then sent token ids in place of text")
]
VerdictFile = Annotated[
    Path | None, typer.Option("--out", help="Verdicts (default: FILE's name, less .jsonl, + .verdicts.jsonl, here)")
]
PromptField = Annotated[str, typer.Option(help="The field that holds the request")]
ResponseField = Annotated[str, typer.Option(help="The field that holds the answer")]
Root = Annotated[Path, typer.Option(help="Where an engine's model and logs are kept")]
Gpu = Annotated[bool, typer.Option("--gpu", help="Serve the model on a GPU")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest prompt and answer of the engine, in tokens")]


def _served(
    model: str | None,
    revision: str | None,
    endpoint: str | None,
    endpoint_model: str | None,
    tokenizer: Path | None,
    root: Path,
    gpu: bool,
    max_tokens: int,
) -> Any:
    from safecl.judging import served

    return served.find(
        model,
        revision,
        endpoint,
        endpoint_model,
        tokenizer,
        served.execution(root, gpu, max_tokens),
        lambda text: print(text, file=sys.stderr),
    )


def _verdict_file(file: Path) -> Path:
    """Default path of the verdicts on a file. It differs for a.csv and a.jsonl."""
    return Path(f"{file.name.removesuffix('.jsonl').replace(':', '-')}.verdicts.jsonl")


def _end(problem: str | None) -> None:
    if problem is not None:
        print(problem, file=sys.stderr)
        raise typer.Exit(1)


@judge_app.command()
def score(
    file: Pairs,
    judge: JudgeNames,
    plugin: Plugins = [],  # noqa: B006
    model: ModelSource = None,
    revision: Revision = None,
    endpoint: EndpointUrl = None,
    endpoint_model: EndpointModel = None,
    tokenizer: TokenizerFolder = None,
    validation: Annotated[
        Path | None, typer.Option(help="What `judge validate --json` printed: corrects rates by it (Rogan-Gladen)")
    ] = None,
    prompt_field: PromptField = "prompt",
    response_field: ResponseField = "response",
    out: VerdictFile = None,
    root: Root = Path("runs"),
    gpu: Gpu = False,
    max_tokens: MaxTokens = 4096,
    as_json: AsJson = False,
) -> None:
    """Write a verdict on every answer of a file, and print their rates with Wilson intervals.

    Verdicts that are in the output file already are not asked for again, so the same command continues. Exits 1 if more
    than 1 % of a judge's answers cannot be read.
    """
    from safecl import registry
    from safecl.judging import score as judging
    from safecl.judging import show

    registry.use(plugin)
    found = None if validation is None else judging.load_validation(validation)
    served = _served(model, revision, endpoint, endpoint_model, tokenizer, root, gpu, max_tokens)
    target = out or _verdict_file(file)
    judged = judging.judge_file(file, judge, served, target, (prompt_field, response_field))
    result = judging.rates(judged, found)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print_table(f"{len(judged.pairs)} answers of {file.name}", *show.rates(result))
        for line in show.why_not(result["judges"]):
            print(line)
        print(f"verdicts: {target}", file=sys.stderr)
    _end(judging.unreadable(judged))


@judge_app.command()
def validate(
    file: Pairs,
    judge: JudgeNames,
    label: Annotated[str, typer.Option(help="The field that holds the human label")],
    positive: Annotated[
        str, typer.Option(help="Its values that mean what the judge's True means, with commas between")
    ],
    by: Annotated[str | None, typer.Option(help="A field: agreement for each of its values too")] = None,
    plugin: Plugins = [],  # noqa: B006
    model: ModelSource = None,
    revision: Revision = None,
    endpoint: EndpointUrl = None,
    endpoint_model: EndpointModel = None,
    tokenizer: TokenizerFolder = None,
    prompt_field: PromptField = "prompt",
    response_field: ResponseField = "response",
    out: VerdictFile = None,
    root: Root = Path("runs"),
    gpu: Gpu = False,
    max_tokens: MaxTokens = 4096,
    as_json: AsJson = False,
) -> None:
    """Measure judges against human labels: accuracy, F1, kappa, AUROC where a judge has a score, by category.

    FILE may be pyrit:refusal or pyrit:objective, the labels that an installed PyRIT ships. `--by half` tells apart the two
    halves of any file, by a hash of the prompt: rules are written on the first and measured on the second.

    Each category's rate is also corrected by the errors seen in the other categories (Rogan-Gladen). Exits 1 if more
    than 1 % of a judge's answers cannot be read.
    """
    from safecl import registry
    from safecl.judging import score as judging
    from safecl.judging import show

    registry.use(plugin)
    served = _served(model, revision, endpoint, endpoint_model, tokenizer, root, gpu, max_tokens)
    target = out or _verdict_file(file)
    judged = judging.judge_file(file, judge, served, target, (prompt_field, response_field), (label, by))
    result = judging.validate(judged, label, positive.split(","), by)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        for title, columns, rows in show.quality(result):
            print_table(title, columns, rows)
        for name, entry in result["judges"].items():
            for line in show.why_not(entry.get("by", {})):
                print(f"{name}, {line}")
    _end(judging.unreadable(judged))


@judge_app.command()
def serve(
    judge: Annotated[str, typer.Option(help='NAME, or NAME:{"key": value}')],
    plugin: Plugins = [],  # noqa: B006
    model: ModelSource = None,
    revision: Revision = None,
    host: Annotated[
        str, typer.Option(help="Another than this machine's own wants SAFECL_JUDGE_TOKEN set")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8765,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests at once; more are told to come again (429)")] = 64,
    root: Root = Path("runs"),
    gpu: Gpu = False,
    max_tokens: MaxTokens = 4096,
) -> None:
    """Serve a judge over HTTP on this machine: POST /v1/judge with {"prompt", "response"} answers with its verdict."""
    from safecl import registry
    from safecl.judging import http

    registry.use(plugin)
    served = _served(model, revision, None, None, None, root, gpu, max_tokens)
    http.serve(
        judge, served, host, port, max_waiting, lambda text: print(text, file=sys.stderr), os.environ.get(http.TOKEN)
    )


@judge_app.command()
def train(file: File, set_: Set = [], limit: Limit = None, as_json: AsJson = False) -> None:  # noqa: B006
    """Train the guard of a sweep file, and nothing else; print how it agrees with the labels of held-out pairs."""
    from safecl import driver
    from safecl.judging import show

    found = driver.train_guard(project_to_run(file, set_, limit), lambda text: print(text, file=sys.stderr))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print_table("guard on held-out pairs", *show.qualities({"held out": found["heldout"]}))
    print(f"guard: {found['guard'][:16]} (safecl export {found['guard'][:12]} FOLDER --merged)", file=sys.stderr)
