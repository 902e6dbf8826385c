"""Memory: rows, and optionally theta_safe's hidden states on them, made once before any fine-tuning.

    in    model (HF folder), rows, and safe (finetune: adapter/) if states are asked for. Without `safe`, `model` is theta_safe
    out   rows.jsonl, memory.safetensors: ids_N, num_tokens_R, num_prompt_R; states-*.safetensors: one tensor a row

States are the last hidden states (after the final norm) at the positions that `positions` names (training/losses.py). They
have the model's own dtype, so nothing is lost if the model computes in it. They are written row by row and read when they
are needed: the states of 10,000 rows of 400 tokens at width 4096 are 33 GB (bfloat16). `num_rows` decides between two uses:

    a number    Safety memory: that many refusals (rows whose request is harmful), the first of a seeded permutation. So a
                smaller memory is a prefix of a larger one. With `mix: stratified` it holds rows of every kind (harmful and
                benign requests of each source), and every prefix holds them in the proportions of the safety rows.
    null        A teacher's answers: every row, in order (LwF's targets on the user rows).

Config: `num_rows`, `positions` (`response`, `last`, `all`; null: no states, and no model is loaded), `seed`, `template`,
`bos`, `dtype`, `max_tokens`, `adapter`, and `mix` only if it is not `refusals`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from safecl import labels
from safecl.base import ConfigError, Json
from safecl.stages import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from safecl.estimate import Estimator
    from safecl.sizes import Length
    from safecl.store import Context, Stage
    from safecl.training.tokens import Encoded

VERSION = "4"
FORWARD_TOKENS = 2048  # most tokens of rows that share a forward pass


class Memory(Kind):
    runs = "trainer"
    unit = "rows"
    fixed_s = 3.0

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        config: Any = stage.config
        if config["positions"] is None:
            return 0.0
        rows = of.length(stage.inputs["rows"])
        row = min(rows.prompt + rows.answer, config["max_tokens"])
        return of.passes(stage, (config["num_rows"] or rows.rows) * row, backward=0.0)

    @staticmethod
    def states_gib(stage: Stage, of: Estimator) -> float:
        config: Any = stage.config
        if config["positions"] is None:
            return 0.0
        rows = of.length(stage.inputs["rows"])
        of_row = {"last": 1.0, "response": rows.answer, "all": rows.prompt + rows.answer}
        num: float = (config["num_rows"] or rows.rows) * min(of_row[config["positions"]], config["max_tokens"])
        return num * of.size_of(stage).width * (4 if config["dtype"] == "float32" else 2) / 2**30

    @staticmethod
    def length(stage: Stage, of: Estimator) -> Length:
        config: Any = stage.config
        rows = of.length(stage.inputs["rows"])
        return rows._replace(rows=config["num_rows"] or rows.rows)

    @staticmethod
    def label(stage: Stage, models: Mapping[str, str]) -> str:
        rows, num = stage.inputs["rows"], stage.config["num_rows"]
        what = "teacher states" if num is None else f"memory of {num} rows"
        return f"{what}, {labels.task(rows)}seed {stage.config['seed']}"


def run(context: Context) -> dict[str, Json]:
    """Write the memory. Returns counts: rows, harmful rows, rows left out, cut prompts, and states with their size (MiB)."""
    device = "cuda" if context.execution.use_gpu else "cpu"
    return remember(dict(context.stage.config), context.inputs, context.out, device, context.report)


def remember(
    config: dict[str, Any], inputs: Mapping[str, Path], out: Path, device: str = "cpu", report: Any = None
) -> dict[str, Json]:
    """Write the memory of `inputs["rows"]` into `out`.

    Raises:
        ConfigError: there are fewer usable rows of the mix than `num_rows`.
        PrerequisiteError: the model's logits are not its output layer applied to the last hidden state.
    """
    import torch
    from safetensors.torch import save_file

    from safecl.training import batches, tokens

    num_rows = config["num_rows"]
    stratified = config.get("mix") == "stratified"
    rows = [row for row in batches.read_rows(inputs["rows"]) if row.harmful or stratified or num_rows is None]
    folder = tokens.base_folder(inputs["model"])
    encoded, dropped = tokens.encode(
        rows, tokens.Tokenizer(folder), config["template"], config["bos"], config["max_tokens"]
    )
    if num_rows is not None:
        if len(encoded) < num_rows:
            raise ConfigError(
                f"memory of {num_rows} rows: the safety rows hold {len(encoded)} usable {'rows' if stratified else 'refusals'}"
                f" ({len(dropped)} of {len(rows)} left out); lower memory_size or give more safety rows"
            )
        order = batches.permutation(batches.stream(config["seed"], "memory.pick"), len(encoded))
        if stratified:
            harmful = {row.id: row.harmful for row in rows}
            kinds = [(item.row_id.split("/")[0], harmful[item.row_id]) for item in encoded]
            order = in_proportion(order, kinds)
        encoded = [encoded[i] for i in order[:num_rows]]
    tensors = {
        "ids_N": torch.tensor([i for row in encoded for i in row.ids], dtype=torch.int32),
        "num_tokens_R": torch.tensor([len(row.ids) for row in encoded], dtype=torch.int32),
        "num_prompt_R": torch.tensor([row.num_prompt for row in encoded], dtype=torch.int32),
    }
    num_cut = sum(row.num_cut > 0 for row in encoded)
    facts: dict[str, Json] = {"rows": len(encoded), "dropped": len(dropped), "cut_prompts": num_cut}
    if config["positions"] is not None:
        facts |= _write_states(config, folder, inputs.get("safe"), encoded, out, device, report)
    save_file(tensors, str(out / "memory.safetensors"))
    by_id = {row.id: row for row in rows}
    facts["harmful"] = sum(by_id[row.row_id].harmful for row in encoded)
    batches.write_rows([by_id[row.row_id] for row in encoded], out)
    return facts


def in_proportion(order: Sequence[int], kinds: Sequence[tuple[str, bool]]) -> list[int]:
    """Reorder `order` so that in every prefix each kind is within one row of its share. The order within a kind is kept."""
    totals, seen = Counter(kinds), Counter[tuple[str, bool]]()
    places: dict[int, tuple[float, tuple[str, bool]]] = {}
    for i in order:
        places[i] = ((seen[kinds[i]] + 0.5) / totals[kinds[i]], kinds[i])
        seen[kinds[i]] += 1
    return sorted(order, key=places.__getitem__)


def _write_states(
    config: Mapping[str, Any],
    folder: Path,
    safe_folder: Path | None,
    rows: Sequence[Encoded],
    out: Path,
    device: str,
    report: Callable[[int, int, dict[str, float]], None] | None,
) -> dict[str, Json]:
    """Write theta_safe's hidden states of each row at the chosen positions to `states-*.safetensors`, shard by shard."""
    import torch

    from safecl.training import batches, losses, model
    from safecl.training.shards import Shards

    if device == "cpu":
        torch.set_num_threads(1)
    base = model.load(folder, config["dtype"], device)
    safe = model.theta_safe(base, safe_folder and safe_folder / "adapter", config["adapter"])
    head = losses.head_of(base)
    states, num_states = Shards(out, "states"), 0
    for start, end in _groups(rows):
        batch = batches.collate(rows[start:end], range(start, end), [0] * (end - start), 1, rows[0], device)
        with torch.no_grad():
            # Check on one row alone. In bfloat16 another batch shape changes logits by more than the check allows.
            if start == 0:
                one = batches.collate(rows[:1], [0], [0], 1, rows[0], device)
                mask_P, _ = losses.targets(one.labels_P)
                logits_PV = safe.peft_model(input_ids=one.ids_P[None]).logits[0]
                losses.check_head(head, safe(one)[mask_P], logits_PV[mask_P])
            hidden_PD = safe(batch)
        chosen = torch.split(losses.positions(batch, config["positions"]), batch.lengths)
        for row, hidden_TD, mask_T in zip(batch.indices, torch.split(hidden_PD, batch.lengths), chosen, strict=True):
            states.add(str(row), hidden_TD[mask_T].cpu())
            num_states += int(mask_T.sum())
        if report is not None:
            report(end, len(rows), {})
    states.close()
    return {"states": num_states, "hidden": int(head.weight_VD.shape[1]), "mib": states.num_bytes / 2**20}


def _groups(rows: Sequence[Encoded]) -> Iterator[tuple[int, int]]:
    """(start, end) of neighbouring rows that share a forward pass: at most FORWARD_TOKENS tokens together, or one row."""
    start, num_tokens = 0, 0
    for i, row in enumerate(rows):
        if i > start and num_tokens + len(row.ids) > FORWARD_TOKENS:
            yield start, i
            start, num_tokens = i, 0
        num_tokens += len(row.ids)
    if rows:
        yield start, len(rows)
