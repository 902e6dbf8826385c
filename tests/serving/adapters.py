"""Adapters and changed bases for the tests of this folder."""

from __future__ import annotations

from pathlib import Path


def make_adapter(base: Path, folder: Path, seed: int, std: float = 0.2, **lora: object) -> Path:
    """A PEFT LoRA adapter (rank 4, alpha 6: a scale that is not 1) on all linear modules, B drawn with `std`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings: dict[str, object] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **lora}
        peft_model = get_peft_model(model, LoraConfig(**settings))  # type: ignore[arg-type]
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=std)
        peft_model.save_pretrained(str(folder))
    return folder


def make_deltas(base: Path, folder: Path, seed: int, std: float = 0.1) -> Path:
    """Dense deltas of the embedding, the last norm and one linear layer, drawn with `std`."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    names = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight")
    chance, tensors = torch.Generator().manual_seed(seed), load_file(base / "model.safetensors")
    deltas = {name: std * torch.randn(tensors[name].shape, generator=chance) for name in names}
    save_file(deltas, folder / "delta.safetensors")
    (folder / "delta.json").write_text(json.dumps(dict.fromkeys(names, "delta.safetensors")))
    return folder


def change_base(base: Path, folder: Path, *, dtype: str = "", noise: float = 0.0, drop: str = "") -> Path:
    """A copy of `base` with its tensors in `dtype`, `noise` added to the embedding, one tensor dropped."""
    import json
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    if noise:
        embedding = tensors["model.embed_tokens.weight"]
        draw = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(11))
        tensors["model.embed_tokens.weight"] = embedding + noise * draw
    if drop:
        del tensors[drop]
    if dtype:
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
