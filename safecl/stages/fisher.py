"""Fisher: the diagonal Fisher information of theta_safe's LoRA factors on safety rows (float32, one value a parameter).

    F_i = 1/n sum over rows of (d log p(y | x) / d theta_i)^2 at theta_safe,    log p(y | x) summed over the response's tokens

    in    model (HF folder), safe (finetune: adapter/), rows (the safety rows)
    out   fisher.safetensors: float32, named and shaped like the adapter's factors

The gradient of one row for a linear layer is (output gradients)^T (inputs), summed over the row's tokens. So one backward
pass over a batch gives the gradients of all its rows. `labels: empirical` uses the answers of the data. `labels: true`
samples each token from the model.

Config: `num_rows` (at most), `labels`, `seed`, `template`, `bos`, `dtype`, `max_tokens`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safecl.base import Json
from safecl.stages import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from safecl.estimate import Estimator
    from safecl.store import Context, Stage
    from safecl.training.batches import Batch
    from safecl.training.losses import Head

VERSION = "3"


class Fisher(Kind):
    runs = "trainer"
    unit = "rows"
    fixed_s = 4.0

    @staticmethod
    def seconds(stage: Stage, of: Estimator) -> float:
        config: Any = stage.config
        rows = of.length(stage.inputs["rows"])
        num_rows = min(config["num_rows"] or rows.rows, rows.rows)
        return of.passes(stage, num_rows * min(rows.prompt + rows.answer, config["max_tokens"]), backward=1.0)


def run(context: Context) -> dict[str, Json]:
    """Write the Fisher information. Returns the number of rows, the mean of F, and the share of values of F that are 0."""
    device = "cuda" if context.execution.use_gpu else "cpu"
    batch_size = context.execution.micro_batch_size
    return estimate(dict(context.stage.config), context.inputs, context.out, batch_size, device, context.report)


def estimate(
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
    out: Path,
    batch_size: int,
    device: str = "cpu",
    report: Any = None,
) -> dict[str, Json]:
    """Write the Fisher information of `inputs["safe"]` into `out`. The batch size changes only rounding."""
    import torch
    from safetensors.torch import save_file

    from safecl.training import batches, losses, model, tokens

    if device == "cpu":
        torch.set_num_threads(1)
    folder = tokens.base_folder(inputs["model"])
    encoded, _ = tokens.encode(
        batches.read_rows(inputs["rows"]), tokens.Tokenizer(folder), config["template"], config["bos"],
        config["max_tokens"],
    )  # fmt: skip
    chosen = batches.permutation(batches.stream(config["seed"], "fisher.pick"), len(encoded))[: config["num_rows"]]
    order = sorted(chosen, key=lambda i: len(encoded[i].ids))
    base = model.load(folder, config["dtype"], device)
    safe = model.theta_safe(base, inputs["safe"] / "adapter", "continue", fused=False)
    head = losses.head_of(base)
    total = {name: torch.zeros_like(p) for name, p in model.factors(safe.peft_model).items()}
    squares = RowSquares(safe.peft_model, total)
    for start in range(0, len(order), batch_size):
        rows = [encoded[i] for i in order[start : start + batch_size]]
        batch = batches.collate(rows, order[start : start + batch_size], [0] * len(rows), 1, rows[0], device)
        mask_P, targets_N = losses.targets(batch.labels_P)
        hidden_PD = safe(batch)
        squares.lengths = [length for _, length in safe.rows]  # padded where the model needs it
        hidden_ND = hidden_PD[mask_P]
        if config["labels"] == "true":
            targets_N = sampled(hidden_ND.detach(), head, batch, config["seed"])
        losses.cross_entropy_sum(hidden_ND, head, targets_N).backward()  # type: ignore[no-untyped-call]
        if report is not None:
            report(start + len(rows), len(order), {})
    squares.close()
    fisher = {name: (value / len(order)).cpu() for name, value in total.items()}
    save_file(fisher, str(out / "fisher.safetensors"))
    num = sum(f.numel() for f in fisher.values())
    return {
        "rows": len(order),
        "mean": sum(float(f.double().sum()) for f in fisher.values()) / num,
        "zero_share": sum(int((f == 0).sum()) for f in fisher.values()) / num,
    }


class RowSquares:
    """Add each row's squared gradient of every LoRA factor to `total` during a backward pass.

    The loss must be a sum over rows. The batch holds the rows one after another; `lengths` are their numbers of tokens.
    """

    def __init__(self, peft_model: Any, total: Mapping[str, Tensor]) -> None:
        self.lengths: list[int] = []
        self.hooks: list[Any] = []
        for name, module in peft_model.named_modules():
            key = name.removesuffix(".default") + ".weight"
            if name.endswith(".default") and key in total:
                module.weight.requires_grad_(False)  # gradients are computed below, so autograd need not do it too
                self.hooks.append(module.register_forward_hook(self.watch(total[key])))

    def watch(self, sum_OI: Tensor) -> Any:
        import torch

        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            inputs_PI = inputs[0].detach().flatten(0, -2)
            if not output.requires_grad:  # in the first layers, because nothing before them is trained
                output.requires_grad_()

            def backward(grad: Tensor) -> None:
                whole = (grad.flatten(0, -2).float(), inputs_PI.float())
                for grad_TO, inputs_TI in zip(*(torch.split(each, self.lengths) for each in whole), strict=True):
                    sum_OI.add_((grad_TO.T @ inputs_TI).square())

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def sampled(hidden_ND: Tensor, head: Head, batch: Batch, seed: int) -> Tensor:
    """Draw a token id for each response position from the model. Each row has its own random stream."""
    import torch

    from safecl.training.batches import stream

    found = []
    sizes = [row.num_targets for row in batch.rows]
    for row, states_ND in zip(batch.indices, torch.split(hidden_ND, sizes), strict=True):
        generator = torch.Generator(device=hidden_ND.device).manual_seed(stream(seed, "fisher.labels", row))
        for part_ND in torch.split(states_ND, head.rows_at_once):
            chances_NV = torch.softmax(head.logits(part_ND).float(), 1)
            found.append(torch.multinomial(chances_NV, 1, generator=generator)[:, 0])
    return torch.cat(found)
