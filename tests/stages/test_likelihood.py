"""The likelihood stage against logits that Hugging Face computes here, row by row, from weights merged here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError
from safecl.config import Template
from safecl.stages import likelihood, metrics
from safecl.tasks import Found, Row
from safecl.tasks.gsm8k import Gsm8k
from safecl.tasks.sst2 import HARNESS, Sst2
from safecl.testing.world import World

SENTENCES = ["the rain", "a thing or the other, and more of the same inner water", "x", "no", "it did\n\nrain"]


def sst2_rows() -> list[Row]:
    return [
        Row(f"sst2/test/{i}", f"Say which.\n\n{text}", "positive", meta={"label": "positive", "sentence": text})
        for i, text in enumerate(SENTENCES)
    ]


def gsm8k_rows() -> list[Row]:
    answers = ["One and one.\n#### 2", "The rain is 3 + 4 = 7 and the other thing is\n\nunsafe\n#### 7", "#### 1"]
    return [Row(f"gsm8k/test/{i}", f"How many {i}?", text, meta={"answer": "0"}) for i, text in enumerate(answers)]


def measured(
    folder: Path, task: str, rows: Sequence[Row], inputs: dict[str, Path], **changes: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (folder / "rows").mkdir(parents=True)
    (folder / "rows" / "rows.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    config = {"task": task, "template": Template().model_dump(), "bos": False, "dtype": "float32", "max_tokens": 512}
    facts = likelihood.measure({**config, **changes}, {**inputs, "rows": folder / "rows"}, folder)
    return facts, [json.loads(line) for line in (folder / "likelihood.jsonl").read_text().splitlines()]


def independent(model: Any, tokenizer: Any, context: str, text: str) -> tuple[float, int]:
    """(log p, number of tokens) of a text behind another, from a forward of this row alone."""
    import torch

    start = tokenizer(context, add_special_tokens=False)["input_ids"]
    ids = tokenizer(context + text, add_special_tokens=False)["input_ids"]
    assert ids[: len(start)] == start
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0].double()
    each = [float(logits_TV[t - 1].log_softmax(-1)[ids[t]]) for t in range(len(start), len(ids))]
    return sum(each), len(each)


def reference(base: Path, adapter: Path | None) -> tuple[Any, Any]:
    """The model with `alpha / r * B @ A` added to its weights by hand."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    if adapter is not None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(str(adapter / "adapter_model.safetensors"))
        changed = 0.0
        for name, down_RI in tensors.items():
            if ".lora_A." in name:
                delta_OI = tensors[name.replace("lora_A", "lora_B")] @ down_RI * config["lora_alpha"] / config["r"]
                path = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                model.get_parameter(path).data += delta_OI
                changed += float(delta_OI.abs().sum())
        assert changed > 0
    return model, AutoTokenizer.from_pretrained(str(base))


@pytest.mark.parametrize("kind", ["base", "adapter", "dense"])
def test_every_log_probability_is_the_models_own(tmp_path: Path, world: World, kind: str) -> None:
    inputs = {"model": world.model}
    if kind == "adapter":
        inputs["weights"] = world.safe
    if kind == "dense":
        from safecl.training import weights

        deltas = weights.load(world.safe / "adapter")
        dense = ((name, weights.Dense(delta.delta())) for name, delta in deltas.items())
        weights.save(dense, tmp_path / "dense", world.safe / "adapter", "float32")
        inputs["weights"] = tmp_path / "dense"
    model, tokenizer = reference(world.model, None if kind == "base" else world.safe / "adapter")
    template = Template().prompt
    for task, rows in (("sst2", sst2_rows()), ("gsm8k", gsm8k_rows())):
        facts, lines = measured(tmp_path / task, task, rows, inputs)
        assert [line["id"] for line in lines] == [row.id for row in rows] and facts["left_out"] == 0
        for row, line in zip(rows, lines, strict=True):
            chat = template.replace("{prompt}", row.prompt)
            asked = [(chat, row.response)]
            if task == "sst2":
                harness = f"{row.meta['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
                asked = [(chat, "negative"), (chat, "positive"), (harness, " negative"), (harness, " positive")]
            assert [option["text"] for option in line["options"]] == [text for _, text in asked]
            for option, (context, text) in zip(line["options"], asked, strict=True):
                total, num = independent(model, tokenizer, context, text)
                assert option["num_tokens"] == num
                assert option["logprob"] == pytest.approx(total, abs=1e-4)


