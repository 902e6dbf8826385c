"""A sweep file means what it says: one YAML, each key once, no value made into another type."""

from __future__ import annotations

from pathlib import Path

import pytest

from safecl.base import ConfigError, sqlite_path, sqlite_url
from safecl.project import Project, load

SWEEPS = Path(__file__).parents[1] / "sweeps"
QUICKSTART = SWEEPS / "quickstart.yaml"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        # what YAML 1.1 reads as 8, 90.0, 10, 16, 1000, 1.0, 1, 1 and 1
        ("tasks.0.num_rows=010", "tasks.0.num_rows: Input should be a valid integer (got '010')"),
        ("align.learning_rate=1:30", "align.learning_rate: Input should be a valid number (got '1:30')"),
        ("tasks.0.num_rows=0o12", "(got '0o12')"),
        ("tasks.0.num_rows=0x10", "(got '0x10')"),
        ("tasks.0.num_rows=1_000", "(got '1_000')"),
        ("align.epochs=yes", "align.epochs: Input should be a valid number (got 'yes')"),
        ("tasks.0.num_rows=true", "tasks.0.num_rows: Input should be a valid integer (got True)"),
        ("seeds=[true]", "seeds.0: Input should be a valid integer (got True)"),
        ("seeds=['3']", "seeds.0: Input should be a valid integer (got '3')"),
        ("execution.use_gpu=yes", "execution.use_gpu: Input should be a valid boolean (got 'yes')"),
        ("execution.use_gpu=1", "execution.use_gpu: Input should be a valid boolean"),
        ("align.learning_rate=.inf", "align.learning_rate: Input should be a valid number"),
        ("about=2026-11-26", ""),  # no date: text
        ("align.epochs=!!binary aGk=", "expected plain values"),
        ("execution.gradient_checkpointing=of", "Did you mean 'off'?"),
        ("execution.num_wrkers=2", "execution.num_wrkers: unknown key. Did you mean 'num_workers'?"),
        ("models.x.dtype=float32", "--set 'models.x.dtype=float32': 'x' is no place in a list of 1; expected 0 to 0"),
        ("models.x.y=", "'x' is no place in a list of 1"),
        ("models.7.dtype=float32", "'7' is no place in a list of 1"),
        ("models.-1.dtype=float32", "'-1' is no place in a list of 1"),
        ("models.1={name: a, source: b}", "'1' is no place in a list of 1"),
        ("align.self_answered.0.task=mini", "'align.self_answered.0.task=mini': '0'"),
        ("name.first=x", "'name' is text: 'quickstart', which has no keys"),
        ("seeds", "expected path=value"),
        ("=1", "expected path=value"),
        ("align..epochs=1", "expected path=value"),
        ("align={epochs: 1, epochs: 2}", "'epochs' stands twice"),
        ("align=[", "is not valid YAML"),
        ("execution.data_dir=''", "execution.data_dir: is empty; expected a path"),  # not the hub
        ("evaluate.test.attack=[]", "evaluate.test.attack: Tuple should have at least 1 item"),
        ("execution.root=$NO_SUCH_VARIABLE/runs", "the environment variable NO_SUCH_VARIABLE is not set"),
    ],
)
def test_a_value_that_is_not_of_its_kind_is_said_with_its_key(setting: str, says: str) -> None:
    if says == "":
        assert load(QUICKSTART, [setting]).about == "2026-11-26"
        return
    with pytest.raises(ConfigError) as caught:
        load(QUICKSTART, ["align.self_answered=[]", setting])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_and_words_that_yaml_1_1_reads_otherwise_are_what_they_look_like() -> None:
    sweep = load(
        QUICKSTART, ["align.learning_rate=1e-4", "execution.gradient_checkpointing=off", "align.epochs=3", "about=on"]
    )
    assert (sweep.align.learning_rate, sweep.align.epochs, sweep.about) == (1e-4, 3.0, "on")
    assert sweep.execution.gradient_checkpointing == "off"


def test_every_key_that_stands_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    text = QUICKSTART.read_text()
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines, 1) if line.startswith("lora:"))
    (tmp_path / "twice.yaml").write_text(f"{text}\nlora: {{rank: 2}}\nseeds: [3]\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "twice.yaml", [])
    told = str(caught.value).splitlines()
    assert len(told) == 2 and "'seeds' stands twice" in told[1]
    assert told[0].endswith(
        f"twice.yaml, line {len(lines) + 2}: 'lora' stands twice, first in line {first}: keep one of them"
    )


def test_a_file_that_is_no_text_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "latin1.yaml").write_bytes("name: a\nabout: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin1\.yaml, line 2: is not UTF-8 text"):
        load(tmp_path / "latin1.yaml", [])
    with pytest.raises(ConfigError, match=r"is a folder; expected a sweep file\. It holds .*quickstart\.yaml"):
        load(SWEEPS, [])
    with pytest.raises(ConfigError, match=r"no sweep file .*Did you mean 'quickstart\.yaml'"):
        load(SWEEPS / "quikstart.yaml", [])
    marked = tmp_path / "marked.yaml"
    marked.write_bytes(b"\xef\xbb\xbf" + QUICKSTART.read_bytes())
    assert load(marked, []).name == "quickstart"


