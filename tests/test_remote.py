"""The store at a URL: a real S3 server on loopback, nodes as folders of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from safecl import cache, cli, keep, lease, printed, records, remote, underway, upkeep
from safecl.base import Damaged, Infrastructure, PrerequisiteError, Unreachable
from safecl.remote import Remote
from safecl.store import Stage, Store
from tests.servers import S3, s3
from tests.test_store import ALIVE, DEAD, damage, publish, stage


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3() as served:
        yield served


@pytest.fixture
def url(server: S3, request: pytest.FixtureRequest) -> str:
    return f"{server.url}/{request.node.name[:40]}-{time.time_ns()}"


def node(monkeypatch: pytest.MonkeyPatch, folder: Path, url: str, **options: object) -> Store:
    """The store as a node with this cache has it."""
    monkeypatch.setenv("SAFECL_CACHE", str(folder))
    return Store(url, **options)  # type: ignore[arg-type]


def test_a_node_reads_what_another_published(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = node(monkeypatch, tmp_path / "1", url), node(monkeypatch, tmp_path / "2", url)
    assert not one.has(stage()) and not other.has(stage())
    with pytest.raises(KeyError, match=r"stage data .* is not in the store at s3://"):
        other.path(stage())
    first = publish(one, stage(), "shared")
    assert other.has(stage())
    folder = other.path(stage())
    assert folder != first and (folder / "rows.jsonl").read_text() == "shared"
    assert other.record(stage()) == one.record(stage()) and other.record(stage())["key"] == stage().key
    third = node(monkeypatch, tmp_path / "3", url)
    assert [record["key"] for record in third.find(stage().key[:8])] == [stage().key]
    assert [record["key"] for record in third.records("data")] == [stage().key]
    assert (third.by_key(stage().key) or {})["kind"] == "data" and third.by_key("0" * 64) is None
    assert not list((tmp_path / "3").rglob("rows.jsonl"))  # a record alone fetches no files
    assert (third.folder(third.find(stage().key)[0]) / "rows.jsonl").read_text() == "shared"
    has = third.listed()
    assert has(stage()) and not has(Stage("data", {"seed": 9}))
    assert not list(tmp_path.glob("*/*/tmp/*"))


def test_of_those_who_publish_one_stage_at_once_one_counts(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [node(monkeypatch, tmp_path / str(i), url) for i in range(4)]
    start = threading.Barrier(4)

    def one(i: int) -> str:
        made = nodes[i].new_folder()
        for name in ("a", "b"):
            (made / name).write_text(f"of {i}")
        start.wait()
        folder = nodes[i].publish(stage(), made, {}, 0.0)
        return (folder / "a").read_text() + (folder / "b").read_text()

    with ThreadPoolExecutor(4) as threads:
        texts = set(threads.map(one, range(4)))
    assert len(texts) == 1, "each then reads the same, of one of them"
    left = Remote(url).list("files")
    assert len(left) == 2 and len({name.split("/")[3] for name in left}) == 1, "the others' uploads are gone"
    assert not Remote(url).list("uploads")


def test_a_process_that_is_killed_while_it_uploads_leaves_nothing_that_counts_and_what_it_left_is_removed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = textwrap.dedent(f"""
        import os, signal
        from safecl.remote import Remote
        from safecl.store import Stage, Store
        Remote.create = lambda self, name, content: os.kill(os.getpid(), signal.SIGKILL)
        store = Store({url!r})
        made = store.new_folder()
        (made / "rows.jsonl").write_text("x" * 1000)
        store.publish(Stage("data", {{"seed": 0}}), made, {{}}, 0.0)
    """)
    environment = {**os.environ, "SAFECL_CACHE": str(tmp_path / "1")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    here = node(monkeypatch, tmp_path / "1", url)
    assert Remote(url).list("files") and not here.has(stage())
    assert list(here.local.glob("tmp/*"))
    upkeep.sweep_temporary(here)
    assert not Remote(url).list("files") and not Remote(url).list("uploads") and not list(here.local.glob("tmp/*"))
    publish(here, stage(), "whole")
    upkeep.sweep_temporary(here)
    assert (node(monkeypatch, tmp_path / "2", url).path(stage()) / "rows.jsonl").read_text() == "whole"


def test_the_upload_of_a_live_owner_and_one_that_counts_are_never_removed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, dead = node(monkeypatch, tmp_path, url), node(monkeypatch, tmp_path, url, owner=DEAD)
    publish(dead, stage())
    upload = dead.record(stage())["upload"]
    Remote(url).note(f"uploads/{upload}.json", {"kind": "data", "key": stage().key})  # killed before it took this away
    Remote(url).note(f"uploads/{ALIVE}.1.json", {"kind": "data", "key": "k"})
    Remote(url).write(f"files/data/k/{ALIVE}.1/rows.jsonl", b"half")
    upkeep.sweep_temporary(here)
    assert set(Remote(url).list("uploads")) == {f"uploads/{ALIVE}.1.json"}
    assert len(Remote(url).list("files")) == 2


def test_several_of_one_node_fetch_a_stage_once(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(node(monkeypatch, tmp_path / "1", url), stage(), "x" * 100_000)
    fetched: list[str] = []
    download = Remote.download

    def slow(self: Remote, at: str, names: list[str], folder: Path) -> None:
        fetched.append(at)
        time.sleep(0.3)
        download(self, at, names, folder)

    monkeypatch.setattr(Remote, "download", slow)
    stores = [node(monkeypatch, tmp_path / "2", url) for _ in range(6)]  # as processes have them
    with ThreadPoolExecutor(6) as threads:
        folders = set(threads.map(lambda store: store.path(stage()), stores))
    assert len(folders) == 1 and len(fetched) == 1


def test_a_full_cache_drops_what_was_used_longest_ago_and_never_what_is_in_use(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "FRESH_S", 0.0)
    stages = [Stage("data", {"seed": i}) for i in range(6)]
    for each in stages:
        publish(node(monkeypatch, tmp_path / "1", url), each, "x" * 1000)
    small = node(monkeypatch, tmp_path / "2", url, cache_gib=3500 / 2**30)

    def here() -> list[int]:
        return [i for i, each in enumerate(stages) if (small.local / "store" / "data" / each.key).exists()]

    with small.using(stages[:1]) as [held]:
        for i in (1, 2):
            small.path(stages[i])
            time.sleep(0.02)
        assert here() == [0, 1, 2]
        small.path(stages[1])  # used again
        time.sleep(0.02)
        small.path(stages[3])
        assert here() == [0, 1, 3], "2 was used longest ago of what is not held"
        small.path(stages[4])
        assert here() == [0, 3, 4] and (held / "rows.jsonl").exists()
    small.path(stages[5])
    assert here() == [3, 4, 5]
    assert (small.path(stages[0]) / "rows.jsonl").read_text() == "x" * 1000, "what was dropped is fetched again"
    alike = node(monkeypatch, tmp_path / "3", url, cache_gib=0.0)
    assert (publish(alike, Stage("data", {"seed": 7})).parent / stages[0].key).exists() is False
    monkeypatch.setattr(cache, "FRESH_S", 60.0)
    for each in stages:
        alike.path(each)
    assert all((alike.path(each) / "rows.jsonl").exists() for each in stages), "what was used just now stays"


def test_a_damaged_copy_is_fetched_again_and_a_damaged_original_made_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "1111111111111"
    one = node(monkeypatch, tmp_path / "1", url)
    damage(publish(one, stage(), text) / "rows.jsonl", "truncated")
    assert (node(monkeypatch, tmp_path / "1", url).path(stage()) / "rows.jsonl").read_text() == text
    [there] = Remote(url).list("files")
    Remote(url).write(there, b"2" * len(text))  # size alone would not tell
    other = node(monkeypatch, tmp_path / "2", url)
    with pytest.raises(Damaged, match=r"rows.jsonl was changed"):
        other.path(stage())
    late = node(monkeypatch, tmp_path / "3", url)
    assert not other.sound(stage()) and not other.has(stage())
    assert not late.sound(stage()) and not late.has(stage())  # which found it at the same moment
    publish(other, stage(), text)
    assert late.sound(stage()) and other.sound(stage())
    Remote(url).remove(next(name for name in Remote(url).list("files") if other.record(stage())["upload"] in name))
    assert not node(monkeypatch, tmp_path / "4", url).sound(stage()), "a file that is gone"


def test_a_large_file_that_was_fetched_is_not_hashed_anew_by_every_process(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "TRUSTED", 5)
    publish(node(monkeypatch, tmp_path / "1", url), stage(), "123456789")
    node(monkeypatch, tmp_path / "2", url).path(stage())

    def never(path: Path) -> str:
        raise AssertionError("it was hashed")

    monkeypatch.setattr(records, "_sha256", never)
    assert node(monkeypatch, tmp_path / "2", url).path(stage())


def test_a_server_that_is_away_for_a_while_delays_and_fails_nothing(
    url: str, server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = node(monkeypatch, tmp_path, url)
    publish(store, stage())
    server.stop()
    timer = threading.Timer(2.0, server.go_on)
    timer.start()
    began = time.monotonic()
    publish(store, Stage("data", {"seed": 1}))
    assert time.monotonic() - began > 1.5 and store.has(Stage("data", {"seed": 1}))


@pytest.mark.slow
def test_a_server_that_never_answers_is_said_and_soon_where_it_never_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr(remote, "FIRST_PATIENCE_S", 0.0)
    s3fs = fsspec.get_filesystem_class("s3")
    s3fs.clear_instance_cache()
    try:
        store = node(monkeypatch, tmp_path, "s3://nobody/here")
        with pytest.raises(Infrastructure, match=r"s3://nobody/here does not answer"):
            store.has(stage())
        with pytest.raises(PrerequisiteError, match=r"execution.root 's3://nobody/here' cannot be used"):
            upkeep.check_writable(store, 0.0)
    finally:
        s3fs.clear_instance_cache()


def test_a_bucket_that_is_not_there_is_said_by_whoever_reads_first(
    server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = node(monkeypatch, tmp_path, "s3://no-such-bucket/x")
    for read in (store.listed, lambda: store.notes(lease.NOTE), lambda: store.noted("x"), lambda: store.find("ab")):
        with pytest.raises(PrerequisiteError, match=r"execution\.root 's3://no-such-bucket/x' cannot be used .*bucket"):
            read()
    monkeypatch.setattr(sys, "argv", ["safecl", "du", "--root", store.root])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "prerequisite error: execution.root" in capsys.readouterr().err
    assert "does not answer" in (cli._mendable(Unreachable("s3://x does not answer")) or "")


def test_a_driver_that_is_not_installed_is_one_clear_error() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None; sys.modules['gcsfs'] = None; sys.modules['adlfs'] = None\n"
        + textwrap.dedent("""
        from safecl.base import PrerequisiteError
        from safecl.store import Store
        for url in ("s3://bucket/x", "gs://bucket/x", "abfs://bucket/x", "nosuch://bucket"):
            try:
                Store(url)
            except PrerequisiteError as error:
                print(error)
    """)
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert len(told) == 4, done.stderr
    assert told[0].startswith("execution.root 's3://bucket/x': ") and told[0].endswith("pip install 'safecl[s3]'")
    assert told[1].endswith("pip install 'safecl[gs]'") and told[2].endswith("pip install adlfs")
    assert "expected a folder or the URL" in told[3]


def test_checkpoints_are_kept_beside_the_store_and_found_by_another_node(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = node(monkeypatch, tmp_path / "1", url)
    scratch = one.scratch(stage())
    assert underway.keep(one, stage(), scratch) is None  # there is none yet

    def step(store: Store, number: int, text: str) -> Path:
        folder = store.scratch(stage()) / f"checkpoint-{number:08d}"
        folder.mkdir()
        (folder / "adapter.safetensors").write_text(text)
        (store.scratch(stage()) / "curves.jsonl").write_text(text)
        (store.scratch(stage()) / "tmp-1-2").mkdir(exist_ok=True)
        (store.scratch(stage()) / "tmp-1-2" / "half").write_text("x")
        return folder

    monkeypatch.setattr(underway, "LOOK_EVERY_S", 0.05)
    log = tmp_path / "a.log"
    with underway.kept(one, log, stage(), scratch):
        step(one, 1, "one")
        log.write_text("first line")
        deadline = time.monotonic() + 20
        while not Remote(url).list("logs") or not any("newest" in n for n in Remote(url).list("scratch")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        log.write_text("first line, last line")
    assert printed.read(node(monkeypatch, tmp_path / "9", url), "a.log") == b"first line, last line"
    step(one, 2, "two")
    underway.keep(one, stage(), scratch)
    assert len([name for name in Remote(url).list("scratch") if "adapter" in name]) == 1, "older ones are removed"
    # The same owner's next worker is on another node: it goes on from what the first one left.
    other = node(monkeypatch, tmp_path / "2", url, owner=one.owner)
    underway.bring(other, stage(), other.scratch(stage()))
    assert sorted(path.name for path in other.scratch(stage()).iterdir()) == ["checkpoint-00000002", "curves.jsonl"]
    assert (other.scratch(stage()) / "checkpoint-00000002" / "adapter.safetensors").read_text() == "two"
    # A rank beside it whose node holds an older one takes what rank 0 found.
    found = json.loads(Remote(url).read(f"scratch/{stage().key}/{one.owner}/newest.json"))
    beside = node(monkeypatch, tmp_path / "3", url, owner=one.owner)
    step(beside, 1, "old")
    underway.bring(beside, stage(), beside.scratch(stage()), rank=1, agree=lambda given: found)
    assert [path.name for path in beside.scratch(stage()).glob("checkpoint*")] == ["checkpoint-00000002"]
    # What lies on this node may be newer than what was kept: rank 0 keeps it, so that all ranks have it.
    step(other, 3, "three")
    agreed: list[dict[str, str]] = []
    underway.bring(other, stage(), other.scratch(stage()), agree=lambda given: agreed.append(given) or given)
    assert agreed[0]["checkpoint"] == "checkpoint-00000003"
    publish(other, stage())
    assert not Remote(url).list("scratch") and not list(other.scratch(stage()).iterdir())


def test_a_checkpoint_is_taken_over_from_a_dead_owner_and_not_from_a_live_one(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = f"{'0' * 10}-1-1"  # of another machine
    for i, owner in enumerate((DEAD, far)):
        store = node(monkeypatch, tmp_path / str(i), url, owner=owner)
        (store.scratch(stage()) / f"checkpoint-{7 + i}").mkdir()
        (store.scratch(stage()) / f"checkpoint-{7 + i}" / "state.json").write_text("{}")
        underway.keep(store, stage(), store.scratch(stage()))
    mine = node(monkeypatch, tmp_path / "mine", url)
    mine.note(lease.NOTE + far, {"held": True})
    underway.bring(mine, stage(), mine.scratch(stage()))
    assert [path.name for path in mine.scratch(stage()).iterdir()] == ["checkpoint-7"]
    publish(mine, stage())
    assert {name.split("/")[2] for name in Remote(url).list("scratch")} == {far}
    mine.forget(lease.NOTE + far)
    again = node(monkeypatch, tmp_path / "again", url)
    underway.bring(again, stage(), again.scratch(stage()))
    assert [path.name for path in again.scratch(stage()).iterdir()] == ["checkpoint-8"]


def test_logs_are_listed_and_read_by_key_from_any_machine(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = node(monkeypatch, tmp_path / "1", url), node(monkeypatch, tmp_path / "2", url)
    one.logs.mkdir(parents=True)
    for name in ("data-0123456789ab.log", "finetune-ba9876543210.log"):
        (one.logs / name).write_text(f"of {name}")
        printed.put(one, one.logs / name)
    with (one.logs / "data-0123456789ab.log").open("a") as file:
        file.write(", and more")  # which only its own node knows yet
    assert [log.name for log in printed.listed(other, "0123456789ab")] == ["data-0123456789ab.log"]
    assert {log.name: log.size for log in printed.listed(other)} == {
        "data-0123456789ab.log": 24, "finetune-ba9876543210.log": 28
    }  # fmt: skip
    assert printed.read(other, "data-0123456789ab.log", 3) == b"data-0123456789ab.log"
    assert printed.read(one, "data-0123456789ab.log", 3).endswith(b", and more")
    with pytest.raises(FileNotFoundError, match="no log 'x'"):
        printed.read(other, "x")


def test_du_counts_what_lies_at_the_url_and_not_this_machines_cache(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = node(monkeypatch, tmp_path, url)
    publish(store, stage(), "123456789")
    store.note("speeds", 1)
    (store.logs / "ray.log").parent.mkdir(parents=True, exist_ok=True)
    (store.logs / "ray.log").write_text("this machine's own")
    rows = {row["what"]: row for row in keep.table(store, None)}
    assert rows["notes/"]["num"] == 1 and "logs/" not in rows
    printed.put(store, store.logs / "ray.log")
    rows = {row["what"]: row for row in keep.table(store, None)}
    assert rows["logs/"]["bytes"] == len("this machine's own") and rows["data"]["bytes"] > 9


def test_notes_are_the_same_for_every_node(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = node(monkeypatch, tmp_path / "1", url), node(monkeypatch, tmp_path / "2", url)
    one.note("lease-a", {"beat": 1})
    one.note("lease-a", {"beat": 2})
    assert other.noted("lease-a") == {"beat": 2} and other.notes("lease-") == {"lease-a": {"beat": 2}}
    other.forget("lease-a")
    assert one.noted("lease-a") is None and one.notes("lease-") == {}
