"""The experiment: `Graph` turns one recipe into cached stages. Its properties follow the order of a run.

    safety rows -> align -> theta_safe -+-> memory, fisher, teacher -+
    user rows (task + poison) ----------+-> finetune(method) <-------+
                                            tuned -> finalize (post-hoc methods) -> generate -> judge -> metrics

Other files of this folder: recipe.py (the recipe of one table row), rows.py (rows of every role, and how they become
text), judging.py (judges and guards). grid.py lists the recipes of a sweep. cost.py counts what a run would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import safecl.methods as methods
import safecl.metrics as metrics
import safecl.tasks as tasks
from safecl import registry
from safecl.base import ConfigError, Json
from safecl.config import Model, Prompts, Rows, Template
from safecl.graph.judging import JudgeStages
from safecl.graph.recipe import MODEL, REFERENCES, SEED, USER, Evidence, Recipe, make
from safecl.memo import shared
from safecl.models import model_stage
from safecl.panel import Seat, named, trained
from safecl.store import SharedConfig, Stage
from safecl.tasks._written import told

__all__ = ["REFERENCES", "Evidence", "Graph", "Recipe"]


class Graph(JudgeStages):
    """The cached stages of one recipe. Graphs with the same `shared` object share the stages on which their recipes
    agree."""

    # -- rows ---------------------------------------------------------------------------------------------------------

    @property
    @shared(*SEED)
    def safety_rows(self) -> Stage:
        """Rows of stage one. Requests of `self_answered` sets get the base model's own answers.

        Raises:
            ConfigError: there is no stage one, and the sweep gives no safety rows instead.
        """
        align, inputs = self.recipe.align, dict(self.held_out)
        if align.safety_from is not None:
            return self._self_made(align.safety_from.name, align.safety_from.config)
        if not align.safety:
            raise ConfigError(
                "needs safety rows, and `align: none` gives none: write align: {train: false, safety: [...]}, or "
                "{train: false, safety_from: {name: grsap}} for rows that the model makes itself"
            )
        for part in align.self_answered:
            asked = self.data(
                "self_answered", "benign.train", [part], seed=self.recipe.align_seed, inputs=self.held_out
            )
            longest, template = self.recipe.evaluate.max_new_tokens, self._text["template"]
            inputs[f"answers_{part.task}"] = self.generate(None, asked, longest, template=template)
        return self.data(
            "safety", "safety", align.safety, seed=self.recipe.align_seed, inputs=inputs, max_tokens=align.max_tokens
        )

    def _self_made(self, name: str, params: dict[str, Json]) -> Stage:
        """Safety rows that a method makes with theta_safe."""
        kind = methods.load(name)
        if methods.needed(kind).get("replay") != "replay":
            raise ConfigError(
                f"align.safety_from: {name} makes no safety rows; name a method that does (its `requires` has `replay`), such "
                "as grsap"
            )
        return kind(kind.Config(**params)).requires(self)["replay"]

    @property
    @shared(*USER)
    def user_rows(self) -> Stage:
        """Rows of stage two: the user's task with `floor(ratio * N)` of its N rows replaced by poison. With
        `keep_task_rows` as many poison rows are added instead."""
        recipe = self.recipe
        poison: dict[str, Json] | None = None
        if recipe.poison_ratio > 0:
            source = self._source(recipe.poison_task, "poison")
            poison = {"task": recipe.poison_task, "ratio": recipe.poison_ratio, "source": source}
            poison |= told(self._task(recipe.poison_task))
            poison |= {"keep_task_rows": True} if recipe.keep_task_rows else {}
        part = Rows(task=recipe.task.task, num_rows=recipe.task.num_rows)
        return self.data(
            "user", "user", [part], seed=recipe.seed, poison=poison, inputs=self._aligned_on,
            max_tokens=recipe.task.max_tokens, text=self._around(recipe.task.template),
        )  # fmt: skip

    # -- models -------------------------------------------------------------------------------------------------------

    @property
    @shared(*SEED)
    def theta_safe(self) -> Stage | None:
        """Stage one: SFT of the base model on safety rows, or training by another method that needs no theta_safe.
        None with `align: none`: theta_safe is then the model itself.

        Raises:
            ConfigError: the method needs a theta_safe to start from.
        """
        align = self.recipe.align
        if not align.train:
            return None
        name, params = align.method.name, align.method.config
        kind = methods.load(name)
        if kind.trains_as is not None:
            raise ConfigError(f"align.method: {name} trains nothing; name a method that does, such as sft or sam")
        kind(kind.Config(**params)).requires(_BeforeThetaSafe(name))
        return self.finetune(name, params, align, {"rows": self.safety_rows}, seed=self.recipe.align_seed)

    @property
    def _safe(self) -> dict[str, Stage]:
        """theta_safe's adapter as an input; empty if theta_safe has no adapter."""
        return {} if self.theta_safe is None else {"safe": self.theta_safe}

    @shared(*SEED)
    def memory(self, num_rows: int, positions: str | None = None) -> Stage:
        """`num_rows` rows of stage one, drawn by the sweep's `memory_mix`. With `positions`, also theta_safe's hidden
        states there."""
        mix: dict[str, Json] = {} if self.recipe.memory_mix == "refusals" else {"mix": self.recipe.memory_mix}
        return self._states(self.safety_rows, num_rows, positions, self.recipe.align.max_tokens, **mix)

    @shared(*USER)
    def teacher(self, positions: str) -> Stage:
        """theta_safe's hidden states on the user rows."""
        task = self.recipe.task
        return self._states(self.user_rows, None, positions, task.max_tokens, **self._around(task.template))

    def _states(self, rows: Stage, num_rows: int | None, positions: str | None, max_tokens: int, **more: Json) -> Stage:
        config: dict[str, Json] = {
            "num_rows": num_rows,
            "positions": positions,
            "seed": self.recipe.align_seed,
            "max_tokens": max_tokens,
            "adapter": self.recipe.adapter,
            **self._text,
            **more,
        }
        inputs = {"model": self.base, "rows": rows}
        config = self._conversing(config, inputs)
        return make("memory", config, inputs if positions is None else {**inputs, **self._safe})

    @shared(*SEED)
    def fisher(self, num_rows: int, labels: str) -> Stage:
        """The Fisher information of theta_safe's adapter on safety rows: how much safety depends on each factor.

        Raises:
            ConfigError: stage two trains a fresh adapter. The Fisher information of its A is zero.
        """
        safe = self.theta_safe
        if safe is None or self.recipe.adapter == "stack":
            which = "`align: none` trains a fresh adapter, which" if safe is None else "a fresh adapter (`stack`)"
            needed = "an alignment by safecl" if safe is None else "`adapter: continue`"
            raise ConfigError(
                f"needs {needed}: {which} starts with B = 0, so the gradient and with it the "
                "Fisher information of its A is zero"
            )
        config: dict[str, Json] = {
            "num_rows": num_rows,
            "labels": labels,
            "seed": self.recipe.align_seed,
            "max_tokens": self.recipe.align.max_tokens,
            **self._text,
        }
        inputs = {"model": self.base, "safe": safe, "rows": self.safety_rows}
        return make("fisher", self._conversing(config, inputs), inputs)

    @cached_property
    def tuned(self) -> Stage:
        """Stage two: the method's finetune on user rows, starting from theta_safe. A post-hoc method uses the
        finetune of the method in its `trains_as`."""
        shared_with = methods.load(self.recipe.method).trains_as
        return self._plainly(shared_with) if shared_with else self._tuned(self.recipe.method, self.recipe.params)

    @shared(*USER)
    def _plainly(self, method: str) -> Stage:
        return self._tuned(method, {})

    def _tuned(self, method: str, params: dict[str, Json]) -> Stage:
        kind = methods.load(method)
        needed = self._method(kind, params).requires(self)
        inputs = {**self._safe, "rows": self.user_rows, **needed}
        text = dict(self._around(self.recipe.task.template))
        if (
            self.recipe.task.template is not None and "replay" in needed
        ):  # theta_safe wrote these rows in its own template
            text["replay_template"] = self._text["template"]
        return self.finetune(method, params, self.recipe.task, inputs, **text)

    @cached_property
    def final(self) -> Stage | None:
        """The weights that are served on top of the base model: none, theta_safe, the tuned adapter, or the result of
        a post-hoc method on these two.

        Raises:
            ConfigError: a post-hoc method works on what the alignment changed, and that change is not known.
        """
        recipe = self.recipe
        if recipe.method == "base":
            return None
        if recipe.method == "aligned":
            return self.theta_safe
        kind = methods.load(recipe.method)
        if kind.trains_as is None:
            return self.tuned
        config: dict[str, Json] = {
            "method": recipe.method,
            "params": self._params(kind, recipe.params),
            "dtype": recipe.model.dtype,
        }
        method = self._method(kind, recipe.params)
        inputs = {**self._safe, "tuned": self.tuned}
        if needed := method.requires(self):  # the method reads rows or models
            inputs |= {"model": self.base, **needed}
            config |= {**self._around(recipe.task.template), "max_tokens": recipe.task.max_tokens}
            config = self._conversing(config, {"rows": self.user_rows, **needed})
        if self.theta_safe is None and method.needs_base:
            if recipe.model.aligned_from is None:
                raise ConfigError(
                    "works on what the alignment changed, and with `align: none` that is known only where the model has "
                    "`aligned_from: {source: BASE}`: name its base model there, or leave this method out"
                )
            origin = recipe.model.model_copy(update=dict(recipe.model.aligned_from))
            inputs |= {"model": self.base, "base": model_stage(origin)}
        return make("finalize", config, inputs, kind.VERSION)

    # -- what a method builds of its own (methods.Needs) --------------------------------------------------------------

    def step(self, kind: str, config: dict[str, Json], inputs: dict[str, Stage]) -> Stage:
        """A stage of the kind `kind`."""
        return make(kind, config, inputs)

    def model(self, model: Model) -> Stage:
        """The stage of another model's weights and tokenizer, as a folder."""
        return model_stage(model)

    @shared(*SEED)
    def once(self, make: Callable[[methods.Needs, Any], Stage], config: Any) -> Stage:
        """`make(self, config)`, made once for all recipes with the same stage one. It may depend on stage one only."""
        return make(self, config)

    @property
    def seed(self) -> int:
        """The seed of stage one and of every stage made from it."""
        return self.recipe.align_seed

    @property
    def template(self) -> Template:
        """How requests become text for this model."""
        return self.recipe.model.text

    @property
    def max_new_tokens(self) -> int:
        """The longest answer to attack and benign prompts, in tokens."""
        return self.recipe.evaluate.max_new_tokens

    @property
    def fits(self) -> dict[str, Json]:
        """The setting with which a stage leaves out rows that are too long for training in stage one."""
        return self._fits(self.recipe.align.max_tokens, self._text)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def likelihood(self, task: str, rows: Stage) -> Stage:
        """Log-probabilities of the answer options of a utility task's rows, under the base model."""
        kind = self._task(task)
        text = self._around(self.recipe.evaluate.template)
        longest = self.recipe.evaluate.max_prompt_tokens + kind.max_new_tokens
        inputs = {"model": self.base, "rows": rows}
        config: dict[str, Json] = {"task": task, "max_tokens": longest, **text, **told(kind, scored=True)}
        return make("likelihood", self._conversing(config, inputs), inputs, kind.SCORING)

    def guard_agreement(self, answering: Iterable[Graph] = ()) -> Evidence | None:
        """How often the guards trained here agree with the labels of held-out pairs; None if no guard is trained.

        The pairs are constructed ones. Added are answers to validation prompts by the models of the graphs in
        `answering`, labelled by the task's rule, for tasks that have a rule.
        """
        seat, guard = trained(self.recipe.evaluate.judges), self.recipe.evaluate.judges.guard
        if seat is None or guard is None:
            return None
        labels: dict[str, Json] = {}
        inputs = dict(self._trained_on)
        for part in self.recipe.evaluate.validation.attack:
            if hasattr(self._task(part.task), "label"):
                rows = self.data("attack.validation", "attack.validation", [part], seed=0, inputs=self._test_prompts)
                for graph in answering:
                    name = f"answers_{graph.recipe.method}.{part.task}"
                    labels[name] = part.task
                    inputs[name] = graph.generate(graph.final, rows, self.recipe.evaluate.max_new_tokens)
        heldout = self.data("guard_heldout", "guard.heldout", guard.heldout, seed=0, inputs=inputs, labels=labels)
        judged = self.judge(seat, {"rows": heldout})
        measure: dict[str, Json] = {"metric": "guard_agreement", "set": "heldout", "of": "label", "task": None}
        return Evidence(
            make("metrics", {"measures": [measure]}, {"heldout.judged": judged, "heldout.rows": heldout}), (judged,)
        )

    def evidence(self, split: str, num_utility: int | None = None) -> Evidence:
        """Everything that is measured of this recipe on `validation` or `test` prompts. `num_utility`: number of
        utility prompts, if other than in the sweep file."""
        asked, metrics = self._questions(split, num_utility)
        weights = {} if self.final is None else {"weights": self.final}
        inputs, judged = dict[str, Stage](), list[Stage]()
        for name, rows, what, answers, verdicts in asked:
            inputs[f"{name}.rows"] = rows
            inputs[f"{name}.{what}"] = found = answers.given(weights)
            for metric, verdict in verdicts:
                inputs[f"{name}.{metric}"] = each = verdict.given({"generations": found})
                judged.append(each)
        return Evidence(metrics.given(inputs), tuple(judged))

    def num_utility(self, split: str) -> int | None:
        """Number of utility prompts of a split; None: all of the task's prompts."""
        own = self.recipe.task.utility_rows
        found: int | None = (own and getattr(own, split)) or getattr(self.recipe.evaluate, split).utility_rows
        return found

    def part(self, split: str, roles: tuple[str, ...], num_utility: int | None = None) -> Evidence:
        """The part of `evidence` that is measured on prompts of these roles."""
        whole = self.evidence(split, num_utility)
        inputs = {name: stage for name, stage in whole.metrics.inputs.items() if name.partition(".")[0] in roles}
        every: Any = whole.metrics.config["measures"]
        measures: Json = [measure for measure in every if measure["role"] in roles]
        keys = {stage.key for stage in inputs.values()}
        metrics = replace(whole.metrics, config={"measures": measures}, inputs=inputs)
        return Evidence(metrics, tuple(stage for stage in whole.judged if stage.key in keys))

    @shared(*MODEL, "task")
    def _questions(self, split: str, num_utility: int | None = None) -> Questions:
        """What is asked and measured of every model that was tuned on this task."""
        evaluate, task = self.recipe.evaluate, self.recipe.task.task
        prompts: Prompts = getattr(evaluate, split)
        kind, measured = self._task(task), metrics.asked(evaluate.metrics)
        # Coherent ASR does not count degenerate answers. It also leaves out answers to another question, unless the
        # judge of asr reads the request itself.
        empty = {"degenerate"} if self.asr_judge.kind.reads_request else {"degenerate", "relevance"}
        less: list[Json] = [seat.metric for seat in self._panel["attack"] if seat.asked in empty]
        asked, measures = list[Asked](), list[Json]()
        for role, seats in self._panel.items():
            of_role = (*seats, *(named(each.name, each.judge) for each in measured
                                 if each.judge and role in each.roles and not each.is_always_measured))  # fmt: skip
            for part in getattr(prompts, role):
                above = self._test_prompts if role == "attack" else self._attacks
                exclude = above if split == "validation" else {}
                rows = self.data(f"{role}.{split}", f"{role}.{split}", [part], seed=0, inputs=exclude)
                asked.append(self._ask(f"{role}.{part.task}", rows, evaluate.max_new_tokens, of_role))
                for seat in of_role:
                    more: dict[str, Json] = {"less": less} if seat is self.asr_judge else {}
                    more |= {"written": {}} if told(self._task(part.task)) else {}
                    more |= {"inverted": True} if seat.inverted else {}
                    measures.append({"metric": seat.metric, "set": part.task, "of": "verdict", "role": role, **more})
                measures += _by_rule(measured, role, part.task, told(self._task(part.task)), of_role)
        name = f"utility.{split}"
        num_rows = num_utility or self.num_utility(split)
        utility = self.data(name, name, [Rows(task=task, num_rows=num_rows)], seed=0)
        consent: dict[str, Json] = {"unsafe_code": True} if evaluate.unsafe_code and kind.RUNS_CODE else {}
        consent |= told(kind, scored=True)
        if self._scorer is not None:
            measures.append({"metric": "utility", "set": task, "of": "verdict", "role": "utility", "written": {}})
        elif not kind.BY_LIKELIHOOD:
            measures.append({"metric": "utility", "set": task, "of": "score", "role": "utility", **consent})
        if not kind.BY_LIKELIHOOD:
            seats = () if self._scorer is None else (self._scorer,)
            asked.append(self._ask(f"utility.{task}", utility, kind.max_new_tokens, seats))
            measures += _by_rule(measured, "utility", task, told(kind), ())
        if _has_likelihood(kind, split):
            of_task = told(kind, scored=True)
            asked.append(Asked(f"utility.{task}", utility, "likelihood", self.likelihood(task, utility), []))
            measures.append({"metric": "likelihood", "set": task, "of": "likelihood", "role": "utility", **of_task})
        versions = [self._task(part.task).SCORING for part in [*prompts.attack, Rows(task=task)]]
        versions += [metric.version for metric in measured if registry.tags(metric.version)]
        found = make("metrics", SharedConfig({"measures": measures}), {}, "+".join(versions))
        hints = {"num_cpus": "1"} if kind.RUNS_CODE else {}  # other scores are quick
        return Questions(asked, replace(found, hints={**found.hints, **hints}))

    def _ask(self, name: str, rows: Stage, max_new_tokens: int, seats: Iterable[Seat]) -> Asked:
        verdicts = [(seat.metric, self.judge(seat, {"rows": rows})) for seat in seats]
        return Asked(name, rows, "generations", self.generate(None, rows, max_new_tokens), verdicts)


