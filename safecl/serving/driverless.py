"""Engines whose driver is gone end by themselves.

Serve keeps its applications, and starts them again, for as long as the cluster lives. The next run of a store ends what a
dead driver left (lease.py). Where none comes, an engine would hold its GPUs for ever.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from safecl.lease import Pulse
from safecl.store import Store

LOOK_S = 60.0  # seconds between two looks at the driver's lease
GONE_S = 600.0  # a driver without a sign of life for so long is taken for gone


def end_without(store: Store, name: str, look_s: float = LOOK_S, gone_s: float = GONE_S) -> None:
    """Shut application `name` down once the driver that owns this store object is gone. Returns at once."""

    def watch() -> None:
        from safecl.serving.deploy import shutdown

        pulse, was_seen = Pulse(store), False
        while True:
            with suppress(Exception):  # the storage may not answer for a while
                still_s = pulse.still_s(store.owner)
                was_seen = was_seen or still_s < gone_s  # who holds no lease is not seen from another machine
                if was_seen and still_s > gone_s:
                    shutdown(name)
            time.sleep(look_s)

    threading.Thread(target=watch, daemon=True, name="driverless").start()
