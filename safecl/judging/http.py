"""A judge behind HTTP, on this machine: POST /v1/judge {"prompt", "response"} -> {"label", "score", "raw", "detail"}.

If `max_waiting` requests are already waiting, further ones get 429 with Retry-After instead of waiting until they time out.
GET /health returns how many are waiting. A request counts once its body is read; incomplete requests do not count towards
`max_waiting`. A body that does not arrive within `read_timeout_s` gets 408. The server listens on the loopback address. On
another address it requires a token.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from safecl.base import ConfigError, PrerequisiteError
from safecl.judges import Judge, Verdict
from safecl.judging.pairs import parse_judge
from safecl.judging.served import Served
from safecl.tasks._files import Record

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LONGEST_BODY = 2**20  # bytes
TOKEN = "SAFECL_JUDGE_TOKEN"  # environment variable with the token that other machines must send
RETRY_AFTER_S = 1  # seconds
READ_TIMEOUT_S = 10.0  # seconds for a request's body


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def asker(judge: Judge, served: Served | None) -> Callable[[str, str], Verdict]:
    """A judge as a plain function of (request, response) that many threads may call.

    The function raises ValueError for a pair that is too long for the judge's model.
    """
    if served is None:
        return judge.rule

    def ask(request: str, response: str) -> Verdict:
        found: list[Verdict] = []
        served.ask(judge, {"0": (request, response)}, lambda _, verdict: found.append(verdict))
        if "limit" in found[0].detail:
            raise ValueError(found[0].raw)
        return found[0]

    return ask


def app(
    ask: Callable[[str, str], Verdict],
    max_waiting: int,
    read_timeout_s: float = READ_TIMEOUT_S,
    token: str | None = None,
) -> Starlette:
    """The ASGI application. With a `token`, requests for a verdict must send it (`Authorization: Bearer TOKEN`)."""
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    pool = ThreadPoolExecutor(max_waiting)
    waiting: set[object] = set()  # requests that were accepted

    def problem(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
        return JSONResponse({"error": text}, status, headers)

    async def judge(request: Request) -> Response:
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token is not None and not hmac.compare_digest(shown.encode(), token.encode()):
            return problem(401, "expected the header 'Authorization: Bearer TOKEN'", {"WWW-Authenticate": "Bearer"})
        try:
            async with asyncio.timeout(read_timeout_s):
                pair = await _pair(request)
        except TimeoutError:
            text = f"the body did not come within {read_timeout_s:g} s"
            return problem(408, text, {"Connection": "close"})
        except ClientDisconnect:
            return problem(400, "the client left")  # no client reads this
        if isinstance(pair, str):
            return problem(400, pair)
        if len(waiting) >= max_waiting:
            text = f"{max_waiting} requests are waiting: try again in {RETRY_AFTER_S} s"
            return problem(429, text, {"Retry-After": str(RETRY_AFTER_S)})
        place = object()
        waiting.add(place)
        try:
            verdict = await asyncio.get_running_loop().run_in_executor(pool, ask, *pair)
            return JSONResponse(verdict._asdict())
        except PrerequisiteError as error:  # the engine is not available now
            return problem(503, str(error), {"Retry-After": str(RETRY_AFTER_S)})
        except ValueError as error:  # the pair is too long for the model
            return problem(400, str(error))
        finally:
            waiting.discard(place)

    async def health(request: Request) -> Response:
        return JSONResponse({"waiting": len(waiting), "max_waiting": max_waiting})

    return Starlette(routes=[Route("/v1/judge", judge, methods=["POST"]), Route("/health", health)])


async def _pair(request: Request) -> tuple[str, str] | str:
    """(request, response) of the body, or an error message."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            return f"expected at most {LONGEST_BODY} bytes"
    try:
        given: Any = json.loads(body)
    except ValueError as error:
        return f"expected a JSON object: {error}"
    try:
        found = Record(given if isinstance(given, dict) else {}, "the body", 1)
        return found.raw("prompt"), found.raw("response")
    except ConfigError as error:  # half a character (a surrogate) is no text either
        return f'expected {{"prompt": text, "response": text}}: {error}'


def serve(
    name: str,
    served: AbstractContextManager[Served] | None,
    host: str,
    port: int,
    max_waiting: int,
    show: Callable[[str], None],
    token: str | None = None,
) -> None:
    """Serve a judge over HTTP until interrupted. `token`: see `app`.

    Raises:
        ConfigError: a served judge has no model, or there is no token for an address that other machines can reach.
    """
    import uvicorn

    if token is None and not _is_loopback(host):
        raise ConfigError(
            f"--host {host!r} lets other machines use the judge: set {TOKEN} in the environment to a secret, which they must "
            "show, or serve on 127.0.0.1"
        )
    _, judge = parse_judge(name)
    if judge.served and served is None:
        raise ConfigError(f"judge {name!r} reads a model's answer: name one with --model")
    with served if served is not None and judge.served else nullcontext(None) as reached:
        show(f"{name} on http://{host}:{port}/v1/judge")
        uvicorn.run(app(asker(judge, reached), max_waiting, token=token), host=host, port=port, log_level="warning")
