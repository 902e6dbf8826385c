"""The Broker's work as metrics of Ray's dashboard (Prometheus: `ray_safecl_...`). Only on a joined cluster: a local cluster of
ours has no dashboard."""

from __future__ import annotations

from typing import Any

from safecl.times import Times, queue


class Gauges:
    """Metrics of the Broker, in which it lives. `show` is called each time the driver asks for its state, about once a second."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        self.stages = Gauge("safecl_stages", "Stages that wait for inputs, are ready or run", ("kind", "state"))
        self.turns = Gauge("safecl_ready", "Stages that wait for their turn, by what they wait for", ("needs",))
        self.engines = Gauge("safecl_engines", "Engines that serve or boot")
        self.finished = Counter("safecl_finished", "Stages that were finished", ("kind",))
        self.failed = Counter("safecl_failed", "Stages that failed, by the kind of failure", ("kind", "cause"))
        self.tokens = Counter("safecl_tokens", "Tokens that engines generated")
        self._told = 0  # how many of the stages that ended were counted
        self._shown: set[tuple[str, str]] = set()
        self._waited: set[str] = set()

    def show(self, times: Times, num_engines: int, tokens: int) -> None:
        """Set the metrics. `tokens`: number of tokens that were generated since the last call."""
        open_now = times.under_way()
        now = {(kind, state): num for kind, states in queue(open_now).items() for state, num in states.items()}
        for kind, state in self._shown | now.keys():
            self.stages.set(now.get((kind, state), 0), {"kind": kind, "state": state})
        self._shown |= now.keys()
        ready: dict[str, int] = {}
        for found in open_now:
            if "ready" in found and "start" not in found:
                ready[found["needs"]] = ready.get(found["needs"], 0) + 1
        for needs in self._waited | ready.keys():
            self.turns.set(ready.get(needs, 0), {"needs": needs})
        self._waited |= ready.keys()
        self.engines.set(num_engines)
        for found in times.closed[self._told :]:
            if "error" not in found:
                self.finished.inc(1, {"kind": found["kind"]})
            elif "start" in found:
                self.failed.inc(1, {"kind": found["kind"], "cause": found["cause"]})
        self._told = len(times.closed)
        if tokens:
            self.tokens.inc(tokens)


def of(address: str) -> Any:
    """Return the Gauges for a cluster at this address; None for a local cluster."""
    return None if address == "local" else Gauges()
