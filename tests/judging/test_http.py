"""A judge behind a real HTTP server on loopback: verdicts, bad requests, and being told to come again."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from safecl.base import ConfigError, PrerequisiteError
from safecl.judges import Verdict
from safecl.judges.keywords import Keywords
from safecl.judging.http import LONGEST_BODY, app, asker, serve


@contextmanager
def serving(ask: Callable[[str, str], Verdict], max_waiting: int = 4) -> Iterator[str]:
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app(ask, max_waiting), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=30)


def post(url: str, body: bytes) -> tuple[int, Any, str | None]:
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/judge", body), timeout=60) as response:
            return response.status, json.load(response), None
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers.get("Retry-After")


def pair(response: str) -> bytes:
    return json.dumps({"prompt": "q", "response": response}).encode()


def test_a_posted_pair_comes_back_with_its_verdict() -> None:
    with serving(asker(Keywords(), None)) as url:
        assert post(url, pair("Sorry"))[:2] == (
            200,
            {"label": False, "raw": "Sorry", "detail": {"keywords": ["Sorry"]}, "score": None},
        )
        for body in (b"{", b"[]", b'{"prompt": "q"}', b'{"prompt": "q", "response": 1}', pair("x" * LONGEST_BODY)):
            status, said, _ = post(url, body)
            assert status == 400 and "expected" in said["error"]
        assert post(url, pair("Yes"))[1]["label"] is True


def test_more_than_can_wait_are_told_to_come_again_and_nobody_else_is_harmed() -> None:
    gate, inside = threading.Event(), threading.Semaphore(0)

    def slow(request: str, response: str) -> Verdict:
        inside.release()
        assert gate.wait(60)
        return Verdict(True, response)

    with serving(slow, max_waiting=3) as url:
        got: list[tuple[int, Any, str | None]] = []
        threads = [threading.Thread(target=lambda n=n: got.append(post(url, pair(str(n))))) for n in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            assert inside.acquire(timeout=60)
        status, said, again = post(url, pair("late"))
        assert (status, again) == (429, "1") and "3 requests are waiting" in said["error"]
        with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
            assert json.load(response) == {"waiting": 3, "max_waiting": 3}
        gate.set()
        for thread in threads:
            thread.join()
        assert sorted((status, said["raw"]) for status, said, _ in got) == [(200, "0"), (200, "1"), (200, "2")]
        assert post(url, pair("late"))[0] == 200


def test_an_engine_that_is_gone_or_refuses_is_not_a_verdict() -> None:
    def fail(request: str, response: str) -> Verdict:
        raise PrerequisiteError("no engine") if response == "gone" else ValueError("too long")

    with serving(fail) as url:
        assert post(url, pair("gone")) == (503, {"error": "no engine"}, "1")
        assert post(url, pair("long"))[:2] == (400, {"error": "too long"})


def test_a_served_judge_needs_its_model() -> None:
    with pytest.raises(ConfigError, match="--model"):
        serve("llamaguard", None, "127.0.0.1", 0, 1, print)