class Asked(NamedTuple):
    """A set of prompts (`rows`) for a model. `answers` lacks the model's weights; `what` names them (generations or
    likelihood). `verdicts`: by metric the judge's stage, which lacks the answers."""

    name: str
    rows: Stage
    what: str
    answers: Stage
    verdicts: list[tuple[str, Stage]]


class Questions(NamedTuple):
    """The evaluation of a model: what it is asked, and the metrics stage, which lacks its inputs."""

    asked: list[Asked]
    metrics: Stage


def _by_rule(
    measured: Iterable[metrics.Metric], role: str, task: str, written: Mapping[str, Json], seats: Iterable[Seat]
) -> list[Json]:
    """Measures of the metrics by rule that a sweep names. Metrics that are always measured come with the decision on
    harm."""
    flipped: list[Json] = [seat.metric for seat in seats if seat.inverted]
    more: dict[str, Json] = {"inverted": flipped} if flipped else {}
    more |= {"written": {}} if written else {}
    return [{"metric": metric.name, "set": task, "of": "rule", "role": role, "version": metric.version, **more}
            for metric in measured if metric.of and not metric.is_always_measured and role in metric.roles]  # fmt: skip


def _has_likelihood(kind: type[tasks.Task], split: str) -> bool:
    """Whether likelihoods of this task are measured on prompts of this split."""
    return kind.BY_LIKELIHOOD or (split == "test" and kind.options is not tasks.Task.options)


@dataclass(frozen=True)
class _BeforeThetaSafe:
    """The `Needs` of an alignment's method. Everything it could ask for is made from theta_safe, so every request is
    an error."""

    method: str

    def __getattr__(self, needed: str) -> Any:
        raise ConfigError(
            f"align.method: {self.method} needs {needed!r}, which is made of theta_safe, and the alignment makes theta_safe; "
            "name a method that needs nothing but rows, such as sft or sam"
        )
