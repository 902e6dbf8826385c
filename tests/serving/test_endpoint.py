"""The endpoint client against a real HTTP server on loopback that fails in every way it can."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from safecl.base import PrerequisiteError, strictly
from safecl.config import Execution, Judges
from safecl.judges.llamaguard import Llamaguard
from safecl.judging.score import judge_file
from safecl.judging.served import RemoteModel, check_endpoints
from safecl.panel import Seat, seats
from safecl.serving.endpoint import Endpoint
from safecl.serving.messages import Completion, Sampling
from safecl.stages import judge as judge_stage
from safecl.store import Context, Stage
from safecl.training.tokens import Tokenizer

GREEDY = Sampling(max_tokens=4, logprobs=2)
ODD = {"nonsense": "<html>", "a list": "[]", "a word": '{"choices": ["safe"]}', "none": '{"choices": []}',
       "no text": '{"choices": [{"text": null}]}', "logprobs": '{"choices": [{"text": "a", "logprobs": [1]}]}'}  # fmt: skip


class Server(ThreadingHTTPServer):
    """Answers "unsafe" where the prompt holds "do", after first failing as `troubles` says for that prompt."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.troubles: dict[str, list[str]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.now = self.most = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("Authorization"))
        self.answer("", "", False)

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = str(body["prompt"] if "prompt" in body else body["messages"][0]["content"])
        with server.lock:
            server.bodies.append({**body, "path": self.path})
            server.keys.append(self.headers.get("Authorization"))
            server.asked[prompt] += 1
            server.now += 1
            server.most = max(server.most, server.now)
            trouble = (server.troubles.get(prompt) or [""]).pop(0) if server.troubles.get(prompt) else ""
        self.answer(prompt, trouble, "messages" in body)

    def leave(self) -> None:
        """Before the last byte is sent: with it the client may ask anew."""
        with self.server.lock:
            self.server.now -= self.command == "POST"

    def answer(self, prompt: str, trouble: str, chat: bool) -> None:
        if trouble == "hang up":
            self.leave()
            self.close_connection = True
            return
        if trouble == "slow":
            time.sleep(1.0)
        time.sleep(0.01)
        word = "unsafe" if "do" in prompt else "safe"
        choice: dict[str, Any] = {
            "text": word,
            "finish_reason": "stop",
            "logprobs": {"tokens": [word], "token_logprobs": [-0.25], "top_logprobs": [{"no": -3.0, word: -0.25}]},
        }
        if chat:
            choice = {"message": {"role": "assistant", "content": word}, "finish_reason": "stop", "logprobs": None}
        status, text = 200, json.dumps({"model": "m", "choices": [choice]})
        if trouble in ODD:
            text = ODD[trouble]
        elif trouble.isdigit():
            status, text = int(trouble), f"try later {self.headers.get('Authorization', '')}"
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/elsewhere")
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(text)))
        self.leave()
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
        "be 2": [*ODD],
    }
    seen: list[Completion] = []
    done = endpoint(server).generate(prompts, GREEDY, seen.append)
    assert list(done) == list(prompts)
    assert {id: c.text for id, c in done.items()} == {
        i: "unsafe" if p[:2] == "do" else "safe" for i, p in prompts.items()
    }
    assert Counter(c.id for c in seen) == Counter(prompts.keys())
    assert done["id-0"].likely == [[("unsafe", -0.25), ("no", -3.0)]]
    tries = {"do 0": 3, "be 1": 4, "be 2": 1 + len(ODD)}
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_port_that_refuses_is_said_at_once_and_a_server_that_is_starting_is_waited_for() -> None:
    port = free_port()
    remote = Endpoint(f"http://127.0.0.1:{port}/v1", "guard")
    begin = time.monotonic()
    with pytest.raises(PrerequisiteError, match=rf"{port}/v1: nothing answers there .* is the server up\?"):
        remote.reach(patience_s=0.3)
    assert time.monotonic() - begin < 2.0

    def late() -> None:
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", port)) as listening:
            listening.settimeout(10)
            listening.accept()[0].close()

    thread = threading.Thread(target=late)
    thread.start()
    remote.reach(patience_s=10)
    thread.join()


def test_judging_a_file_at_a_port_that_refuses_ends_soon(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "q", "response": "do"}\n')
    absent = RemoteModel(Endpoint(f"http://127.0.0.1:{free_port()}/v1", "guard"), None)
    begin = time.monotonic()
    with pytest.raises(PrerequisiteError, match="nothing answers there"):
        judge_file(file, ["llamaguard"], absent, tmp_path / "out.jsonl")
    assert time.monotonic() - begin < 5.0


def test_a_chat_is_one_message_of_the_users_and_is_read_as_a_completion(server: Server) -> None:
    done = endpoint(server, chat=True).generate({"a": "do"}, GREEDY)
    assert done["a"].text == "unsafe" and done["a"].weights_key == "m"
    [body] = server.bodies
    assert body == {
        "model": "guard", "max_tokens": 4, "temperature": 0.0, "messages": [{"role": "user", "content": "do"}],
        "path": "/v1/chat/completions",
    }  # fmt: skip


