"""Methods, tasks, judges and metrics by name, from three sources:

    safecl's own     one file per name: `methods/der.py` holds `Der`, called `der`
    installed        entry points of the groups `safecl.methods`, `safecl.tasks`, `safecl.judges` and `safecl.metrics`
    plugins          files that a sweep names: each class in them that subclasses Method, Task or Judge (`MyMethod` is
                     called `my_method`), and each Metric at the top level

A class from outside safecl carries a hash of its content in its `VERSION` (see `_stamp`). The hash is therefore in the
identity of each stage that uses the class, and of no other stage. The path of the file is not part of an identity. A
stage sends the plugins that its version names to the process that runs it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, packages_distributions
from importlib.metadata import version as installed_version
from pathlib import Path
from threading import Lock
from traceback import extract_tb
from types import ModuleType
from typing import TYPE_CHECKING, Any

from safecl.base import ConfigError, PrerequisiteError, Strict, near

if TYPE_CHECKING:
    from safecl.metrics import Metric

KINDS = {
    "methods": "Method",
    "tasks": "Task",
    "judges": "Judge",
}  # a package of safecl, and the base class of what is in it
VERSIONS = ("VERSION", "SCORING")  # attributes that enter the identity of stages
HINT = "plugins"  # key in a stage's hints: the plugins that it needs, as JSON


@dataclass(frozen=True)
class Plugin:
    """A file of a sweep's `plugins`, with the content it had when it was read. `path` is for people and in no
    identity."""

    path: str
    source: str

    @cached_property
    def tag(self) -> str:
        """The text that is added to the `VERSION` of its classes: `plugin:` and a SHA-256 hash of the source."""
        return f"plugin:{hashlib.sha256(self.source.encode()).hexdigest()}"


@dataclass
class _Process:
    """The plugins that this process knows. It is global state, like `sys.path`, because names are looked up
    everywhere."""

    plugins: tuple[Plugin, ...] = ()
    lock: Lock = field(default_factory=Lock)


_process = _Process()


def use(paths: Iterable[str]) -> None:
    """From now on this process knows the plugins in these files, and no others.

    Raises:
        ConfigError: one line per file that is missing, cannot be imported, holds no class or metric of a known kind, or
            holds a class that lacks something; or a name is taken.
    """
    _process.plugins = read(paths)


def read(paths: Iterable[str]) -> tuple[Plugin, ...]:
    """The plugins in these files. Raises as `use` does."""
    plugins, errors = [], []
    for i, path in enumerate(paths):
        try:
            plugins.append(_read(path))
            _refuse_neighbours(plugins[-1])
            _classes(plugins[-1])
        except ConfigError as error:
            errors.append(f"plugins[{i}]: {error}")
    found = tuple(dict.fromkeys(plugins))
    try:
        for kind in KINDS if not errors else ():
            _known(kind, found)
        _metric_sources(found if not errors else ())
    except ConfigError as error:
        errors.append(f"plugins: {error}")
    if errors:
        raise ConfigError("\n".join(errors))
    return found


def add(plugins: Iterable[Plugin]) -> None:
    """Add plugins to those that this process knows. If two have a class or metric of one name, only the later plugin is
    kept."""
    with _process.lock:  # light stages run as threads of one process
        for plugin in plugins:
            if plugin not in _process.plugins:
                kept = [old for old in _process.plugins if not _names_of(old) & _names_of(plugin)]
                _process.plugins = (*kept, plugin)


def in_use() -> tuple[Plugin, ...]:
    """The plugins that this process knows."""
    return _process.plugins


def hints(version: str) -> dict[str, str]:
    """The hints of a stage of this version: the plugins that the version names. Empty if it names none."""
    if not _process.plugins:
        return {}
    used = [plugin for plugin in _process.plugins if plugin.tag in version]
    return {HINT: _text(tuple(used))} if used else {}


def prepare(version: str, given: Mapping[str, str]) -> None:
    """Make the plugins in a stage's hints known to this process, which runs a stage of this version.

    Raises:
        PrerequisiteError: an installed package that the stage uses is missing here, or has another version.
    """
    if HINT in given:
        add(Plugin(path, source) for path, source in json.loads(given[HINT]))
    for package, planned in re.findall(r"installed:(.+?)==(.+?):[0-9a-f]{64}", version):
        try:
            here = installed_version(package)
        except PackageNotFoundError:
            here = "none"
        if here != planned:
            raise PrerequisiteError(
                f"this node has version {here} of package {package}, and the sweep was planned with {planned}"
            )


def metrics() -> dict[str, Metric]:
    """Metrics from outside safecl, by name. Their `version` contains a hash of their content.

    Raises:
        ConfigError: a metric cannot be imported, or its name is taken.
    """
    return _metrics(_process.plugins)


def tags(version: str) -> list[str]:
    """The parts of a version that name content from outside safecl."""
    return re.findall(r"(?:plugin|installed:.+?):[0-9a-f]{64}", version)


def names(kind: str) -> tuple[str, ...]:
    """All names of a kind (`methods`, ...), sorted. Imports no module of safecl's own that is not imported yet."""
    return _names(kind, _process.plugins)


