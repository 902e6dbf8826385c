"""An empty database of MLflow's, whose making takes seconds: made once and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from safecl.tracking.server import Server


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an empty database."""
    root = tmp_path_factory.mktemp("template")
    Server(f"sqlite:///{root / 'mlflow.db'}", root)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A root of a run, with an empty database."""
    shutil.copy(template / "mlflow.db", tmp_path)
    return tmp_path
