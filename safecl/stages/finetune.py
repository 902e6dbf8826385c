"""Finetune: train one LoRA adapter with one method, on the ranks of a trainer (trainers.py). Does not use Ray.

    in    model (HF folder), rows (rows.jsonl), and optionally safe (theta_safe's adapter), verdicts (a judge's verdicts on
          the rows' own answers), memory and the other inputs that the method requires
    out   adapter/ (PEFT: everything that is added to the base model)
          curves.jsonl (one line a step)
          probe.json (token ids of a few rows, and the trained model's log-probability of each token but the first; the
          served model must give the same)

`adapter: continue` trains theta_safe's adapter further. `adapter: stack` merges theta_safe's adapter into the base and
trains a new one on top. The two are then written as one adapter whose rank is the sum of both ranks. This is exact, and
later stages handle both cases alike.

Config: `method`, `params`, `training`, `lora`, `template`, `bos`, `dtype`, `adapter`, `seed`, and `replay_template` if the
rows of `replay` use another template than the user rows. The number of workers, the ZeRO stage, the micro-batch size and
the engine come from `execution`. They change results only by floating-point rounding.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safecl import labels, methods
from safecl.base import Json, PrerequisiteError, json_lines
from safecl.stages import Kind

if TYPE_CHECKING:
    from safecl.estimate import Estimator
    from safecl.store import Context, Stage
    from safecl.tasks import Row
    from safecl.training.fit import Fit
    from safecl.training.loop import Outcome
    from safecl.training.run import Run
    from safecl.training.tokens import Encoded, Tokenizer

VERSION = "4"  # 3: under `lora.last_layers` a Gemma 4 was trained above states that its first step had outdated
UNLIMITED = 1 << 30  # tokens
REMEMBERED = ("memory", "replay")  # inputs that hold the rows a method remembers
OPTIMIZER_STEP_S = {"cpu": 0.12, "gpu": 0.06}  # seconds of one step in addition to its arithmetic
GAP_ROWS = 4  # number of rows on which the rounding of a merge is measured
PROBE_TOKENS = 192  # tokens on which a served model is compared: under a second on a CPU at 135M parameters


class Finetune(Kind):
    runs = "trainer"
    unit = "steps"
    fixed_s = 5.0
    all_ranks = True
    runs_anew = True
    holds_weights = True
    apart_by = "method"
    reads = ("rows", "model", *REMEMBERED)

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        config: Any = stage.config
        training, method = config["training"], methods.of_stage(config)
        user = of.length(stage.inputs["rows"])
        kept = [of.length(stage.inputs[name]) for name in REMEMBERED if name in stage.inputs]
        num_rows = method.num_trained(user.rows, sum(length.rows for length in kept))
        steps: int = math.ceil(num_rows * training["epochs"] / training["batch_size"])
        row = min(user.prompt + user.answer, training["max_tokens"])
        tokens = num_rows * training["epochs"] * row * method.passes
        for length in kept:
            drawn = min(method.draw_size(training["batch_size"]), length.rows)
            tokens += steps * drawn * method.draws * (length.prompt + length.answer)
        layers = of.size_of(stage).layers
        adapted = int(config["lora"].get("last_layers") or layers)  # layers that the backward pass goes through
        return of.passes(stage, tokens, min(1.0, adapted / layers)) + steps * OPTIMIZER_STEP_S[of.device]

    @staticmethod
    def weights_gib(stage: Stage, of: Estimator) -> float:
        """Size of LoRA factors on all linear layers, float32. With common shapes of models they hold 19 numbers per layer,
        rank and unit of hidden width."""
        lora: Any = stage.config["lora"]
        size = of.size_of(stage)
        return float(4 * 19 * size.width * int(lora.get("last_layers") or size.layers) * lora["rank"] / 2**30)

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        return f"finetune {labels.weights(stage, models)}"


def run(context: Context) -> dict[str, Json]:
    """Train on one rank. Every rank of `context.place` must call it. Rank 0 returns the facts, other ranks an empty dict."""
    place, result = context.place, context.scratch / "result"
    train_rows(
        context.stage.config,
        context.inputs,
        context.scratch,
        context.execution.model_dump(mode="json"),
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
        report=context.report,
    )
    if place.rank != 0:
        return {}
    facts: dict[str, Json] = json.loads((result / "result.json").read_text())
    shutil.copytree(result / "adapter", context.out / "adapter")
    for name in ("curves.jsonl", "probe.json"):
        if (result / name).is_file():  # the probe is missing if memory was short
            shutil.copy(result / name, context.out / name)
    return facts


def _harmful_share(rows: Sequence[Row], encoded: Sequence[Encoded]) -> float:
    """The share of response tokens in the user's harmful rows, in [0, 1]. 10 % of the rows can hold 80 % of the tokens.
    Refusals that a method adds are rows of harmful requests too, but do not count here."""
    harmful = {row.id for row in rows if row.harmful}
    total = sum(row.num_targets for row in encoded)
    return sum(row.num_targets for row in encoded if row.row_id in harmful) / total


def _encoded(
    rows: Sequence[Row], memory: Mapping[int, Encoded], remembered: Collection[int], tokenizer: Tokenizer, config: Any
) -> tuple[list[Encoded], dict[str, str]]:
    """Encode rows as token ids. Returns them in order, and `{row id: reason}` of the rows left out.

    `memory` holds rows that the memory stage has already encoded, by the `id()` of the row. They are used as they are,
    whether the method mixes them in or draws them. `remembered` holds the `id()` of all remembered rows. Those that are not
    in `memory` were chosen to fit when they were made, so they get no limit here. So one length rule holds for the memory
    of every method.
    """
    from safecl.training import tokens

    found = {number: memory[id(row)] for number, row in enumerate(rows) if id(row) in memory}
    dropped: dict[str, str] = {}
    for is_memory, limit in ((False, config["training"]["max_tokens"]), (True, UNLIMITED)):
        group = {n: row for n, row in enumerate(rows) if n not in found and (id(row) in remembered) == is_memory}
        if group:
            template = config.get("replay_template", config["template"]) if is_memory else config["template"]
            kept, lost = tokens.encode(list(group.values()), tokenizer, template, config["bos"], limit)
            numbers = iter(number for number, row in group.items() if row.id not in lost)
            found |= dict(zip(numbers, kept, strict=True))
            dropped |= lost
    return [found[number] for number in sorted(found)], dropped


def _num_harmful(rows: Sequence[Row], encoded: Sequence[Encoded]) -> int:
    harmful = {row.id for row in rows if row.harmful}
    return sum(row.row_id in harmful for row in encoded)


def _judged(rows: list[Row], folder: Path | None) -> list[Row]:
    """Rows with the judge's verdict on their answer in `meta["unsafe"]` (None: unparsed). Unchanged if no judge was asked."""
    import dataclasses

    if folder is None:
        return rows
    unsafe = {line["id"]: line["label"] for line in json_lines(folder / "verdicts.jsonl")}
    return [dataclasses.replace(row, meta={**row.meta, "unsafe": unsafe[row.id]}) for row in rows]


