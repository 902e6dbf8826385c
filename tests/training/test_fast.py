"""What makes training fast changes nothing: rows end to end against rows alone on Hugging Face's own model and eager
attention, one-node LoRA layers and norms against PEFT's and transformers' chains, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.base import PrerequisiteError
from safecl.config import Lora, Template
from safecl.testing.world import World
from safecl.training import attention, batches, model
from safecl.training.batches import Batch
from safecl.training.model import HiddenStates
from safecl.training.tokens import Encoded

LENGTHS = (30, 7, 41)  # two are longer than the sliding window of 24


def _rows() -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    return [Encoded(str(n), torch.randint(3, 300, (n,), generator=generator).tolist(), 1 + n // 3) for n in LENGTHS]


def _batch(rows: list[Encoded], seeds: list[int] | None = None) -> Batch:
    return batches.collate(rows, range(len(rows)), seeds or [11, 12, 13][: len(rows)], 1, rows[0], "cpu")


def _adapted(folder: Path, dropout: float = 0.0, dtype: str = "float32") -> Any:
    """An adapted model whose B is not zero, and scores that reach the attention's soft cap where there is one."""
    base = model.load(folder, dtype)
    adapted = model.with_adapter(base, Lora(dropout=dropout).model_dump(), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, factor in model.factors(adapted).items():
            if "lora_B" in name:
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.05)
        for name, parameter in adapted.named_parameters():
            if "gemma2" in str(folder) and ("q_proj.base_layer" in name or "k_proj.base_layer" in name):
                parameter.mul_(4.0)
    return adapted


