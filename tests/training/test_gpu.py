"""On a GPU the training code computes what it computes on a CPU. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.training import batches, fit, model
from safecl.training.engine import TorchEngine
from safecl.training.model import HiddenStates
from safecl.training.tokens import Encoded
from tests.training import test_fast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def _error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    apart = sum(float((found[name].cpu() - value).square().sum()) for name, value in exact.items())
    return float(apart / sum(float(value.square().sum()) for value in exact.values())) ** 0.5


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_and_gradients_are_the_cpus(
    kind: str, dtype: str, tiny_models: dict[str, Path], monkeypatch: Any
) -> None:
    """With dropout off, rows longer than the window, and caps reached; bfloat16 is as far off as on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = test_fast._rows()
    exact = test_fast._gradients(HiddenStates(test_fast._adapted(tiny_models[kind])), test_fast._batch(rows))[1]
    own = HiddenStates(test_fast._adapted(tiny_models[kind], dtype=dtype).to("cuda"))
    found = test_fast._gradients(own, batches.collate(rows, range(3), [11, 12, 13], 1, rows[0], "cuda"))[1]
    bound = 1e-3
    if dtype == "bfloat16":
        plain = HiddenStates(test_fast._adapted(tiny_models[kind], dtype=dtype))
        bound = 2 * _error(test_fast._gradients(plain, test_fast._batch(rows))[1], exact)
    assert _error(found, exact) < bound


def test_rows_end_to_end_take_the_flash_kernel_where_there_is_one() -> None:
    from safecl.training import attention

    if attention._varlen_attn() is None:
        pytest.skip("this PyTorch has no varlen_attn with windows")
    generator = torch.Generator("cuda").manual_seed(0)
    states = [torch.randn(1, h, 70, 64, generator=generator, device="cuda").bfloat16() for h in (4, 2, 2)]
    ends = torch.tensor([0, 30, 37, 70], dtype=torch.int32)
    for window in (None, 8):
        flash, _ = attention.rows_attention(
            torch.nn.Module(), *states, None, sliding_window=window, cu_seq_lens_q=ends.cuda(), max_length_q=33
        )
        wide = [part.float().cpu() for part in states]
        exact, _ = attention.rows_attention(torch.nn.Module(), *wide, None, sliding_window=window, cu_seq_lens_q=ends)
        assert (flash.float().cpu() - exact).norm() < 1e-2 * exact.norm()


LENGTHS = ((30, 7, 41), (28, 9, 42), (30, 7, 41), (20, 20, 40))  # one shape of graph


def _steps(states: HiddenStates, graphs: bool, twice: bool = False) -> tuple[list[torch.Tensor], TorchEngine]:
    """The gradient of each batch in turn; with `twice`, while another forward waits for its backward."""
    engine = TorchEngine(states.train(), weight_decay=0.0, max_grad_norm=1.0, graphs=graphs)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step, lengths in enumerate(LENGTHS):
        rows = [Encoded(str(n), torch.randint(3, 300, (n,), generator=generator).tolist(), 1) for n in lengths]
        batch = batches.collate(rows, range(3), [step, 12, 13], 1, rows[0], "cuda")
        hidden = [engine.forward(batch) for _ in range(1 + twice)]
        for hidden_PD in hidden:
            weights = torch.linspace(-1, 1, hidden_PD.numel(), device="cuda").view_as(hidden_PD)
            engine.backward((hidden_PD.float() * weights).sum(), last=True)
        found.append(engine.flat_grad().clone() / (1 + twice))
        engine.clear_grads()
    return found, engine


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_graphs_give_the_gradients_of_forwards_without(
    kind: str, dtype: str, dropout: float, checkpointing: bool, tiny_models: dict[str, Path]
) -> None:
    """Of other rows than were captured."""
    torch.backends.cuda.matmul.allow_tf32 = False
    states = [HiddenStates(test_fast._adapted(tiny_models[kind], dropout, dtype).to("cuda")) for _ in range(2)]
    if checkpointing:
        fit.checkpoint_layers(states[1])
    expected, _ = _steps(states[0], graphs=False)
    found, engine = _steps(states[1], graphs=True)
    assert len(engine.graphs.captured) == 1 and engine.graphs.works
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() < (1e-4 if dtype == "float32" else 2e-2) * theirs.norm()
    engine.release()
    again, engine = _steps(states[1], graphs=True, twice=True)
    assert engine.graphs.captured
    for mine, theirs in zip(again, expected, strict=True):
        assert (mine - theirs).norm() < (1e-4 if dtype == "float32" else 2e-2) * theirs.norm()


def test_a_larger_shape_takes_the_place_of_smaller_ones(tiny_models: dict[str, Path]) -> None:
    """And they are captured again, into its memory."""
    states = [HiddenStates(test_fast._adapted(tiny_models["llama"]).to("cuda")).train() for _ in range(2)]
    engines = [
        TorchEngine(s, weight_decay=0.0, max_grad_norm=1.0, graphs=g)
        for s, g in zip(states, (True, False), strict=True)
    ]
    captured = []
    for length in (300, 300, 400, 400, 300, 300, 30, 30):
        row = Encoded("", [3 + i % 290 for i in range(length)], 1)
        batch = batches.collate([row], [0], [0], 1, row, "cuda")
        for engine in engines:
            engine.backward(engine.forward(batch).square().sum(), last=True)
        mine, theirs = (engine.flat_grad() for engine in engines)
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()
        captured.append(sorted(shape[0] for shape in engines[0].graphs.captured))
        for engine in engines:
            engine.clear_grads()
    assert captured == [[], [320], [320], [416], [320, 416], [320, 416], [320, 416], [64, 320, 416]]


def test_a_model_that_asks_the_device_for_a_number_is_trained_without_graphs(tiny_models: dict[str, Path]) -> None:
    states = [HiddenStates(test_fast._adapted(tiny_models["llama"]).to("cuda")) for _ in range(2)]
    expected, _ = _steps(states[0], graphs=False)
    layer = states[1].inner.layers[0]
    layer.register_forward_pre_hook(lambda _, given: (given[0] * (1.0 if float(given[0].sum()) else 2.0),))
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        found, engine = _steps(states[1], graphs=True)
    assert torch.randn(2, device="cuda").isfinite().all()
    assert not engine.graphs.works and torch.cuda.current_stream() == torch.cuda.default_stream()
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()


def test_a_model_lies_on_the_device(tiny_model: Path) -> None:
    assert model.load(tiny_model, "bfloat16", "cuda").device.type == "cuda"
