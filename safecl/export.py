"""Export a trial's weights for other programs: as a PEFT adapter, or as a merged model in Hugging Face format."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safecl.base import ConfigError
from safecl.stages import load as kind_of
from safecl.stages import names
from safecl.store import Store


def export(store: Store, key: str, out: Path, merged: bool) -> Path:
    """Write the weights of a finetune or finalize stage into a new folder, and return the folder.

    The folder also gets the template of the training as chat template. It appears only when it is complete.

    Args:
        key: the beginning of the stage's key.
        out: the new folder.
        merged: False: write the PEFT adapter. True: write the whole model with its tokenizer; base + adapter are summed in
            float32 and rounded once to the model's dtype in the sweep.

    Raises:
        ConfigError: no stage or several stages have such a key, `out` exists, or an adapter is asked for where the stage
            changed whole weights.
    """
    from safecl.training.tokens import base_folder, weights_folder

    record = _only(store, key)
    if out.exists():
        raise ConfigError(f"{str(out)!r} is there already: name a new folder")
    weights = weights_folder(store.folder(record))
    if weights.name == "delta" and not merged:
        raise ConfigError(
            f"stage {key!r} ({record['config']['method']}) changes whole weights, which no adapter can hold: add --merged"
        )
    while "tuned" in record["inputs"]:  # a finalize stage has a finetune as input, and the finetune names the model
        record = _only(store, record["inputs"]["tuned"])
    model = _only(store, record["inputs"]["model"])
    base, dtype = base_folder(store.folder(model)), str(model["config"]["dtype"])
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if merged:
            _write_model(base, weights, dtype, temporary)
        else:
            shutil.copytree(weights, temporary)
            config = json.loads((weights / "adapter_config.json").read_text())
            (temporary / "adapter_config.json").write_text(
                json.dumps({**config, "base_model_name_or_path": str(base)}, indent=2, sort_keys=True)
            )
        if "template" in record["config"]:
            _write_template(record["config"], base, temporary, merged)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _only(store: Store, key: str) -> dict[str, Any]:
    holding = {name for name in names() if kind_of(name).holds_weights}
    found = [record for record in store.find(key) if record["kind"] in holding]
    if len(found) != 1:
        what = "no" if not found else f"{len(found)}"
        raise ConfigError(
            f"{what} stages that hold weights have a key that begins with {key!r}, expected one; `safecl status FILE` "
            "prints the key of each row's weights, and --root names the store"
        )
    return found[0]


def _write_template(config: Any, base: Path, out: Path, merged: bool) -> None:
    """Write the chat template, so that a server writes prompts as in training. For a whole model also write the tokens at which
    its answers end."""
    from safecl.templates import chat_template, whole
    from safecl.training.tokens import Tokenizer

    tokenizer = Tokenizer(base)
    template = whole(config["template"], tokenizer)
    text = chat_template(template, config["bos"], tokenizer.special_texts.get("bos_token"))
    (out / "chat_template.jinja").write_text(text, encoding="utf-8")
    if merged:
        file = out / "generation_config.json"
        settings = json.loads(file.read_text()) if file.is_file() else {}
        ends = dict.fromkeys((tokenizer.id_of(template["end"]), *tokenizer.eos_ids))
        file.write_text(json.dumps({**settings, "eos_token_id": [id for id in ends if id is not None]}, indent=2))


def _write_model(base: Path, weights: Path, dtype: str, out: Path) -> None:
    import torch

    from safecl.serving import swap
    from safecl.training.shards import Shards

    swap.check(base, base, weights)
    out.mkdir(parents=True)
    for file in base.iterdir():
        if file.is_file() and not file.name.startswith("model.safetensors") and file.suffix != ".safetensors":
            shutil.copy(file, out / file.name)
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2, sort_keys=True))
    shards = Shards(out, "shard")
    for name, tensor in swap.merged(base, weights, dtype=getattr(torch, dtype)):
        shards.add(name, tensor)
    shards.close()
    written = sorted(set(shards.files.values()))
    if len(written) == 1:
        (out / written[0]).rename(out / "model.safetensors")
        return
    named = {shard: f"model-{i:05d}-of-{len(written):05d}.safetensors" for i, shard in enumerate(written, 1)}
    for shard, name in named.items():
        (out / shard).rename(out / name)
    weight_map = {tensor: named[shard] for tensor, shard in shards.files.items()}
    index = {"metadata": {"total_size": shards.num_bytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