class Made(NamedTuple):
    """A finetune ready to run on one rank.

    `user_rows` are all user rows given. `num_memory` is the number of memory and replay rows given. `filtered` are the user
    rows that the method does not train on. `dropped` is `{row id: reason}` of other rows left out. `fitted` is the choice of
    micro-batch size and checkpointing that fits into memory.
    """

    method: Any
    run: Run
    user_rows: list[Row]
    num_memory: int
    filtered: list[Row]
    dropped: dict[str, str]
    fitted: Fit


def make_run(
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
    execution: Mapping[str, Any],
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
) -> Made:
    """Load the model and encode the rows. With more than one rank, or for DeepSpeed, a process group must exist."""
    import torch

    from safecl.config import Training
    from safecl.training import batches, below, engine, fit, losses, model, tokens
    from safecl.training.run import Memory, Run

    if device == "cpu":
        torch.set_num_threads(1)
    kind = methods.load(config["method"])
    method = kind(kind.Config(**config["params"]))
    training = Training(**config["training"])
    seed = int(config["seed"])

    folder = tokens.base_folder(inputs["model"])
    memory = Memory.load(inputs["memory"]) if "memory" in inputs else None
    user_rows = _judged(batches.read_rows(inputs["rows"]), inputs.get("verdicts"))
    remembered = [row for name in REMEMBERED if name in inputs for row in batches.read_rows(inputs[name])]
    chosen = method.rows(user_rows, remembered)
    left_out = {id(row) for row in user_rows} - {id(row) for row in chosen}
    encoded, dropped = _encoded(
        chosen,
        dict(zip(map(id, remembered), memory.rows, strict=False)) if memory else {},
        {id(row) for row in remembered},
        tokens.Tokenizer(folder),
        config,
    )

    safe = inputs["safe"] / "adapter" if "safe" in inputs else None
    base = model.load(folder, config["dtype"], device)
    if safe is not None and config["adapter"] == "stack":
        model.fold(base, safe)
        safe = None
    sharded = engine.shards_the_model(execution["engine"], execution["zero"], world_size)
    hidden_states = model.HiddenStates(model.with_adapter(base, config["lora"], seed, safe), fused=not sharded)
    head = losses.head_of(base, copy=sharded)
    num_drawn = method.draw_size(training.batch_size)
    drawn = sorted(memory.rows if memory else [], key=lambda row: -len(row.ids))[:num_drawn]
    drawn *= math.ceil(method.draws)  # each draw is added to the user rows of a forward
    free = fit.free_memory(device, world_size, execution["num_trials_at_once"])
    fitted = fit.choose(base.config, config["lora"], encoded, drawn, execution, free, head.weight_VD.element_size())
    if fitted.checkpointing:
        fit.checkpoint_layers(hidden_states)
    elif device == "cpu" and world_size == 1 and not sharded:
        # Not on a GPU, where a graph holds the whole forward. Not with several ranks, which would split the groups.
        num_taken = len(encoded) * training.epochs
        num_steps = math.ceil(num_taken / training.batch_size)
        used = below.Used(encoded, num_taken), below.Used(memory.rows if memory else [], num_steps * len(drawn))
        weights = (str(folder), config["dtype"], str(inputs.get("safe")) if config["adapter"] == "stack" else None)
        hidden_states.below = below.of(hidden_states, config["lora"].get("last_layers"), weights, used)
    run = Run(
        hidden_states=hidden_states,
        head=head,
        engine=engine.make(
            execution["engine"],
            hidden_states,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            world_size=world_size,
            zero=execution["zero"],
            graphs=device != "cpu" and fitted.leaves_room(free),
        ),
        config=training,
        seed=seed,
        rows=encoded,
        memory_rows=memory,
        memory_batch_size=num_drawn,
        inputs=dict(inputs),
        rank=rank,
        world_size=world_size,
        micro_batch_size=fitted.micro_batch_size,
        device=device,
        is_fresh=safe is None,
    )
    filtered = [row for row in user_rows if id(row) in left_out]
    return Made(method, run, user_rows, len(remembered), filtered, dropped, fitted)


