"""Client of an OpenAI-compatible endpoint, used in place of an engine of our own. Standard library only.

It sends exact prompts to `/completions`, so that the server's template is not applied, unless `chat` is set. It returns
completions by id.
"""

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
PATIENCE_S = 1.5  # seconds to wait for a server that is starting
CONNECT_S = 5.0  # seconds
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server and how to use it.

    `url` is the part before `/completions`, as in `http://127.0.0.1:8000/v1`. `model` is the server's name of the model.
    Redirects are not followed, because the key and the prompts would go to another server.
    """

    url: str
    model: str
    max_in_flight: int = 16
    max_tries: int = 8
    first_wait_s: float = 0.5  # seconds before the second try; doubles each time unless the server says how long
    timeout_s: float = 120.0
    chat: bool = False  # use `/chat/completions`: the prompt becomes a user message in the server's own template
    key_variable: str = KEY_VARIABLE  # environment variable whose value is sent as bearer token, if it is set

    def reach(self, patience_s: float = PATIENCE_S) -> None:
        """Wait until a server accepts connections at `url`. With a proxy it returns at once.

        Raises:
            PrerequisiteError: no server accepts a connection within `patience_s` seconds.
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
        """Get one completion for each prompt (text or token ids). Returns them by id.

        `on_done` is called with each completion as it arrives, in this thread. A request with a temporary failure (429, 5xx,
        timeout, lost connection) is sent again. A prompt that the server refuses with 400 (too long) is left out, and
        `on_refused` is called with its id and the reason.

        Raises:
            PrerequisiteError: the server refuses a request for another reason, one request failed `max_tries` times, or a
                prompt was refused with 400 and there is no `on_refused`.
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
        # `add_special_tokens` is vLLM's option; other servers ignore it. The template writes its own BOS.
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
                # Random factor: else all requests that were refused together are sent again together.
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
        """The key, "" if it is not set. Raises PrerequisiteError for characters that a header cannot hold, because the error
        of http.client would show the key."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise PrerequisiteError(
                f"endpoint {self.url}: the key in the environment variable {self.key_variable} holds a character that no "
                "request can carry (a line break, a typographic quote): set it anew"
            )
        return key

    def _hidden(self, text: str) -> str:
        """The text with the key replaced by `***`."""
        return text.replace(os.environ.get(self.key_variable, "").strip() or "\0", "***")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """Return None, so that a redirect is an error."""


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirect)


def _read(error: urllib.error.HTTPError) -> str:
    """The first 500 bytes of a server's error message. "nothing" if they cannot be read."""
    try:
        return error.read(500).decode(errors="replace")
    except (OSError, HTTPException):
        return "nothing"


@cache
def _room(url: str, num: int) -> threading.BoundedSemaphore:
    """Semaphore for requests in flight at an endpoint, shared by all callers of this process."""
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
