"""Progress of a running sweep: one live block on a terminal, else one line every 15 s."""

from __future__ import annotations

import time
from typing import IO, Any


class Display:
    """Display of a sweep's progress. `show` draws the driver's state; `close` leaves the last line on the screen."""

    def __init__(self, stream: IO[str], every_s: float = 15.0) -> None:
        self.stream, self.every_s = stream, every_s
        self.started = time.monotonic()
        self.last = 0.0
        self.reported: set[str] = set()
        self.live: Any = None
        if stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(file=stream), refresh_per_second=4, transient=True)
            self.live.start()

    def show(self, state: dict[str, Any]) -> None:
        """Draw the driver's state. Off a terminal it prints at most one line every `every_s` seconds, and every new failure."""
        for error in state["failed"].values():
            if error not in self.reported:  # stages that depend on a failed stage fail with the same message
                self.reported.add(error)
                self._print(f"failed: {error}")
        if self.live is not None:
            self.live.update(self._block(state))
        elif time.monotonic() - self.last >= self.every_s:
            self.last = time.monotonic()
            running = "; ".join(s["label"] + (f" {_share(s):.0%}" if s["total"] else "") for s in state["running"])
            self._print(f"{self._headline(state)}  |  {running or 'waiting'}")

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()

    def _headline(self, state: dict[str, Any]) -> str:
        return (
            f"trials {state['trials_done']}/{state['trials']}  stages run {state['num_finished']}  "
            f"elapsed {clock(time.monotonic() - self.started)}  ETA about {clock(state['eta_s'])}"
        )

    def _block(self, state: dict[str, Any]) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        for stage in state["running"]:
            bar = ProgressBar(total=stage["total"] or None, completed=stage["done"], width=30, pulse=not stage["total"])
            loss = stage.get("metrics", {}).get("loss")
            detail = f"{stage['done']}/{stage['total']} {stage['unit']}" if stage["total"] else ""
            age = clock(state["now"] - stage["start"])
            grid.add_row(stage["label"], bar, detail, age, "" if loss is None else f"loss {loss:.3f}")
        return Group(self._headline(state), grid)

    def _print(self, text: str) -> None:
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)


def clock(seconds: float) -> str:
    """Seconds as text: `75` -> `1:15`, `4000` -> `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _share(stage: dict[str, Any]) -> float:
    return float(stage["done"]) / float(stage["total"])