def test_the_key_is_sent_from_the_variable_that_is_named_and_is_never_said(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARD_KEY", "s3cret")
    server.troubles = {"bad": ["401"], "down": ["503"] * 2}
    endpoint(server, key_variable="GUARD_KEY").generate({"a": "do"}, GREEDY)
    endpoint(server).generate({"a": "do"}, GREEDY)
    assert server.keys == ["Bearer s3cret", None]
    for prompt in ("bad", "down"):  # servers that repeat what they were sent
        with pytest.raises(PrerequisiteError) as caught:
            endpoint(server, key_variable="GUARD_KEY", max_tries=2).generate({"a": prompt}, GREEDY)
        assert "try later" in str(caught.value) and "s3cret" not in str(caught.value)


@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308"])
def test_a_redirect_is_not_followed(server: Server, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_KEY", "s3cret")
    server.troubles = {"away": [status]}
    with pytest.raises(PrerequisiteError, match=r"sends requests on to 'http:.*elsewhere', which is not followed"):
        endpoint(server, key_variable="GUARD_KEY").generate({"a": "away"}, GREEDY)
    assert server.keys == ["Bearer s3cret"]


def test_a_key_that_no_header_can_hold_is_never_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("s3cret\nX: y", "s3cret\u2019"):
        monkeypatch.setenv("GUARD_KEY", key)
        with pytest.raises(PrerequisiteError, match="variable GUARD_KEY holds a character that no request") as caught:
            endpoint(server, key_variable="GUARD_KEY").generate({"a": "do"}, GREEDY)
        assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("GUARD_KEY", " s3cret\n")  # as a file read by the shell ends
    endpoint(server, key_variable="GUARD_KEY").generate({"a": "do"}, GREEDY)
    assert server.keys == ["Bearer s3cret"]


def test_all_callers_of_an_endpoint_share_its_places(server: Server) -> None:
    remote = endpoint(server, max_in_flight=2)
    prompts = {str(n): f"be {n}" for n in range(12)}
    threads = [threading.Thread(target=remote.generate, args=(prompts, GREEDY)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.bodies) == 36 and server.most == 2


def asked_there(server: Server, judge: str, config: dict[str, Any], tmp_path: Path, **remote: Any) -> Context:
    """A judge stage of three answers at the server."""
    rows, out = tmp_path / "rows", tmp_path / "out"
    rows.mkdir()
    out.mkdir()
    lines = [{"id": id, "prompt": "How?", "response": text} for id, text in (("a", "do it"), ("b", "No."), ("c", "be"))]
    (rows / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    by = {"model": "guard", "version": None, "tokenizer": None, "chat": False, **remote}
    hints = {"url": endpoint(server).url, "at_once": "2"}
    stage = Stage("judge", {"judge": judge, "config": config, "remote": by}, {"rows": Stage("data", {})}, hints=hints)
    return Context(stage, {"rows": rows}, out, tmp_path, Execution(), lambda *_: None)


@pytest.mark.parametrize(("judge", "chat"), [("llamaguard", False), ("written", False), ("written", True)])
def test_a_judge_stage_asks_an_endpoint_and_keeps_who_answered(
    server: Server, tmp_path: Path, judge: str, chat: bool
) -> None:
    written = {"template": "{request} {response}", "labels": {"unsafe": True, "safe": False}}
    context = asked_there(server, judge, written if judge == "written" else {}, tmp_path, chat=chat)
    assert judge_stage.run(context) == {"num": 3, "true": 1, "unparsed": 0, "answered_by": ["m"]}
    verdicts = [json.loads(line) for line in (context.out / "verdicts.jsonl").read_text().splitlines()]
    assert [(verdict["id"], verdict["label"]) for verdict in verdicts] == [("a", True), ("b", False), ("c", False)]
    assert {body["path"].removeprefix("/v1/") for body in server.bodies} == {
        "chat/completions" if chat else "completions"
    }
    assert {body["temperature"] for body in server.bodies} == {0.0}


def test_a_key_that_is_named_and_not_set_is_said_by_name(server: Server, tmp_path: Path) -> None:
    context = asked_there(server, "llamaguard", {}, tmp_path)
    stage = replace(context.stage, hints={**context.stage.hints, "key_variable": "NO_SUCH_KEY"})
    with pytest.raises(PrerequisiteError, match="environment variable NO_SUCH_KEY with its key is not set"):
        judge_stage.run(replace(context, stage=stage))


def test_endpoints_of_a_sweep_are_asked_before_anything_is_spent(server: Server) -> None:
    def judges(**settings: Any) -> list[Seat]:
        own = {"judge": "llamaguard", "model": "m", "endpoint": endpoint(server).url, **settings}
        return seats(strictly(Judges, {"asr": ["keywords", own]}))

    said: list[str] = []
    check_endpoints(judges(), said.append)
    assert len(server.bodies) == 1 and not said
    check_endpoints(seats(strictly(Judges, {"asr": "keywords"})), said.append)
    assert len(server.bodies) == 1
    check_endpoints(judges(judge="harmbench"), said.append)  # which says yes or no
    assert len(said) == 1 and "is no verdict: 'unsafe'" in said[0]
    check_endpoints(judges(model="guard"), said.append)
    assert len(said) == 2 and "was asked for 'guard' and says it is m" in said[1]
    server.troubles = {server.bodies[0]["prompt"]: ["404", "400"]}
    with pytest.raises(PrerequisiteError, match="with 404"):
        check_endpoints(judges(), said.append)
    with pytest.raises(PrerequisiteError, match="with 400"):
        check_endpoints(judges(), said.append)
    with pytest.raises(PrerequisiteError, match="nothing answers there"):
        check_endpoints(judges(endpoint=f"http://127.0.0.1:{free_port()}/v1"), said.append)


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
