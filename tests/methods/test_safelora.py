from __future__ import annotations

import pytest
import torch

from safecl.methods.safelora import Safelora
from safecl.training.weights import LoRA


def _low(seed: int, scale: float = 0.5, rank: int = 3) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    return LoRA(torch.randn(rank, 7, generator=generator), torch.randn(9, rank, generator=generator), scale)


def _dense(safe: LoRA, tuned: LoRA, exact: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
    """U, C U and their cosine, with matrices written out."""
    v, u = safe.delta().double(), tuned.delta().double() - safe.delta().double()
    c = v @ torch.linalg.pinv(v, rtol=1e-5) if exact else v @ v.T / v.norm()
    return u, c @ u, float((u * (c @ u)).sum() / (u.norm() * (c @ u).norm()))


SAFE = {"a": _low(0), "b": _low(1), "c": _low(2)}
# Stacked: the tuned delta is theta_safe's plus a fresh one. Continued: theta_safe's own factors moved.
STACKED = {
    name: LoRA(torch.cat([s.down_RI, t.down_RI]), torch.cat([0.5 * s.up_OR, t.up_OR], 1), 1.0)
    for name, s, t in ((n, SAFE[n], _low(i + 10, 0.3)) for i, n in enumerate(SAFE))
}
CONTINUED = {
    name: LoRA(s.down_RI + 0.1 * _low(i + 20).down_RI, s.up_OR + 0.3 * _low(i + 20).up_OR, s.scale)
    for i, (name, s) in enumerate(SAFE.items())
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tuned", [STACKED, CONTINUED], ids=["stack", "continue"])
def test_the_factored_projection_is_the_dense_one(exact: bool, tuned: dict[str, LoRA]) -> None:
    projector = "exact" if exact else "frobenius"
    for threshold in (-1.0, 1.0):  # none is projected, all are
        log: dict[str, object] = {}
        method = Safelora(Safelora.Config(threshold=threshold, projector=projector))
        found = dict(method.finalize(SAFE, tuned, log))
        cosines = []
        for name, safe in SAFE.items():
            u, cu, cosine = _dense(safe, tuned[name], exact)
            cosines.append(cosine)
            expected = safe.delta().double() + (u if threshold < 0 else cu)
            assert torch.allclose(found[name].delta().double(), expected, atol=1e-5), (name, threshold)
        assert log["projected"] == (0 if threshold < 0 else 3)
        assert log["cosines"] == pytest.approx(sorted(cosines), abs=2e-5)


def test_the_threshold_and_the_number_choose_the_least_aligned_modules() -> None:
    cosines = {name: _dense(SAFE[name], STACKED[name], False)[2] for name in SAFE}
    least, middle, most = sorted(cosines, key=lambda name: cosines[name])

    def projected(**config: object) -> set[str]:
        found = dict(Safelora(Safelora.Config(**config)).finalize(SAFE, STACKED, {}))
        same = {n for n in SAFE if torch.allclose(found[n].delta(), STACKED[n].delta(), atol=1e-5)}
        return set(SAFE) - same

    assert projected(threshold=(cosines[least] + cosines[middle]) / 2) == {least}
    assert projected(mode="number", num_modules=2) == {least, middle}
    assert projected(mode="number", num_modules=0) == set()
    assert most not in projected(mode="number", num_modules=2)


def test_a_tie_projects_no_more_than_the_number_and_a_zero_alignment_is_left_alone() -> None:
    twins = {"a": SAFE["a"], "b": SAFE["a"]}
    log: dict[str, object] = {}
    method = Safelora(Safelora.Config(mode="number", num_modules=1))
    dict(method.finalize(twins, {"a": STACKED["a"], "b": STACKED["a"]}, log))
    assert log["projected"] == 1
    nothing = {"a": LoRA(SAFE["a"].down_RI, torch.zeros(9, 3), 0.5)}
    found = dict(Safelora(Safelora.Config(threshold=1.0)).finalize(nothing, {"a": STACKED["a"]}, {}))
    assert torch.allclose(found["a"].delta(), STACKED["a"].delta(), atol=1e-5)
