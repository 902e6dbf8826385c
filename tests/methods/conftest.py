from pathlib import Path

import pytest

from tests.methods import contract


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> contract.World:
    return contract.build_world(tmp_path_factory.mktemp("world"), tiny_model)
