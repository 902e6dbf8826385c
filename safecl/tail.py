"""Logs of stages and engines. They are on the node that wrote them under `<local>/logs`, and at a URL also beside the
store. Only reads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from safecl import printed
from safecl.base import ConfigError
from safecl.keep import live
from safecl.store import Store
from safecl.watch import RUN

EVERY_S = 1.0


def listing(store: Store) -> list[tuple[str, int]]:
    """(name, bytes) of every log, the newest last. Raises ConfigError if there is none."""
    found = printed.listed(store)
    if not found:
        raise ConfigError(f"no logs under {store.root!r}; name the store with --root")
    return [(log.name, log.size) for log in found]


def names_of(store: Store, key: str) -> list[str]:
    """Names of a stage's logs (one per rank) by the beginning of its key, or of the log with this name. Raises
    ConfigError if there is none."""
    every = [name for name, _ in listing(store)]
    short = key[:12]
    found = [name for name in every if name in (key, f"{key}.log")]
    found = found or [name for name in every if _key_of(name).startswith(short)]
    if not found:
        raise ConfigError(
            f"no log of a stage whose key begins with {key!r} under {store.root!r} (one that waits for an engine has a log "
            "only if it failed); `safecl logs` lists those there are"
        )
    several = sorted({_key_of(name) for name in found})
    if len(short) < 12 and len(several) > 1 and key not in (name.removesuffix(".log") for name in found):
        raise ConfigError(f"key {key!r} is the beginning of several: {', '.join(several)}; give more of it")
    return sorted(found)


def _key_of(name: str) -> str:
    """`finetune-0123456789ab-rank1.log` -> `0123456789ab`. For an engine's log: the text after the first dash."""
    return name.removesuffix(".log").partition("-")[2].partition("-rank")[0]


def lines(store: Store, key: str, num: int, follow: bool) -> Iterator[str]:
    """The last `num` lines of a stage's log. With `follow`, then new lines until the stage ends, or no driver runs in
    the store."""
    names = names_of(store, key)
    at: dict[str, int] = {}
    while True:
        is_over = not follow or _is_over(store, _key_of(names[0]))
        for name in names:
            text = _from(store, name, at.get(name, 0))
            whole = text if is_over else text[: text.rfind(b"\n") + 1]
            told = whole.decode(errors="replace").splitlines()
            if name not in at:
                if len(names) > 1 and told:
                    yield f"==> {name} <=="
                told = list(deque(told, num))
            at[name] = at.get(name, 0) + len(whole)
            yield from told
        if is_over:
            return
        time.sleep(EVERY_S)


def _from(store: Store, name: str, at: int) -> bytes:
    try:
        return printed.read(store, name, at)
    except FileNotFoundError:
        return b""


def _is_over(store: Store, short: str) -> bool:
    """Whether the stage of this key has ended, or no driver runs in the store."""
    if not live(store):
        return True
    told: list[dict[str, Any]] = list(store.notes(RUN).values())
    if any(stage["key"].startswith(short) for run in told for stage in run["running"] if run["how"] == "under way"):
        return False
    if any(failed["key"].startswith(short) for run in told for failed in run["failed"]):
        return True
    return bool(store.find(short))