def load(kind: str, name: str) -> type:
    """The class of a kind called `name`.

    Raises:
        ConfigError: there is none (the message suggests a similar name), it cannot be imported, or it lacks a
            declaration.
    """
    return _load(kind, name, _process.plugins)


def origin(kind: str, name: str) -> str:
    """Where a name comes from, as text: `safecl`, a package and its version, or a file."""
    known = _metric_sources(_process.plugins) if kind == "metrics" else _known(kind, _process.plugins)
    found = known.get(name)
    if isinstance(found, Plugin):
        path = Path(found.path)
        return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return "safecl" if found is None else _distribution(found)


# -- how -----------------------------------------------------------------------------------------------------------------


def _read(path: str) -> Plugin:
    file = Path(path)
    try:
        return Plugin(path, file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        hint = near(file.name, [other.name for other in file.parent.glob("*.py")])
        raise ConfigError(f"no file {path!r}.{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


@cache
def _text(plugins: tuple[Plugin, ...]) -> str:
    return json.dumps([[plugin.path, plugin.source] for plugin in plugins])


@cache
def _module(plugin: Plugin) -> ModuleType:
    """The module of a plugin's source. It is put into `sys.modules`, where pydantic looks up the names in
    annotations."""
    module = ModuleType(f"safecl_plugin_{plugin.tag[-16:]}_{Path(plugin.path).stem}")
    module.__file__ = plugin.path
    sys.modules[module.__name__] = module
    try:
        exec(compile(plugin.source, plugin.path, "exec"), module.__dict__)
    except SyntaxError as error:
        del sys.modules[module.__name__]
        raise ConfigError(f"{plugin.path}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == plugin.path]
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{plugin.path}, line {lines[-1] if lines else '?'}: {told}") from None
    return module


def _refuse_neighbours(plugin: Plugin) -> None:
    """Raises ConfigError if a plugin imports a module of its own folder that is not part of an installed package."""
    folder, found = Path(plugin.path).parent, set[str]()
    try:
        tree = ast.parse(plugin.source)
    except SyntaxError:  # reported when the source is run
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
    found -= {"", "safecl", *sys.stdlib_module_names}
    found = {name for name in found if (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()}
    if found and (own := found - packages_distributions().keys()):
        raise ConfigError(
            f"{plugin.path} imports {min(own)!r}, which lies beside it: what that holds would be in no result's identity, and on "
            "no other machine. Put both into one file, or install a package"
        )


@cache
def _classes(plugin: Plugin) -> dict[tuple[str, str], type]:
    """A plugin's classes by kind and name. Classes whose name begins with `_` are ignored."""
    module = _module(plugin)
    found: dict[tuple[str, str], type] = {}
    for kind in KINDS:
        base = _base(kind)
        for value in vars(module).values():
            if not isinstance(value, type) or not issubclass(value, base) or value.__name__.startswith("_"):
                continue
            if value.__module__ == module.__name__:
                if found.get(name := (kind, _snake(value.__name__)), value) is not value:
                    raise ConfigError(f"{plugin.path} holds two {kind} called {name[1]!r}; give one another name")
                found[name] = _checked(value, base, plugin.path, plugin.tag)
    if not found and not _metrics_of(plugin):
        bases = ", ".join(f"safecl.{kind}.{name}" for kind, name in KINDS.items())
        raise ConfigError(
            f"{plugin.path} holds nothing that safecl knows; expected a class that subclasses one of {bases}, or a "
            "safecl.metrics.Metric"
        )
    return found


def _names_of(plugin: Plugin) -> set[tuple[str, str]]:
    return {*_classes(plugin), *(("metrics", name) for name in _metrics_of(plugin))}


@cache
def _metrics_of(plugin: Plugin) -> dict[str, Any]:
    """A plugin's metrics. Metrics whose variable begins with `_` are ignored."""
    made = [value for name, value in vars(_module(plugin)).items() if _is_metric(value) and not name.startswith("_")]
    return {each.name: _versioned(each, plugin.tag) for each in made}


def _is_metric(value: Any) -> bool:
    return isinstance(value, importlib.import_module("safecl.metrics").Metric)


def _versioned(metric: Any, tag: str) -> Any:
    """The metric with the tag in its version. It is measured only where a sweep names it. Otherwise results would
    depend on what is installed."""
    return replace(metric, version=f"{metric.version}+{tag}", is_always_measured=False)


@cache
def _metric_sources(plugins: tuple[Plugin, ...]) -> dict[str, Plugin | EntryPoint]:
    """Where each metric from outside safecl comes from. Raises ConfigError if a name is taken."""
    found: dict[str, Plugin | EntryPoint] = {}
    own = {metric.name for metric in importlib.import_module("safecl.metrics").METRICS}
    outside: list[tuple[str, Plugin | EntryPoint]] = [(entry.name, entry) for entry in _installed("metrics")]
    outside += [(name, plugin) for plugin in plugins for name in _metrics_of(plugin)]
    for name, source in outside:
        if name in own or name in found:
            whose = "is safecl's own" if name in own else f"is in {_told(found[name])} too"
            raise ConfigError(f"{_told(source)}: metric {name!r} {whose}; give it another name")
        found[name] = source
    return found


@cache
def _metrics(plugins: tuple[Plugin, ...]) -> dict[str, Any]:
    return {
        name: _metrics_of(source)[name] if isinstance(source, Plugin) else _metric_of_package(name, source)
        for name, source in _metric_sources(plugins).items()
    }


def _metric_of_package(name: str, entry: EntryPoint) -> Any:
    where = f"package {_distribution(entry)}, {entry.value}"
    try:
        found = entry.load()
        content = Path(str(importlib.import_module(entry.module).__file__)).read_bytes()
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{where}: cannot be imported ({told})") from None
    if not _is_metric(found) or found.name != name:
        raise ConfigError(f"{where}: expected a safecl.metrics.Metric called {name!r}, got {found!r}")
    return _versioned(
        found, f"installed:{_distribution(entry).replace(' ', '==')}:{hashlib.sha256(content).hexdigest()}"
    )


def _snake(name: str) -> str:
    """`MyMethod` -> `my_method`, `Sst2` -> `sst2`, `MyDER` -> `my_der`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _base(kind: str) -> Any:
    return getattr(importlib.import_module(f"safecl.{kind}"), KINDS[kind])


def _checked(found: type, base: Any, where: str, tag: str) -> type:
    """The class with its tag, if it declares everything that `MUST` of the base class lists."""
    name = found.__name__
    lacks = [need for need in base.MUST if all(_same(found, base, one) for one in need.split(" or "))]
    if lacks:
        raise ConfigError(
            f"{where}: class {name} must declare {', '.join(lacks)} (see {base.__module__}.{base.__name__})"
        )
    config = getattr(found, "Config", Strict)
    if not (isinstance(config, type) and issubclass(config, Strict)):
        raise ConfigError(f"{where}: {name}.Config must subclass safecl.base.Strict")
    _stamp(found, where, tag)
    return found


def _same(found: type, base: type, name: str) -> bool:
    return bool(getattr(found, name) == getattr(base, name))


def _stamp(found: type, where: str, tag: str) -> None:
    """Append the content's tag to the class's versions, so that no stage built from them can omit it. A version
    inherited from a class of safecl stays in front, so a change of that class changes the identity too."""
    for name in VERSIONS:
        own = getattr(found, name, None)
        if own is None:
            continue
        if not isinstance(own, str):
            raise ConfigError(f"{where}: {found.__name__}.{name} must be text, got {own!r}")
        if tag not in own:
            setattr(found, name, f"{own}+{tag}")


@cache  # listing a folder takes longer than everything else in a plan
def _own(kind: str) -> frozenset[str]:
    package = importlib.import_module(f"safecl.{kind}")
    return frozenset(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


@cache
def _installed(kind: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=f"safecl.{kind}"))


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


@cache
def _known(kind: str, plugins: tuple[Plugin, ...]) -> dict[str, Plugin | EntryPoint | None]:
    """Where each name comes from; None means safecl's own. Raises ConfigError if a name is taken."""
    known: dict[str, Plugin | EntryPoint | None] = dict.fromkeys(_own(kind))
    for name, source in _outside(kind, plugins):
        if name in known:
            first, here = known[name], _told(source)
            whose = "is safecl's own" if first is None else f"is in {_told(first)} too"
            raise ConfigError(f"{here}: {kind[:-1]} {name!r} {whose}; give it another name")
        known[name] = source
    return known


def _outside(kind: str, plugins: Sequence[Plugin]) -> Iterator[tuple[str, Plugin | EntryPoint]]:
    for entry in _installed(kind):
        yield entry.name, entry
    for plugin in plugins:
        yield from ((name, plugin) for of, name in _classes(plugin) if of == kind)


def _told(source: Plugin | EntryPoint) -> str:
    return source.path if isinstance(source, Plugin) else f"package {_distribution(source)}"


@cache
def _names(kind: str, plugins: tuple[Plugin, ...]) -> tuple[str, ...]:
    return tuple(sorted(_known(kind, plugins)))


@cache
def _load(kind: str, name: str, plugins: tuple[Plugin, ...]) -> type:
    known = _known(kind, plugins)
    if name not in known:
        raise ConfigError(f"unknown {kind[:-1]} {name!r}.{near(name, known)} Available: {', '.join(sorted(known))}")
    source = known[name]
    if isinstance(source, Plugin):
        return _classes(source)[kind, name]
    if source is not None:
        return _from_package(kind, source)
    module = importlib.import_module(f"safecl.{kind}.{name}")
    found: type = getattr(module, "".join(part.capitalize() for part in name.split("_")))
    return found


def _from_package(kind: str, entry: EntryPoint) -> type:
    """The class of an entry point. Its tag holds the distribution's version and a hash of the file's content."""
    where = f"package {_distribution(entry)}, {entry.value}"
    try:
        found = entry.load()
        file = inspect.getsourcefile(found)
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{where}: cannot be imported ({told})") from None
    base = _base(kind)
    if not (isinstance(found, type) and issubclass(found, base)) or file is None:
        raise ConfigError(
            f"{where}: expected a subclass of safecl.{kind}.{KINDS[kind]} in a Python file, got {found!r}"
        )
    content = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return _checked(found, base, where, f"installed:{_distribution(entry).replace(' ', '==')}:{content}")