def train_rows(
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
    scratch: Path,
    execution: Mapping[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    report: Callable[[int, int, dict[str, float]], bool | None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Load, encode and train on one rank. Rank 0 writes `scratch/result`.

    `scratch/result` holds adapter/, curves.jsonl, result.json and, if memory allows, probe.json. It exists only when it is
    complete. With more than one rank, or for DeepSpeed, a process group must exist.

    If memory runs out, half the micro-batch size is noted in `scratch` (and `auto` checkpointing turned on). A single rank
    then goes on from the last checkpoint. With several ranks the error is raised, and all ranks must be started again.

    Raises:
        PrerequisiteError: a single rank is out of memory with one row a forward, and nothing can be reduced further.
        RuntimeError: the same on one of several ranks.
    """
    import time

    started = time.monotonic()
    from safecl.training import fit, loop

    execution = {**execution, **fit.noted(scratch, execution, world_size, device)}
    made = make_run(config, inputs, execution, rank, world_size, device)
    run = made.run
    ready = time.monotonic()
    try:
        outcome = loop.train(made.method, run, scratch, report, execution["checkpoint_every_s"], after_step)
    except fit.OUT_OF_MEMORY as error:
        size = run.micro_batch_size
        last = made.fitted.checkpointing or execution["gradient_checkpointing"] == "off"
        if size == 1 and last:
            text = "out of memory with one row a forward: lower max_tokens or use a device with more memory"
            if execution["gradient_checkpointing"] == "off":
                text += ", or set execution.gradient_checkpointing: auto"
            # With several ranks it is not a PrerequisiteError: the other ranks wait for this one, and all must end.
            raise (PrerequisiteError(text) if world_size == 1 else RuntimeError(text)) from error
        smaller = fit.halved(scratch, size)
        print(f"out of memory with {size} rows a forward: going on from the last checkpoint with {smaller}", flush=True)
        if report is not None and rank == 0:
            report(run.step, run.num_steps, {"halved": float(smaller)})
        if world_size > 1:
            raise  # the other ranks wait for this one: all ranks start again and read the noted micro-batch size
    else:
        _finish(config, inputs, scratch, execution, made, outcome, rank, ready - started)
        return
    # Outside the handler, because the traceback would keep the model's memory alive.
    del made, run
    fit.release(device)
    train_rows(
        config, inputs, scratch, execution, rank=rank, world_size=world_size, device=device, report=report,
        after_step=after_step,
    )  # fmt: skip


def _finish(
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
    scratch: Path,
    execution: Mapping[str, Any],
    made: Made,
    outcome: Outcome,
    rank: int,
    setup_s: float,
) -> None:
    """Write `scratch/result` on rank 0."""
    import resource

    from safecl.training import engine, model, weights

    run = made.run
    final = run.values()
    if rank != 0:
        return
    facts: dict[str, Json] = {
        "engine": "torch" if isinstance(run.engine, engine.TorchEngine) else "deepspeed",
        "micro_batch_size": run.micro_batch_size,
        "gradient_checkpointing": made.fitted.checkpointing,
        "rows": len(run.rows),
        "poison_rows": _num_harmful(made.user_rows, run.rows),
        "memory_rows": made.num_memory,
        "cut_prompts": sum(row.num_cut > 0 for row in run.rows),
        "harmful_token_share": _harmful_share(made.user_rows, run.rows),
        "filtered": len(made.filtered),
        "filtered_poison": sum(row.harmful for row in made.filtered),
        "dropped": len(made.dropped),
        "dropped_why": dict(sorted(Counter(made.dropped.values()).items())),
        "steps": outcome.steps,
        "final_loss": outcome.final_loss,
        "response_tokens": outcome.response_tokens,
        "tokens": outcome.tokens,
        "tokens_per_s": outcome.tokens_per_s,
        "setup_s": setup_s,
        "train_s": outcome.seconds,
        "norm_start": outcome.norm_start,
        "norm_end": outcome.norm_end,
        "norm_lost": outcome.decayed * outcome.norm_start,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    temporary = scratch / "result.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_adapter(run.model, temporary / "adapter", final)
    if "safe" in inputs and config["adapter"] == "stack":
        safe = inputs["safe"] / "adapter"
        fresh = weights.load(temporary / "adapter")
        both = (
            (name, weights.combine([(delta, 1.0), (fresh[name], 1.0)])) for name, delta in weights.load(safe).items()
        )
        weights.save(both, temporary, safe, config["dtype"])
    if not engine.shards_the_model(execution["engine"], execution["zero"], run.world_size):
        continues = "safe" in inputs and config["adapter"] == "continue"
        costs, probe = merge_gap(run, Path(inputs["model"]), temporary / "adapter", continues)
        facts |= costs
        if probe:
            (temporary / "probe.json").write_text(json.dumps(probe))
    shutil.copy(scratch / "curves.jsonl", temporary / "curves.jsonl")
    (temporary / "result.json").write_text(json.dumps(facts))
    shutil.rmtree(scratch / "result", ignore_errors=True)
    os.rename(temporary, scratch / "result")


def merge_gap(run: Run, model: Path, adapter: Path, continues: bool) -> tuple[dict[str, Json], list[Json]]:
    """Measure how much rounding changes the model when the adapter is merged into the base for serving.

    Returns (facts, probe). Facts, in nats per response token of the first GAP_ROWS rows: `kl_merged` = KL(trained || merged),
    and for comparison `kl_moved` = KL(trained || start of training). If `kl_merged` is a hundredth of `kl_moved` or more,
    serve in float32. The probe holds the first PROBE_TOKENS tokens of these rows with the trained model's log-probabilities
    in nats, as {"ids", "logprobs"} for each row.

    Everything is computed in float32. In bfloat16 the rounding of activations (KL of 1e-3 on SmolLM2, merged or not) hides
    that of the weights (4e-5). The model is left in float32 and merged, so call this last. Both results are empty if memory
    is too short.
    """
    import psutil
    import torch
    from safetensors.torch import load_file

    from safecl.serving import swap
    from safecl.training import batches, losses, tokens
    from safecl.training.model import factors, load_factors

    on_gpu = run.device != "cpu"
    free = torch.cuda.mem_get_info(run.device)[0] if on_gpu else psutil.virtual_memory().available
    if free < 2 * sum(4 * p.numel() for p in run.model.parameters()):
        return {}, []
    rows = run.rows[:GAP_ROWS]
    batch = batches.collate(rows, range(len(rows)), [0] * len(rows), 1, rows[0], run.device)
    mask_P, _ = losses.targets(batch.labels_P)
    base = run.model.get_base_model()
    if base.dtype != torch.float32:
        run.hidden_states.below = None  # its stored states were computed in a lower precision
    base = base.float()
    head = losses.head_of(base)
    trained = {name: p.detach().clone() for name, p in factors(run.model).items()}
    run.hidden_states.eval()

    def log_probabilities(states_PD: torch.Tensor | None = None) -> torch.Tensor:
        states_PD = run.hidden_states(batch) if states_PD is None else states_PD
        return head.logits(states_PD[mask_P]).log_softmax(-1)

    def divergence(other_NV: torch.Tensor) -> float:
        return float((tuned_NV.exp() * (tuned_NV - other_NV)).sum(-1).mean())

    with torch.no_grad():
        states_PD = run.hidden_states(batch)
        tuned_NV = log_probabilities(states_PD)
        probe: list[Json] = []
        left = PROBE_TOKENS
        for row, states_TD in zip(rows, states_PD.split(batch.lengths), strict=True):
            ids = row.ids[:left]
            if len(ids) < 2:
                break
            following_N = torch.tensor(ids[1:], device=run.device)
            logprobs = losses.log_probabilities(states_TD[: len(ids) - 1], head, following_N)
            probe.append({"ids": list(ids), "logprobs": logprobs.tolist()})
            left -= len(ids)
        zero = {name: torch.zeros_like(p) for name, p in trained.items()}
        safe = load_file(str(run.inputs["safe"] / "adapter" / "adapter_model.safetensors")) if continues else zero
        load_factors(run.model, safe)
        moved = divergence(log_probabilities())
        load_factors(run.model, zero)
        changed = swap.changes(adapter)
        for name, tensor in swap.merged(tokens.base_folder(model), adapter):
            if name in changed:
                base.get_submodule(name.removesuffix(".weight")).base_layer.weight.copy_(tensor)
        return {"kl_merged": divergence(log_probabilities()), "kl_moved": moved}, probe
