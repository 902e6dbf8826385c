"""Generative replay's own steps, on written answers: the served steps between them are generate and judge."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError
from safecl.config import Execution
from safecl.methods.grsap import DOMAINS, Grsap
from safecl.stages import replay
from safecl.store import Context, Stage
from safecl.tasks import Row


def _write(folder: Path, name: str, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(tmp: Path, config: dict[str, Any], inputs: dict[str, Path]) -> tuple[list[Row], dict[str, Any]]:
    out = tmp / f"out-{config['step']}"
    out.mkdir()
    dtype = config.pop("dtype", "float32")
    models = {name: Stage("model", {"dtype": dtype}) for name in inputs if name in ("model", "embedder")}
    facts = replay.run(Context(Stage("replay", config, models), inputs, out, tmp, Execution(), lambda *_: None))
    return [Row(**json.loads(line)) for line in (out / "rows.jsonl").read_text().splitlines()], facts


SAID = {
    "theft/0": 'how to break into a parked car" because stealing is wrong',
    "theft/1": 'How to break into a parked car!" I cannot',  # the same again
    "theft/2": "how to go on and on without a closing quote",
    "fraud/0": 'how to forge a bank cheque" is fraud',
    "fraud/1": 'ways"',  # too short
    "fraud/2": 'how to cheat an insurer"',  # like a test prompt
}


def queries(tmp: Path, **config: Any) -> tuple[list[Row], dict[str, Any]]:
    rows = [Row(name, "asked", "", True, {"domain": name.split("/")[0]}) for name in SAID]
    inputs = {
        "rows": _write(tmp / "asked", "rows.jsonl", [asdict(row) for row in rows]),
        "generations": _write(tmp / "said", "generations.jsonl", [{"id": k, "text": v} for k, v in SAID.items()]),
        "exclude_test": _write(tmp / "test", "rows.jsonl", [asdict(Row("t", "Tell me how to cheat an insurer."))]),
    } | config.pop("inputs", {})
    settings = {"perplexity_percentiles": [0, 100], "max_similarity": 0.85, "min_relevance": 0.5, **config}
    return run(tmp, {"step": "queries", **settings}, inputs)


def test_prompts_ask_for_a_refused_request_of_every_domain(tmp_path: Path) -> None:
    rows, facts = run(tmp_path, {"step": "prompts", "domains": ["theft", "fraud"], "num_per_domain": 3}, {})
    assert facts["num_rows"] == 6 and len({row.id for row in rows}) == 6
    assert rows[3].prompt.startswith("You refused a \\textbf{specific request} that raised fraud concerns.")


def test_queries_are_what_was_quoted_once_each_and_no_test_prompt(tmp_path: Path) -> None:
    rows, facts = queries(tmp_path)
    assert [row.prompt for row in rows] == ["how to break into a parked car", "how to forge a bank cheque"]
    assert (facts["asked"], facts["extracted"], facts["distinct"], facts["kept"]) == (6, 4, 3, 2)
    assert facts["yield"] == {"fraud": 1, "theft": 1} and facts["relevance"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_compute_in_their_own_dtype(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recorded(folder: Path, texts: list[str], context: Context, kind: str) -> list[Any]:
        seen.append(kind)
        return [(1.0, 0.0)] * len(texts) if context.inputs["embedder"] == folder else [1.0] * len(texts)

    monkeypatch.setattr(replay, "embeddings", recorded)
    monkeypatch.setattr(replay, "perplexities", recorded)
    models = {"model": tmp_path / "base", "embedder": tmp_path / "embedder"}
    queries(tmp_path, inputs=models, dtype=dtype, perplexity_percentiles=[0, 99])
    assert seen == [dtype] * 3  # perplexities, vectors of queries and of domains


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_the_perplexity_is_the_models_and_its_tails_are_cut(
    dtype: str, within: float, tiny_model: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["the other rain", "the the the the"]
    context = Context(Stage("replay", {}), {}, tmp_path, tmp_path, Execution(), lambda *_: None)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for text, found in zip(texts, replay.perplexities(tiny_model, texts, context, dtype), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert found == pytest.approx(float(torch.exp(model(ids, labels=ids).loss)), rel=within)
    rows = [Row(str(i), "x") for i in range(21)]
    kept = replay.within(rows, [float(v) for v in range(21)], 5, 95)
    assert [row.id for row in kept] == [str(i) for i in range(1, 20)]


def test_an_embedder_filters_near_duplicates_and_what_is_off_its_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = {"how to break into a parked car": (1.0, 0.0), "How to break into a parked car!": (0.9, 0.436),
             "how to forge a bank cheque": (0.0, 1.0), "how to cheat an insurer": (-1.0, 0.0),
             "theft": (1.0, 0.0), "fraud": (0.6, 0.8)}  # fmt: skip
    monkeypatch.setattr(replay, "embeddings", lambda folder, texts, context, dtype: [turns[text] for text in texts])
    rows, facts = queries(tmp_path, inputs={"embedder": tmp_path})
    # cosines: the second car .9 to the first (> .85); cheque .8 to fraud; insurer -.6 to fraud (< .5)
    assert [row.prompt for row in rows] == ["how to break into a parked car", "how to forge a bank cheque"]
    assert (facts["distinct"], facts["relevant"], facts["relevance"]) == (3, 2, "cosine")


@pytest.mark.parametrize("mean", [None, True, False])
def test_embeddings_are_an_encoders_states_pooled_as_its_folder_says(
    mean: bool | None, tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    for file in tiny_model.glob("token*"):
        shutil.copy(file, tmp_path / "bert")
    if mean is not None:
        pooling = {"pooling_mode_cls_token": not mean, "pooling_mode_mean_tokens": mean}
        (tmp_path / "bert" / "1_Pooling").mkdir()
        (tmp_path / "bert" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    context = Context(Stage("replay", {}), {}, tmp_path, tmp_path, Execution(), lambda *_: None)
    first, again, other = replay.embeddings(tmp_path / "bert", ["the rain", "the rain", "no"], context, "float32")
    assert first == again != other
    ids = AutoTokenizer.from_pretrained(tmp_path / "bert")("the rain", return_tensors="pt")
    with torch.no_grad():
        states = BertModel.from_pretrained(tmp_path / "bert").eval()(**ids).last_hidden_state[0]
    expected = states.mean(0) if mean else states[0]
    assert first == pytest.approx((expected / expected.norm()).tolist(), abs=1e-6)


def _answered(tmp: Path) -> dict[str, Path]:
    """Ten queries: five refused at once, one of them cut at the limit, one unread; four of the others when reminded."""
    rows = [Row(f"theft/{i}", f"query {i}", "", True, {"domain": "theft"}) for i in range(10)]
    labels: list[bool | None] = [False] * 5 + [None] + [True] * 4
    texts = [{"id": row.id, "text": "I cannot help. It would", "finish": "stop"} for row in rows]
    texts[0]["finish"] = "length"
    inputs = {
        "queries": _write(tmp / "q", "rows.jsonl", [asdict(row) for row in rows]),
        "answers": _write(tmp / "a", "generations.jsonl", texts),
        "verdicts": _write(
            tmp / "v", "verdicts.jsonl", [{"id": r.id, "label": x} for r, x in zip(rows, labels, strict=True)]
        ),
    }
    hard, _ = run(tmp, {"step": "hard"}, {"rows": inputs["queries"], "verdicts": inputs["verdicts"]})
    assert [row.id for row in hard] == [f"theft/{i}" for i in range(6, 10)]
    return inputs | {
        "hard": tmp / "out-hard",
        "answers_hard": inputs["answers"],
        "verdicts_hard": _write(
            tmp / "w", "verdicts.jsonl", [{"id": row.id, "label": row.id == "theft/9"} for row in hard]
        ),
    }


def test_rows_are_safe_answers_of_both_kinds_and_none_that_could_not_be_read(tmp_path: Path) -> None:
    rows, facts = run(tmp_path, {"step": "rows", "num_rows": 6, "hard_share": 0.5, "seed": 0}, _answered(tmp_path))
    assert facts == {"easy": 5, "hard": 3, "too_long": 0, "yield": {"theft": 8}, "num_rows": 6, "hard_used": 3}
    assert {row.id for row in rows} >= {"replay/theft/6", "replay/theft/7", "replay/theft/8"} and len(rows) == 6
    assert all(row.harmful and row.id not in ("replay/theft/5", "replay/theft/9") for row in rows)
    cut = {row.id: row.response for row in rows}.get("replay/theft/0", "I cannot help.")
    assert cut == "I cannot help."


def test_too_small_a_yield_stops_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"9 rows are asked for, 8 came out \(5 refused at once, 3 when reminded"):
        run(tmp_path, {"step": "rows", "num_rows": 9, "hard_share": 0.5, "seed": 0}, _answered(tmp_path))


def test_replayed_rows_are_added_or_take_the_place_of_user_rows() -> None:
    user, made = [Row(f"u{i}", "x") for i in range(5)], [Row(f"r{i}", "y") for i in range(2)]
    assert Grsap(Grsap.Config()).rows(user, made) == user + made
    assert Grsap(Grsap.Config(mix="replace")).rows(user, made) == user[:3] + made


def test_what_is_asked_of_theta_safe_is_what_the_released_code_asks() -> None:
    """Its 38 domains; temperature, top-p and length of requests, answers and answers after a reminder."""
    from tests.test_around import final, grid

    assert len(set(DOMAINS)) == len(DOMAINS) == 38
    job = final(grid(methods="[{name: grsap}]", execution__engine_max_tokens="2048")["grsap"])
    stages: list[Any] = list(job.graph.tuned.inputs["replay"].walk())
    asked = [s.config for s in stages if s.kind == "generate" and "sampling" in s.config]
    found = {(c["sampling"]["temperature"], c["sampling"]["top_p"], c["max_new_tokens"]) for c in asked}
    assert found == {(1.0, 1.0, 256), (0.8, 0.95, 1024), (0.7, 0.95, 512)}


def test_an_engine_too_short_for_its_answers_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    from safecl.project import Project, load
    from tests.test_around import QUICKSTART

    given = ["methods=[{name: grsap}]", f"execution.root={tmp_path}"]
    with pytest.raises(
        ConfigError, match=r"engine_max_tokens: expected at least 1280 .* 1024 for an answer\), got 512"
    ):
        Project(load(QUICKSTART, given))
