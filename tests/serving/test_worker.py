"""An engine's own processes end with their replica."""

from __future__ import annotations

import os
import subprocess
import sys

from safecl.serving.worker import REPLICA


def test_a_process_ends_once_its_replica_is_killed_even_if_nobody_reaps_it() -> None:
    """As after `ray stop --force`, which kills every process of Ray and no process of vLLM."""
    replica = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    code = "import safecl.serving.worker, time; print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, REPLICA: str(replica.pid)}, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        assert process.poll() is None
        replica.kill()
        assert process.wait(20) == 1
    finally:
        process.kill()
        replica.kill()
        replica.wait()
