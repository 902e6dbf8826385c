"""What a swap loads, without an engine: the merge itself, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from safecl.serving import swap
from tests.serving.adapters import change_base, make_adapter, make_deltas


def test_the_merge_gives_the_logits_of_the_model_with_its_adapter(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for number, extra in enumerate(({}, {"use_rslora": True})):
        adapter = make_adapter(tiny_model, tmp_path / str(number), seed=number, **extra)
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), str(adapter)
        ).eval()
        merged = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
        missing = merged.load_state_dict(dict(swap.merged(tiny_model, adapter)), strict=False)
        assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}  # tied
        ids = torch.arange(3, 43).view(2, 20)
        with torch.no_grad():
            theirs, ours, base = adapted(ids).logits, merged(ids).logits, plain(ids).logits
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
        assert (base - theirs).abs().max() > 1e-2 * theirs.abs().max(), "the adapter changes nothing: test is void"


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    base = change_base(tiny_model, tmp_path / "base", dtype="bfloat16")
    adapter = make_adapter(tiny_model, tmp_path / "adapter", seed=0)
    weights, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    got = dict(swap.merged(base, adapter))
    assert set(got) == set(weights)
    name = "model.layers.1.mlp.down_proj"
    a_RI, b_OR = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    exact = weights[f"{name}.weight"].double() + 6 / 4 * b_OR @ a_RI
    assert got[f"{name}.weight"].dtype == torch.bfloat16
    # bfloat16 has 8 significant bits, so the nearest one to x lies within half of 2^(floor(log2|x|) - 7); the float32
    # sum adds noise far below that. A product or sum in bfloat16 would err by several times as much somewhere.
    half_spacing = 0.5 * torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
    assert ((got[f"{name}.weight"].double() - exact).abs() <= half_spacing * 1.001 + 1e-7).all()
    wider = dict(swap.merged(base, adapter, dtype=torch.float32))  # an engine in float32 rounds nothing
    assert (wider[f"{name}.weight"].double() - exact).abs().max() < 1e-6 * exact.abs().max()
    narrower = dict(
        swap.merged(tiny_model, adapter, dtype=torch.bfloat16)
    )  # the base is rounded first, as for training
    assert torch.equal(narrower[f"{name}.weight"], got[f"{name}.weight"])
    untouched = "model.norm.weight"
    assert torch.equal(got[untouched], weights[untouched])


def test_tensors_are_fresh_so_that_writing_to_them_reaches_nobody(tiny_model: Path) -> None:
    import torch

    first = dict(swap.merged(tiny_model, None))
    before = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in first.values():
        tensor.fill_(float("nan"))
    again = dict(swap.merged(tiny_model, None))
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_only_the_tensors_asked_for_are_read_and_merged_as_ever(tiny_model: Path, tmp_path: Path) -> None:
    """To the bit, for both kinds of changes: what is shared between tensors (the place of the sums) leaks into none."""
    import torch
    from safetensors.torch import load_file

    adapter = make_adapter(tiny_model, tmp_path / "adapter", seed=0)
    deltas = make_deltas(tiny_model, tmp_path / "deltas", seed=1)
    base, factors = load_file(tiny_model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    expected = {
        "deltas": {name: base[name] + delta for name, delta in load_file(deltas / "delta.safetensors").items()},
        "adapter": {
            f"{name}.weight": torch.addmm(
                base[f"{name}.weight"],
                *(factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA"),
                alpha=1.5,
            )
            for name in (key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in factors)
            if not name.endswith("lora_B.weight")
        },
    }
    for folder, merged in zip((deltas, adapter), expected.values(), strict=True):
        whole = dict(swap.merged(tiny_model, folder))
        assert whole.keys() == base.keys()
        assert all(torch.equal(tensor, merged.get(name, base[name])) for name, tensor in whole.items())
        assert dict(swap.merged(tiny_model, folder, only=merged)).keys() == merged.keys()
        with pytest.raises(ValueError, match="not applied"):
            list(swap.merged(tiny_model, folder, only=list(merged)[1:]))


def test_files_that_were_replaced_or_written_to_have_another_stamp(tiny_model: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_model, tmp_path / "copy")
    before = swap.stamp(copied)
    assert before == swap.stamp(copied) != swap.stamp(tiny_model)
    (tmp_path / "link").symlink_to(copied)
    assert swap.stamp(tmp_path / "link") == before
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes())
    assert swap.stamp(copied) != before


def test_the_loader_is_asked_where_each_tensor_goes_and_writes_nothing() -> None:
    import torch

    class Stacked(torch.nn.Module):
        """q and k in one parameter; a head tied to the embedding, which the loader refuses alone as vLLM's does."""

        def __init__(self) -> None:
            super().__init__()
            self.qk, self.embedding = (torch.nn.Parameter(torch.ones(4, 2)) for _ in range(2))
            self.qk.weight_loader = self.load  # type: ignore[attr-defined]

        def load(self, parameter: torch.nn.Parameter, tensor: torch.Tensor, shard: int) -> None:
            parameter.data[2 * shard : 2 * shard + 2] = tensor

        def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
            for name, tensor in weights:
                if name == "head":
                    raise ValueError("tied")
                if name == "embedding":
                    getattr(self.embedding, "weight_loader", lambda p, t: p.data.copy_(t))(self.embedding, tensor)
                else:
                    self.qk.weight_loader(self.qk, tensor, "qk".index(name))  # type: ignore[attr-defined]
            return {"embedding" if name == "embedding" else "qk" for name, _ in weights}

    model = Stacked()
    shapes = {"q": [2, 2], "k": [2, 2], "embedding": [4, 2], "head": [4, 2]}
    found = swap.owners(model, shapes, torch.float32)
    assert found == {"q": {"qk"}, "k": {"qk"}, "embedding": {"embedding"}, "head": set()}
    assert torch.equal(model.qk, torch.ones(4, 2)) and not hasattr(model.embedding, "weight_loader")
    model.load_weights([("k", torch.zeros(2, 2))])
    assert model.qk[2:].sum() == 0, "the model's own loader is back"


