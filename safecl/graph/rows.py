"""The rows of every role, how they become text, and the stages that need only rows: a finetune, and answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import safecl.judges as judges
import safecl.methods as methods
import safecl.tasks as tasks
from safecl.base import Json, Strict
from safecl.config import Rows, Template, Training
from safecl.graph.recipe import MODEL, Recipe, make, resolved
from safecl.memo import Shared, shared
from safecl.models import model_stage, tokenizer_stage
from safecl.store import SharedConfig, Stage
from safecl.tasks._source import identity
from safecl.tasks._written import find, hints, told


class RowStages:
    """The data stages of one recipe, and the model that reads the rows."""

    def __init__(self, recipe: Recipe, shared: Shared) -> None:
        self.recipe = recipe
        self.shared = shared
        self.parts: dict[str, int] = {}

    def data(
        self,
        role: str,
        split: str,
        parts: Iterable[Rows],
        *,
        seed: int,
        inputs: dict[str, Stage] | None = None,
        poison: dict[str, Json] | None = None,
        guard: dict[str, Json] | None = None,
        labels: dict[str, Json] | None = None,
        max_tokens: int | None = None,
        text: dict[str, Json] | None = None,
    ) -> Stage:
        """Rows of one role. Inputs named `exclude_*` hold prompts that these rows must not overlap. `labels`: see
        stages/data.py. `max_tokens`: for rows to train on; longer rows (in the template of `text`) are left out."""
        config: dict[str, Json] = {
            "role": role,
            "parts": [self._part(part, split) for part in parts],
            "poison": poison,
            "guard": guard,
            "seed": seed,
            **({"labels": labels} if labels else {}),
        }
        inputs = inputs or {}
        used = [part.task for part in parts] + ([str(poison["task"])] if poison else [])
        if max_tokens is not None:
            fits = self._fits(max_tokens, text or (self._guard_text if guard else self._text))
            config["fits"] = fits if guard else self._conversing(fits, inputs, used)
            inputs = {**inputs, "tokenizer": self.tokenizer}
        rules = [self._task(task).SCORING for task in sorted({str(task) for task in (labels or {}).values()})]
        worded = [judges.load(str(guard["judge"])).VERSION] if guard else []
        stage = make("data", config, inputs, *(self._task(name).VERSION for name in used), *rules, *worded)
        places = {key: place for name in used for key, place in hints(self._task(name), name).items()}
        return replace(stage, hints={**stage.hints, **places}) if places else stage

    def _task(self, name: str) -> type[tasks.Task]:
        return find(name, self.shared.data)

    def _fits(self, max_tokens: int, text: dict[str, Json]) -> dict[str, Json]:
        """The setting with which a stage leaves out rows that are too long for training."""
        return {"max_tokens": max_tokens, "template": text["template"], "bos": text["bos"]}

    def _part(self, part: Rows, split: str) -> dict[str, Json]:
        counts: dict[str, Json] = {"num_rows": part.total, **({"kinds": dict(part.kinds)} if part.kinds else {})}
        source = self._source(part.task, split)
        return {"task": part.task, "split": split, **counts, "source": source, **told(self._task(part.task))}

    @shared(*MODEL)
    def _source(self, task: str, split: str) -> Json:
        found = identity(self._task(task), split, self.shared.folder, self.shared.planned)
        self.shared.sources.append(found)
        return found

    # Deduplication across roles. Priority, highest first: test, validation (attack before benign), rows of alignment,
    # user rows with poison, a guard's held-out pairs, its training pairs. A lower role drops each prompt that nearly
    # equals any row of a higher role's whole source, so another num_rows or seed never changes another role's data.

    def _all(self, split: str, parts: Iterable[Rows], inputs: dict[str, Stage] | None = None) -> Stage:
        return self.data("exclude", split, [Rows(task=part.task) for part in parts], seed=0, inputs=inputs)

    @property
    @shared(*MODEL)
    def _test_prompts(self) -> dict[str, Stage]:
        test = self.recipe.evaluate.test
        attack, benign = self._all("attack.test", test.attack), self._all("benign.test", test.benign)
        return {"exclude_attack": attack, "exclude_benign": benign}

    @property
    @shared(*MODEL)
    def _attacks(self) -> dict[str, Stage]:
        attack = self._all("attack.validation", self.recipe.evaluate.validation.attack, self._test_prompts)
        return {**self._test_prompts, "exclude_validation": attack}

    @property
    @shared(*MODEL)
    def held_out(self) -> dict[str, Stage]:
        """Test and validation prompts, which training rows must not overlap."""
        benign = self._all("benign.validation", self.recipe.evaluate.validation.benign, self._attacks)
        return {**self._attacks, "exclude_benign_validation": benign}

    @property
    @shared(*MODEL)
    def _aligned_on(self) -> dict[str, Stage]:
        safety = self._all("safety", self.recipe.align.safety, self.held_out)
        asked = self._all("benign.train", self.recipe.align.self_answered, self.held_out)
        return {**self.held_out, "exclude_safety": safety, "exclude_self_answered": asked}

    @property
    @shared(*MODEL)
    def _trained_on(self) -> dict[str, Stage]:
        """The rows that a guard's rows must not overlap: everything its candidates are trained or measured on."""
        poison = self._all("poison", [Rows(task=self.recipe.poison_task)], self._aligned_on)
        return {**self._aligned_on, "exclude_poison": poison}

    @property
    @shared(*MODEL)
    def base(self) -> Stage:
        """The base model's weights and tokenizer as a folder."""
        return model_stage(self.recipe.model)

    @property
    @shared(*MODEL)
    def tokenizer(self) -> Stage:
        """The base model's tokenizer alone. With it rows that are too long can be left out before the model is
        downloaded."""
        return tokenizer_stage(self.recipe.model)

    @property
    def _text(self) -> dict[str, Json]:
        """The settings with which requests become text for this model."""
        model = self.recipe.model
        return {"template": self._plain(model.text), "bos": model.bos, "dtype": model.dtype}

    def _around(self, prompt: str | None) -> dict[str, Json]:
        """`_text` with another text around requests."""
        if prompt is None:
            return self._text
        template = self.recipe.model.text.model_copy(update={"prompt": prompt})
        return {**self._text, "template": template.model_dump(mode="json")}

    def _conversing(
        self, config: dict[str, Json], inputs: Mapping[str, Stage], drawn_from: Iterable[str] = ()
    ) -> dict[str, Json]:
        """The config of a stage. If its rows may be conversations, the template also gets the keys with which this
        model's template writes conversations."""
        if not self.shared.data or not any(self._task(name).CONVERSES for name in (*drawn_from, *_drawn_from(inputs))):
            return config
        template: Any = config["template"]
        return {**config, "template": {**template, **self.recipe.model.text.conversation}}

    @property
    @shared(*MODEL)
    def _guard_text(self) -> dict[str, Json]:
        """`_text` for a guard trained here: its rows already hold the judge's template, which writes its own BOS."""
        template = Template(prompt="{prompt}", end=self.recipe.model.text.end, stop=())
        return {"template": template.model_dump(mode="json"), "bos": False}

    def _plain(self, config: Strict, kind: type[Strict] | None = None) -> dict[str, Json]:
        """A config as JSON: all its fields, or only those of the class `kind`."""
        fields = set(kind.model_fields) if kind else None
        return self.shared.once(
            ("plain", kind), config, lambda: SharedConfig(config.model_dump(mode="json", include=fields))
        )

    # All seeds of a cell share one object of hyperparameters.

    def _method(self, kind: type[methods.Method], given: dict[str, Json]) -> methods.Method:
        return self.shared.once(("method", kind), given, lambda: kind(kind.Config(**given)))

    def _params(self, kind: type[methods.Method], given: dict[str, Json]) -> SharedConfig:
        """The hyperparameters with their defaults."""
        return self.shared.once(("params", kind), given, lambda: SharedConfig(resolved(kind, given)))

    def generate(self, final: Stage | None, rows: Stage, max_new_tokens: int, **more: Json) -> Stage:
        """A model's answers to the prompts of `rows`. Greedy, unless `more` gives `sampling`; `more` may also give a
        `template`."""
        config = self._generation(max_new_tokens)
        inputs = {"model": self.base, "rows": rows}
        config = self._conversing({**config, **more} if more else config, inputs)
        return make("generate", config, inputs if final is None else {**inputs, "weights": final})

    @shared(*MODEL)
    def _generation(self, max_new_tokens: int) -> dict[str, Json]:
        evaluate = self.recipe.evaluate
        text = self._around(evaluate.template)
        return SharedConfig({"max_new_tokens": max_new_tokens, "max_prompt_tokens": evaluate.max_prompt_tokens, **text})

    def finetune(
        self, method: str, params: dict[str, Json], training: Training, inputs: dict[str, Stage], **text: Json
    ) -> Stage:
        """A LoRA finetune of the base model, from a fresh adapter or from the adapter in `inputs["safe"]`."""
        recipe, kind = self.recipe, methods.load(method)
        config: dict[str, Json] = {
            "method": method,
            "params": self._params(kind, params),
            "training": self._plain(training, Training),
            "lora": self._plain(recipe.lora),
            "adapter": recipe.adapter,
            "seed": recipe.seed,
            **self._text,
            **text,
        }
        return make("finetune", self._conversing(config, inputs), {"model": self.base, **inputs}, kind.VERSION)


def _drawn_from(inputs: Mapping[str, Stage]) -> Iterator[str]:
    """The tasks from which rows among these inputs are drawn or whose prompts they answer. A guard's rows are left
    out: they are pairs in the judge's template."""
    for name, stage in inputs.items():
        if name.partition("_")[0] not in ("rows", "memory", "answers"):
            continue
        config: Any = stage.config
        if stage.kind != "data":
            yield from _drawn_from(stage.inputs)
        elif not config["guard"]:
            parts = [*config["parts"], *([config["poison"]] if config["poison"] else [])]
            yield from (str(part["task"]) for part in parts)
            yield from _drawn_from(stage.inputs)
