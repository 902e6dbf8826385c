"""Memory: safety rows with theta_safe's hidden states, made once before any fine-tuning.

    in    model (HF folder), safe (finetune: adapter/), rows (the safety rows)
    out   rows.jsonl, memory.safetensors: ids_N, num_tokens_R, num_prompt_R, states_ND

`states_ND` holds the last hidden state (after the final norm) at every position that predicts a response token, in the
model's own dtype (nothing is lost where the model computes in it). Only refusals are kept: rows whose request is
harmful. The rows are the first of a seeded permutation, so a smaller memory is a prefix of a larger one.

Config: `num_rows`, `seed`, `lora`, `template`, `bos`, `dtype`, `max_tokens`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safecl.base import ConfigError, Json

if TYPE_CHECKING:
    from pathlib import Path

    from safecl.store import Context

VERSION = "1"


def run(context: Context) -> dict[str, Json]:
    """Rows are forwarded one at a time: padding would move the states by the model's rounding."""
    device = "cuda" if context.execution.use_gpu else "cpu"
    return remember(dict(context.stage.config), context.inputs, context.out, device, context.report)


def remember(
    config: dict[str, Any], inputs: dict[str, Path], out: Path, device: str = "cpu", report: Any = None
) -> dict[str, Json]:
    """Write the memory of `inputs["safe"]` into `out`."""
    import torch
    from safetensors.torch import save_file

    from safecl.training import batches, losses, model, tokens

    if device == "cpu":
        torch.set_num_threads(1)
    folder = tokens.base_folder(inputs["model"])
    rows = [row for row in batches.read_rows(inputs["rows"]) if row.harmful]
    encoded, dropped = tokens.encode(
        rows, tokens.Tokenizer(folder), config["template"], config["bos"], config["max_tokens"]
    )
    num_rows = config["num_rows"]
    if len(encoded) < num_rows:
        raise ConfigError(
            f"memory of {num_rows} rows: the safety rows hold {len(encoded)} usable refusals ({len(dropped)} of "
            f"{len(rows)} left out); lower memory_size or give more safety rows"
        )
    chosen = batches.permutation(batches.stream(config["seed"], "memory.pick"), len(encoded))[:num_rows]
    picked = [encoded[i] for i in chosen]

    base = model.load(folder, config["dtype"], device)
    peft_model = model.with_continued(base, inputs["safe"] / "adapter").eval()
    hidden_states = model.HiddenStates(peft_model).eval()
    head = losses.head_of(base)
    states: list[torch.Tensor] = []
    with torch.no_grad():
        for done, row in enumerate(picked):
            batch = batches.collate([row], [0], [0], row.num_targets, row, device)
            hidden_BTD = hidden_states(batch.ids_BT, batch.attention_BT, batch.positions_BT)
            mask_BT, _ = losses.targets(batch.labels_BT)
            if done == 0:
                logits_BTV = peft_model(input_ids=batch.ids_BT, position_ids=batch.positions_BT).logits
                losses.check_head(head, hidden_BTD[mask_BT], logits_BTV[mask_BT])
            states.append(hidden_BTD[mask_BT].cpu())
            if report is not None and (done % 10 == 9 or done == len(picked) - 1):
                report(done + 1, len(picked), {})
    states_ND = torch.cat(states).contiguous()
    save_file(
        {
            "ids_N": torch.tensor([i for row in picked for i in row.ids], dtype=torch.int32),
            "num_tokens_R": torch.tensor([len(row.ids) for row in picked], dtype=torch.int32),
            "num_prompt_R": torch.tensor([row.num_prompt for row in picked], dtype=torch.int32),
            "states_ND": states_ND,
        },
        str(out / "memory.safetensors"),
    )
    by_id = {row.id: row for row in rows}
    batches.write_rows([by_id[row.row_id] for row in picked], out)
    return {
        "rows": len(picked),
        "dropped": len(dropped),
        "response_tokens": len(states_ND),
        "hidden": int(states_ND.shape[1]),
        "mib": states_ND.numel() * states_ND.element_size() / 2**20,
    }
