"""What a search asks next, as a function: of the recipe's seed, the study's name, the trial's place and what was told before it.

A fresh sampler over a study in memory gives each suggestion, so nothing of a sampler is ever stored: a study that is
reopened, replayed or finished in another order asks the same. Trials go in batches of `at_once`. Those of one batch know
what was told of the batches before; of their own they know which values were asked before them, and Optuna's constant liar
takes these for bad, so that the batch spreads out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safecl.store import canonical


class Sampling(NamedTuple):
    """How a study suggests. `directions`: minimize or maximize, an objective each; `distributions`: Optuna's, by parameter;
    `num_random`: finished trials without which nothing is modelled."""

    name: str
    seed: int
    sampler: str  # tpe, random or grid (whose points are all known, and never suggested)
    at_once: int
    num_random: int
    directions: tuple[str, ...]
    distributions: Mapping[str, Any]
    in_batches: bool  # whether a trial waits for the batches before its own: with TPE, and where it may be pruned

    def begins(self, place: int) -> int:
        """The first place of the batch that this place is in: what a suggestion waits for lies before it."""
        return place - place % self.at_once if self.in_batches else 0

    def suggest(self, place: int, before: Sequence[Any]) -> dict[str, Any]:
        """Parameters of the trial at a place. `before`: the trials at the places before it, in this order."""
        import optuna
        from optuna.trial import TrialState, create_trial

        study = optuna.create_study(directions=self.directions, sampler=self._sampler(place))
        begins = self.begins(place)
        for trial in before[:begins]:
            if trial.state != TrialState.FAIL:
                study.add_trial(trial)
        for params in map(known_params, before[begins:]):  # whatever has become of them since
            if params.keys() == self.distributions.keys():
                pending = create_trial(state=TrialState.RUNNING, params=params, distributions=dict(self.distributions))
                study.add_trial(pending)
        found: dict[str, Any] = study.ask(dict(self.distributions)).params
        return found

    def _sampler(self, place: int) -> Any:
        import optuna

        text = canonical([self.seed, self.name, place])
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        if self.sampler != "tpe":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=self.num_random, multivariate=True, constant_liar=True
        )


def known_params(trial: Any) -> dict[str, Any]:
    """Parameters of a trial, those included that were fixed for it while it was in the queue and are not stored as its own."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def is_worse(values: Mapping[str, float], best: Mapping[str, float], p: float = 0.05) -> bool:
    """Whether values (more is better) are below those of the best trial on the same prompts: Optuna's WilcoxonPruner, a
    prompt a step."""
    import warnings

    import optuna
    from optuna.trial import TrialState, create_trial

    both = sorted(values.keys() & best.keys())
    if len(both) < 2:
        return False
    reported = [{step: float(of[prompt]) for step, prompt in enumerate(both)} for of in (values, best)]
    study = optuna.create_study(direction="maximize")
    mean = sum(reported[1].values()) / len(both)
    study.add_trial(create_trial(state=TrialState.COMPLETE, value=mean, intermediate_values=reported[1]))
    pending = create_trial(state=TrialState.RUNNING, intermediate_values=reported[0])
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        return bool(optuna.pruners.WilcoxonPruner(p_threshold=p).prune(study, pending))
