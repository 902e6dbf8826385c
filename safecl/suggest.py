"""A search's next trial, as a function of the recipe's seed, the study's name, the trial's place and the results before
it.

Each suggestion comes from a fresh sampler over a study in memory, so no state of a sampler is stored. A study that is
reopened, repeated, or finished in another order therefore asks the same trials. Trials are asked in batches of
`at_once`. A trial knows the results of the earlier batches. Of its own batch it knows only the values asked before it.
Optuna's constant liar treats these as bad, so that the batch spreads out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safecl.store import canonical


class Sampling(NamedTuple):
    """How a study suggests. `directions`: "minimize" or "maximize" for each objective. `distributions`: Optuna's, by
    parameter. `num_random`: TPE models nothing before this many trials are finished."""

    name: str
    seed: int
    sampler: str  # tpe, random or grid (all points of a grid are queued at first, so none is suggested)
    at_once: int
    num_random: int
    directions: tuple[str, ...]
    distributions: Mapping[str, Any]
    in_batches: bool  # whether a trial waits for the batches before its own: with TPE, and if trials may be pruned

    def begins(self, place: int) -> int:
        """The first place of the batch that contains `place`. A suggestion waits for all trials before it."""
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
        for params in map(known_params, before[begins:]):  # whatever their result is by now
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
    """Parameters of a trial, including those that were fixed in the queue and are not stored as its own."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def is_worse(values: Mapping[str, float], best: Mapping[str, float], p: float = 0.05) -> bool:
    """Whether `values` are significantly below `best`, those of the best trial, on the same prompts. More is better.
    The test is Optuna's WilcoxonPruner at threshold `p`, with each prompt as one step. False for fewer than two common
    prompts."""
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
