"""What finetunes are trained on, and notes about it. `Preview` computes it from data and tokenizers alone, before any
stage runs. After a run, the stages' records hold the same facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safecl.base import ConfigError, Damaged, Json, PrerequisiteError, json_lines
from safecl.graph import REFERENCES, Graph
from safecl.grid import Cell, Job
from safecl.models import tokenizer_folder
from safecl.stages.data import Composed, Found, compose, find
from safecl.stages.finetune import REMEMBERED
from safecl.store import Stage, Store, below, canonical
from safecl.tasks import Row
from safecl.tasks._source import is_here
from safecl.training.tokens import Tokenizer


class Trained(NamedTuple):
    """Facts of one finetune's training data. For an alignment, rows that a model has yet to answer are not included.

    `too_long`: number of rows left out because they exceed `max_tokens`, by part. `poison_tokens`: the poison's
    fraction of the response tokens. `memory_rows`: None for a method without a memory.
    """

    rows: int
    poison_rows: int
    poison_tokens: float
    too_long: dict[str, int]
    cut_prompts: int
    memory_rows: int | None = None


class Preview:
    """Rows of data stages, computed in this process, each stage once. Stages that the store holds are read from it."""

    def __init__(self, store: Store, folder: Path | None, planned: bool = False) -> None:
        self.store, self.folder, self.planned = store, folder, planned
        self._made: dict[str, Composed | ConfigError | None] = {}
        self._found: dict[tuple[Any, ...], Found] = {}  # several stages draw from these
        self._taken: dict[tuple[str, ...], list[str]] = {}  # by keys of excluded stages: their prompts
        self._tokenizers: dict[str, Tokenizer] = {}

    def rows(self, stage: Stage) -> Composed | None:
        """The rows of a data stage, without those that a model has yet to answer. None if a source is not on this
        machine.

        Raises:
            ConfigError: the stage would fail because there are too few rows.
        """
        if stage.key not in self._made:
            try:
                self._made[stage.key] = self._rows(stage)
            except ConfigError as error:
                self._made[stage.key] = error
        if isinstance(found := self._made[stage.key], ConfigError):
            raise found
        return found

    def _rows(self, stage: Stage) -> Composed | None:
        config: Any = stage.config
        if self.store.has(stage):
            with suppress(Damaged):  # a run makes it again
                lines = json_lines(self.store.path(stage) / "rows.jsonl")
                return Composed([Row(**line) for line in lines], self.store.record(stage)["result"])
        excluded = [stage.inputs[name] for name in sorted(stage.inputs) if name.startswith("exclude_")]
        rows = [self.rows(other) for other in excluded]
        if None in rows:
            return None
        parts = [*config["parts"], *([config["poison"]] if config["poison"] else [])]
        if not all(is_here(part["source"]) for part in parts):
            return None
        keys = tuple(other.key for other in excluded)
        if keys not in self._taken:
            self._taken[keys] = [row.asked for found in rows if found is not None for row in found.rows]
        taken = self._taken[keys]
        seed = int(config["seed"])

        def draw_from(part: dict[str, Any], split: str) -> Found:
            same = (part["task"], split, canonical([part["source"], part.get("written")]), seed, keys)
            if same not in self._found:
                self._found[same] = find(part, split, seed, self.folder, taken, stage.hints)
            return self._found[same]

        return compose(config, draw_from, taken, {}, self._tokenizer(stage))

    def _tokenizer(self, stage: Stage) -> Tokenizer | None:
        below = stage.inputs.get("tokenizer")
        if below is not None and below.key not in self._tokenizers:
            try:
                self._tokenizers[below.key] = Tokenizer(tokenizer_folder(below))
            except PrerequisiteError:
                if not self.planned:
                    raise
                return None
            self._tokenizers[below.key].memo = {}
        return None if below is None else self._tokenizers[below.key]


def expected(cells: Sequence[Cell], seed: int, preview: Preview) -> dict[str, Trained | None]:
    """What each cell's finetune will be trained on, by label. None if its data is not on this machine yet.

    Raises:
        ConfigError: without the rows that are too long, there are fewer rows, poisoned rows or memory rows than asked
            for.
    """
    found: dict[str, Trained | None] = {}
    errors: list[str] = []
    store = preview.store

    def rows(stage: Stage) -> Composed | None:
        try:
            return preview.rows(stage)
        except ConfigError as error:
            errors.append(str(error))
            return None

    jobs = [cell.job({}, seed, "final") for cell in cells]
    tops = [job.evidence.metrics for job in jobs]
    tops += [job.graph.evidence("validation").metrics for job in jobs if job.cell.space is not None]
    for stage in below(tops, leave_out=store.has):
        if stage.kind == "data":
            rows(stage)
    for cell, job in zip(cells, jobs, strict=True):
        graph, method = job.graph, cell.recipe.method
        if method in REFERENCES and method != "aligned":
            continue
        if method == "aligned" and graph.theta_safe is None:
            continue
        tuned = graph.theta_safe if method == "aligned" else graph.tuned
        own = graph.safety_rows if method == "aligned" else graph.user_rows
        assert tuned is not None
        num_memory = None if method == "aligned" else _memory(cell, seed)
        if store.has(tuned):  # its memory was already made
            with suppress(Damaged):
                if store.has(own) and "num_rows" in (facts := store.record(own)["result"]):
                    found[cell.label] = of(facts, num_memory)
            continue
        composed = rows(own)
        usable = None if num_memory is None else _usable(graph, store, rows)
        if num_memory is not None and usable is not None and usable < num_memory:
            what = "rows" if graph.recipe.memory_mix == "stratified" else "refusals"
            errors.append(
                f"{cell.label}: a memory of {num_memory} rows is asked for, the safety rows hold {usable} {what}; lower "
                f"{cell.memory_key} or give more safety rows"
            )
        found[cell.label] = None if composed is None else of(composed.facts, num_memory)
    if errors:
        raise ConfigError("\n".join(dict.fromkeys(errors)))
    return found


def of(facts: Mapping[str, Any], memory_rows: int | None) -> Trained:
    """A Trained from the recorded facts of the user's rows."""
    too_long = {name: num for name, num in facts.get("too_long", {}).items() if num}
    tokens, cut = facts.get("poison_tokens", 0.0), facts.get("cut_prompts", 0)
    return Trained(facts["num_rows"], facts["num_poison"], tokens, too_long, cut, memory_rows)


