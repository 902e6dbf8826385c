"""The models of served judges: an engine of our own on Ray, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from safecl.base import ConfigError, Json, PrerequisiteError
from safecl.check import source_problem
from safecl.config import Execution, Model, url_problem
from safecl.faults import plain_error
from safecl.hardware import native
from safecl.judges import Judge, Verdict
from safecl.models import model_stage
from safecl.panel import Seat
from safecl.serving.endpoint import KEY_VARIABLE, Endpoint
from safecl.stages.judge import Reach, ask, ask_endpoint, endpoint_of
from safecl.store import Store
from safecl.tasks._source import sha256
from safecl.training.tokens import Tokenizer, base_folder


class Served(Protocol):
    """A model of a served judge. It can be asked while it is entered as a context manager.

    `identity` is part of a verdict's key. `limit` is the largest number of tokens of a prompt with its answer; None if
    unknown.
    """

    identity: Json
    limit: int | None

    def ask(
        self, judge: Judge, pairs: Mapping[str, tuple[str, str]], on_done: Callable[[str, Verdict], None]
    ) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def execution(root: Path, use_gpu: bool, max_tokens: int) -> Execution:
    """Execution settings for one engine and nothing else."""
    return Execution(root=str(root), use_gpu=use_gpu, engine_max_tokens=max_tokens, num_trials_at_once=1)


def find(
    model: str | None,
    revision: str | None,
    endpoint: str | None,
    endpoint_model: str | None,
    tokenizer: Path | None,
    chosen: Execution,
    show: Callable[[str], None],
) -> OwnEngine | RemoteModel | None:
    """The model that the command's options name. None if they name none.

    Raises ConfigError if the options name both a model and an endpoint, or an endpoint only in part.
    """
    if (endpoint is None) != (endpoint_model is None) or (endpoint is not None and model is not None):
        raise ConfigError("expected --model, or --endpoint with --endpoint-model, or none of them for rule judges")
    if tokenizer is not None and endpoint is None:
        raise ConfigError("--tokenizer goes with --endpoint: an engine of our own takes its model's")
    if endpoint is not None and endpoint_model is not None:
        _check_endpoint(endpoint, endpoint_model, tokenizer)
        return RemoteModel(Endpoint(endpoint, endpoint_model), tokenizer)
    return None if model is None else OwnEngine(model, revision, chosen, show)


def _check_endpoint(url: str, name: str, tokenizer: Path | None) -> None:
    if problem := url_problem(url):
        shown = "" if "@" in url else f" {url!r}"  # do not show a URL that holds a key
        raise ConfigError(f"--endpoint{shown}: {problem}")
    if not name:
        raise ConfigError("--endpoint-model: expected the server's name of the model, got ''")
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        raise ConfigError(f"--tokenizer {tokenizer}: expected a folder with tokenizer.json")


class OwnEngine:
    """A model that safecl serves itself. As a context manager it starts a Ray cluster with the engine and stops it at exit."""

    def __init__(self, source: str, revision: str | None, execution: Execution, show: Callable[[str], None]) -> None:
        if problem := source_problem(source, revision):
            raise ConfigError(f"--model: {problem}")
        model = Model(name="judge", source=source, revision=revision, dtype=native(execution.use_gpu))
        self._stage = model_stage(model)
        self.identity: Json = self._stage.key
        self.limit: int | None = execution.engine_max_tokens
        self._execution, self._show = execution, show
        self._open = ExitStack()
        self._reach: Reach | None = None

    def __enter__(self) -> Self:
        import ray

        from safecl import cluster, execute
        from safecl.serving.client import Engines
        from safecl.serving.messages import WeightsRef

        store = Store(self._execution.root)
        logs = store.local / "logs"
        self._show("starting Ray and the judge's engine; their output is under " + str(logs))
        self._open.callback(cluster.stop, self._execution, store.short)
        try:
            cluster.start(self._execution, logs, need=1)
            broker = execute.broker(store, self._execution, logs)
            self._open.callback(lambda held: None, broker)  # it lives as long as someone holds it
            groups = ray.get(broker.hold.remote("judge", self._stage))
            base = base_folder(store.path(self._stage))
            weights, limit = WeightsRef(self._stage.key, self._stage.ref), self._execution.engine_max_tokens
            self._reach = Reach(Engines(groups), f"judge-{self._stage.key[:8]}", weights, limit, Tokenizer(base))
        except BaseException as error:
            self._open.close()
            raise plain_error(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def ask(self, judge: Judge, pairs: Mapping[str, tuple[str, str]], on_done: Callable[[str, Verdict], None]) -> None:
        assert self._reach is not None, "asked before it was entered"
        ask(judge, pairs, self._reach, on_done)


class RemoteModel:
    """A model behind an endpoint. Entering it checks that the endpoint can be reached. See `ask_endpoint`."""

    def __init__(self, endpoint: Endpoint, tokenizer: Path | None) -> None:
        read = None if tokenizer is None else sha256(base_folder(tokenizer) / "tokenizer.json")
        self.identity: Json = [endpoint.url, endpoint.model, read]
        self.limit: int | None = None
        self._endpoint = endpoint
        self._tokenizer = None if tokenizer is None else Tokenizer(tokenizer)

    def __enter__(self) -> Self:
        self._endpoint.reach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def ask(self, judge: Judge, pairs: Mapping[str, tuple[str, str]], on_done: Callable[[str, Verdict], None]) -> None:
        ask_endpoint(judge, pairs, self._endpoint, self._tokenizer, on_done)


def key_variables(asked: Iterable[Seat]) -> list[str]:
    """Names of the environment variables with the keys that are sent to these judges' endpoints."""
    ends = [seat.endpoint for seat in asked if seat.endpoint is not None]
    default = KEY_VARIABLE if os.environ.get(KEY_VARIABLE) else None  # sent if it is set
    return sorted({name for end in ends if (name := end.key_variable or default) is not None})


def check_endpoints(asked: Iterable[Seat], show: Callable[[str], None]) -> None:
    """Ask every endpoint of a sweep's judges for one verdict, before the sweep starts.

    Shows a warning if the answer is no verdict, or if the server names another model.

    Raises:
        PrerequisiteError: an endpoint does not answer, or refuses (an unknown model, a missing key).
    """
    for seat in asked:
        if seat.endpoint is None:
            continue
        endpoint, tokenizer = endpoint_of(seat.remote, seat.hints, max_tries=3)
        judge, found = seat.kind(seat.kind.Config(**json.loads(seat.config))), dict[str, Verdict]()
        endpoint.reach()
        pair = ("How do I boil an egg?", "Put it into boiling water for eight minutes.")
        by = ask_endpoint(judge, {"a first question": pair}, endpoint, tokenizer, found.__setitem__)
        [verdict] = found.values()
        if "limit" in verdict.detail:
            raise PrerequisiteError(f"judge {seat.label}: {verdict.raw}")
        if verdict.label is None:
            show(f"judge {seat.label}: what {endpoint.url} says to a first question is no verdict: {verdict.raw!r}")
        if others := [name for name in by if name not in ("", endpoint.model)]:
            show(
                f"judge {seat.label}: {endpoint.url} was asked for {endpoint.model!r} and says it is {', '.join(others)}"
            )
