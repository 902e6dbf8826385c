"""Replay: generative replay (GR-SAP), where the aligned model itself writes safety rows.

Each stage does one step. Generate and judge stages run between these steps.

    prompts    Ask for each domain: "Which request of this domain did you refuse?" (The opening of the answer is in the
               template of the generate stage.)
    queries    Take the quoted request from each answer and filter: well-formed, perplexity, near-duplicates, relevance,
               overlap with test prompts.
    hard       Keep the queries whose answer the judge called unsafe. They are answered again with a reminder.
    rows       Mix the safe answers of both kinds.

Each step writes rows.jsonl (the fields of one `Row` a line). Config: `step` and the settings of that step, which
`methods/grsap.py` lists.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl import sizes
from safecl.base import ConfigError, Json, json_lines
from safecl.sizes import Length
from safecl.stages import Kind
from safecl.store import Context, Stage
from safecl.tasks import Row
from safecl.tasks._overlap import content_words, drop_overlaps, normalise
from safecl.training.tokens import Tokenizer, least_tokens

if TYPE_CHECKING:
    from safecl.estimate import Estimator

VERSION = "3"
QUESTION = (
    "You refused a \\textbf{{specific request}} that raised {domain} concerns. Repeat the \\textbf{{specific request}} and "
    "explain why it was refused."
)


class Replay(Kind):
    runs = "trainer"
    unit = ""
    fixed_s = 1.0
    reads = ()

    @staticmethod
    def length(stage: Stage, of: Estimator) -> Length:
        config: Any = stage.config
        rows = stage.inputs.get("rows")
        made = sizes.TYPICAL if rows is None else of.length(rows)
        return made._replace(rows=config.get("num_rows") or made.rows)

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        seed = f", seed {stage.config['seed']}" if "seed" in stage.config else ""
        return f"replay {stage.config['step']}{seed}"


def run(context: Context) -> dict[str, Json]:
    """Run one step. Returns its counts. Raises ConfigError if step `rows` has fewer rows left than were asked for."""
    step = {"prompts": _prompts, "queries": _queries, "hard": _hard, "rows": _rows}[str(context.stage.config["step"])]
    rows, facts = step(dict(context.stage.config), context)
    with (context.out / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row.as_json()) + "\n")
    return facts


def _prompts(config: dict[str, Any], context: Context) -> tuple[list[Row], dict[str, Json]]:
    rows = [
        Row(f"{domain}/{i}", QUESTION.format(domain=domain), "", True, {"domain": domain})
        for domain in config["domains"]
        for i in range(config["num_per_domain"])
    ]
    return rows, {"num_rows": len(rows)}


def _queries(config: dict[str, Any], context: Context) -> tuple[list[Row], dict[str, Json]]:
    said = {line["id"]: line for line in json_lines(context.inputs["generations"] / "generations.jsonl")}
    asked = list(_read(context.inputs["rows"]))
    found = [
        dataclasses.replace(row, prompt=query) for row in asked if (query := quoted(said[row.id]["text"])) is not None
    ]
    left: dict[str, list[Row]] = {"extracted": found}
    low, high = config["perplexity_percentiles"]
    if (low, high) != (0, 100) and found:
        dtype = str(context.stage.inputs["model"].config["dtype"])
        surprises = perplexities(context.inputs["model"], [row.prompt for row in found], context, dtype)
        left["perplexity"] = found = within(found, surprises, low, high)
    if "embedder" in context.inputs:
        dtype = str(context.stage.inputs["embedder"].config["dtype"])
        vectors = embeddings(context.inputs["embedder"], [row.prompt for row in found], context, dtype)
        kept = distinct_vectors(vectors, config["max_similarity"])
        left["distinct"] = [found[i] for i in kept]
        domains = sorted({row.meta["domain"] for row in found}, key=str)
        about = dict(
            zip(domains, embeddings(context.inputs["embedder"], [str(d) for d in domains], context, dtype), strict=True)
        )
        close = [i for i in kept if dot(vectors[i], about[found[i].meta["domain"]]) >= config["min_relevance"]]
        left["relevant"] = found = [found[i] for i in close]
    else:
        left["distinct"] = found = distinct(found, config["max_similarity"])
    held_out = [row.asked for name in sorted(context.inputs) if name.startswith("exclude_")
                for row in _read(context.inputs[name])]  # fmt: skip
    left["kept"] = found = drop_overlaps(found, held_out)[0]
    counts: dict[str, Json] = {"asked": len(asked), **{name: len(rows) for name, rows in left.items()}}
    return found, {**counts, "relevance": "cosine" if "embedder" in context.inputs else None, "yield": by_domain(found)}


def _hard(config: dict[str, Any], context: Context) -> tuple[list[Row], dict[str, Json]]:
    unsafe = {line["id"] for line in json_lines(context.inputs["verdicts"] / "verdicts.jsonl") if line["label"] is True}
    rows = [row for row in _read(context.inputs["rows"]) if row.id in unsafe]
    return rows, {"num_rows": len(rows)}


def _rows(config: dict[str, Any], context: Context) -> tuple[list[Row], dict[str, Json]]:
    easy = list(_safe(context.inputs, "queries", "answers", "verdicts"))
    hard = list(_safe(context.inputs, "hard", "answers_hard", "verdicts_hard"))
    num_safe, fits = len(easy) + len(hard), config.get("fits")
    if fits:  # the same length rule as for the memory of every method
        text = (Tokenizer(context.inputs["tokenizer"]), fits["template"], fits["bos"])
        easy, hard = (
            [
                row
                for row, least in zip(rows, least_tokens(rows, *text), strict=True)
                if least and least <= fits["max_tokens"]
            ]
            for rows in (easy, hard)
        )
    num, num_hard = config["num_rows"], min(len(hard), round(config["hard_share"] * config["num_rows"]))
    too_long = num_safe - len(easy) - len(hard)
    counts: dict[str, Json] = {
        "easy": len(easy), "hard": len(hard), "too_long": too_long, "yield": by_domain(easy + hard)
    }  # fmt: skip
    if len(easy) + len(hard) < num:
        raise ConfigError(
            f"generative replay: {num} rows are asked for, {len(easy) + len(hard)} came out ({len(easy)} refused at once, "
            f"{len(hard)} when reminded; by domain: {json.dumps(counts['yield'])}). Raise num_per_domain, lower num_rows, "
            "or align for longer: a model that does not refuse has nothing to replay"
        )
    num_hard = max(num_hard, num - len(easy))
    chance = random.Random(f"replay/{config['seed']}")
    chosen = chance.sample(hard, num_hard) + chance.sample(easy, num - num_hard)
    chance.shuffle(chosen)
    return chosen, {**counts, "num_rows": num, "hard_used": num_hard}


def _safe(inputs: Any, rows: str, answers: str, verdicts: str) -> Iterator[Row]:
    """Rows with the answers that the judge called safe. Answers with an unparsed verdict are left out."""
    labels = {line["id"]: line["label"] for line in json_lines(inputs[verdicts] / "verdicts.jsonl")}
    texts = {line["id"]: line for line in json_lines(inputs[answers] / "generations.jsonl")}
    for row in _read(inputs[rows]):
        answer = texts[row.id]["text"].strip()
        if texts[row.id]["finish"] == "length":  # no row may teach to stop in the middle of a sentence
            answer = answer[: max(answer.rfind(mark) for mark in ".!?") + 1]
        if labels[row.id] is False and answer:
            yield dataclasses.replace(row, response=answer, id=f"replay/{row.id}", harmful=True)


# -- filters -----------------------------------------------------------------------------------------------------------


def quoted(text: str) -> str | None:
    """The text before the closing quotation mark. None if there is no mark or the text has fewer than three words."""
    query, quote, _ = text.partition('"')
    query = " ".join(query.split())
    return query if quote and len(query.split()) >= 3 else None


def within(rows: Sequence[Row], values: Sequence[float], low: float, high: float) -> list[Row]:
    """The rows whose value lies between two percentiles of all values. `low` and `high` are in [0, 100]."""
    ordered = sorted(values)
    bounds = [ordered[round(p / 100 * (len(ordered) - 1))] for p in (low, high)]
    return [row for row, value in zip(rows, values, strict=True) if bounds[0] <= value <= bounds[1]]


def distinct(rows: Sequence[Row], most: float) -> list[Row]:
    """Drop rows that are similar to an earlier kept row.

    Two rows are similar if their prompts differ only in case and punctuation, or if the Jaccard similarity of their content
    words is above `most` (in [0, 1]).
    """
    kept: list[Row] = []
    seen: set[str] = set()
    words: list[frozenset[str]] = []
    for row in rows:
        text, own = normalise(row.prompt), content_words(row.prompt)
        if text in seen or any(len(own & other) > most * len(own | other) for other in words):
            continue
        kept.append(row)
        seen.add(text)
        words.append(own)
    return kept


def distinct_vectors(vectors: Sequence[Sequence[float]], most: float) -> list[int]:
    """Indices of unit vectors whose cosine to every earlier kept one is at most `most`."""
    kept: list[int] = []
    for i, vector in enumerate(vectors):
        if all(dot(vector, vectors[j]) <= most for j in kept):
            kept.append(i)
    return kept


def dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def by_domain(rows: Sequence[Row]) -> dict[str, Json]:
    return dict(sorted(Counter(str(row.meta["domain"]) for row in rows).items()))


def perplexities(folder: Path, texts: Sequence[str], context: Context, dtype: str) -> list[float]:
    """Perplexity of each text under the base model: exp of the mean token cross-entropy.

    The mean starts at the second token, or at the first one if the tokenizer puts BOS before it.
    """
    import torch

    from safecl.training import batches, losses, model, tokens

    device = "cuda" if context.execution.use_gpu else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    base = model.load(tokens.base_folder(folder), dtype, device)
    hidden_states, head = model.HiddenStates(base).eval(), losses.head_of(base)
    tokenizer = tokens.Tokenizer(folder)
    start = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    found: list[float] = []
    with torch.no_grad():
        for own in tokenizer.prompt_ids([[(text, False)] for text in texts]):
            ids = start + own
            row = tokens.Encoded("", ids, 1)
            batch = batches.collate([row], [0], [0], 1, row, device)
            total = losses.cross_entropy_sum(hidden_states(batch)[:-1], head, batch.ids_P[1:])
            found.append(float(torch.exp(total / max(1, len(ids) - 1))))
    return found


def embeddings(folder: Path, texts: Sequence[str], context: Context, dtype: str) -> list[list[float]]:
    """Embed texts as unit vectors (L2 norm 1) with an encoder model, from its last hidden states.

    The states are averaged if the folder's sentence-transformers file (1_Pooling/config.json) says so. Else the first
    token's state is taken, as for bge models. A text is cut at 256 tokens.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from safecl.training.tokens import base_folder

    if not context.execution.use_gpu:
        torch.set_num_threads(1)
    source = base_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
    pooling = source / "1_Pooling" / "config.json"
    mean = pooling.exists() and json.loads(pooling.read_text()).get("pooling_mode_mean_tokens", False)
    found: list[list[float]] = []
    with torch.no_grad():
        for text in texts:
            encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            states_TD = model(**encoded).last_hidden_state[0].float()
            found.append(torch.nn.functional.normalize(states_TD.mean(0) if mean else states_TD[0], dim=0).tolist())
    return found


def _read(folder: Path) -> Iterator[Row]:
    return (Row(**line) for line in json_lines(folder / "rows.jsonl"))
