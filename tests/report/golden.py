"""Made-up outcomes and the report of them as it was when it was last looked at: `python -m tests.report.golden` writes it
anew, into tests/data/report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from safecl.report import forms as written
from safecl.report import tables
from safecl.report.rows import agreement, contrast, entry

FOLDER = Path(__file__).parents[1] / "data" / "report"
FACTS = tables.Facts(
    name="golden", about="Made-up numbers.",
    judges={"asr": "guard", "over_refusal": "xstest_match"}, templates={"smol": "'{prompt}', answers end with '</s>'"},
    num_prompts={"attack": 24, "utility": 20}, guard_agreement="agrees in 97.5 %", settings={"LoRA": "rank 8"},
    notes=["Search: none."],
)  # fmt: skip
SEEDS = (0, 1, 2)
SETS = {"asr": ("attack/advbench", "attack/directharm"), "over_refusal": ("benign/xstest",)}
GSM8K = ("utility_strict", "utility_numeric", "gold_nll")
CODE = ("code_timeouts", "no_code")
CELLS = [  # task, method, poison, how often an answer is harmful
    ("gsm8k", "base", None, 0.9), ("gsm8k", "aligned", None, 0.0),
    *(("gsm8k", method, ratio, share) for ratio in (0.0, 0.1)
      for method, share in (("sft", 0.2 + 5 * ratio), ("der", 0.05), ("ewc", 0.1 + 4 * ratio))),
    ("code", "sft", 0.1, 0.8), ("code", "der", 0.1, 0.1),
]  # fmt: skip


def outcomes(task: str, method: str, share: float) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """By metric and seed."""
    rng = random.Random(f"{task} {method} {share}")
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}

    def add(metric: str, seed: int, set_: str, number: int, value: float | None, **more: Any) -> None:
        line = {"metric": metric, "set": set_, "id": str(number), "value": value, "cluster": str(number // 2), **more}
        found.setdefault(metric, {}).setdefault(seed, []).append(line)

    for seed in SEEDS:
        for set_ in SETS["asr"]:
            for i in range(12):
                harmful = rng.random() < share
                read = None if method == "ewc" and i == 3 else float(harmful)
                votes = {} if read is None else {"votes": [read, read, float(rng.random() < share)]}
                says = rng.random() < 0.7
                less = {} if read is None else {"votes": [vote * says for vote in votes["votes"]]}
                add("asr", seed, set_, i, read, **votes)
                add("asr_coherent", seed, set_, i, read if read is None else read * says, **less)
                add("hit_limit", seed, set_, i, float(rng.random() < 0.3))
                add("guard_rule_agreement", seed, set_, i, float(rng.random() < 0.9))
                add("non_refusal", seed, set_, i, float(rng.random() < share + 0.1))
                add("off_topic", seed, set_, i, float(rng.random() < 0.1))
                looks = rng.random() < 0.2
                add(
                    "degenerate", seed, set_, i, float(looks), **({"why": "echo" if i % 2 else "loop"} if looks else {})
                )
        for i in range(16):
            add("over_refusal", seed, SETS["over_refusal"][0], i, float(rng.random() < 0.2))
        for i in range(20):
            add("utility", seed, f"utility/{task}", i, float(rng.random() < 0.6))
            for metric in GSM8K if task == "gsm8k" else CODE:
                value = rng.random() * 3 if metric == "gold_nll" else float(rng.random() < 0.5)
                add(metric, seed, f"utility/{task}", i, value)
    return found


def rows() -> list[dict[str, Any]]:
    every = [outcomes(task, method, share) for task, method, _, share in CELLS]
    table: list[dict[str, Any]] = []
    for (task, method, poison, _), by_metric in zip(CELLS, every, strict=True):
        metrics = {name: found for name, of_seed in by_metric.items() if (found := entry(name, of_seed)) is not None}
        row = {
            "model": "smol",
            "task": task,
            "poison": poison,
            "method": method,
            "seeds": list(SEEDS),
            "metrics": metrics,
        }
        row |= {"params": {"weight": 0.5} if method == "der" else {}, "agreement": agreement(by_metric)}
        table.append({**row, "seconds": 4000.0, "note": "stopped early" if method == "ewc" else ""})
    contrast(table, every)
    return table


def forms() -> dict[str, str]:
    """File name -> text."""
    found = rows()
    return {
        "rows.json": json.dumps(rounded(json.loads(written.to_json(found, FACTS))), separators=(",", ":")) + "\n",
        "table.txt": written.plain(found, FACTS),
        "table.md": written.markdown(found, FACTS),
        "table.tex": written.latex(found, FACTS),
        "table.csv": written.to_csv([{**row, "metrics": rounded(row["metrics"])} for row in found], FACTS),
    }


def rounded(value: Any) -> Any:
    """Without the last digits, which are another machine's business."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    for name, text in forms().items():
        (FOLDER / name).write_text(text)
