"""devices.py with the real clock, on the Broker's event loop. Users ask for units here, and are told which holders to
start and stop."""

from __future__ import annotations

import asyncio
import math
from typing import Any, Protocol

from safecl.devices import IDLE_S, Devices, Holder, Start


class User(Protocol):
    """Starts and stops the holders of its groups, and gives work to open holders. No call may block."""

    def start(self, holder: Holder) -> None: ...
    def stop(self, holder: Holder) -> None: ...
    def give(self) -> None: ...


class Lender:
    """Its calls are those of Devices, without the time."""

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self._users: dict[str, User] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._stepping = False
        self._have = devices.num_units  # units that are there, without those that autoscaling may add
        self._capped: float | None = None  # units that were there when autoscaling added none
        self._freed = -math.inf  # when a holder was last gone

    def add(self, group: str, user: User, size: float, at_most: int, idle_s: float = IDLE_S) -> None:
        """Register a group of at most `at_most` holders of `size` units each, and the user that starts and stops them."""
        self._users[group] = user
        self.devices.add(group, size, at_most, idle_s)

    def ask(self, group: str, wanted: int, rank: int, coming: int) -> None:
        """Report a group's work, and step. `wanted`, `rank`, `coming`: see Devices.ask."""
        self.devices.ask(group, wanted, self._now(), rank, coming)
        self.step()

    def up(self, holder: Holder) -> None:
        """Report that a holder has been started, and step."""
        self.devices.up(holder, self._now())
        self.step()

    def work(self, holder: Holder, num: int) -> None:
        """Report that a holder was given `num` pieces of work, or below 0, has done them. A caller whose work is done
        then calls `ask`, which steps."""
        self.devices.work(holder, num, self._now())

    def gone(self, holder: Holder) -> None:
        """Report that a holder has been stopped, has died, or could not be started, and step. Its units are free."""
        self._freed = self._now()
        self.devices.gone(holder, self._freed)
        self.step()

    @property
    def since_freed(self) -> float:
        """Seconds since a holder was last gone; infinity if none ever was."""
        return self._now() - self._freed

    @property
    def may_grow(self) -> bool:
        """Whether autoscaling may add units."""
        return self.devices.num_units > self._have

    def resize(self, num_units: float, have: float, shares: bool = False) -> None:
        """`num_units`: units including those that autoscaling may add. `have`: units that are there. `shares`: see
        Devices.resize."""
        self._have = have
        if self._capped is not None and have > self._capped:
            self._capped = None  # autoscaling adds some after all
        self.devices.resize(num_units if self._capped is None else have, shares)
        self.step()

    def never_came(self, holder: Holder) -> bool:
        """Whether a holder could not be started because its units are not there. Then only the units that are there
        count, until there are more, and the group waits for its turn."""
        if self.devices.held <= self._have:
            return False
        self._capped = self._have
        self.devices.resize(self._have)
        return True

    def step(self) -> None:
        """Start and stop holders by the rules of Devices, and set a timer for the next step."""
        if self._stepping:  # one of its own acts asked: the loop below continues
            return
        self._stepping = True
        try:
            while acts := self.devices.step(self._now()):
                for act in acts:
                    user = self._users[act.holder.group]
                    (user.start if isinstance(act, Start) else user.stop)(act.holder)
            for user in dict.fromkeys(self._users.values()):
                user.give()
        finally:
            self._stepping = False
        if self._timer is not None:
            self._timer.cancel()
        at = self.devices.next_at
        self._timer = None if at == math.inf else asyncio.get_running_loop().call_at(at + 0.001, self.step)

    def told(self) -> dict[str, Any]:
        """The units of each group, and for how many seconds a group has waited for units."""
        devices, now = self.devices, self._now()
        groups = {
            group.name: {
                "wanted": group.wanted,
                "up": sum(holder.state == "up" for holder in group.holders.values()),
                "starting": group.num_starting,
                "stopping": group.num_stopping,
                "units": sum(holder.size for holder in group.holders.values()),
                "waits_s": now - group.since if group.starved else None,
            }
            for group in devices.groups.values()
        }
        return {"units": devices.num_units, "held": devices.held, "groups": groups}

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
