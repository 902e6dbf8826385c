"""The store: identity, atomic publishing, what survives a kill."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from safecl import lease, records, upkeep
from safecl.base import Damaged, PrerequisiteError
from safecl.store import SharedConfig, Stage, Store, below, canonical


def stage(**config: object) -> Stage:
    return Stage("data", config or {"seed": 0})  # type: ignore[arg-type]


def publish(store: Store, made: Stage, text: str = "x") -> Path:
    folder = store.new_folder()
    (folder / "rows.jsonl").write_text(text)
    return store.publish(made, folder, {"num": 1}, 0.5)


def test_a_key_is_the_same_in_another_process_whatever_the_order_of_keys_and_the_hash_seed() -> None:
    code = "from safecl.store import Stage; print(Stage('data', {'b': [1, 2.5], 'a': {'y': None, 'x': 'é'}}).key)"
    keys = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert keys == {Stage("data", {"a": {"x": "é", "y": None}, "b": [1, 2.5]}).key}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: "x"}, {"a": {2, 3}}, Path("x"), b"x"])
def test_a_value_without_a_stable_form_raises(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        canonical({"at": value})  # type: ignore[dict-item]


def test_an_input_or_the_version_changes_the_key_and_a_hint_does_not() -> None:
    plain = Stage("data", {"seed": 0})
    assert Stage("data", {"seed": 0}, {"rows": plain}).key != plain.key
    assert Stage("data", {"seed": 0}, version="2").key != plain.key
    assert Stage("data", {"seed": 0}, hints={"path": "elsewhere"}).key == plain.key
    assert Stage("data", {"seed": 0.0}).key != plain.key  # 0 and 0.0 are different configs


def test_a_stage_given_more_inputs_is_the_stage_made_with_all_of_them() -> None:
    rows, weights, other = Stage("data", {"seed": 0}), Stage("finetune", {"seed": 1}), Stage("finetune", {"seed": 2})
    for config in ({"text": "100 % \0 %s", "n": 1}, SharedConfig({"text": "\0"})):
        asked = Stage("generate", config, {"rows": rows}, "2", {"path": "/here"})  # type: ignore[arg-type]
        for inputs in ({}, {"weights": weights}, {"weights": other}, {'a"b': other, "weights": weights}):
            given, made = (
                asked.given(inputs),
                Stage("generate", asked.config, {"rows": rows, **inputs}, "2", asked.hints),
            )
            assert given == made
            assert given.key == made.key


def test_a_key_is_the_sha256_of_the_canonical_json_of_kind_config_inputs_and_version() -> None:
    below = Stage("data", {"seed": 0})
    config = {"z": 1, "a": [1.5, None, {"ü": 'say "x"'}]}
    for given in (config, SharedConfig(config)):
        made = Stage("finetune", given, {"z": below, 'ä"': below, "b": below}, "2+ü")  # type: ignore[arg-type]
        identity = {"kind": "finetune", "config": config, "version": "2+ü",
                    "inputs": {name: below.key for name in ("z", "ä\"", "b")}}  # fmt: skip
        assert made.key == hashlib.sha256(canonical(identity).encode()).hexdigest()  # type: ignore[arg-type]


def test_what_is_left_out_takes_with_it_what_only_it_needs() -> None:
    shared, own = Stage("data", {"n": 1}), Stage("data", {"n": 2})
    one, two = Stage("memory", {"n": 3}, {"a": shared, "b": own}), Stage("memory", {"n": 4}, {"a": shared})
    assert below([one, two]) == [shared, own, one, two]
    assert below([one, two], lambda stage: stage is one) == [shared, two]


def test_records_of_a_kind_are_the_newest_and_oldest_first(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert store.records("data") == []
    for n in range(4):
        folder = publish(store, Stage("data", {"n": n}))
        os.utime(folder, (n, n))
    assert [record["config"]["n"] for record in store.records("data", at_most=2)] == [2, 3]
    (folder / "record.json").unlink()  # half removed
    assert [record["config"]["n"] for record in store.records("data")] == [0, 1, 2]


def test_a_stage_without_a_record_does_not_exist(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    folder = publish(store, stage())
    assert store.has(stage())
    (folder / "record.json").unlink()
    assert not store.has(stage())
    with pytest.raises(KeyError):
        store.path(stage())
    publish(store, stage(), "again")  # and is made again over what lies there
    assert (store.path(stage()) / "rows.jsonl").read_text() == "again"


def test_the_first_to_publish_wins(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    publish(store, stage(), "first")
    publish(store, stage(), "second")
    assert (store.path(stage()) / "rows.jsonl").read_text() == "first"
    assert not list((tmp_path / "tmp").iterdir())


def test_a_record_names_inputs_result_cost_and_libraries(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    below = stage()
    above = Stage("memory", {"num_rows": 3}, {"rows": below})
    publish(store, below)
    publish(store, above)
    record = store.record(above)
    assert record["inputs"] == {"rows": below.key}
    assert record["result"] == {"num": 1} and record["seconds"] == 0.5
    assert record["files"] == {"rows.jsonl": 1}
    assert record["sha256"] == {"rows.jsonl": hashlib.sha256(b"x").hexdigest()}
    assert "torch" in record["libraries"]
    assert [found["key"] for found in store.find(above.key[:6])] == [above.key]


def test_kill_9_in_the_middle_of_writing_leaves_no_stage_and_the_next_attempt_succeeds(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import time
        from safecl.store import Stage, Store
        store = Store({str(tmp_path)!r})
        folder = store.new_folder()
        with (folder / "rows.jsonl").open("w") as file:
            for i in range(10**9):
                file.write("row\\n"); file.flush()
                if i == 100: print("half", flush=True)
                time.sleep(0.001)
    """)
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "half\n"
    os.kill(writer.pid, signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    store = Store(str(tmp_path))
    assert not store.has(stage()) and store.find("") == []
    publish(store, stage(), "whole")
    assert (store.path(stage()) / "rows.jsonl").read_text() == "whole"
    upkeep.sweep_temporary(store)
    assert not list((tmp_path / "tmp").iterdir())


def test_a_note_that_could_not_be_written_leaves_nothing_and_one_that_was_cut_short_is_removed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, half = Store(str(tmp_path), owner=DEAD), []

    def fails(written: Path, to: Path) -> None:
        half.append(written)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safecl.store.os.replace", fails)
    with pytest.raises(OSError, match="No space"):
        store.note("fact", {"a": 1})
    assert half[0].parent.parent == tmp_path / "tmp", "where `sweep_temporary` finds what was being written"
    assert half[0].parent.name.startswith(DEAD)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not list((tmp_path / "tmp").iterdir())


def test_a_full_disk_leaves_no_stage(tmp_path: Path) -> None:
    """A real write limit: the process may write 4 KiB a file, the record is refused."""
    code = textwrap.dedent(f"""
        import resource, signal
        from safecl.store import Stage, Store
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = Store({str(tmp_path)!r})
        made = store.new_folder()
        (made / "rows.jsonl").write_text("x")
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        store.publish(Stage("data", {{"seed": 0}}), made, {{}}, 0.0)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "File too large" in done.stderr
    assert not Store(str(tmp_path)).has(stage())


def test_a_root_that_cannot_hold_the_results_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PrerequisiteError, match="cannot be written"):
        upkeep.check_writable(Store(str(tmp_path / "file" / "below")), 0.0)
    with pytest.raises(PrerequisiteError, match=r"GiB free, expected at least"):
        upkeep.check_writable(Store(str(tmp_path)), 1e9)


ALIVE = f"{lease.machine()}-{os.getppid()}-{lease._began(os.getppid())}"  # this process's parent
DEAD = f"{lease.machine()}-999999999-1"  # a process that is gone


def damage(file: Path, how: str) -> None:
    """As a disk does: without a later time of writing."""
    before = file.stat()
    if how == "gone":
        file.unlink()
        return
    was, is_now = ('"num": 1', '"num": 2') if file.name == "record.json" else ("1", "2")
    file.write_text(file.read_text()[:-9] if how == "truncated" else file.read_text().replace(was, is_now))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("how", ["truncated", "altered", "gone"])
@pytest.mark.parametrize("name", ["rows.jsonl", "record.json"])
def test_what_was_cut_short_or_changed_is_named_never_served_and_made_again(
    how: str, name: str, tmp_path: Path
) -> None:
    if (how, name) == ("gone", "record.json"):
        return  # it then is no stage
    text = "11 22 33 44 55 66"
    folder = publish(Store(str(tmp_path)), stage(), text)
    damage(folder / name, how)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    reader = Store(str(tmp_path))
    for read in (reader.path, lambda stage: reader.file(stage, "rows.jsonl")):
        with pytest.raises(Damaged, match=rf"stage data {stage().key[:12]} is damaged: {name} .*safecl run"):
            read(stage())  # type: ignore[no-untyped-call]
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    if name == "record.json":
        for read in (reader.record, lambda stage: reader.find(stage.key[:9])):
            with pytest.raises(Damaged, match="cut short or was changed"):
                read(stage())
        assert reader.records("data") == []
    run = Store(str(tmp_path))
    assert not run.sound(stage()) and not run.has(stage())
    assert [path.name[:9] for path in (tmp_path / "damaged").iterdir()] == [f"data-{stage().key[:4]}"]
    publish(run, stage(), text)
    assert run.sound(stage()) and (run.path(stage()) / "rows.jsonl").read_text() == text


def test_a_large_file_is_hashed_where_its_time_of_writing_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "TRUSTED", 5)
    file = publish(Store(str(tmp_path)), stage(), "1" * 9) / "rows.jsonl"
    damage(file, "altered")
    assert Store(str(tmp_path)).sound(stage())  # what is not looked for, so that a start need not read whole models
    os.utime(file)
    assert not Store(str(tmp_path)).sound(stage())


def test_a_record_of_an_earlier_version_is_read_by_its_sizes(tmp_path: Path) -> None:
    folder = publish(Store(str(tmp_path)), stage(), "123")
    record = json.loads((folder / "record.json").read_text())
    for name in ("sha256", "written_ns", "digest"):
        del record[name]
    (folder / "record.json").write_text(json.dumps(record))
    assert Store(str(tmp_path)).path(stage()) == folder
    (folder / "rows.jsonl").write_text("12")
    assert not Store(str(tmp_path)).sound(stage())


def test_scratch_of_two_runs_never_collides_and_that_of_a_dead_one_is_taken_over(tmp_path: Path) -> None:
    mine, other = Store(str(tmp_path)), Store(str(tmp_path), f"{'0' * 10}-1-1")
    other.note(lease.NOTE + other.owner, {"held": True})  # of another machine, and at work
    (other.scratch(stage()) / "checkpoint-8").mkdir()
    (tmp_path / "scratch" / stage().key / "left").symlink_to("gone")  # as what another rank took over meanwhile
    assert not list(mine.scratch(stage()).iterdir())
    dead = Store(str(tmp_path), DEAD)
    (dead.scratch(Stage("data", {"n": 1})) / "checkpoint-7").mkdir()
    assert (mine.scratch(Stage("data", {"n": 1})) / "checkpoint-7").is_dir()
    assert (mine.scratch(Stage("data", {"n": 1})) / "checkpoint-7").is_dir()  # as another rank finds it
    publish(mine, stage())
    publish(mine, Stage("data", {"n": 1}))
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [stage().key]
    assert (other.scratch(stage()) / "checkpoint-8").is_dir()


def test_what_is_being_written_stays_however_old_it_is_and_what_the_dead_left_goes_at_once(tmp_path: Path) -> None:
    mine, other, dead = (Store(str(tmp_path), owner) for owner in (None, ALIVE, DEAD))
    kept, left = other.new_folder(), dead.new_folder()
    week_ago = time.time() - 7 * 86_400
    os.utime(kept, (week_ago, week_ago))
    upkeep.sweep_temporary(mine)
    assert kept.is_dir() and not left.is_dir()


def test_a_store_in_another_process_works_for_the_same_owner(tmp_path: Path) -> None:
    import copy

    store = Store(str(tmp_path), DEAD)
    again = copy.copy(store)  # by what pickling goes by
    assert again.owner == DEAD and again.local == store.local
