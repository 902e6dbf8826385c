"""Sources: identity without paths, missing ones in one line, samples that nest, groups and hashes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from safecl.base import ConfigError, PrerequisiteError
from safecl.tasks import Row, Source, Task, load, names
from safecl.tasks._source import _commit, choose, digest, first_of_each, groups, identity, lowest, records

REAL = [name for name in names() if load(name).SOURCES]


@pytest.mark.parametrize("name", names())
def test_every_split_of_a_real_task_names_its_sources(name: str) -> None:
    task = load(name)
    assert task.SPLITS
    assert set(task.SOURCES) in (set(), set(task.SPLITS))


@pytest.mark.parametrize("name", REAL)
def test_a_missing_source_gives_one_line_with_what_where_and_how(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = load(name)
    for split in task.SPLITS:
        for attempt in (lambda s=split: task(tmp_path).rows(s, None, 0), lambda s=split: identity(task, s, tmp_path)):
            with pytest.raises(PrerequisiteError) as caught:
                attempt()
            message, source = str(caught.value), task.SOURCES[split][0]
            assert "\n" not in message
            assert source.file in message and "execution.data_dir" in message
            assert (source.hub or "https://github.com") in message
            assert ("licence" in message) == source.gated


def test_a_data_folder_that_is_none_is_named() -> None:
    with pytest.raises(PrerequisiteError, match="no/such is not a folder"):
        records(Source("a.jsonl"), Path("no/such"))


def test_identity_is_the_contents_not_the_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "advbench.jsonl").write_text('{"goal": "alpha"}\n')
    advbench = load("advbench")
    found = [identity(advbench, "attack.test", tmp_path / folder) for folder in ("one", "two")]
    wanted = [{"file": "advbench.jsonl", "sha256": hashlib.sha256(b'{"goal": "alpha"}\n').hexdigest()}]
    assert found == [wanted, wanted]
    (tmp_path / "one" / "advbench.jsonl").write_text('{"goal": "omega"}\n')  # same size: the time of change tells
    os.utime(tmp_path / "one" / "advbench.jsonl", ns=(1, 1))
    assert identity(advbench, "attack.test", tmp_path / "one") != wanted
    assert str(tmp_path) not in json.dumps(found)


def test_a_generated_suite_is_identified_by_its_version() -> None:
    assert identity(load("mini"), "user", None) == {"generated": load("mini").VERSION}
    with pytest.raises(ConfigError, match="has no split 'x'"):
        identity(load("mini"), "x", None)


def test_broken_files_are_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\nnot json\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 3: not JSON"):
        records(Source("a.jsonl"), tmp_path)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(ConfigError, match="line 3: expected an object, got a list"):
        records(Source("a.jsonl"), tmp_path)


class Toy(Task):
    SPLITS = ("user", "attack.test")


def test_samples_nest_and_only_training_splits_move_with_the_seed() -> None:
    rows = [Row(str(i), f"prompt {i}") for i in range(50)]
    for split, moves in (("user", True), ("attack.test", False)):
        few, many = choose(Toy(), split, rows, 10, 1), choose(Toy(), split, rows[::-1] if not moves else rows, 20, 1)
        assert many[:10] == few
        assert (choose(Toy(), split, rows, 10, 2) != few) == moves
    with pytest.raises(ConfigError, match="holds 50 rows, 51 were asked for"):
        choose(Toy(), "user", rows, 51, 0)


def test_hash_picks_group_equal_prompts_first() -> None:
    prompts = ["Alpha!", "alpha", "beta", "gamma", "delta"]
    picked = lowest("salt", prompts, 2)
    wanted = sorted(
        {"alpha", "beta", "gamma", "delta"}, key=lambda p: hashlib.sha256(f"salt\n{p}".encode()).hexdigest()
    )
    assert picked == set(wanted[:2])
    assert digest("salt", "Alpha!") == digest("salt", " ALPHA ") != digest("pepper", "alpha")
    kept = first_of_each([Row(str(i), p) for i, p in enumerate(prompts)])
    assert [row.id for row in kept] == ["0", "2", "3", "4"]


def test_groups_are_connected_components() -> None:
    assert groups(6, [(0, 2), (2, 4), (5, 1)]) == [[0, 2, 4], [1, 5], [3]]
    assert groups(0, []) == []


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Unreachable:
        def __init__(self) -> None:
            asked.append(1)
            raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi", Unreachable)
    for split in ("a", "b"):
        with pytest.raises(PrerequisiteError, match="no route"):
            _commit(Source("x.jsonl", "no-such/set", split=split))
    assert len(asked) == 1
