"""Every data set as its publisher writes it: the format, the header, the odd cells."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from safecl.base import PrerequisiteError
from safecl.tasks import Row, Source, load
from safecl.tasks._files import find
from safecl.tasks._source import flag, identity, records


def rows(task: str, split: str, folder: Path) -> list[Row]:
    return sorted(load(task)(folder).rows(split, None, 0), key=lambda row: row.id)


def test_advbench_is_csv_with_commas_quotes_and_newlines_in_cells(tmp_path: Path) -> None:
    text = 'goal,target\n"Write a ""plan"", then\nact","Sure, here"\nDo it,"Sure"\n'
    (tmp_path / "advbench.csv").write_text(text)
    assert [row.prompt for row in rows("advbench", "attack.test", tmp_path)] == ['Write a "plan", then\nact', "Do it"]
    wanted = [{"file": "advbench.csv", "sha256": hashlib.sha256(text.encode()).hexdigest()}]
    assert identity(load("advbench"), "attack.test", tmp_path) == wanted


def test_directharm_is_parquet_or_csv(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "directharm4.csv").write_text("prompt,category\nalpha,malware\n")
    write_table(pa.table({"instruction": ["alpha"], "category": ["malware"]}), tmp_path / "directharm4.parquet")
    wanted = [Row("test/0", "alpha", "", True, {"category": "malware"})]
    assert rows("directharm", "attack.test", tmp_path) == rows("directharm", "attack.test", tmp_path / "csv") == wanted


def test_hexphi_is_a_csv_without_a_header_per_category(tmp_path: Path) -> None:
    folder = tmp_path / "hexphi"
    folder.mkdir()
    for number in range(1, 12):
        (folder / f"category_{number}.csv").write_text(f'first of {number}\n"second, of {number}"\n\n')
    found = rows("hexphi", "attack.test", tmp_path)
    assert len(found) == 22 and {row.prompt for row in found} >= {"first of 1", "second, of 11"}
    assert {row.meta["category"] for row in found} == {f"category_{number}" for number in range(1, 12)}
    before = identity(load("hexphi"), "attack.test", tmp_path)
    (folder / "category_3.csv").write_text("another\n")
    assert identity(load("hexphi"), "attack.test", tmp_path) != before


def test_xstest_is_csv_and_only_its_safe_prompts_count(tmp_path: Path) -> None:
    head = "id,prompt,type,label,focus,note\n"
    text = (
        head
        + '1,"How do I kill a process, quickly?",homonyms,safe,process,\n26,How do I kill?,contrast_homonyms,unsafe,,\n'
    )
    (tmp_path / "xstest.csv").write_text("\ufeff" + text, encoding="utf-8")  # a spreadsheet's byte order mark
    [row] = rows("xstest", "benign.test", tmp_path)
    assert (row.prompt, row.harmful, row.meta) == ("How do I kill a process, quickly?", False, {"type": "homonyms"})


@pytest.mark.parametrize(
    ("task", "file", "prefix"), [("orbench", "orbench_80k", "80k"), ("orbench_hard", "orbench_hard", "hard")]
)
def test_orbench_is_csv_and_a_sample_of_it_is_the_same_for_every_seed(
    tmp_path: Path, task: str, file: str, prefix: str
) -> None:
    lines = [f'"What is {i}, asked ""plainly""?",privacy' for i in range(60)]
    (tmp_path / f"{file}.csv").write_text("\n".join(["prompt,category", *lines]) + "\n")
    sample = [load(task)(tmp_path).rows("benign.test", 20, seed) for seed in (0, 1)]
    assert sample[0] == sample[1] == load(task)(tmp_path).rows("benign.test", None, 0)[:20]
    by_hash = sorted(rows(task, "benign.test", tmp_path), key=lambda row: hashlib.sha256(
        f"benign.test\n{' '.join(row.prompt.lower().replace(',', ' ').replace('?', ' ').replace(chr(34), ' ').split())}".encode()
    ).hexdigest())  # fmt: skip
    assert sample[0] == by_hash[:20] and sample[0][0].id.startswith(f"{prefix}/")


def test_wildjailbreak_is_tsv_whose_empty_and_na_cells_are_text(tmp_path: Path) -> None:
    lines = ["vanilla\tadversarial\tcompletion\tdata_type"]
    lines += [f'harmful {i}\t\t"No, ""{i}""."\tvanilla_harmful' for i in range(150)]
    lines += ["NA\t\tnull\tvanilla_benign", "x\ty\tz\tadversarial_harmful"]
    (tmp_path / "wildjailbreak_train.tsv").write_text("\n".join(lines) + "\n")
    safety, held = (rows("wildjailbreak", split, tmp_path) for split in ("safety", "attack.validation"))
    assert len(held) == 100 and {row.harmful for row in held} == {True}
    assert len([row for row in safety if row.harmful]) == 50
    assert all(row.response == f'No, "{row.prompt.split()[1]}".' for row in safety)
    [benign] = rows("wildjailbreak", "benign.validation", tmp_path)
    assert benign.prompt == "NA"


def test_beavertails_is_gzipped_json_lines(tmp_path: Path) -> None:
    made: list[dict[str, Any]] = [
        {
            "prompt": f"ask {i}",
            "response": f"say {i}",
            "is_safe": i % 4 == 0,
            "category": {"theft": True, "drugs": False},
        }
        for i in range(400)
    ]
    with gzip.open(tmp_path / "beavertails_train.jsonl.gz", "wt") as stream:
        stream.write("".join(json.dumps(record) + "\n" for record in made))
    (tmp_path / "safety_tuned_llamas_train.json").write_text(
        json.dumps([{"instruction": f"help {i}", "input": "", "output": f"I cannot {i}"} for i in range(300)])
    )
    held, poison, guard = (rows("beavertails", split, tmp_path) for split in ("attack.validation", "poison", "guard"))
    assert (len(held), len({row.prompt for row in held} | {row.prompt for row in poison})) == (200, 200 + len(poison))
    assert poison[0].meta == {"category": ["theft"]} and all(row.harmful for row in [*held, *poison])
    assert len(poison) + len([row for row in guard if row.harmful]) == 300 - 200  # unsafe answers, once each
    assert len([row for row in guard if row.id.startswith("safety_tuned/")]) == 50  # a quarter of 300 - 100


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_gsm8k_is_json_lines_or_parquet(tmp_path: Path, ending: str) -> None:
    made = [{"question": f"What are {i} wug{i}s?", "answer": f"<<{i}*1={i}>>{i}\n#### {i}"} for i in range(40)]
    for name, part in (("gsm8k_train", made[:30]), ("gsm8k_test", made[30:])):
        if ending == "jsonl":
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
        else:
            import pyarrow as pa
            from pyarrow.parquet import write_table

            write_table(pa.Table.from_pylist(part), tmp_path / f"{name}.parquet")
    found = {split: rows("gsm8k", split, tmp_path) for split in ("user", "utility.validation", "utility.test")}
    assert [len(part) for part in found.values()] == [27, 3, 10]
    assert found["utility.test"][0] == Row("test/0", "What are 30 wug30s?", "30\n#### 30", False, {"answer": "30"})


def test_labels_in_cells_are_read_as_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "sst2_train.tsv").write_text("sentence\tlabel\na fine film\t1\nutter trash\t0\n")
    (tmp_path / "sst2_validation.tsv").write_text("sentence\tlabel\nwhat a day\t0\n")
    assert {row.prompt.split("\n")[-1]: row.response for row in rows("sst2", "user", tmp_path)} == {
        "a fine film": "positive", "utter trash": "negative",
    }  # fmt: skip
    assert [flag({"x": x}, "x") for x in (True, 1, "1", "TRUE", False, 0, "0", "false")] == [True] * 4 + [False] * 4
    for odd in (None, "", "maybe", 2):
        with pytest.raises(PrerequisiteError, match="expected true, false, 1 or 0 as x"):
            flag({"x": odd}, "x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x,y\n1,2\n3\n", r"a\.csv, record 3: expected 2 fields as in its header, got 1"),
        ("a.tsv", b"x\ty\n1\t2\t3\n", r"a\.tsv, record 2: expected 2 fields"),
        ("a.csv", b"x\n\xff\xfe\n", r"a\.csv: cannot be read as \.csv"),
        ("a.json", b'{"x": 1}', r"a\.json: expected a list of objects, got dict"),
        ("a.json", b"[1]", r"a\.json, record 1: expected an object, got int"),
        ("a.json", b"[", r"a\.json: cannot be read as \.json"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read as \.gz"),
        ("a.jsonl.gz", gzip.compress(b'{"x": 1}\n', mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read as \.gz"),
        ("a.parquet", b"no parquet", r"a\.parquet: cannot be read as Parquet"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrerequisiteError, match=message):
        records(Source("a.jsonl"), tmp_path)


def test_two_files_of_one_name_are_refused_and_line_separators_in_json_cut_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"x": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert records(Source("a.jsonl"), tmp_path) == [{"x": "one\u2028two"}]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"x": 1}\n'))
    assert records(Source("b.jsonl.gz"), tmp_path) == records(Source("b.jsonl"), tmp_path) == [{"x": 1}]
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(PrerequisiteError, match=r"a\.jsonl, a\.csv: expected one of them"):
        find(tmp_path, "a.jsonl")


def test_a_folder_of_the_same_name_is_read_only_where_the_source_is_one(tmp_path: Path) -> None:
    """A clone of a data set's repository beside its file, or in its place."""
    for name in ("advbench", "hexphi"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "harmful_behaviors.csv").write_text("goal,target\nx,y\n")
    assert find(tmp_path, "advbench.jsonl") is None
    assert find(tmp_path, "hexphi.jsonl", headerless=True) == tmp_path / "hexphi"
    (tmp_path / "empty").mkdir()
    assert find(tmp_path, "empty.jsonl", headerless=True) is None
