"""What vLLM imports into an engine's own processes, as `worker_extension_cls`. Importing it elsewhere ends nothing.

Ray ends these processes with their replica. But when Ray itself was killed, as by `ray stop --force`, nothing did: an engine
held its memory for ever. So each of them looks whether its replica lives.
"""

from __future__ import annotations

import os
import threading
import time

import psutil

from safecl.serving.swap import Swap

__all__ = ["Swap"]

REPLICA = "SAFECL_REPLICA"  # environment variable: process id of the replica, which its children inherit
LOOK_S = 2.0  # seconds between two looks


def _end_with(pid: int) -> None:
    while True:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                break
        except psutil.NoSuchProcess:
            break
        time.sleep(LOOK_S)
    os._exit(1)


if (_replica := int(os.environ.get(REPLICA, os.getpid()))) != os.getpid():
    threading.Thread(target=_end_with, args=(_replica,), daemon=True, name="replica").start()
