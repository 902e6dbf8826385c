from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError
from safecl.config import Template
from safecl.tasks import Row
from safecl.training import batches
from safecl.training.batches import Encoded
from safecl.training.model import load_tokenizer

TEMPLATE = Template().model_dump()
PLAIN = {**TEMPLATE, "prompt": "Q: {prompt}\nA:", "end": "<|im_end|>"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def test_a_row_becomes_prompt_answer_and_one_end_token(tokenizer: Any) -> None:
    [row], dropped = batches.encode([Row("a", "the rain", "or")], tokenizer, TEMPLATE, False, 256)
    assert not dropped
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (
        tokenizer.decode(row.ids[: row.num_prompt]) == "<|im_start|>user\nthe rain<|im_end|>\n<|im_start|>assistant\n"
    )
    # "or" is one merge of the tokenizer; the answer stops at the end token, without the newline of chat templates.
    assert row.ids[row.num_prompt :] == [tokenizer.convert_tokens_to_ids("or"), end]
    assert row.ids[0] == start and row.num_targets == 2


def test_generation_sees_the_ids_that_training_puts_before_the_answer(tokenizer: Any) -> None:
    for bos in (False, True):
        [row], _ = batches.encode([Row("a", "the rain", "water")], tokenizer, PLAIN, bos, 256)
        assert batches.encode_prompt("the rain", tokenizer, PLAIN, bos) == row.ids[: row.num_prompt]


def test_bos_stands_there_exactly_once(tokenizer: Any) -> None:
    written = {**PLAIN, "prompt": "<|endoftext|>Q: {prompt}\nA:"}
    for template in (PLAIN, written):
        [row], _ = batches.encode([Row("a", "the rain", "water")], tokenizer, template, True, 256)
        assert row.ids[0] == tokenizer.bos_token_id and row.ids.count(tokenizer.bos_token_id) == 1
    [row], _ = batches.encode([Row("a", "the rain", "water")], tokenizer, PLAIN, False, 256)
    assert tokenizer.bos_token_id not in row.ids


def test_braces_in_a_prompt_stay_text(tokenizer: Any) -> None:
    ids = batches.encode_prompt("{prompt} {0} {x}", tokenizer, PLAIN, False)
    assert tokenizer.decode(ids) == "Q: {prompt} {0} {x}\nA:"


def test_long_prompts_are_cut_from_the_left_and_long_answers_dropped(tokenizer: Any) -> None:
    rows = [Row("long prompt", "x" * 100, "yes"), Row("long answer", "x", "y" * 100), Row("short", "x", "y")]
    encoded, dropped = batches.encode(rows, tokenizer, PLAIN, True, 40)
    assert [row.row_id for row in encoded] == ["long prompt", "short"] and list(dropped) == ["long answer"]
    cut = encoded[0]
    assert len(cut.ids) == 40
    assert tokenizer.decode(cut.ids) == "<|endoftext|>" + "x" * 32 + "\nA:" + "yes" + "<|im_end|>"
    assert cut.ids[: cut.num_prompt] == batches.encode_prompt("x" * 100, tokenizer, PLAIN, True, cut.num_prompt)


def test_an_answer_that_melts_into_the_prompt_is_left_out(tokenizer: Any) -> None:
    """Two newlines are one token of this tokenizer: together they are not what generation continues from."""
    rows = [Row("melts", "x", "\n\nyes"), Row("fine", "x", "yes")]
    encoded, dropped = batches.encode(rows, tokenizer, TEMPLATE, False, 256)
    assert [row.row_id for row in encoded] == ["fine"]
    assert "tokenise differently" in dropped["melts"]
    with pytest.raises(ConfigError, match="none of 1"):
        batches.encode(rows[:1], tokenizer, TEMPLATE, False, 256)


def test_the_order_is_a_permutation_an_epoch_and_depends_on_nothing_else() -> None:
    order = batches.order(seed=1, num_rows=10, batch_size=4, epochs=2.5)
    flat = [i for batch in order for i in batch]
    assert [len(batch) for batch in order] == [4] * 6 + [1]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and len(set(flat[20:])) == 5
    assert flat[:10] != flat[10:20]
    assert order == batches.order(1, 10, 4, 2.5) != batches.order(2, 10, 4, 2.5)
    assert [i for batch in batches.order(1, 10, 3, 2.5) for i in batch] == flat


def test_streams_differ_by_name_seed_and_position() -> None:
    seeds = {batches.stream(s, n, p) for s in (0, 1) for n in ("order", "dropout") for p in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2, 8])
def test_shares_hold_every_row_once_in_as_many_parts_on_every_rank(num_rows: int, world_size: int, micro: int) -> None:
    rows = [Encoded(str(i), list(range(3, 9 + 7 * i % 5)), 2 + i % 3) for i in range(9)]
    indices = list(range(9))[-num_rows:]
    shares = [
        batches.share(rows, indices, [100 + i for i in indices], rank=r, world_size=world_size, micro_batch_size=micro)
        for r in range(world_size)
    ]
    parts = [part for share in shares for part in share.parts]
    assert len({len(share.parts) for share in shares}) == 1
    assert sorted(i for part in parts for i in part.indices) == indices
    assert max(len(part.rows) for part in parts) <= micro
    total = sum(rows[i].num_targets for i in indices)
    assert {part.num_targets for part in parts} == {total}
    assert sum(int((part.labels_BT != -100).sum()) for part in parts) == total
    for part in parts:
        assert len(part.dropout_seeds) == len(part.ids_BT) == len(part.lengths)
        if part.rows:
            assert part.dropout_seeds == [100 + i for i in part.indices]


def test_padding_is_masked_by_length_although_the_pad_token_ends_answers() -> None:
    end = 2
    rows = [Encoded("short", [7, 8, end], 1), Encoded("long", [7, 8, 9, 9, end], 3)]
    batch = batches.collate(rows, [0, 1], [0, 0], 4, rows[0], "cpu")
    assert batch.attention_BT.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.labels_BT.tolist() == [[-100, 8, end, -100, -100], [-100, -100, -100, 9, end]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 4]] * 2