def _usable(graph: Graph, store: Store, rows: Callable[[Stage], Composed | None]) -> int | None:
    """Number of safety rows that a memory may draw from; None if that is not known yet."""
    safety, stratified = graph.safety_rows, graph.recipe.memory_mix == "stratified"
    if safety.kind != "data":  # the model has yet to make this many rows
        return int(num) if isinstance(num := safety.config.get("num_rows"), int) else None
    if stratified and graph.recipe.align.self_answered and not store.has(safety):
        return None
    composed = rows(safety)
    return None if composed is None else sum(row.harmful or stratified for row in composed.rows)


def _memory(cell: Cell, seed: int) -> int | None:
    """Number of rows of the largest memory that this cell's method may ask for."""
    graph = cell.job({}, seed, "final").graph
    stage = graph.tuned.inputs.get("memory") or (graph.final and graph.final.inputs.get("memory"))
    if stage is None:
        return None
    space: Any = (cell.space or {}).get(cell.memory_key)
    searched = space if isinstance(space, list) else [space["high"]] if isinstance(space, dict) else []
    return max(searched, default=int(str(stage.config["num_rows"])))


def recorded(job: Job, store: Store) -> dict[str, Json] | None:
    """The same facts of a finished trial's finetune, from records. None if the records do not hold them."""
    graph = job.graph
    if not store.has(graph.tuned) or not store.has(graph.user_rows):
        return None
    training, user = store.record(graph.tuned)["result"], store.record(graph.user_rows)["result"]
    if "num_rows" not in user:
        return None
    memory = training.get("memory_rows") if graph.tuned.inputs.keys() & set(REMEMBERED) else None
    own = of(user, memory)._asdict()
    # The method's own rows are trained on: it may add rows to the user's, or leave some out.
    own |= {name: training[name] for name in ("poison_rows", "cut_prompts") if name in training}
    filtered = {name: training.get(name, 0) for name in ("filtered", "filtered_poison")}
    return own | {"trained_rows": training.get("rows"), "left_out": training.get("dropped", 0), **filtered}


def notes(found: Sequence[tuple[str, float | None, Mapping[str, Any]]]) -> list[str]:
    """Differences from what the sweep asked for, one line per kind, each place once. `found`: (where, poison ratio, a
    Trained as a dict)."""
    shares: dict[str, None] = {}
    long: dict[str, None] = {}
    cut: dict[str, None] = {}
    left_out: dict[str, None] = {}
    filtered: dict[str, None] = {}
    for where, ratio, one in found:
        num_rows = one.get("trained_rows") or one["rows"]
        share = one["poison_rows"] / max(1, num_rows)
        if ratio and abs(share - ratio) >= 0.0005:
            shares[f"{where} {one['poison_rows']} of {num_rows} ({share:.1%})"] = None
        if one["too_long"]:
            told = " and ".join(f"{num} of {part}" for part, num in sorted(one["too_long"].items()))
            long[f"{where} {told}"] = None
        if one["cut_prompts"]:
            cut[f"{where} {one['cut_prompts']} of {num_rows}"] = None
        if one.get("left_out"):
            left_out[f"{where} {one['left_out']}"] = None
        if one.get("filtered"):
            told = f"{one['filtered']} of {one['rows']}, {one['filtered_poison']} of them poison; trained on {num_rows} rows"
            filtered[f"{where} {told}"] = None
    lines = {
        "Poison's share of the rows": shares,
        "Rows too long for max_tokens, passed over": long,
        "Requests cut to fit max_tokens (inside the template)": cut,
        "Rows left out in training": left_out,
        "User rows that a method filtered": filtered,
    }
    return [f"{what}: {', '.join(places)}." for what, places in lines.items() if places]
