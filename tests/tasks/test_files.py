"""Every data set as its publisher writes it: the format, the header, the odd cells."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from safecl.base import ConfigError
from safecl.tasks import Row, Source, load
from safecl.tasks._files import Record, find, read
from safecl.tasks._source import identity, records


def rows(task: str, split: str, folder: Path) -> list[Row]:
    return sorted(load(task)(folder).rows(split, None, 0), key=lambda row: row.id)


def record(fields: dict[str, Any]) -> Record:
    return Record(fields, "f.jsonl, line 7", 7)


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
    for said, values in ((True, (True, 1, 1.0, "1", "TRUE")), (False, (False, 0, 0.0, "0", "false"))):
        assert {record({"x": value}).flag("x") for value in values} == {said}
    for odd in (None, "", "maybe", 2, [], {}):
        with pytest.raises(ConfigError, match=r"f\.jsonl, line 7: expected true, false, 1 or 0 in 'x', got "):
            record({"x": odd}).flag("x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x,y\n1,2\n3\n", r"a\.csv, record 3: expected 2 fields as in its header, got 1"),
        ("a.tsv", b"x\ty\n1\t2\t3\n", r"a\.tsv, record 2: expected 2 fields"),
        ("a.csv", b"x,y,x\n", r"a\.csv: column 'x' stands twice in its header"),
        ("a.csv", b'x\n1\n"2\n3\n', r"a\.csv, record 3: cannot be read as a table \(unexpected end of data"),
        ("a.csv", b"x\n\xe9\n", r"a\.csv: is not UTF-8 text"),
        ("a.json", b'{"x": 1}', r"a\.json: expected a list of objects, got an object: \{'x': 1\}"),
        ("a.json", b"[1]", r"a\.json, record 1: expected an object, got a number: 1"),
        ("a.json", b"[", r"a\.json: cannot be read as \.json"),
        ("a.json", b"[" * 100_000, r"a\.json: cannot be read as \.json \(maximum recursion"),
        (
            "a.jsonl",
            b'{"x": ' + b"1" * 5000 + b"}\n",
            r"a\.jsonl, line 1: not JSON \(Exceeds the limit \(4300 digits\)",
        ),
        ("a.jsonl", b'\n{"x": "a", "x": "b"}\n', r"a\.jsonl, line 2: not JSON \(field 'x' stands twice\)"),
        ("a.jsonl", b'"x"\n', r"a\.jsonl, line 1: expected an object, got 'x'"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read \("),
        ("a.jsonl.gz", gzip.compress(b'{"x": 1}\n', mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read \("),
        ("a.jsonl.zst", b"no zst", r"a\.jsonl\.zst: cannot be read \("),
        ("a.parquet", b"no parquet", r"a\.parquet: cannot be read as Parquet"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        records(Source("a.jsonl"), tmp_path)


def test_two_files_of_one_name_are_refused_and_line_separators_in_json_cut_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"x": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert records(Source("a.jsonl"), tmp_path) == [{"x": "one\u2028two"}]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"x": 1}\n'))
    assert records(Source("b.jsonl.gz"), tmp_path) == records(Source("b.jsonl"), tmp_path) == [{"x": 1}]
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(ConfigError, match=r"a\.csv, a\.jsonl: expected one of them"):
        find(tmp_path, "a.jsonl")


@pytest.mark.parametrize(
    "name", ["advbench", "advbench.xlsx", "AdvBench.jsonl.bz2", "advbench.jsonl.part", "advbench.txt"]
)
def test_what_is_there_and_cannot_be_read_is_refused_and_not_passed_over(tmp_path: Path, name: str) -> None:
    """A clone of a data set's repository in its file's place, another format, half a download."""
    (tmp_path / name).mkdir() if name == "advbench" else (tmp_path / name).write_text("x")
    for attempt in (lambda: rows("advbench", "attack.test", tmp_path),
                    lambda: identity(load("advbench"), "attack.test", tmp_path)):  # fmt: skip
        with pytest.raises(
            ConfigError, match=f"{name} cannot be read as advbench; expected a file advbench with one of"
        ):
            attempt()
    (tmp_path / "advbench.csv").write_text("goal\nx\n")
    assert len(rows("advbench", "attack.test", tmp_path)) == 1  # beside one that can be read it is nobody's


@pytest.mark.parametrize("name", ["gsm8k.jsonl", "gsm8k-train (1).csv", "GSM8K_train_v2.jsonl", "gsm8ktrain.jsonl"])
def test_a_file_under_another_name_is_asked_about_and_not_replaced_by_the_hubs(tmp_path: Path, name: str) -> None:
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match=r"expected gsm8k_train\.jsonl .* is it that one\? Rename it to gsm8k_train"):
        rows("gsm8k", "user", tmp_path)


def test_a_folder_of_tables_is_read_only_where_the_source_is_one(tmp_path: Path) -> None:
    (tmp_path / "hexphi").mkdir()
    with pytest.raises(ConfigError, match="hexphi cannot be read as hexphi"):
        find(tmp_path, "hexphi.jsonl", headerless=True)
    (tmp_path / "hexphi" / "category_1.CSV").write_text("x, y\n")
    assert find(tmp_path, "hexphi.jsonl", headerless=True) == tmp_path / "hexphi"
    with pytest.raises(ConfigError, match=r"category_1\.CSV, record 1: expected one cell, got 2"):
        rows("hexphi", "attack.test", tmp_path)
    assert find(tmp_path, "advbench.jsonl") is None


@pytest.mark.parametrize(
    "name", ["A.JSONL", "a.json", "a.jsonl.gz", "a.csv.gz", "a.json.zst", "a.tsv.zst", "A.Parquet.GZ"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_format_is_read_packed_or_not_with_or_without_byte_order_mark(
    tmp_path: Path, name: str, encoding: str
) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    made = [{"x": "one, \u00e9 \U0001f600", "y": "two"}, {"x": "", "y": 'a "b"'}]
    kind = name.lower().split(".")[1]
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        write_table(pa.Table.from_pylist(made), sink)
        raw = sink.getvalue().to_pybytes()
    elif kind in ("csv", "tsv"):
        stream = io.StringIO()
        writer = csv.DictWriter(stream, ["x", "y"], delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(made)
        raw = stream.getvalue().encode(encoding)
    else:
        lines = [json.dumps(item, ensure_ascii=False) for item in made]
        raw = (f"[{','.join(lines)}]" if kind == "json" else "\n\n".join(lines)).encode(encoding)
    packing = name.lower().rpartition(".")[2]
    packed = {"gz": gzip.compress, "zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    (tmp_path / name).write_bytes(packed[packing](raw) if packing in packed else raw)
    assert records(Source("a.jsonl"), tmp_path) == made


def test_remarks_before_a_tables_header_are_left_out_and_a_hash_is_a_name_like_another(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("# version=1,,\n# more\n\nprompt,note,n\n# one,# two,3\n")
    assert [(dict(found), found.number) for found in read(tmp_path / "a.csv")] == [
        ({"prompt": "# one", "note": "# two", "n": "3"}, 5)
    ]
    (tmp_path / "b.csv").write_text("#,# prompt\n1,a\n")
    assert [dict(found) for found in read(tmp_path / "b.csv")] == [{"#": "1", "# prompt": "a"}]


def test_an_array_under_the_name_of_lines_and_lines_under_the_name_of_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n[{"x": 1},\n {"x": 2}]')
    (tmp_path / "b.json").write_text('{"x": 1}\n{"x": 2}\n')
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "b.json") == [{"x": 1}, {"x": 2}]


NO_TEXT = [
    ([{"role": "user", "content": "hi"}], r"a list: \[\{'role': 'user'"),
    ({"text": "hi"}, r"an object: \{'text'"),
    (float("nan"), "a number: nan"),
    (b"hi", "bytes: b'hi'"),
    (True, "a yes or no: True"),
    (3, "a number: 3"),
    ("cut \ud83d", r"half a character \(a surrogate\) in 'cut"),
]


@pytest.mark.parametrize(("value", "said"), NO_TEXT)
def test_what_is_no_text_is_refused_with_record_and_field_and_never_made_into_text(value: Any, said: str) -> None:
    for read_it in (lambda r: r.text("x", "y"), lambda r: r.raw("x"), lambda r: r.texts("list")):
        with pytest.raises(ConfigError, match=rf"f\.jsonl, line 7: expected text in '(x|list)', got {said}"):
            read_it(record({"x": value, "y": "text", "list": ["text", value]}))
    if value != 3:
        with pytest.raises(ConfigError, match=rf"expected text in 'x', got {said}"):
            record({"x": value}).label("x")
    assert record({"x": 3}).label("x") == "3" and record({"x": None}).label("x") == ""


@pytest.mark.parametrize(
    "end", [*([value] for value, _ in NO_TEXT if not isinstance(value, bytes)), [], ["", "  ", None]]
)
def test_every_task_refuses_a_record_without_text_and_counts_a_blank_one(tmp_path: Path, end: list[Any]) -> None:
    """AdvBench as the example of all, which go through the same reader."""
    lines = [json.dumps({"goal": value}) for value in ["bake", *end, "cook"]]
    (tmp_path / "advbench.jsonl").write_text("\n".join(lines) + "\n")
    task = load("advbench")(tmp_path)
    if len(end) == 1:
        with pytest.raises(ConfigError, match=r"^advbench\.jsonl, line 2: expected text in 'goal', got "):
            task.rows("attack.test", None, 0)
        return
    found = sorted(task.rows("attack.test", None, 0), key=lambda row: row.id)
    assert [(row.id, row.prompt) for row in found] == [("test/0", "bake"), (f"test/{len(end) + 1}", "cook")]
    assert task.left_out == ({"advbench.jsonl: goal": 3} if end else {})


def test_a_file_of_blanks_an_empty_file_and_one_without_the_field_are_refused(tmp_path: Path) -> None:
    for text, says in (
        ("", "advbench.jsonl: expected records to read, but it holds no record"),
        (
            '{"goal": null}\n{"goal": " "}',
            "advbench.jsonl: expected records to read, but 'goal' is blank in every record",
        ),
        ('{"goals": "x"}', r"line 1: expected a field 'goal' or 'prompt', got only 'goals'"),
    ):
        (tmp_path / "advbench.jsonl").write_text(text)
        with pytest.raises(ConfigError, match=says):
            rows("advbench", "attack.test", tmp_path)


def test_alpacas_input_belongs_to_its_instruction_and_a_blank_field_hides_no_filled_one() -> None:
    alpaca = {"instruction": " Translate. ", "input": "le chat", "response": " ", "output": "the cat"}
    assert record(alpaca).text("prompt", "instruction") == "Translate.\nle chat"
    assert record({**alpaca, "input": None}).text("instruction") == "Translate."
    assert record({**alpaca, "prompt": "own"}).text("prompt", "instruction") == "own"
    assert record(alpaca).text("response", "output") == "the cat"
    with pytest.raises(ConfigError, match="expected text in 'input', got a list"):
        record({**alpaca, "input": ["le chat"]}).text("instruction")


@pytest.mark.parametrize("task", ["safety_tuned", "directharm", "hexphi", "code"])
def test_every_task_that_takes_instructions_takes_their_input(tmp_path: Path, task: str) -> None:
    [source] = {
        sources[0] for sources in load(task).SOURCES.values() if not sources[0].file.startswith(("mbpp", "human"))
    }
    made = [{"instruction": f"do {i}", "input": f"with {i}", "output": f"x = {i}", "category": "c"} for i in range(200)]
    (tmp_path / source.file).write_text("".join(json.dumps(item) + "\n" for item in made))
    for name, held in (
        ("mbpp", {"text": "t", "task_id": 600}),
        ("humaneval", {"prompt": "", "task_id": "HumanEval/0"}),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(held) + "\n")
    split = next(split for split in ("safety", "attack.test", "user") if split in load(task).SPLITS)
    found = rows(task, split, tmp_path)
    assert found and all(
        row.prompt.replace("do ", "with ") == "\n".join([row.prompt.split("\n")[1]] * 2) for row in found
    )
