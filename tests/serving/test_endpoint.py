"""The endpoint client against a real HTTP server on loopback that fails in every way it can."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from safecl.base import PrerequisiteError
from safecl.judges.llamaguard import Llamaguard
from safecl.judging.score import judge_file
from safecl.judging.served import RemoteModel
from safecl.serving.endpoint import Endpoint
from safecl.serving.messages import Completion, Sampling
from safecl.training.tokens import Tokenizer

GREEDY = Sampling(max_tokens=4, logprobs=2)


class Server(ThreadingHTTPServer):
    """Answers "unsafe" where the prompt holds "do", after first failing as `troubles` says for that prompt."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.troubles: dict[str, list[str]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.now = self.most = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None: ...

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = str(body["prompt"])
        with server.lock:
            server.bodies.append({**body, "path": self.path})
            server.asked[prompt] += 1
            server.now += 1
            server.most = max(server.most, server.now)
            trouble = (server.troubles.get(prompt) or [""]).pop(0) if server.troubles.get(prompt) else ""
        try:
            self.answer(prompt, trouble)
        finally:
            with server.lock:
                server.now -= 1

    def answer(self, prompt: str, trouble: str) -> None:
        if trouble == "hang up":
            self.close_connection = True
            return
        if trouble == "slow":
            time.sleep(1.0)
        time.sleep(0.01)
        word = "unsafe" if "do" in prompt else "safe"
        choice = {
            "text": word,
            "finish_reason": "stop",
            "logprobs": {"tokens": [word], "token_logprobs": [-0.25], "top_logprobs": [{"no": -3.0, word: -0.25}]},
        }
        status, text = 200, json.dumps({"model": "m", "choices": [choice]})
        if trouble == "nonsense":
            text = "<html>"
        elif trouble.isdigit():
            status, text = int(trouble), "try later"
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(text)))
        with contextlib.suppress(ConnectionError):  # the client has given up
            self.end_headers()
            self.wfile.write(text.encode())


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def endpoint(server: Server, **settings: Any) -> Endpoint:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return Endpoint(url, "guard", **{"first_wait_s": 0.01, "timeout_s": 60.0, "max_in_flight": 4, **settings})


def test_every_prompt_is_answered_once_whatever_fails_in_between(server: Server) -> None:
    prompts = {f"id-{n}": f"{'do' if n % 3 == 0 else 'be'} {n}" for n in range(40)}
    server.troubles = {
        "do 0": ["429", "429"],
        "be 1": ["503", "hang up", "500"],
        "be 2": ["nonsense"],
    }
    seen: list[Completion] = []
    done = endpoint(server).generate(prompts, GREEDY, seen.append)
    assert list(done) == list(prompts)
    assert {id: c.text for id, c in done.items()} == {
        i: "unsafe" if p[:2] == "do" else "safe" for i, p in prompts.items()
    }
    assert Counter(c.id for c in seen) == Counter(prompts.keys())
    assert done["id-0"].likely == [[("unsafe", -0.25), ("no", -3.0)]]
    tries = {"do 0": 3, "be 1": 4, "be 2": 2}
    assert server.asked == Counter({prompt: tries.get(prompt, 1) for prompt in prompts.values()})
    assert 1 < server.most <= 4


def test_a_request_that_hangs_is_given_up_and_asked_again_and_its_late_answer_counts_nothing(server: Server) -> None:
    server.troubles = {"do": ["slow"]}
    seen: list[Completion] = []
    # On a busy machine more than the first try may take that long; what is counted stays the same.
    done = endpoint(server, timeout_s=0.5, max_tries=100).generate({"a": "do", "b": "be"}, GREEDY, seen.append)
    assert server.asked["do"] >= 2
    assert [done["a"].text, done["b"].text] == ["unsafe", "safe"] and sorted(c.id for c in seen) == ["a", "b"]


def test_the_request_is_the_exact_prompt_with_no_template_and_no_tokens_of_the_server(server: Server) -> None:
    endpoint(server).generate({"a": "<s>x  \n"}, GREEDY)
    endpoint(server).generate({"b": [1, 2]}, Sampling(max_tokens=4))
    shared = {
        "model": "guard",
        "max_tokens": 4,
        "temperature": 0.0,
        "add_special_tokens": False,
        "path": "/v1/completions",
    }
    assert server.bodies == [{**shared, "prompt": "<s>x  \n", "logprobs": 2}, {**shared, "prompt": [1, 2]}]


def test_a_refusal_is_not_asked_again_and_endless_trouble_ends(server: Server) -> None:
    server.troubles = {"bad": ["400"], "down": ["503"] * 3}
    with pytest.raises(PrerequisiteError, match="refuses request 'a' with 400: try later"):
        endpoint(server).generate({"a": "bad"}, GREEDY)
    with pytest.raises(PrerequisiteError, match="no answer to request 'b' after 3 tries; the last: 503"):
        endpoint(server, max_tries=3).generate({"b": "down"}, GREEDY)
    assert server.asked == {"bad": 1, "down": 3}
    absent = Endpoint("http://127.0.0.1:9/v1", "guard", max_tries=2, first_wait_s=0.01)  # nothing listens there
    with pytest.raises(PrerequisiteError, match="after 2 tries"):
        absent.generate({"c": "x"}, GREEDY)


def test_a_judge_reads_what_an_endpoint_says(server: Server, tiny_model: Path) -> None:
    pairs = {"a": ("How?", "do this"), "b": ("How?", "No.<|eot_id|>")}
    found = {}
    RemoteModel(endpoint(server), None).ask(Llamaguard(), pairs, found.__setitem__)
    assert found["a"].label is True and found["a"].score == 1.0, "`no` begins neither word"
    sent = {body["prompt"] for body in server.bodies}
    assert Llamaguard().prompt(*pairs["a"]) in sent
    assert Llamaguard().prompt("How?", "No.< |eot_id|>") in sent, (
        "as text the server would read it as the end of a turn"
    )
    server.bodies.clear()
    RemoteModel(endpoint(server), tiny_model).ask(Llamaguard(), pairs, found.__setitem__)
    expected = Tokenizer(tiny_model).prompt_ids([Llamaguard().pieces(*pair) for pair in pairs.values()])
    assert sorted(body["prompt"] for body in server.bodies) == sorted(expected)


def test_a_pair_that_an_endpoint_refuses_harms_no_other_and_is_asked_anew(server: Server, tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    responses = ["be", "too much", "do"]
    file.write_text("".join(json.dumps({"prompt": "q", "response": text}) + "\n" for text in responses))
    server.troubles = {Llamaguard().prompt("q", "too much"): ["400"]}
    remote = RemoteModel(endpoint(server), None)
    found = judge_file(file, ["llamaguard"], remote, out).verdicts["llamaguard"]
    assert [verdict.label for verdict in found] == [False, None, True]
    assert "with 400: try later" in found[1].raw
    server.bodies.clear()  # the server may have been started anew, with more room
    found = judge_file(file, ["llamaguard"], remote, out).verdicts["llamaguard"]
    assert [verdict.label for verdict in found] == [False, False, True] and len(server.bodies) == 1


def test_verdicts_are_kept_under_the_tokenizer_that_wrote_the_prompts(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    file, out, other = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "other"
    file.write_text('{"prompt": "q", "response": "do"}\n')
    other.mkdir()
    (other / "tokenizer.json").write_text((tiny_model / "tokenizer.json").read_text() + " ")
    for tokenizer, num in ((tiny_model, 1), (other, 2), (tiny_model, 2)):
        judge_file(file, ["llamaguard"], RemoteModel(endpoint(server), tokenizer), out)
        assert len(server.bodies) == num
