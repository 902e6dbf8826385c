"""A judge behind a real HTTP server on loopback: verdicts, bad requests, and being told to come again."""

from __future__ import annotations

import json
import socket
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
from safecl.judging.http import LONGEST_BODY, READ_TIMEOUT_S, app, asker, serve


@contextmanager
def serving(
    ask: Callable[[str, str], Verdict],
    max_waiting: int = 4,
    read_timeout_s: float = READ_TIMEOUT_S,
    token: str | None = None,
) -> Iterator[str]:
    import uvicorn

    served = app(ask, max_waiting, read_timeout_s, token)
    server = uvicorn.Server(uvicorn.Config(served, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=30)


CUT_EMOJI = rb'{"prompt": "q", "response": "cut \ud83d"}'


def post(url: str, body: bytes, **headers: str) -> tuple[int, Any, str | None]:
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/judge", body, headers), timeout=60) as response:
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
        for body in (
            b"{",
            b"[]",
            b'{"prompt": "q"}',
            b'{"prompt": "q", "response": 1}',
            CUT_EMOJI,
            pair("x" * LONGEST_BODY),
        ):
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


def half_sent(url: str) -> socket.socket:
    """A connection that has sent a request's headers and one byte of its body."""
    host, port = url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=60)
    client.sendall(b"POST /v1/judge HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    return client


def waiting(url: str) -> int:
    with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
        return int(json.load(response)["waiting"])


def test_half_sent_requests_take_no_ones_place() -> None:
    with serving(asker(Keywords(), None), max_waiting=1, read_timeout_s=60) as url:
        clients = [half_sent(url) for _ in range(3)]
        time.sleep(0.2)  # they are being read
        assert post(url, pair("Yes"))[0] == 200 and waiting(url) == 0
        for client in clients:
            client.close()


def test_a_request_that_does_not_end_is_told_so_and_cut_off() -> None:
    with serving(asker(Keywords(), None), read_timeout_s=0.5) as url:
        with half_sent(url) as client:
            client.settimeout(READ_TIMEOUT_S - 2)
            said = b""
            while part := client.recv(4096):  # until the server closes
                said += part
        assert said.startswith(b"HTTP/1.1 408") and b"within 0.5 s" in said
        assert post(url, pair("Yes"))[0] == 200


def test_a_client_that_leaves_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(asker(Keywords(), None), max_waiting=1) as url:
        half_sent(url).close()
        time.sleep(0.2)
        assert post(url, pair("Yes"))[0] == 200 and waiting(url) == 0
    assert capfd.readouterr().err == ""


def test_an_engine_that_is_gone_or_refuses_is_not_a_verdict() -> None:
    def fail(request: str, response: str) -> Verdict:
        raise PrerequisiteError("no engine") if response == "gone" else ValueError("too long")

    with serving(fail) as url:
        assert post(url, pair("gone")) == (503, {"error": "no engine"}, "1")
        assert post(url, pair("long"))[:2] == (400, {"error": "too long"})


def test_a_served_judge_needs_its_model() -> None:
    with pytest.raises(ConfigError, match="--model"):
        serve("llamaguard", None, "127.0.0.1", 0, 1, print)


def test_with_a_token_only_who_shows_it_is_answered() -> None:
    with serving(asker(Keywords(), None), token="secret") as url:
        assert [post(url, pair("Sorry"), **shown)[0] for shown in ({}, {"Authorization": "Bearer other"})] == [401, 401]
        assert post(url, pair("Sorry"), Authorization="Bearer secret")[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "judge.example"])
def test_without_a_token_no_other_machine_is_let_in(host: str) -> None:
    with pytest.raises(ConfigError, match="SAFECL_JUDGE_TOKEN"):
        serve("keywords", None, host, 0, 4, lambda text: None)
