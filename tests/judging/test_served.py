"""A judge on a real engine of our own: boots, judges, is served over HTTP, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from safecl.judges import Verdict
from safecl.judges.harmbench import Harmbench
from safecl.judges.llamaguard import Llamaguard
from safecl.judging.http import asker
from safecl.judging.served import OwnEngine, execution
from tests.judging.test_http import pair, post, serving


@pytest.mark.slow
def test_an_engine_of_our_own_judges_pairs_and_serves_http(tiny_model: Path, tmp_path: Path) -> None:
    import ray

    verdicts: dict[str, Verdict] = {}
    with OwnEngine(str(tiny_model), None, execution(tmp_path / "root", False, 2048), print) as engine:
        engine.ask(Llamaguard(), {str(n): (f"q{n}", f"a{n}") for n in range(3)}, verdicts.__setitem__)
        assert list(verdicts) == ["0", "1", "2"]
        assert [v.label for v in verdicts.values()] == [None] * 3, "a random model gives no verdict"
        with serving(asker(Llamaguard(), engine)) as url:
            status, said, _ = post(url, b'{"prompt": "q1", "response": "a1"}')
            assert status == 200 and said["raw"] == verdicts["1"].raw != ""
            status, said, _ = post(url, pair("x" * 4000))
            assert status == 400 and "max_model_len" in said["error"]
        engine.ask(Harmbench(), {"0": ("q", "a")}, verdicts.__setitem__)
        assert verdicts["0"].label is None
    assert not ray.is_initialized()
