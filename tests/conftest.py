"""Fixtures shared by all rooms."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.methods.contract import World

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else transformers' integration prints that it found none
os.environ.setdefault("HF_HUB_OFFLINE", "1")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of several processes slow each other twentyfold

# `make test` runs two processes, a file's tests in one of them, since they share its fixtures. What starts Ray and engines
# goes first and stands in one line: two clusters at once would want more memory than a small machine has, and would
# see each other's processes.
CLUSTERS = ["test_end_to_end.py", "serving/test_engine.py", "test_trainers.py", "test_execute.py"]
LONG = ["methods/test_contract.py", "test_sandbox.py", "test_study.py", "test_tracking.py"]  # before short ones

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


def build_model(folder: Path, vocab_size: int = 320, kind: str = "llama") -> None:
    """A random model that vLLM can serve (head size 64), float32, logits with some spread: Llama, Mistral (its window
    shorter than the longest rows, its head its own), or Gemma-2 (soft caps on attention and logits). No pad token: its
    embedding would be zero, and with a tied head the model could then never end an answer."""
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


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Folders of tiny random models by architecture."""
    found = {"llama": tiny_model}
    for kind in ("mistral", "gemma2"):
        found[kind] = tmp_path_factory.mktemp(kind)
        build_tokenizer(found[kind])
        build_model(found[kind], kind=kind)
    return found


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama and its tokenizer, in Hugging Face format."""
    folder = tmp_path_factory.mktemp("tiny_model")
    build_tokenizer(folder)
    build_model(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    """The tiny model aligned, with what methods ask for (tests/methods/contract.py)."""
    from tests.methods import contract

    return contract.build_world(tmp_path_factory.mktemp("world"), tiny_model)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(CLUSTERS + LONG)}
    items.sort(key=lambda item: order.get(_file(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist; its own groups (3.8) do not reach pytest 9's node ids
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "clusters" if _file(nodeid) in CLUSTERS else _file(nodeid)

    return ByFile(config, log)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/")


def pytest_sessionfinish() -> None:
    ranks = sys.modules.get("tests.training.ranks")
    if ranks is not None:
        ranks.close()
