"""The judge stages of a recipe, and the guards that are trained for them."""

from __future__ import annotations

import json
from dataclasses import replace

from safecl.base import ConfigError, Json
from safecl.graph.recipe import MODEL, make, resolved
from safecl.graph.rows import RowStages
from safecl.memo import shared
from safecl.models import model_stage
from safecl.panel import Seat, panel, scorer
from safecl.store import SharedConfig, Stage


class JudgeStages(RowStages):
    """The judge stages of one recipe."""

    @property
    @shared("evaluate", "model")
    def _panel(self) -> dict[str, tuple[Seat, ...]]:
        return panel(self.recipe.evaluate.judges)

    @property
    @shared("evaluate", "model", "task")
    def _scorer(self) -> Seat | None:
        """The judge that decides the task's utility; None if no judge does."""
        written = next((data for data in self.shared.data if data.name == self.recipe.task.task), None)
        return None if written is None or written.judge is None else scorer(written, self.recipe.evaluate.judges)

    @property
    def asr_judge(self) -> Seat:
        """The judge that decides whether an answer is harmful."""
        return self._panel["attack"][0]

    def judge(self, seat: Seat, inputs: dict[str, Stage]) -> Stage:
        """Verdicts of one judge on `generations`; without `generations`, on the rows' own answers."""
        full, models, version, hints = self._judge(seat)
        stage = make("judge", full, {**inputs, **models}, version)
        return replace(stage, hints={**stage.hints, **hints}) if hints else stage

    @shared(*MODEL)
    def _judge(self, seat: Seat) -> tuple[dict[str, Json], dict[str, Stage], str, dict[str, str]]:
        kind = seat.kind
        config: dict[str, Json] = {"judge": seat.judge, "config": resolved(kind, json.loads(seat.config))}
        models: dict[str, Stage] = {} if seat.model is None else {"model": model_stage(seat.model)}
        if seat.trained:
            votes = {f"weights.{i}" if i else "weights": guard for i, guard in enumerate(self.guards(seat))}
            models = {"model": self.base, **votes}
        hints = {}
        if seat.endpoint is not None:
            config["remote"], hints = seat.remote, seat.hints
        return SharedConfig(config), models, kind.VERSION, hints

    @shared(*MODEL)
    def guards(self, seat: Seat) -> tuple[Stage, ...]:
        """The guards trained here for a judge: finetunes of the base model on labelled pairs in the judge's template.
        They are measuring instruments, so their seeds do not depend on the recipe's seed."""
        guard = self.recipe.evaluate.judges.guard
        assert guard is not None, "panel.py checks this"
        wording: dict[str, Json] = {"judge": seat.judge, "config": json.loads(seat.config)}
        inputs = {**self._trained_on, "exclude_heldout": self._all("guard.heldout", guard.heldout, self._trained_on)}
        found = []
        for seed in guard.seeds:
            rows = self.data(
                "guard", "guard", guard.rows, seed=seed, guard=wording, inputs=inputs, max_tokens=guard.max_tokens
            )
            fixed = JudgeStages(replace(self.recipe, seed=seed, lora=guard.lora), self.shared)
            found.append(fixed.finetune("sft", {}, guard, {"rows": rows}, **self._guard_text))
        return tuple(found)

    def verdicts(self, inputs: dict[str, Stage]) -> Stage:
        """Verdicts of the judge of ASR on `generations` to `rows`; without `generations`, on the rows' own answers.

        Raises:
            ConfigError: True of this judge means "not harmful", but callers read True as harmful.
        """
        if self.asr_judge.inverted:
            raise ConfigError(
                f"needs to know which answers are harmful, and {self.asr_judge.judge!r}, the judge of asr, says True of those "
                "that are not: name another one, or turn its True round in its own file"
            )
        return self.judge(self.asr_judge, inputs)
