"""What pruning spares of a real search, and whether it chooses the same: python benchmarks/prune.py SWEEP [--set KEY=VALUE]

Replays the finished searches of a sweep from its store, trial after trial as they were suggested and in 200 other orders
(trial 0 first), by each rule of `search.prune`. No model is run: what each trial answered, and the seconds that its stages
took, are those of the store. A trial suggested after a pruned one might have been another; that is not replayed.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from statistics import mean
from typing import Any

import _bench

from safecl import metrics
from safecl.grid import PILOT, STEPS, Cell
from safecl.objective import Trial, bounds, hopeless, select
from safecl.project import Project, load
from safecl.schedule import values
from safecl.suggest import is_worse

RULES = {"none": (), "bounds": ("search: attack", "search: utility"), "wilcoxon": tuple(STEPS)}


class Told:
    """One finished trial of a search as the store has it."""

    def __init__(self, project: Project, cell: Cell, trial: Trial) -> None:
        job = cell.trial(trial.params)
        self.trial = trial
        self._compared: dict[int, bool] = {}
        self.metrics = values(project.store.record(job.evidence.metrics)["result"])
        objective = project.sweep.search.objective
        self.limits = bounds(objective, values(project.store.record(job.aligned.evidence.metrics)["result"]))
        lines = project.lines(job.evidence.metrics, "outcomes")
        self.utility = {
            o["id"]: o["value"] for o in lines if o["metric"] == objective.maximise and o["value"] is not None
        }
        self.seconds = {"attack": 0.0, "benign": 0.0, "utility": 0.0}  # of answering and judging, by role of prompts
        for name, stage in job.evidence.metrics.inputs.items():
            if stage.kind in ("generate", "judge", "likelihood"):
                self.seconds[name.partition(".")[0]] += float(project.store.record(stage)["seconds"])
        own = [stage for stage in job.own if stage.kind in ("finetune", "finalize")]
        self.training_s = sum(float(project.store.record(stage)["seconds"]) for stage in own)

    def is_worse(self, first: dict[str, float], best: Told) -> bool:
        if best.trial.number not in self._compared:
            self._compared[best.trial.number] = is_worse(first, best.utility)
        return self._compared[best.trial.number]


def replay(told: list[Told], rule: str, at_once: int, maximise: str) -> tuple[Trial, int, float]:
    """Who is chosen, how many trials were pruned, and the seconds spent after training."""
    kept: list[Told] = []
    spent, num_pruned = 0.0, 0
    for begins in range(0, len(told), at_once):
        before = [each.trial for each in kept]
        best = {each.trial.number: each for each in kept}
        finished = []
        for each in told[begins : begins + at_once]:
            asked: set[str] = set()
            why = ""
            for step in RULES[rule]:
                if step == "search: pilot":
                    first = dict(list(each.utility.items())[: max(1, len(each.utility) // PILOT)])
                    spent += each.seconds["utility"] / PILOT
                    within = [trial for trial in before if trial.feasible]
                    why = "pilot" if within and each.is_worse(first, best[select(within).number]) else ""
                else:
                    spent += sum(each.seconds[role] for role in {*STEPS[step]} - asked)
                    asked |= {*STEPS[step]}
                    known = {name: v for name, v in each.metrics.items() if {*metrics.of(name).roles} <= asked}
                    why = hopeless(known, each.limits, maximise, before)
                if why:
                    break
            if why:
                num_pruned += 1
                continue
            spent += sum(seconds for role, seconds in each.seconds.items() if role not in asked)
            finished.append(each)
        kept += finished
    return select([each.trial for each in kept]), num_pruned, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    project = Project(load(arguments.sweep, arguments.settings), reads=True)
    maximise = project.sweep.search.objective.maximise
    numbers: dict[str, Any] = {}
    for cell in project.cells:
        if cell.space is None or (study := project.past(cell)) is None or not study.is_done:
            continue
        told = [Told(project, cell, trial) for trial in study.complete()]
        whole = sum(sum(each.seconds.values()) for each in told)
        training = sum(each.training_s for each in told)
        within = sum(each.trial.feasible for each in told)
        chance = random.Random(0)
        orders = [told, *([told[0], *chance.sample(told[1:], len(told) - 1)] for _ in range(200))]
        rows = []
        for rule in ("bounds", "wilcoxon"):
            for at_once in (1, 4):
                found = [replay(order, rule, at_once, maximise) for order in orders]
                unpruned = [replay(order, "none", at_once, maximise)[0] for order in orders]
                same = [
                    a.value == b.value and a.feasible == b.feasible for (a, *_), b in zip(found, unpruned, strict=True)
                ]
                lost = [b.value - a.value for (a, *_), b in zip(found, unpruned, strict=True)]
                rows.append({
                    "prune": rule, "at once": at_once, "pruned, as suggested": found[0][1],
                    "pruned, mean of orders": mean(pruned for _, pruned, _ in found),
                    "spared of answering and judging": 1 - mean(spent for *_, spent in found) / whole,
                    "spared with training": (whole - mean(spent for *_, spent in found)) / (whole + training),
                    "same choice, share of orders": mean(same), f"{maximise} lost, mean": mean(lost), "worst": max(lost),
                })  # fmt: skip
                print(rows[-1])
        sizes = f"{len(told)} trials, {within} within the bounds"
        told_of = f"{cell.label}: {sizes}, {training:.0f} s of training, {whole:.0f} s of the rest"
        numbers[told_of] = rows
    if not numbers:
        raise SystemExit("no search of this sweep is finished: run it with search.prune: none first")
    print(_bench.write("prune", numbers))


if __name__ == "__main__":
    main()
