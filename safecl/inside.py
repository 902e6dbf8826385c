"""Code that runs inside the sandboxes: `candidate` runs an untrusted program, `tests` calls its functions and checks.

Each is a process in its own sandbox (`sandbox.py`). A bare interpreter gets this file as text, so it imports nothing of
safecl. The two are linked only by a pipe each way, with one JSON text per line. A call is [function, arguments, keyword
arguments]. Its answer is [true, result] or [false, exception's name, message]. The first answer says that the program
ran to its end.

Only data pass: None, bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset. They are rebuilt from
JSON as objects of exactly these types, so no test can run the candidate's code by using a result. An object of a
subclass becomes an object of the base class (a Counter becomes a dict). An iterator becomes its items. Every other
object stays in the candidate's process, and the tests get a `Stranger` for it.
"""

from __future__ import annotations

import builtins
import json
import math
import os
import resource
import signal
import sys
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from itertools import islice

TYPE_CHECKING = False  # importing it from typing would take a tenth of a short program's time
if TYPE_CHECKING:
    from typing import Any, BinaryIO, Never

MAX_LINE = 1 << 26  # bytes of an answer; the longest of HumanEval+'s is under 1 MB
MAX_ITEMS = 1 << 17  # of an iterator that a candidate returns; a longer or endless one is not passed as data
# Longer integers are sent as hexadecimal: decimal digits take quadratic time, and Python refuses many of them.
LONG_INT = 1 << 64
# The tests' process reports: begun, passed, and that the candidate's process has ended.
BEGUN, PASSED, GONE = b"s", b"p", b"g"

_ITERATED = (Iterator, range, deque, KeysView, ValuesView, ItemsView)
_EXACT: dict[type, Callable[[Any], Any]] = {  # for an object of a subclass, whatever it overrides
    int: int.__int__, float: float.__float__, complex: complex.__complex__, str: str.__str__, bytes: bytes.__bytes__,
    bytearray: bytes, tuple: tuple, list: list, dict: dict, set: set, frozenset: frozenset,
}  # fmt: skip
_TYPES = {kind.__name__: kind for kind in (bool, *_EXACT)}


class Stranger:
    """An object in the candidate's process. It can only be called, or be passed back. All else raises. Even a
    comparison that is always False would be an answer that a candidate could ask for."""

    def __init__(self, call: Callable[..., Any], reference: int | str) -> None:
        self._call, self._reference = call, reference

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._call(self._reference, args, kwargs)

    def _refuse(self, *_: object) -> Never:
        raise TypeError("the candidate gave an object that is no plain data")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = __str__ = __repr__ = _refuse


def encoded(value: Any, keep: Callable[[object], int]) -> Any:
    """A value as JSON. `keep` stores an object that is no data, and returns the number by which it is found again."""
    kind = type(value)
    if value is None or kind is str or kind is bool:
        return value
    if kind is int:
        return value if -LONG_INT < value < LONG_INT else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [encoded(item, keep) for item in value]
    if kind is tuple or kind is set or kind is frozenset:
        return {kind.__name__: [encoded(item, keep) for item in value]}
    if kind is dict:
        return {"dict": [[encoded(key, keep), encoded(item, keep)] for key, item in value.items()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [repr(value.real), repr(value.imag)]}
    if kind is type and value in _TYPES.values():
        return {"type": value.__name__}
    if kind is Stranger:
        return {"stranger": value._reference}
    for base, exact in _EXACT.items():
        if isinstance(value, base):
            return encoded(exact(value), keep)
    numpys = kind.__module__ == "numpy"
    if numpys and value.shape == ():  # a numpy scalar
        return encoded(value.item(), keep)
    if numpys or isinstance(value, _ITERATED):
        items = [*islice(value, MAX_ITEMS + 1)]
        if len(items) <= MAX_ITEMS:
            return {"iterator": [encoded(item, keep) for item in items]}
    return {"stranger": keep(value)}


def decoded(form: Any, find: Callable[[Any], object]) -> Any:
    """The value that a JSON form stands for, of plain types only. `find` returns the object of a stranger's reference.

    Raises:
        ValueError, TypeError, LookupError: the form stands for no value.
    """
    if isinstance(form, list):
        return [decoded(item, find) for item in form]
    if not isinstance(form, dict):
        return form
    ((kind, given),) = form.items()
    if kind == "dict":
        return {decoded(key, find): decoded(item, find) for key, item in given}
    if kind in _COLLECTIONS:
        return _COLLECTIONS[kind](decoded(item, find) for item in given)
    if kind == "complex":
        return complex(float(given[0]), float(given[1]))
    return find(given) if kind == "stranger" else _SCALARS[kind](given)


def _items(items: Iterator[object]) -> Iterator[object]:
    return iter(list(items))


_COLLECTIONS: dict[str, Callable[[Iterator[Any]], object]] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": _items,
}  # fmt: skip
_SCALARS: dict[str, Callable[[str], object]] = {
    "int": lambda digits: int(digits, 16), "float": float, "bytes": bytes.fromhex,
    "type": _TYPES.__getitem__,
}  # fmt: skip


