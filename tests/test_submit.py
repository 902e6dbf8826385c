"""What travels with a job, and what is refused before it is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from safecl import submit
from safecl.base import ConfigError, PrerequisiteError


def packed(tmp_path: Path, raw: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path / "job"
    folder.mkdir()
    submit.pack({"execution": {"root": "s3://b/x"}, **raw}, tmp_path / "mine" / "sweep.yaml", folder)
    return folder, yaml.safe_load((folder / "sweep.yaml").read_text())


def test_what_lies_beside_a_sweep_file_travels_and_absolute_places_stay(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "model").mkdir(parents=True)
    for name in ("rows.jsonl", "val.jsonl", "plugin.py", "numbers.yaml", "model/config.json"):
        (mine / name).write_text(name)
    data = [{"name": "a", "file": {"train": "rows.jsonl", "test": "val.jsonl"}}, {"name": "b", "file": "/data/b.jsonl"}]
    folder, raw = packed(
        tmp_path,
        {
            "plugins": ["plugin.py"], "published": {"file": "numbers.yaml"}, "data": data,
            "models": [{"source": "model"}, {"source": "meta/llama"}, {"source": "/models/one"}],
        },
    )  # fmt: skip
    read = [raw["plugins"][0], raw["published"]["file"], *raw["data"][0]["file"].values()]
    assert [(folder / place).read_text() for place in read] == ["plugin.py", "numbers.yaml", "rows.jsonl", "val.jsonl"]
    assert (folder / raw["models"][0]["source"] / "config.json").is_file()
    assert raw["data"][1]["file"] == "/data/b.jsonl"
    assert [model["source"] for model in raw["models"][1:]] == ["meta/llama", "/models/one"]


def test_a_store_in_the_jobs_own_folder_is_refused(tmp_path: Path) -> None:
    for execution in ({}, {"root": "runs"}):
        with pytest.raises(ConfigError, match=r"execution\.root.*goes with the job"):
            submit.pack({"execution": execution}, tmp_path / "sweep.yaml", tmp_path)


def test_large_folders_do_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "LARGEST", 3)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "weights").write_text("four")
    with pytest.raises(ConfigError, match="at most 3 B travel"):
        packed(tmp_path, {"models": [{"source": "model"}]})


def test_where_no_dashboard_answers_is_said_with_the_remedy() -> None:
    with pytest.raises(PrerequisiteError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:9 .*--address"):
        submit.client("http://127.0.0.1:9")
