"""A judge on an engine of our own: what is too long or interrupted, with scripted engines; and a real one, which boots,
judges, is served over HTTP, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import pytest

from safecl.judges import Verdict
from safecl.judges.harmbench import Harmbench
from safecl.judges.llamaguard import Llamaguard
from safecl.judging import score
from safecl.judging.http import asker
from safecl.judging.served import OwnEngine, execution
from safecl.serving.messages import Completion, Request, Sampling, WeightsRef
from safecl.stages.judge import Reach
from safecl.training.tokens import Tokenizer
from tests.judging.test_http import pair, post, serving


class Dying:
    """Engines that say "safe" to everything, and die after `lives` answers."""

    def __init__(self, lives: int = 10**6) -> None:
        self.asked: list[Request] = []
        self.lives = lives

    def generate(
        self,
        name: str,
        weights: WeightsRef,
        requests: Sequence[Request],
        sampling: Sampling,
        on_done: Callable[[Completion], None],
    ) -> None:
        for request in requests:
            if len(self.asked) == self.lives:
                raise RuntimeError("killed")
            self.asked.append(request)
            on_done(Completion(request.id, "safe", [], "stop", weights.key))


class Reached(OwnEngine):
    """An own engine without Ray."""

    def __init__(self, model: Path, max_tokens: int, engines: Dying) -> None:
        super().__init__(str(model), None, execution(model / "root", False, max_tokens), print)
        self.engines, self.entered, self.model = engines, 0, model

    def __enter__(self) -> Self:
        self.entered += 1
        weights = WeightsRef("k", "/nowhere")
        self._reach = Reach(self.engines, "judge", weights, self.limit or 0, Tokenizer(self.model))
        return self


def test_a_pair_too_long_is_unparsed_until_the_engine_takes_it(tiny_model: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    responses = ["short", "x" * 3000, "brief"]
    file.write_text("".join(json.dumps({"prompt": "q", "response": text}) + "\n" for text in responses))
    long = len(Tokenizer(tiny_model).ids([Llamaguard().prompt("q", responses[1])])[0]) + Llamaguard.max_tokens

    def judged(max_tokens: int) -> tuple[list[Verdict], Reached]:
        served = Reached(tiny_model, max_tokens, Dying())
        return score.judge_file(file, ["llamaguard"], served, out).verdicts["llamaguard"], served

    found, served = judged(long - 1)
    assert [v.label for v in found] == [False, None, False] and len(served.engines.asked) == 2
    assert found[1].raw == f"too long: {long} tokens with the judge's answer, at most {long - 1}"
    again, served = judged(long - 1)
    assert again == found and served.entered == 0, "nothing was left to ask: no engine is started"
    found, served = judged(long)
    assert [v.label for v in found] == [False] * 3 and len(served.engines.asked) == 1
    assert len(out.read_text().splitlines()) == 3


def test_what_is_answered_before_an_engine_dies_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"prompt": "q", "response": str(n)}) + "\n" for n in range(5)))
    with pytest.raises(RuntimeError, match="killed"):
        score.judge_file(file, ["llamaguard"], Reached(tiny_model, 4096, Dying(lives=3)), out)
    last = Reached(tiny_model, 4096, Dying())
    found = score.judge_file(file, ["llamaguard"], last, out).verdicts["llamaguard"]
    assert [v.label for v in found] == [False] * 5 and len(last.engines.asked) == 2


def test_a_server_reads_its_tokenizer_once_and_refuses_what_is_too_long(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Reached(tiny_model, 4096, Dying()) as engine:
        monkeypatch.setattr(Tokenizer, "__init__", lambda *_: pytest.fail("read again"))
        judge = asker(Llamaguard(), engine)
        assert [judge("q", "a").label, judge("q", "b").label] == [False, False]
        with pytest.raises(ValueError, match="too long"):
            judge("q", "x" * 5000)


@pytest.mark.slow
def test_an_engine_of_our_own_judges_pairs_and_serves_http(tiny_model: Path, tmp_path: Path) -> None:
    import ray

    verdicts: dict[str, Verdict] = {}
    with OwnEngine(str(tiny_model), None, execution(tmp_path / "root", False, 2048), print) as engine:
        engine.ask(Llamaguard(), {str(n): (f"q{n}", f"a{n}") for n in range(3)}, verdicts.__setitem__)
        assert sorted(verdicts) == ["0", "1", "2"]
        assert [v.label for v in verdicts.values()] == [None] * 3, "a random model gives no verdict"
        with serving(asker(Llamaguard(), engine)) as url:
            status, said, _ = post(url, b'{"prompt": "q1", "response": "a1"}')
            assert status == 200 and said["raw"] == verdicts["1"].raw != ""
            status, said, _ = post(url, pair("x" * 4000))
            assert status == 400 and "too long" in said["error"]
        engine.ask(Harmbench(), {"0": ("q", "a")}, verdicts.__setitem__)
        assert verdicts["0"].label is None
    assert not ray.is_initialized()
