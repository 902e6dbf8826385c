"""Fixtures shared by all rooms."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from safecl.testing.tiny import build_model as build_model
from safecl.testing.tiny import build_tokenizer as build_tokenizer

if TYPE_CHECKING:
    from safecl.testing.world import World
    from tests.browser import Browser

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else transformers' integration prints that it found none
os.environ.setdefault("HF_HUB_OFFLINE", "1")

gc.set_threshold(50_000, 10, 10)  # as cli.py does: what imports and fixtures make lives on

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of several processes slow each other twentyfold

# `make test` runs two processes, a file's tests in one of them, since they share its fixtures. What starts Ray and engines
# goes first and stands in one line: two clusters at once would want more memory than a small machine has, and would
# see each other's processes. So does, in the other process, what takes ranks: their libraries are imported once.
CLUSTERS = ["test_end_to_end.py", "serving/test_engine.py", "test_trainers.py", "test_execute.py", "test_nodes.py"]
PAGES = ["report/test_page.py", "report/test_labelled.py"]  # in one process: they share a browser
RANKS = ["methods/test_contract.py", "training/test_loop.py", "training/test_ranks.py", "training/test_engine.py"]
# Programs that wait for their time to be over leave a core to the processes of a cluster, which need more than one.
WAITING = ["test_sandbox.py", "test_fakes.py", "tasks/test_code.py", "tasks/test_program.py"]
TRACKED = ["tracking/test_tracker.py", "tracking/test_logbook.py"]  # MLflow is imported, and its database made, once
# Of the others, those that take longest begin first.
LONG = [
    *TRACKED,
    "test_aligned.py",
    "test_trained.py",
    "test_search.py",
    "test_study.py",
    "test_datafile.py",
]


@pytest.fixture(scope="session", autouse=True)
def _soon_written() -> None:
    """SQLite waits for the disk at every commit, which only a machine that loses its power would miss: processes that are
    killed do not. Studies and MLflow commit thousands of times."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    @event.listens_for(Engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        if type(connection).__module__.startswith("sqlite3"):
            connection.execute("PRAGMA synchronous = OFF")


@pytest.fixture(scope="session", autouse=True)
def _read_once() -> None:
    """Typer reads the signatures of all commands each time that one is called, 0.1 s. A process of a user calls one."""
    from typer import main, testing

    main.get_command = testing._get_command = cache(main.get_command)  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, Path]:
    """Folders of tiny random models by architecture."""
    from safecl.testing.world import tiny_model

    return {kind: tiny_model(kind) for kind in ("llama", "mistral", "gemma2")}


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Folder of a tiny random Llama and its tokenizer, in Hugging Face format."""
    from safecl.testing.world import tiny_model

    return tiny_model("llama")


@pytest.fixture(scope="session")
def world() -> World:
    """The tiny model aligned, with what methods ask for."""
    from safecl.testing.world import a_world

    return a_world()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder, and a local Ray cluster as a sweep starts it: of the files in CLUSTERS that need none of their own."""
    from safecl import cluster as ray_cluster
    from safecl.config import Execution

    folder = tmp_path_factory.mktemp("cluster")
    ray_cluster.start(Execution(root=str(folder / "root")), folder / "logs")
    yield folder
    ray_cluster.stop(Execution(), "")


@pytest.fixture(scope="session")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from tests.browser import browser

    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def web(_browser: Browser) -> Browser:
    """A headless Chromium, one for all tests of this process, on an empty page."""
    _browser.forget()
    return _browser


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and items live to the end: without them a collection of garbage is short


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(CLUSTERS + WAITING + RANKS + LONG)}
    items.sort(key=lambda item: order.get(_file(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist; its own groups (3.8) do not reach pytest 9's node ids
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = _file(nodeid)
            return next((f"with {files[0]}" for files in (CLUSTERS, RANKS, PAGES, TRACKED) if file in files), file)

    return ByFile(config, log)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The cluster ends after the last test that uses it: its processes take a tenth of a core, idle too."""
    ray = sys.modules.get("ray")
    if (
        ray is not None
        and nextitem is not None
        and _file(item.nodeid) in CLUSTERS
        and _file(nextitem.nodeid) not in CLUSTERS
    ):
        ray.shutdown()


def pytest_sessionfinish() -> None:
    ranks = sys.modules.get("safecl.testing.ranks")
    if ranks is not None:
        ranks.close()
