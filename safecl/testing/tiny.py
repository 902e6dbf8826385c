"""Tiny random models with a tokenizer, in Hugging Face's format. A test can train one in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def build_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer: three special tokens, 256 bytes and a few merges. Two newlines merge, so text
    can tokenise differently together than apart. The pad token is the end token, as in SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline, space = "\u010a", "\u0120"
    merges = [
        (newline, newline),
        ("t", "h"),
        ("th", "e"),
        (space, "a"),
        ("i", "n"),
        ("o", "r"),
        ("e", "r"),
        ("s", "a"),
        ("f", "e"),
        ("sa", "fe"),
        ("u", "n"),
        ("un", "safe"),
    ]
    tokens = [ENDOFTEXT, IM_START, IM_END, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=ENDOFTEXT, eos_token=IM_END, pad_token=IM_END,
        additional_special_tokens=[IM_START],
    )  # fmt: skip
    fast.save_pretrained(str(folder))


def build_model(folder: Path, vocab_size: int = 320, kind: str = "llama") -> None:
    """Write a random float32 model that vLLM can serve (head size 64), with some spread in its logits. `kind`: Llama,
    Mistral (untied head, and a sliding window shorter than the longest rows), or Gemma-2 (soft caps on attention and
    logits). It has no pad token: a pad token's embedding would be zero, and with a tied head the model could then
    never end an answer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own: dict[str, dict[str, Any]] = {
        "llama": {"tie_word_embeddings": True},
        "mistral": {"tie_word_embeddings": False, "sliding_window": 24},
        "gemma2": {
            "tie_word_embeddings": True, "sliding_window": 24, "query_pre_attn_scalar": 64, "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 50.0, "pad_token_id": None,
        },
    }  # fmt: skip
    config = AutoConfig.for_model(
        kind, vocab_size=vocab_size, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, initializer_range=0.1, bos_token_id=0,
        eos_token_id=2, **own[kind],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(str(folder))
