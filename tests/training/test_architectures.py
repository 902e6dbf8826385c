"""Every family of language models that transformers has, tiny: what is trained is what the family's own eager attention
computes, a row at a time, or it is refused. About two minutes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.base import ConfigError, PrerequisiteError
from safecl.training import batches, below, model
from safecl.training.tokens import Encoded

LENGTHS = (30, 7, 41)  # two are longer than a window or chunk of 8
COMMON = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
WHERE_KNOWN = {  # what a config may have, and how it is made small or switched on
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1, "attention_chunk_size": 8,
    "attn_logit_softcapping": 2.0,
}  # fmt: skip
OTHER = {"cpmant"}  # its positions and segments come from a prompt of its own kind


def _rows() -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    return [Encoded(str(n), torch.randint(3, 300, (n,), generator=generator).tolist(), 1) for n in LENGTHS]


def _build(kind: str, folder: str) -> bool:
    """A random model; False where its config wants more than is known here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        plain = AutoConfig.for_model(kind).get_text_config()
        config = AutoConfig.for_model(kind, **COMMON, **{k: v for k, v in WHERE_KNOWN.items() if hasattr(plain, k)})
        with torch.device("meta"):
            if sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > 12e6:
                return False
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    except Exception:
        return False
    return True


def _gap(folder: str) -> float:
    from transformers import AutoModelForCausalLM

    rows = _rows()
    with torch.no_grad():
        states = model.HiddenStates(model.load(Path(folder), "float32")).eval()
        batch = batches.collate(rows, range(len(rows)), [0] * len(rows), 1, rows[0], "cpu")
        ours = states(batch)
        states.below = below.of(states, 1, folder, [below.Used(rows, len(rows))])
        assert float((states(batch) - ours).norm() / ours.norm()) < 1e-5, "layers that were passed over"
        theirs: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        inner = getattr(theirs, theirs.base_model_prefix)
        alone = [inner(input_ids=torch.tensor([row.ids]), use_cache=False).last_hidden_state[0] for row in rows]
    return float((ours - torch.cat(alone)).norm() / torch.cat(alone).norm())


@pytest.mark.slow
def test_what_is_trained_is_what_each_family_computes_or_is_refused() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    apart: dict[str, float] = {}
    refused, failed = set(), {}
    for kind in sorted(NAMES):
        with tempfile.TemporaryDirectory() as folder:
            if not _build(kind, folder):
                continue
            try:
                apart[kind] = _gap(folder)
            except (ConfigError, PrerequisiteError):
                refused.add(kind)
            except AssertionError:
                raise
            except Exception as error:  # sizes that do not go together in that family, here and in its own words
                failed[kind] = repr(error)
    assert len(apart) > 90 and {"bert", "roberta", "electra"} <= refused, (len(apart), refused, failed)
    assert {kind for kind, gap in apart.items() if gap > 1e-2} <= OTHER, {k: g for k, g in apart.items() if g > 1e-2}
    assert {"llama", "mistral", "gemma2", "qwen2", "qwen2_moe", "qwen3", "phimoe", "gpt_oss"} <= apart.keys()