def test_home_and_variables_are_expanded_in_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "/data")
    settings = ["execution.root=~/runs", "execution.data_dir=${WHERE}/sets", "models.0.source=$WHERE/model"]
    sweep = load(QUICKSTART, settings)
    assert (sweep.execution.root, sweep.execution.data_dir) == (f"{tmp_path}/runs", "/data/sets")
    assert sweep.models[0].source == "/data/model"


def test_a_database_lies_in_its_folder_whatever_that_is_called(tmp_path: Path) -> None:
    from safecl.storage import open_storage

    folder = tmp_path / "what?x=1 My%20Drive#{b}+c caf\u00e9@host:1"
    folder.mkdir()
    url = sqlite_url(folder / "study.db")
    open_storage(url)
    assert [file.name for file in folder.iterdir()] == ["study.db"] and [*tmp_path.iterdir()] == [folder]
    assert sqlite_path(url) == folder / "study.db" and sqlite_url(Path("/a b/c.db")) == "sqlite:////a b/c.db"
    assert sqlite_path("postgresql://host/db") is None


def test_a_quick_look_keeps_memories_within_its_few_safety_rows(tmp_path: Path) -> None:
    assert Project(load(QUICKSTART, [f"execution.root={tmp_path}"], 20)).expected
    methods = "methods=[{name: sft}, {name: lisa}, *]".replace("*", ", ".join(
        f"{{name: {name}, search: {{}}}}" for name in ("safeinstr", "drr", "agem")
    ))  # fmt: skip
    _, lisa, safeinstr, unknown, agem = load(QUICKSTART, [methods], 240).methods
    assert lisa.config == {"memory_size": 60} == safeinstr.config and lisa.search is None
    assert safeinstr.search == {"memory_size": [50, 60]} and unknown.search == {}
    assert agem.search == {"memory_size": [50, 60], "memory_batch_size": [5, 10, 20, 50]}
    sizes = "methods=[{name: der, grid: {memory_size: [50, 150, 5%]}}, {name: der, label: all}, {name: lisa}]"
    some, rest, other = load(QUICKSTART, [sizes], 40).methods  # of 40 rows 5 % are 2
    assert some.grid == {"memory_size": (8, 9, 2)} and rest.config == other.config == {"memory_size": 10}
    ranged = "methods=[{name: der, search: {memory_size: {low: 10, high: 400}, weight: [1.0]}}]"
    assert load(QUICKSTART, [ranged], 40).methods[0].search == {"weight": [1.0]}


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            "models.0.template=chatlm",
            "models.0.template: Input should be 'auto' or 'chatml', 'alpaca', 'llama2' or 'gemma' or an object "
            "(got 'chatlm') Did you mean 'chatml'?",
        ),
        ("models.0.bos=maybe", "models.0.bos: Input should be 'auto' or a valid boolean (got 'maybe')"),
        ("lora.targets=q_proj", "lora.targets: Input should be a valid array or 'all-linear' (got 'q_proj')"),
        ("lora.targets=[1]", "lora.targets.0: Input should be a valid string (got 1)"),
        (
            "models.0.template={prompt: '{prompt}', edn: x}",
            "models.0.template.edn: unknown key. Did you mean 'end'? Known here: between, "
            "end, lead, past, prompt, stop, strip, system",
        ),
        ("seeds=[0,1000]", "search.seed: 1000 is among `seeds`, which are reported; name another one"),
        ("models.0.template.prompt=x", "models.0.template.prompt: must hold {prompt} exactly once, got 'x' (got 'x')"),
    ],
)
def test_one_mistake_is_one_line_whatever_kinds_a_value_may_be_of(setting: str, line: str) -> None:
    removed = ["models.0.template="] if setting.startswith("models.0.template.") else []
    with pytest.raises(ConfigError) as caught:
        load(QUICKSTART, [*removed, setting])
    assert str(caught.value) == line


def test_what_yaml_cannot_make_of_a_tag_is_said() -> None:
    for value in ("!!bool x", "!!timestamp x", "!!int ''"):
        with pytest.raises(ConfigError, match="is not valid YAML"):
            load(QUICKSTART, [f"seeds={value}"])
    with pytest.raises(ConfigError, match="expected plain values"):
        load(QUICKSTART, ["about=&a [*a]"], 20)


def test_folders_of_models_are_whole_places_beside_the_sweep_file_or_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers stand elsewhere: a relative place would be taken for a hub id there."""
    (tmp_path / "sweeps" / "mine").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sweeps" / "s.yaml"
    file.write_text((SWEEPS / "quickstart.yaml").read_text())
    for given, found in (("./mine", "sweeps/mine"), ("here", "here")):
        model = load(file, [f"models.0.source={given}"]).models[0]
        assert Path(model.source) == tmp_path / found and Path(model.source).is_absolute()
    assert load(file, ["models.0.source=org/name"]).models[0].source == "org/name"
    judge = "{judge: llamaguard, endpoint: 'http://127.0.0.1:8000/v1', model: m, tokenizer: ./mine}"
    asr = load(file, [f"evaluate.judges.asr={judge}"]).evaluate.judges.asr
    assert asr.tokenizer == str(tmp_path / "sweeps" / "mine")  # type: ignore[union-attr]