def candidate(source: str, requests: BinaryIO, answers: BinaryIO, call_s: float) -> None:
    """Run a program, then answer calls of its functions until no more come.

    A call that takes more than `call_s` seconds of CPU time (0: no limit) ends the process, as the limit on all calls
    does. This limit is for slow programs, not for hostile ones: a hostile program can stop the timer, but not the limit
    on all calls.
    """
    scope: dict[str, Any] = {}
    kept: list[object] = []

    def keep(value: object) -> int:
        kept.append(value)
        return len(kept) - 1

    def find(reference: int | str) -> Any:
        if isinstance(reference, int):
            return kept[reference]
        if reference not in scope:
            raise NameError(f"name {reference!r} is not defined")
        return scope[reference]

    def answer(*form: object) -> None:
        answers.write(json.dumps(form).encode() + b"\n")
        answers.flush()

    signal.signal(signal.SIGPROF, lambda number, frame: os.kill(os.getpid(), signal.SIGXCPU))
    exec(compile(source, "<program>", "exec", dont_inherit=True), scope)
    answer(True, None)
    for line in requests:
        try:
            reference, args, kwargs = json.loads(line)
            function, given = find(reference), decoded(args, find)
            named = {name: decoded(value, find) for name, value in kwargs.items()}
            signal.setitimer(signal.ITIMER_PROF, call_s)
            try:
                result = encoded(function(*given, **named), keep)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except Exception as error:
            sys.excepthook(*sys.exc_info())
            answer(False, type(error).__name__, str(error.args[0] if len(error.args) == 1 else error))
        else:
            answer(True, result)


def tests(source: str, names: list[str], requests: BinaryIO, answers: BinaryIO, say: Callable[[bytes], object]) -> None:
    """Run tests in which `names` stand for the candidate's functions, and report when the tests have come to their end.
    An answer that is invalid ends the process, because tests could take an exception for one that they expect."""

    def leave(why: str, said: bytes = b"") -> Never:
        say(said)
        sys.stderr.write(f"{why}\n")
        sys.stderr.flush()
        os._exit(1)

    def read() -> object:
        line = answers.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            leave("the answer is too long" if len(line) == MAX_LINE else "the candidate ended", b"" if line else GONE)
        try:
            done, *form = json.loads(line, parse_constant=_no_constant)
            if done is True:
                (result,) = form
                return decoded(result, stranger)
            name, message = map(str, form)
        except Exception as error:
            leave(f"the answer is none: {error!r}"[:200])
        raise _raised(name, message)

    def call(reference: int | str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        given = {name: encoded(value, _keep_none) for name, value in kwargs.items()}
        line = json.dumps([reference, encoded(list(args), _keep_none), given]).encode() + b"\n"
        try:
            requests.write(line)
            requests.flush()
        except BrokenPipeError:
            leave("the candidate ended", GONE)
        return read()

    def stranger(reference: int | str) -> Stranger:
        return Stranger(call, reference)

    read()
    exec(compile(source, "<tests>", "exec", dont_inherit=True), {name: stranger(name) for name in names})
    say(PASSED)
    os._exit(0)  # at once: cleaning up would only take time


def _raised(name: str, message: str) -> Exception:
    """An exception by its name, if it is one of Python's own. Not StopIteration, which would end a test's loop
    silently."""
    kind = getattr(builtins, name, None)
    known = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, StopIteration)
    try:
        return kind(message) if known and kind is not None else RuntimeError(f"{name}: {message}")
    except TypeError:  # UnicodeDecodeError and similar ones need more than a message
        return RuntimeError(f"{name}: {message}")


def _keep_none(value: object) -> int:
    raise TypeError(f"a test may pass plain data only, not {type(value).__name__}")


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON")


def main() -> None:
    """Entry point. Arguments: role, numpy's folder, limits (bytes, seconds, seconds per call), file descriptors
    (program, report of the begin and, from tests, of the end; requests, answers), names."""
    role, site, memory, seconds, call_s, program, word, requests, answers, *names = sys.argv[1:]
    with open(int(program), "rb") as file:  # closed before the program runs
        source = file.read().decode("utf-8", "surrogatepass")
    sys.path.append(site)
    cpu_s = int(seconds) + 1 + int(sum(os.times()[:2]))
    limits = {"AS": int(memory), "FSIZE": 0, "CORE": 0, "NOFILE": 64, "NPROC": 1}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    os.write(int(word), BEGUN)
    if role == "candidate":
        os.close(int(word))
        with open(int(requests), "rb") as asked, open(int(answers), "wb") as said:
            candidate(source, asked, said, float(call_s))
    else:
        with open(int(requests), "wb") as ask, open(int(answers), "rb") as told:
            tests(source, names, ask, told, lambda what: os.write(int(word), what))


if __name__ == "__main__":
    main()
