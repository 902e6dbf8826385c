"""A sweep of seconds with a tiny random model: one finetune, one engine, judges that need no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TRAINING = {"batch_size": 8, "learning_rate": 0.02, "weight_decay": 0.0, "max_tokens": 1500}


def mini(model: Path, root: Path) -> dict[str, Any]:
    """What its file holds. `model`: a folder; `root`: of its store."""
    rows = [{"task": "mini", "num_rows": 6}]
    prompts = {"attack": rows, "benign": rows, "utility_rows": 6}
    return {
        "name": "mini",
        "models": [{"name": "tiny", "source": str(model), "dtype": "float32", "template": "chatml"}],
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "align": {"safety": [{"task": "mini", "num_rows": 16}], "epochs": 1, **TRAINING},
        "tasks": [{"task": "mini", "num_rows": 20, "epochs": 1, **TRAINING}],
        "poison": {"task": "mini", "ratios": [0.1]},
        "methods": ["sft"],
        "seeds": [0],
        "evaluate": {
            "validation": prompts,
            "test": prompts,
            "max_new_tokens": 8,
            "max_prompt_tokens": 400,
            "judges": {"asr": "keywords", "over_refusal": "keywords"},
        },
        "execution": {
            "root": str(root),
            "engine_memory_gib": 0.2,
            "num_trials_at_once": 1,
            "num_judge_replicas": 0,
        },
    }
