"""Contract tests for methods, tasks, judges and metrics, your own and safecl's. A test is a pytest class of three
lines.

    from safecl.testing import MethodContract

    class TestMine(MethodContract):
        method, plugin = "my_method", "my_method.py"    # a file beside the test; without it: an installed method

It trains a tiny model for about a minute on CPUs. Nothing else of safecl imports pytest.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from safecl import judges, methods, metrics, registry, tasks
from safecl.base import ConfigError
from safecl.registry import Plugin

# torch and DeepSpeed read these when they are first imported. Without them threads of several processes slow each other
# down twentyfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Float32 sums in another order, relative to how far training moved; measured 5e-7, another seed gives about 1.
ROUNDING = 1e-5
BF16_ROUNDING = 0.05  # measured .006 to .015
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {},
    "zero0": {"engine": "deepspeed", "zero": 0},
    "zero1": {"engine": "deepspeed", "zero": 1},
    "zero2": {"engine": "deepspeed", "zero": 2},
    "zero3": {"engine": "deepspeed", "zero": 3},
}
# (engine, number of ranks). One rank of an engine that is also tested with two ranks shows little more, and takes half
# of the total time, so those tests are slow ones. A run with ZeRO-3 takes four times as long as without.
PLACES = [
    *[pytest.param(engine, 2, id=f"{engine}-2") for engine in ("torch", "zero2", "zero3")],
    pytest.param("zero1", 2, id="zero1-2", marks=pytest.mark.slow),
    pytest.param("torch", 1, id="torch-1"),
    pytest.param("zero0", 2, id="zero0-2", marks=pytest.mark.slow),
    *[pytest.param(zero, 1, id=f"{zero}-1", marks=pytest.mark.slow) for zero in ("zero0", "zero1", "zero2", "zero3")],
]
Corner = tuple[str, str, str]  # architecture, dtype, adapter
HOOKS = (
    "prepare",
    "before_step",
    "loss",
    "after_backward",
    "after_step",
)  # functions that act in the training loop
ON_GRADIENTS = ("before_step", "after_backward", "after_step")
CORNERS = [
    pytest.param(corner, id="-".join(corner))
    for corner in (
        ("mistral", "float32", "continue"),
        ("gemma2", "float32", "stack"),
        ("gemma2", "bfloat16", "continue"),
        ("llama", "bfloat16", "stack"),
    )
]


def _slow(param: Any) -> Any:
    return pytest.param(*param.values, id=param.id, marks=pytest.mark.slow)


class _Contract:
    """The common part of the contracts: the plugin is registered while their tests run."""

    plugin: ClassVar[str] = ""  # your file, relative to the test's folder; empty for what is installed
    _plugins: ClassVar[tuple[Plugin, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.plugin:
            folder = Path(str(sys.modules[cls.__module__].__file__)).parent
            cls._plugins = registry.read([str(folder / cls.plugin)])
        registry.add(cls._plugins)
        cls._leave_out()

    @classmethod
    def _leave_out(cls) -> None:
        """Remove the tests that do not apply to this class."""

    @pytest.fixture(autouse=True)
    def _is_known(self) -> Iterator[None]:
        registry.add(self._plugins)
        yield


class MethodContract(_Contract):
    """Tests that every method must pass. `method`: its name. Every run has dropout .1 and micro-batches that divide
    the batches unevenly. `Method.contract` holds a method's own settings for the tests."""

    method: ClassVar[str] = ""

    @classmethod
    def _leave_out(cls) -> None:
        if not cls.method:
            return
        kind, told = cls._kind(), cls.__dict__
        every = {name for name in dir(MethodContract) if name.startswith("test_")} - {"test_it_describes_itself"}
        merges = {name for name in every if "merge" in name}
        away = [*(every - merges if kind.trains_as is not None else merges)]
        if kind.neutral() is None:
            away = [*away, "test_the_neutral_setting_is_sft_bit_for_bit"]
        if not kind.contract.in_bfloat16:
            away = [*away, "test_ranks_and_engines_agree_in_bfloat16_too"]
        for name in away:
            if name not in told:
                setattr(cls, name, None)

    @classmethod
    def _kind(cls) -> type[methods.Method]:
        return methods.load(cls.method)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Choose the engines and the corners (architecture, dtype, adapter) that a method is tested with. A method
        that only chooses its rows is SFT in the loop, and SFT is tested everywhere. So for such a method only the
        first case is fast and the others are marked slow. ZeRO-3 is fast only for `sft`, for methods that are tested
        in bfloat16, and for methods that act on gradients."""
        for asked, params in ((("engine", "num"), PLACES), (("corner",), CORNERS)):
            if set(asked) <= set(metafunc.fixturenames):
                first, *others = params
                fast = [param for param in others if self._acts() and (self._shards() or param.values[0] != "zero3")]
                metafunc.parametrize(asked, [first, *(param if param in fast else _slow(param) for param in others)])

    @classmethod
    def _acts(cls) -> bool:
        kind = cls._kind()
        return cls.method == "sft" or any(getattr(kind, hook) is not getattr(methods.Method, hook) for hook in HOOKS)

    @classmethod
    def _shards(cls) -> bool:
        kind = cls._kind()
        on_gradients = any(getattr(kind, hook) is not getattr(methods.Method, hook) for hook in ON_GRADIENTS)
        return cls.method == "sft" or kind.contract.in_bfloat16 or on_gradients

    def _once(self) -> Path:
        """The scratch folder of this method, trained once on one rank of the reference engine."""
        from safecl.testing import world

        return world.trained_once(self.method, self._plugins)

    def _on_ranks(self, num: int, scratch: Path, settings: dict[str, Any], where: dict[str, Any]) -> None:
        from safecl.testing import ranks, world

        ranks.run(world.train_on_rank, num, world.a_world(), str(scratch), settings, where, self._plugins)

    def test_it_describes_itself(self) -> None:
        """The default search space can be searched: its hyperparameters exist, it holds the default values, and its
        ends are allowed. A method without a number among its hyperparameters has no search space."""
        from safecl.check import space_errors
        from safecl.config import Method

        kind = self._kind()
        assert kind.equation and kind.cost and len(kind.equation) < 100
        assert set(kind.contract.params) <= set(kind.Config.model_fields)
        for given in ({}, *kind.contract.variants):
            config = kind.Config(**given)
            has_number = any(isinstance(value, int | float) for value in config.model_dump().values())
            assert bool(kind.search_space(config)) == has_number
            assert space_errors(kind, Method(name=self.method, config=dict(given), search={}), config) == []
        assert methods.needed(kind).keys().isdisjoint({"model", "safe", "rows"})

    def test_the_neutral_setting_is_sft_bit_for_bit(self, tmp_path: Path) -> None:
        from safecl.testing import world

        neutral = self._kind().neutral()
        assert neutral is not None
        found = world.train(world.a_world(), tmp_path, world.config(self.method, **neutral.model_dump()))
        assert world.same_bits(found, world.adapter(world.trained_once("sft", ())))

    def test_another_seed_gives_other_weights(self, tmp_path: Path) -> None:
        from safecl.testing import world

        other = world.train(world.a_world(), tmp_path, {**world.config(self.method), "seed": 4})
        assert not world.same_bits(other, world.adapter(self._once()))

    def test_the_same_seed_gives_the_same_weights_also_to_a_run_that_was_interrupted(self, tmp_path: Path) -> None:
        from safecl.stages import finetune
        from safecl.testing import world

        class Interrupted(Exception):
            pass

        def stop_at_four(step: int) -> None:
            if step == 4:
                raise Interrupted

        settings, where = world.config(self.method), world.execution(checkpoint_every_s=1e-9)
        inputs = world.a_world().inputs(self.method)
        with pytest.raises(Interrupted):
            finetune.train_rows(settings, inputs, tmp_path, where, after_step=stop_at_four)
        seen: list[int] = []
        finetune.train_rows(settings, inputs, tmp_path, where, after_step=seen.append)
        assert seen == list(range(5, 1 + len(world.curves(self._once()))))
        assert world.same_bits(world.adapter(tmp_path), world.adapter(self._once()))
        assert world.curves(tmp_path) == world.curves(self._once())

    def test_ranks_engines_and_micro_batches_change_only_rounding(self, engine: str, num: int, tmp_path: Path) -> None:
        """Runs on real ranks, with micro-batches of 2."""
        from safecl.testing import world

        self._on_ranks(num, tmp_path, world.config(self.method), {**ENGINES[engine], "micro_batch_size": 2})
        once, start = self._once(), world.adapter(world.a_world().safe.parent)
        assert world.gap(world.adapter(once), world.adapter(tmp_path), start) < ROUNDING
        for mine, theirs in zip(world.curves(once), world.curves(tmp_path), strict=True):
            assert theirs == pytest.approx(mine, rel=1e-4, abs=1e-5)

    @pytest.mark.parametrize("engine", ["zero1", pytest.param("zero3", marks=pytest.mark.slow)])
    def test_ranks_and_engines_agree_in_bfloat16_too(self, engine: str, tmp_path: Path) -> None:
        """Agreement within bfloat16: factors are float32, activations are not, and other shapes round differently."""
        from safecl.testing import world

        settings = world.config(self.method, dtype="bfloat16")
        alone = world.train(world.a_world(), tmp_path / "alone", settings)
        self._on_ranks(2, tmp_path / engine, settings, {**ENGINES[engine], "micro_batch_size": 2})
        start = world.adapter(world.a_world().safe.parent)
        assert world.gap(alone, world.adapter(tmp_path / engine), start) < BF16_ROUNDING

    def test_only_the_trained_adapter_moves_and_the_base_stays(self) -> None:
        from safecl.testing import world
        from safecl.training.tokens import base_folder

        of = world.a_world()
        tuned, safe = world.adapter(self._once()), world.adapter(of.safe.parent)
        assert set(tuned) == set(safe)
        assert all(bool((tuned[key] != safe[key]).any()) for key in tuned)
        assert not any("embed" in key or "lm_head" in key for key in tuned)
        assert base_folder(of.model) == of.model
        config = json.loads((self._once() / "result" / "adapter" / "adapter_config.json").read_text())
        assert config["modules_to_save"] is None and config["bias"] == "none"

    def test_it_trains_with_other_architectures_types_and_adapters(self, corner: Corner, tmp_path: Path) -> None:
        """The neutral setting is SFT bit for bit, the logged distances start at zero, and the adapter has the right
        rank. Or `requires` refuses this kind of adapter."""
        from safecl.testing import world

        architecture, dtype, adapter = corner
        try:
            methods.needed(self._kind(), adapter)
        except ConfigError:
            assert adapter == "stack"
            return
        of = world.a_world(architecture, dtype, adapter)
        mode: dict[str, Any] = {"dtype": dtype, "adapter": adapter}
        plain = world.plain(architecture, dtype, adapter)
        found = world.train(of, tmp_path / "own", world.config(self.method, dropout=0.0, **mode))
        assert not world.same_bits(found, plain)  # dropout at least
        if (neutral := self._kind().neutral()) is not None:
            again = world.train(of, tmp_path / "neutral", world.config(self.method, **mode, **neutral.model_dump()))
            assert world.same_bits(again, plain)
        first, *_, last = world.curves(tmp_path / "own")
        for held in self._kind().contract.zero_at_start:
            assert first[held] < (1e-8 if dtype == "float32" else 0.05) and last[held] > first[held]
        start = world.adapter(of.safe.parent)
        rank = {len(tensor) for name, tensor in found.items() if "lora_A" in name}
        assert rank == ({16} if adapter == "stack" else {8}) and set(found) == set(start)

    def test_a_merge_is_of_every_module_the_same_each_time_and_neutral_where_it_says_so(self, tmp_path: Path) -> None:
        """A post-hoc method on top of SFT's adapter: every module is merged, two merges are equal, and the neutral
        setting gives the tuned adapter."""
        import torch

        from safecl.testing import world

        kind, neutral = self._kind(), self._kind().neutral()
        ways = {"once": dict(kind.contract.params), "again": dict(kind.contract.params)}
        ways |= {} if neutral is None else {"neutral": neutral.model_dump()}
        found = {name: world.merge(self.method, params, tmp_path / name) for name, params in ways.items()}
        tuned = world.deltas(world.trained_once(str(kind.trains_as), ()) / "result")
        for name, delta in found["once"].items():
            assert torch.equal(delta, found["again"][name]) and bool(delta.isfinite().all())
        for merged in found.values():
            assert merged.keys() == tuned.keys()
        for name, delta in found.get("neutral", {}).items():
            assert torch.allclose(delta, tuned[name], atol=1e-6)


class TaskContract(_Contract):
    """Tests that every task must pass. `task`: its name. Its data must be in `folder`, or the task makes its data
    itself."""

    task: ClassVar[str] = ""
    folder: ClassVar[Path | None] = None

    def test_rows_of_a_split_are_one_seeded_sequence(self) -> None:
        """A smaller sample is the beginning of a larger one. Test splits ignore the seed. Row ids are unique."""
        kind = tasks.load(self.task)
        assert kind.SPLITS
        for split in kind.SPLITS:
            rows = kind(self.folder).rows(split, None, 0)
            ids = [row.id for row in rows]
            assert rows and len(set(ids)) == len(ids)
            few = max(1, len(rows) // 2)
            drawn = kind(self.folder).rows(split, few, 0)
            assert len(drawn) == few and drawn == kind(self.folder).rows(split, len(rows), 0)[:few]
            if split.endswith(".test"):
                assert drawn == kind(self.folder).rows(split, few, 1)

    def test_scores_are_fractions(self) -> None:
        kind = tasks.load(self.task)
        if "utility.test" in kind.SPLITS:
            declared, rows = metrics.of_task(kind), kind(self.folder).rows("utility.test", 3, 0)
            for text in ("", "something else", rows[0].response):
                for name, values in kind(self.folder).scores(rows, [text] * len(rows)).items():
                    assert name in declared, f"{name} is not among METRICS"
                    assert len(values) == len(rows) and all(value is None or 0 <= value <= 1 for value in values)


class JudgeContract(_Contract):
    """Tests that every judge must pass. `judge`: its name."""

    judge: ClassVar[str] = ""

    def test_it_answers_or_says_that_it_cannot(self) -> None:
        """A judge by rule judges any text. A guard's answer in another form than its own has the label None, never
        "safe"."""
        judge = judges.load(self.judge)()
        assert judge.question and set(judge.answers) <= set(judges.QUESTIONS)
        if not judge.served:
            texts = ("", "Sure, here is how.", "I cannot help with that.", "\x00 \U0001f600" * 50)
            assert all(judge.rule("How?", text).label in (True, False, None) for text in texts)
            return
        assert judge.max_tokens > 0
        assert all(judge.parse(text).label is None for text in ("", "perhaps", "I cannot tell"))
        foreign = {piece.text for piece in judge.pieces("the request", "the answer") if not piece.own}
        assert "the answer" in foreign and foreign <= {"the request", "the answer"}


class MetricContract(_Contract):
    """Tests that every metric by rule must pass. `metric`: its name. `answers`: texts to try it on, besides the
    built-in ones."""

    metric: ClassVar[str] = ""
    answers: ClassVar[Sequence[str]] = ()

    def test_it_describes_itself(self) -> None:
        found = metrics.load(self.metric)
        low, high = found.bounds
        assert found.of is not None, "a metric by rule has `of`"
        assert found.roles and set(found.roles) <= {"attack", "benign", "utility"}
        assert high is None or low < high
        assert found.margin is None or found.better, "what is tested has a better end"

    def test_it_measures_rows_that_were_asked_within_its_bounds(self) -> None:
        """For every answer and label the value is within the bounds, or None if unreadable, and two calls give equal
        values."""
        found = metrics.load(self.metric)
        assert found.of is not None
        low, high = found.bounds
        texts = ["", "No.", "I cannot help with that.", "Sure, here is how. " * 40, *self.answers]
        rows = [tasks.Row(f"row-{i}", "How?", "Like this.", harmful=True) for i in range(len(texts))]
        answers = [
            {"id": row.id, "text": text, "num_tokens": len(text.split()), "finish": "stop"}
            for row, text in zip(rows, texts, strict=True)
        ]
        for label in (True, False, None):
            verdicts: dict[str, list[dict[str, Any]]] = {
                name: [{"id": row.id, "label": label, "detail": {}, "score": None} for row in rows]
                for name in found.rests_on
            }
            asked = metrics.Asked(tasks.Task, rows, answers, verdicts)
            values = found.of(asked)
            assert values == found.of(asked)
            assert values.keys() <= {row.id for row in rows}
            for value in values.values():
                assert value is None or (low <= value and (high is None or value <= high))
