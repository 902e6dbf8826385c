from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from safecl.base import ConfigError, PrerequisiteError
from safecl.config import Template
from safecl.tasks import Row
from safecl.training import tokens
from safecl.training.tokens import Tokenizer

TEMPLATE = Template().model_dump()
PLAIN = {**TEMPLATE, "prompt": "Q: {prompt}\nA:", "end": "<|im_end|>"}


def text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.fast.decode(ids, skip_special_tokens=False))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def test_a_row_becomes_prompt_answer_and_one_end_token(tokenizer: Tokenizer) -> None:
    [row], dropped = tokens.encode([Row("a", "the rain", "or")], tokenizer, TEMPLATE, False, 256)
    assert not dropped
    start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    assert text(tokenizer, row.ids[: row.num_prompt]) == "<|im_start|>user\nthe rain<|im_end|>\n<|im_start|>assistant\n"
    # "or" is one merge of the tokenizer; the answer stops at the end token, without the newline of chat templates.
    assert row.ids[row.num_prompt :] == [tokenizer.id_of("or"), end]
    assert row.ids[0] == start and row.num_targets == 2


def test_generation_sees_the_ids_that_training_puts_before_the_answer(tokenizer: Tokenizer) -> None:
    for bos in (False, True):
        [row], _ = tokens.encode([Row("a", "the rain", "water")], tokenizer, PLAIN, bos, 256)
        assert tokens.encode_prompt("the rain", tokenizer, PLAIN, bos) == row.ids[: row.num_prompt]


def test_bos_stands_there_exactly_once(tokenizer: Tokenizer) -> None:
    written = {**PLAIN, "prompt": "<|endoftext|>Q: {prompt}\nA:"}
    for template in (PLAIN, written):
        [row], _ = tokens.encode([Row("a", "the rain", "water")], tokenizer, template, True, 256)
        assert row.ids[0] == tokenizer.bos_id and row.ids.count(tokenizer.bos_id) == 1
    [row], _ = tokens.encode([Row("a", "the rain", "water")], tokenizer, PLAIN, False, 256)
    assert tokenizer.bos_id not in row.ids


def test_braces_in_a_prompt_stay_text(tokenizer: Tokenizer) -> None:
    ids = tokens.encode_prompt("{prompt} {0} {x}", tokenizer, PLAIN, False)
    assert text(tokenizer, ids) == "Q: {prompt} {0} {x}\nA:"


def test_long_prompts_are_cut_from_the_left_and_long_answers_dropped(tokenizer: Tokenizer) -> None:
    rows = [Row("long prompt", "x" * 100, "yes"), Row("long answer", "x", "y" * 100), Row("short", "x", "y")]
    encoded, dropped = tokens.encode(rows, tokenizer, PLAIN, True, 40)
    assert [row.row_id for row in encoded] == ["long prompt", "short"] and list(dropped) == ["long answer"]
    cut = encoded[0]
    assert len(cut.ids) == 40
    assert text(tokenizer, cut.ids) == "<|endoftext|>" + "x" * 32 + "\nA:" + "yes" + "<|im_end|>"
    assert cut.ids[: cut.num_prompt] == tokens.encode_prompt("x" * 100, tokenizer, PLAIN, True, cut.num_prompt)


def test_an_answer_that_melts_into_the_prompt_is_left_out(tokenizer: Tokenizer) -> None:
    """Two newlines are one token of this tokenizer: together they are not what generation continues from."""
    rows = [Row("melts", "x", "\n\nyes"), Row("fine", "x", "yes")]
    encoded, dropped = tokens.encode(rows, tokenizer, TEMPLATE, False, 256)
    assert [row.row_id for row in encoded] == ["fine"]
    assert "tokenise differently" in dropped["melts"]
    with pytest.raises(ConfigError, match="none of 1"):
        tokens.encode(rows[:1], tokenizer, TEMPLATE, False, 256)


def test_ids_are_those_of_transformers(tiny_model: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(tiny_model))
    texts = ["", " the  rain\n\n", "<|im_start|>user\nwasser\u00e4\u4e2d<|im_end|>", "or" * 300]
    assert tokenizer.ids(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_special_tokens_are_read_as_text_or_as_objects(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "bos_token": null}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_id == tokenizer.id_of("<|im_end|>") is not None and tokenizer.bos_id is None


def test_a_folder_without_a_fast_tokenizer_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=r"expected tokenizer\.json.*save_pretrained"):
        Tokenizer(tmp_path)