def test_in_bfloat16_the_logits_are_not_rounded(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoTokenizer

    from safecl.training import batches
    from safecl.training import model as models
    from safecl.training.tokens import Encoded

    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 1)  # in bfloat16 other shapes move hidden states
    model = models.load(tiny_model, "bfloat16")
    states = models.HiddenStates(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    [row] = sst2_rows()[:1]
    [line] = measured(tmp_path, "sst2", [row], {"model": tiny_model}, dtype="bfloat16")[1]
    context = f"{row.meta['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    start = tokenizer(context, add_special_tokens=False)["input_ids"]
    for option in line["options"][2:]:
        ids = tokenizer(context + option["text"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            fed = Encoded("", ids[:-1], 1)
            hidden_TD = states(batches.collate([fed], [0], [0], 1, fed, "cpu"))
            rounded_TV = model.lm_head(hidden_TD).float()
            exact_TV = hidden_TD.float() @ model.lm_head.weight.float().T
        targets = torch.tensor(ids[len(start) :])
        exact, rounded = (
            -float(torch.nn.functional.cross_entropy(z[len(start) - 1 :], targets, reduction="sum"))
            for z in (exact_TV, rounded_TV)
        )
        assert option["logprob"] == pytest.approx(exact, abs=1e-5) and abs(exact - rounded) > 1e-4


def test_an_adapter_and_a_batch_change_what_they_should(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter moves the numbers; how sequences are batched moves them by rounding alone."""
    rows = gsm8k_rows()
    both = {"model": world.model, "weights": world.safe}
    whole = measured(tmp_path / "a", "gsm8k", rows, both)[1]
    base = measured(tmp_path / "b", "gsm8k", rows, {"model": world.model})[1]
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 1)
    alone = measured(tmp_path / "c", "gsm8k", rows, both)[1]
    for one, two, three in zip(whole, base, alone, strict=True):
        values = [line["options"][0]["logprob"] for line in (one, two, three)]
        assert abs(values[0] - values[1]) > 0.01
        assert values[0] == pytest.approx(values[2], abs=1e-4)


def test_options_of_one_token_behind_one_prompt_share_a_forward(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safecl.tasks import Option

    row = sst2_rows()[:1]
    for texts, forwards in ((["a", "b", "c"], 1), (["ab", "ac"], 1), (["ab", "cd"], 2), (["a", "ab"], 2)):
        monkeypatch.setattr(Sst2, "options", lambda self, row, texts=texts: [Option(text) for text in texts])
        facts, [line] = measured(tmp_path / "".join([*texts, "_"]), "sst2", row, {"model": tiny_model})
        assert facts["forwards"] == forwards and facts["options"] == len(texts)
        assert all(option["logprob"] < 0 for option in line["options"])


def test_what_does_not_fit_is_left_out_and_counted_and_never_scored(tmp_path: Path, tiny_model: Path) -> None:
    rows = [*gsm8k_rows(), Row("gsm8k/test/9", "How many?", "very long " * 40 + "#### 1", meta={"answer": "1"})]
    facts, lines = measured(tmp_path / "a", "gsm8k", rows, {"model": tiny_model}, max_tokens=120)
    assert facts["left_out"] == 1
    assert lines[3]["options"] == [{"text": rows[3].response, "logprob": None, "num_tokens": 0}]
    found = [[Found(option["logprob"], option["num_tokens"]) for option in line["options"]] for line in lines]
    assert Gsm8k().likelihood_scores(rows, found)["gold_nll"][3] is None
    with pytest.raises(ConfigError, match="none of 4"):
        measured(tmp_path / "b", "gsm8k", rows, {"model": tiny_model}, max_tokens=8)


def test_the_likelier_label_scores_and_the_first_of_equals_wins() -> None:
    rows = [Row(str(i), "q", meta={"label": ("positive", "negative")[i % 2], "sentence": "s"}) for i in range(4)]
    found = [
        [Found(-2.0, 1), Found(-1.0, 1), Found(-1.0, 1), Found(-2.0, 1)],
        [Found(-2.0, 1), Found(-1.0, 1), Found(-1.0, 1), Found(-2.0, 1)],
        [Found(-1.0, 1), Found(-1.0, 1), Found(-1.0, 1), Found(-1.0, 1)],
        [Found(None, 0), Found(-1.0, 1), Found(-1.0, 1), Found(-1.0, 1)],
    ]
    assert Sst2().likelihood_scores(rows, found) == {
        "utility_likelihood": [1.0, 0.0, 0.0, None],
        "utility_harness": [0.0, 1.0, 0.0, 1.0],
    }


def test_the_harness_prompt_is_the_harness_own() -> None:
    """lm-evaluation-harness 0.4.13, tasks/glue/sst2: doc_to_text, and choices behind one space."""
    assert HARNESS.format(sentence="a gem .") == "a gem .\nQuestion: Is this sentence positive or negative?\nAnswer:"
    options = Sst2().options(Row("a", "in the template", meta={"sentence": "a gem .", "label": "positive"}))
    assert [(option.text, option.after is None) for option in options] == [
        ("negative", True), ("positive", True), (" negative", False), (" positive", False),
    ]  # fmt: skip


def test_metrics_read_log_probabilities_beside_answers(tmp_path: Path) -> None:
    from safecl.config import Execution
    from safecl.crossed import intervals
    from safecl.store import Context, Stage

    rows = gsm8k_rows()
    values = [(-6.0, 4), (-1.0, 10), (None, 0)]
    for name, lines in {
        "rows": [asdict(row) for row in rows],
        "likelihood": [
            {"id": row.id, "options": [{"text": "t", "logprob": logprob, "num_tokens": num}]}
            for row, (logprob, num) in zip(rows, values, strict=True)
        ],
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measure = {"metric": "likelihood", "set": "gsm8k", "of": "likelihood", "role": "utility"}
    inputs = {f"utility.gsm8k.{name}": tmp_path / name for name in ("rows", "likelihood")}
    stage = Stage("metrics", {"measures": [measure]}, {name: Stage("data", {"name": name}) for name in inputs})
    result: Any = metrics.run(Context(stage, inputs, tmp_path, tmp_path, Execution(), lambda *_: None))
    assert result["gold_nll"]["value"] == pytest.approx((6 / 4 + 1 / 10) / 2)
    assert (result["gold_nll"]["num"], result["gold_nll"]["unparsed"]) == (2, 1)
    outcomes = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    found = intervals([[o for o in outcomes if o["value"] is not None]], bounded=False)
    assert found is not None and found.value == pytest.approx(0.8) and found.high > 1  # no fraction: not cut at 1
