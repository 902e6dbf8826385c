"""An OpenAI-compatible endpoint in place of an engine of our own: exact prompts in (`/completions`, so that no server's
template gets between, unless `chat` is asked for), completions out by id. Standard library only."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from safecl.base import PrerequisiteError
from safecl.serving.messages import Completion, Finish, Refused, Sampling

KEY_VARIABLE = "SAFECL_ENDPOINT_KEY"
PATIENCE_S = 1.5  # for a server that is starting
CONNECT_S = 5.0
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True)
class Endpoint:
    """`url` ends where `/completions` follows, as in `http://127.0.0.1:8000/v1`; `model` is the server's name for it. No
    redirect is followed: the key and what was asked would go to whom it names."""

    url: str
    model: str
    max_in_flight: int = 16
    max_tries: int = 8
    first_wait_s: float = 0.5  # before the second try; doubles, unless the server says how long
    timeout_s: float = 120.0
    chat: bool = False  # `/chat/completions` in place: the prompt is a user's message in the server's own template
    key_variable: str = KEY_VARIABLE  # environment variable whose value is sent as bearer token, if it is set

    def reach(self, patience_s: float = PATIENCE_S) -> None:
        """Return once something listens at `url`; through a proxy nothing is tried.

        Raises:
            PrerequisiteError: nothing does after `patience_s`, which is for a server that is starting.
        """
        parts = urlsplit(self.url)
        host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
            return
        deadline = time.monotonic() + patience_s
        while True:
            try:
                socket.create_connection((host, port), timeout=CONNECT_S).close()
                return
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise PrerequisiteError(
                        f"endpoint {self.url}: nothing answers there ({error}): is the server up?"
                    ) from None
            time.sleep(0.2)

    def generate(
        self,
        prompts: Mapping[str, str | Sequence[int]],
        sampling: Sampling,
        on_done: Callable[[Completion], None] | None = None,
        on_refused: Callable[[str, str], None] | None = None,
    ) -> dict[str, Completion]:
        """One completion a prompt (text or token ids), by id; `on_done` sees each as it comes, from this thread.

        What fails for a while (429, 5xx, time-outs, lost connections) is asked again; an answer counts once. A prompt
        that the server refuses with 400 (too long) goes to `on_refused`, as (id, why), and is left out.

        Raises:
            PrerequisiteError: the server refuses a request otherwise, or failed `max_tries` times on one.
        """
        done: dict[str, Completion] = {}
        room = _room(self.url, self.max_in_flight)
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.max_in_flight)
        try:
            asked = {
                pool.submit(self._complete, id, prompt, sampling, stop, room): id for id, prompt in prompts.items()
            }
            for future in as_completed(asked):
                try:
                    completion = future.result()
                except Refused as error:
                    if on_refused is None:
                        raise PrerequisiteError(str(error)) from None
                    on_refused(asked[future], str(error))
                    continue
                done[completion.id] = completion
                if on_done is not None:
                    on_done(completion)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return {id: done[id] for id in prompts if id in done}

    def _body(self, prompt: str | Sequence[int], sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
        }
        if self.chat:
            return {**body, "messages": [{"role": "user", "content": prompt}]}
        # vLLM's name: the template writes its own BOS. Others ignore it
        body |= {"prompt": prompt if isinstance(prompt, str) else list(prompt), "add_special_tokens": False}
        return {**body, "logprobs": sampling.logprobs} if sampling.logprobs else body

    def _complete(
        self,
        id: str,
        prompt: str | Sequence[int],
        sampling: Sampling,
        stop: threading.Event,
        room: threading.BoundedSemaphore,
    ) -> Completion:
        body = self._body(prompt, sampling)
        for number in range(self.max_tries):
            try:
                with room:
                    return _completion(id, self._post(body))
            except urllib.error.HTTPError as error:
                said = self._hidden(_read(error))
                if 300 <= error.code < 400:
                    there = self._hidden(str(error.headers.get("Location")))
                    raise PrerequisiteError(
                        f"endpoint {self.url} sends requests on to {there!r}, which is not followed: name the URL of the "
                        "server itself"
                    ) from None
                if error.code not in _TRANSIENT:
                    kind = Refused if error.code == 400 else PrerequisiteError
                    raise kind(f"endpoint {self.url} refuses request {id!r} with {error.code}: {said}") from None
                problem, asked_s = f"{error.code}: {said}", error.headers.get("Retry-After", "")
            except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
                problem, asked_s = self._hidden(f"{type(error).__name__}: {error}"), ""
            if number + 1 < self.max_tries:
                # Spread out, or all that were turned away together come back together.
                wait_s = self.first_wait_s * 2**number * random.uniform(0.75, 1.25)
                if stop.wait(min(_LONGEST_WAIT_S, float(asked_s) if asked_s.isdigit() else wait_s)):
                    break
        raise PrerequisiteError(
            f"endpoint {self.url}: no answer to request {id!r} after {self.max_tries} tries; the last: {problem}"
        )

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        path = "chat/completions" if self.chat else "completions"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", json.dumps(body).encode(), headers)
        with _opener().open(request, timeout=self.timeout_s) as response:
            return json.load(response)

    def _key(self) -> str:
        """Raises PrerequisiteError for what no header can hold; http.client's own error would show it."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise PrerequisiteError(
                f"endpoint {self.url}: the key in the environment variable {self.key_variable} holds a character that no "
                "request can carry (a line break, a typographic quote): set it anew"
            )
        return key

    def _hidden(self, text: str) -> str:
        """The text without the key."""
        return text.replace(os.environ.get(self.key_variable, "").strip() or "\0", "***")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """None: an answer that names another address is an error."""


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirect)


def _read(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server says of a refusal, as far as it comes."""
    try:
        return error.read(500).decode(errors="replace")
    except (OSError, HTTPException):
        return "nothing"


@cache
def _room(url: str, num: int) -> threading.BoundedSemaphore:
    """Places for requests under way at an endpoint, over all callers of this process."""
    return threading.BoundedSemaphore(num)


def _completion(id: str, answer: Any) -> Completion:
    choice = answer["choices"][0]
    if "message" in choice:  # of a chat
        choice = {"text": choice["message"]["content"], "finish_reason": choice.get("finish_reason")}
    likely: list[list[tuple[str, float]]] = []
    if (told := choice.get("logprobs")) and told.get("tokens"):
        tokens = told["tokens"]
        tops = told.get("top_logprobs") or [None] * len(tokens)
        for token, logprob, others in zip(tokens, told["token_logprobs"], tops, strict=True):
            rest = (others or {}).items()
            likely.append([(token, logprob), *((text, value) for text, value in rest if text != token)])
    if not isinstance(choice["text"], str):
        raise ValueError(f"expected choices[0].text, got {choice['text']!r}")
    finish: Finish = "length" if choice.get("finish_reason") == "length" else "stop"
    return Completion(id, choice["text"], [], finish, str(answer.get("model", "")), likely)
