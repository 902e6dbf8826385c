"""Fixtures shared by all rooms."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else transformers' integration prints that it found none
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def build_tokenizer(folder: Path) -> None:
    """Byte-level BPE: three special tokens, 256 bytes, a few merges (so that text can tokenise differently together
    than apart: two newlines merge). The pad token is the end token, as in SmolLM2."""
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


def build_model(folder: Path, vocab_size: int = 320) -> None:
    """A random Llama that vLLM can serve (head size 64), float32, logits with some spread. No pad token: its embedding
    would be zero, and with a tied head the model could then never end an answer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, initializer_range=0.1,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = LlamaForCausalLM(config)
    model.save_pretrained(str(folder))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama and its tokenizer, in Hugging Face format."""
    folder = tmp_path_factory.mktemp("tiny_model")
    build_tokenizer(folder)
    build_model(folder)
    return folder
