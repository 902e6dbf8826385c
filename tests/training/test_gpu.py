"""On a GPU the training code computes what it computes on a CPU. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safecl.training import batches, model
from safecl.training.model import HiddenStates
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
        flash, _ = attention.rows_attention(torch.nn.Module(), *states, None, sliding_window=window, cu_seq_lens_q=ends)
        wide = [part.float() for part in states]
        exact, _ = attention.rows_attention(torch.nn.Module(), *wide, None, sliding_window=window, cu_seq_lens_q=ends)
        assert (flash.float() - exact).norm() < 1e-2 * exact.norm()


def test_a_model_lies_on_the_device(tiny_model: Path) -> None:
    assert model.load(tiny_model, "bfloat16", "cuda").device.type == "cuda"