def _gradients(states: HiddenStates, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    hidden_PD = states(batch)
    weights = torch.linspace(-1, 1, hidden_PD.numel()).view_as(hidden_PD).to(hidden_PD.device)
    (hidden_PD.float() * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.factors(states.peft_model).items() if p.grad is not None}
    states.zero_grad()
    return hidden_PD.detach(), found


def _same(first: Any, second: Any, tolerance: float = 1e-4) -> None:  # float32 rounding: measured up to 2e-5
    assert (first[0] - second[0]).norm() < tolerance * second[0].norm()
    assert set(first[1]) == set(second[1])
    for name, expected in second[1].items():
        assert (first[1][name] - expected).norm() < tolerance * expected.norm(), name


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_rows_end_to_end_are_each_row_alone_in_eager_attention(kind: str, tiny_models: dict[str, Path]) -> None:
    """Also where scores reach Gemma-2's soft cap on attention, which transformers' default attention leaves out."""
    ours = HiddenStates(_adapted(tiny_models[kind]))
    found = _gradients(ours, _batch(_rows()))
    theirs = _adapted(tiny_models[kind])
    theirs.get_base_model().set_attn_implementation("eager")
    alone = HiddenStates(theirs, fused=False)
    hidden, total = [], {}
    start = 0
    for row in _rows():
        end = start + len(row.ids)
        out = theirs.get_base_model().model(input_ids=torch.tensor([row.ids])).last_hidden_state[0]
        weights = torch.linspace(-1, 1, sum(LENGTHS) * out.shape[1]).view(-1, out.shape[1])[start:end]
        (out * weights).sum().backward()
        hidden.append(out.detach())
        start = end
    total = {name: p.grad.clone() for name, p in model.factors(alone.peft_model).items() if p.grad is not None}
    _same(found, (torch.cat(hidden), total))
    if kind == "gemma2":
        theirs.get_base_model().set_attn_implementation("sdpa")
        with torch.no_grad():
            uncapped = theirs.get_base_model().model(input_ids=torch.tensor([_rows()[0].ids])).last_hidden_state[0]
        assert (uncapped - hidden[0]).norm() > 5e-4 * hidden[0].norm()  # so the cap was reached


def _unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_supports_attention_backend", False)


def test_a_model_without_the_attention_registry_gets_padded_rows(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _gradients(HiddenStates(_adapted(tiny_model)), _batch(_rows()))
    _unregistered(monkeypatch)
    padded = HiddenStates(_adapted(tiny_model))
    assert padded.base.config._attn_implementation != attention.NAME
    _same(_gradients(padded, _batch(_rows())), found)


def test_padded_rows_have_dropout_of_their_own_and_a_fisher(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of other lengths: what stands beside a row does not change its mask, nor the Fisher information."""
    from safetensors.torch import load_file

    from safecl.stages import fisher

    settings = {
        "seed": 3, "template": Template().model_dump(), "bos": False, "dtype": "float32", "max_tokens": 256, "num_rows": 9,
        "labels": "empirical",
    }  # fmt: skip
    found = []
    for name in ("whole", "padded"):
        (tmp_path / name).mkdir()
        inputs = {"model": world.model, "safe": world.safe, "rows": world.user}
        fisher.estimate(settings, inputs, tmp_path / name, 4)
        found.append(load_file(str(tmp_path / name / "fisher.safetensors")))
        _unregistered(monkeypatch)
    for name, value in found[0].items():
        assert (found[1][name] - value).norm() < 1e-4 * value.norm()
    states = HiddenStates(_adapted(world.model, dropout=0.25)).train()
    first, again = (states(_batch(_rows(), [11, 12, last])).detach() for last in (13, 99))
    assert torch.equal(first[: sum(LENGTHS[:2])], again[: sum(LENGTHS[:2])]) and not torch.equal(first, again)


@pytest.mark.parametrize("kind", ["lfm2", "recurrent_gemma"])
def test_rows_of_a_model_that_is_not_attention_alone_are_padded(kind: str, tmp_path: Path) -> None:
    """Convolutions and running states would go on from one row into the next."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own: dict[str, Any] = {
        "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "recurrent_gemma": {"lru_width": 64, "attention_window_size": 64, "head_dim": 32},
    }[kind]
    config = AutoConfig.for_model(
        kind, vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, **own,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path))
    states = HiddenStates(model.load(tmp_path, "float32")).eval()
    with torch.no_grad():
        together = states(_batch(_rows()))
        alone = torch.cat([states(_batch([row])) for row in _rows()])
    assert (together - alone).norm() < 1e-4 * alone.norm()


def test_the_bases_own_dropout_is_off(tmp_path: Path) -> None:
    """Its masks would depend on what the process drew before."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=2)).save_pretrained(str(tmp_path))
    states = HiddenStates(model.load(tmp_path, "float32")).train()
    with torch.no_grad():
        assert torch.equal(states(_batch(_rows())), states(_batch(_rows())))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_one_node_is_the_chain_it_replaces(kind: str, dropout: float, tiny_models: dict[str, Path]) -> None:
    """With dropout too: both draw the same masks."""
    fused, chain = (HiddenStates(_adapted(tiny_models[kind], dropout), fused=f).train() for f in (True, False))
    replaced = [name for name, module in fused.named_modules() if "forward" in vars(module)]
    norms = [name for name, module in chain.named_modules() if type(module).__name__.endswith("RMSNorm")]
    assert len(replaced) == 2 * 7 + len(norms)
    _same(_gradients(fused, _batch(_rows())), _gradients(chain, _batch(_rows())))
    other = _gradients(fused, _batch(_rows(), [11, 12, 99]))
    assert torch.equal(other[0][:37], _gradients(fused, _batch(_rows()))[0][:37])  # the first two rows' masks stay
    assert torch.equal(other[0], _gradients(fused, _batch(_rows()))[0]) == (dropout == 0)


def test_bfloat16_is_as_near_to_float32_as_the_chain_is(tiny_model: Path) -> None:
    exact = _gradients(HiddenStates(_adapted(tiny_model)), _batch(_rows()))[1]

    def error(fused: bool) -> float:
        found = _gradients(HiddenStates(_adapted(tiny_model, dtype="bfloat16"), fused), _batch(_rows()))[1]
        apart = sum(float((found[n] - exact[n]).square().sum()) for n in exact)
        return float(apart / sum(float(g.square().sum()) for g in exact.values())) ** 0.5

    assert error(True) < 1.5 * error(False)


def test_attention_without_row_bounds_is_refused_not_done_across_rows() -> None:
    class Forgetful(torch.nn.Module):
        pass

    states = torch.zeros(1, 2, 5, 4)
    with attention.packed(), pytest.raises(PrerequisiteError, match="Forgetful does not hand row bounds"):
        attention.rows_attention(Forgetful(), states, states, states, None)
    with pytest.raises(PrerequisiteError, match="s_aux"):
        attention.rows_attention(Forgetful(), states, states, states, None, s_aux=torch.zeros(2))