def test_a_sharded_base_is_read_through_its_index(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.save_pretrained(str(tmp_path), max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    whole, sharded = dict(swap.merged(tiny_model, None)), dict(swap.merged(tmp_path, None))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def edit_adapter(adapter: Path, folder: Path, *, config: dict[str, object] | None = None, rename: str = "") -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    written = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(written))
    tensors = load_file(folder / "adapter_model.safetensors")
    if rename:
        old, new = rename.split("->")
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_what_cannot_be_merged_whole_is_refused_before_anything_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    good = make_adapter(tiny_model, tmp_path / "good", seed=0)
    swap.check(tiny_model, tiny_model, good)

    unknown = edit_adapter(good, tmp_path / "unknown", rename="layers.1.mlp.up_proj->layers.7.mlp.up_proj")
    with pytest.raises(ValueError, match=r"layers\.7\.mlp\.up_proj"):
        swap.check(tiny_model, tiny_model, unknown)
    with pytest.raises(ValueError, match=r"layers\.7\.mlp\.up_proj"):
        list(swap.merged(tiny_model, unknown))

    lone = edit_adapter(good, tmp_path / "lone", rename="layers.1.mlp.up_proj.lora_B->layers.7.mlp.up_proj.lora_B")
    with pytest.raises(ValueError, match="pairs"):
        swap.check(tiny_model, tiny_model, lone)

    crossed = good
    for number, rename in enumerate(("up_proj.lora->x.lora", "down_proj.lora->up_proj.lora", "x.lora->down_proj.lora")):
        crossed = edit_adapter(crossed, tmp_path / f"crossed{number}", rename=rename)
    with pytest.raises(ValueError, match=r"shape \[(128, 192|192, 128)\]"):
        swap.check(tiny_model, tiny_model, crossed)

    for config in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"alpha_pattern": {"q_proj": 9}}):
        with pytest.raises(ValueError, match="plain LoRA"):
            swap.check(tiny_model, tiny_model, edit_adapter(good, tmp_path / next(iter(config)), config=config))
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        swap.check(tiny_model, tiny_model, tmp_path)


def test_a_base_without_one_of_the_served_tensors_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    with pytest.raises(ValueError, match=name):
        swap.check(tiny_model, change_base(tiny_model, tmp_path / "less", drop=name), None)


def test_a_parameter_that_was_not_loaded_raises() -> None:
    swap.require_complete({"a", "b"}, {"a", "b", "c"})
    with pytest.raises(RuntimeError, match="1 of 2 parameters"):
        swap.require_complete({"a", "b"}, {"a"})
