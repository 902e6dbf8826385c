"""Everything that a model can ask of its attention is done or refused: held against transformers' own sources."""

from __future__ import annotations

import json
import re
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.base import ConfigError, PrerequisiteError
from safecl.config import Lora
from safecl.training import attention, model

# Told by some model of transformers, and refused: biases, sinks, chosen blocks, masks of their own, another direction.
REFUSED = {"position_bias", "s_aux", "indices", "block_indices"}
NOT_LANGUAGE = {"query", "key", "value"}  # speech models name them


def test_nothing_that_transformers_hands_to_an_attention_is_passed_by_unseen() -> None:
    """A new version may bring a keyword: then it is to be done in rows_attention, or named here as refused."""
    import transformers

    call = re.compile(r"\battention_(?:interface|fn)\(\n((?:[^\n]*\n)*?)[ ]+\)")
    found: dict[str, str] = {}
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for arguments in call.findall(file.read_text(encoding="utf-8")):
            found |= dict.fromkeys(re.findall(r"^\s+(\w+)=", arguments, re.MULTILINE), file.name)
    assert {"softcap", "sliding_window", "s_aux", "scaling"} <= found.keys()  # so the search finds them
    done = {name for name in signature(attention.rows_attention).parameters if name != "others"}
    assert not found.keys() - done - attention.HARMLESS - REFUSED - NOT_LANGUAGE, found
    assert not REFUSED & (done | attention.HARMLESS)


@pytest.mark.parametrize("name", [*sorted(REFUSED), "attention_mask", "something_new"])
def test_what_is_not_done_is_refused_by_name(name: str) -> None:
    states = torch.zeros(1, 2, 5, 4)
    given = {"attention_mask": None, name: torch.zeros(2)}
    with pytest.raises(PrerequisiteError, match=f"Linear asks its attention for {name}"):
        attention.rows_attention(torch.nn.Linear(2, 2), states, states, states, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 8])
def test_rows_padded_and_attended_to_at_once_are_rows_one_after_the_other(
    heads: tuple[int, int], cap: float | None, window: int | None
) -> None:
    """What a GPU computes where flash attention does not: also with a row of no tokens, and padding of other rows' tokens."""
    generator = torch.Generator().manual_seed(0)
    states = [
        (2 * torch.randn(1, h, 70, 16, generator=generator)).requires_grad_() for h in (heads[0], heads[1], heads[1])
    ]
    bounds = torch.tensor([0, 30, 37, 70], dtype=torch.int32)
    how = {"scaling": 0.4, "sliding_window": window, "softcap": cap}
    exact, _ = attention.rows_attention(torch.nn.Module(), *states, None, cu_seq_lens_q=bounds, **how)
    bounds = torch.tensor([0, 30, 37, 70, 70], dtype=torch.int32)
    found = attention.padded_rows(*states, bounds, 40, *how.values())
    outer = torch.randn(exact.shape, generator=generator)
    pairs = zip(*(torch.autograd.grad(each, states, outer) for each in (found, exact)), strict=True)
    for mine, theirs in [(found, exact), *pairs]:
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()


def test_a_model_that_sees_what_comes_after_is_refused_and_not_made_causal(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("bert", vocab_size=320, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path))
    with pytest.raises(PrerequisiteError, match="expected a causal"), torch.no_grad():
        model.load(tmp_path, "float32")
    states = torch.zeros(1, 2, 5, 4)
    with pytest.raises(PrerequisiteError, match="expected a causal"):
        attention.rows_attention(torch.nn.Linear(2, 2), states, states, states, None, is_causal=False)


def test_an_adapter_is_never_folded_into_a_layer_that_lies_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's square c_proj would take the transposed change without an error."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(str(tmp_path / "gpt2"))
    lora = {**Lora().model_dump(), "targets": ["c_proj"]}
    for targets in (["c_proj"], "all-linear"):
        with pytest.raises(ConfigError, match=r"c_(attn|proj)', a Conv1D: expected linear layers"):
            model.with_adapter(model.load(tmp_path / "gpt2", "float32"), {**lora, "targets": targets}, seed=1)
    theirs = get_peft_model(
        GPT2LMHeadModel(config), LoraConfig(r=8, lora_alpha=4, target_modules=["attn.c_proj"], init_lora_weights=False)
    )
    model.save_adapter(theirs, tmp_path / "adapter")
    plain = model.load(tmp_path / "gpt2", "float32")
    with pytest.raises(ValueError, match="fan_in_fan_out"):
        model.fold(plain, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["gpt_oss", "phimoe", "qwen2_moe"])
def test_a_model_whose_rows_are_padded_computes_by_its_own_words(kind: str, tmp_path: Path) -> None:
    """Sinks and windows: transformers' default attention leaves the one out, safecl's the other."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from safecl.training import batches
    from safecl.training.tokens import Encoded

    own: dict[str, Any] = {
        "gpt_oss": {"head_dim": 16},
        "phimoe": {},
        "qwen2_moe": {
            "use_sliding_window": True,
            "max_window_layers": 2,
            "num_experts": 4,
            "moe_intermediate_size": 32,
        },
    }[kind]
    config = AutoConfig.for_model(
        kind, vocab_size=320, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, sliding_window=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, **own,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = AutoModelForCausalLM.from_config(config)
        for name, parameter in made.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter, 3.0)
    made.save_pretrained(str(tmp_path))
    found = model.HiddenStates(model.load(tmp_path, "float32")).eval()
    rows = [Encoded(str(n), list(range(3, 3 + n)), 1) for n in (20, 9)]
    theirs = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        ours = found(batches.collate(rows, [0, 1], [0, 0], 1, rows[0], "cpu"))
        alone = [theirs.model(torch.tensor([row.ids]), use_cache=False).last_hidden_state[0] for row in rows]
    assert (ours - torch.cat(alone)).norm() < 1e-4 * torch.cat(alone).norm()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
