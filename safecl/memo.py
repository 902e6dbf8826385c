"""Values that recipes of one sweep have in common are computed once: `@shared(*fields)` on a method of graph.Graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from operator import attrgetter
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from safecl import registry

Made = TypeVar("Made")


class Shared:
    """Values that the graphs of one sweep share.

    `folder`: of local data files; None: the hub. `data`: tasks that the sweep file writes. `planned`: see
    tasks._source.identity.
    """

    def __init__(self, folder: Path | None, data: tuple[Any, ...] = (), planned: bool = False) -> None:
        self.folder, self.data, self.planned = folder, data, planned
        self.made: dict[Hashable, Any] = {}
        self.kept: list[object] = []  # objects whose ids are in the keys of `made` and `parts`, kept alive
        self.sources: list[Any] = []  # what data the stages read (tasks._source.identity)
        self.parts: dict[tuple[int, ...], int] = {}  # ids of the objects that recipes hold -> a number

    def part(self, recipe: object, held: tuple[object, ...]) -> int:
        """A number for the objects that a recipe holds. It is equal for recipes that hold the same objects."""
        ids = tuple(map(id, held))
        if ids not in self.parts:
            self.kept.append(recipe)
            self.parts[ids] = len(self.parts)
        return self.parts[ids]

    def once(self, what: Hashable, of: object, make: Callable[[], Made]) -> Made:
        """The result of `make` for one object, computed once."""
        key = (what, id(of))
        if key not in self.made:
            self.kept.append(of)
            self.made[key] = make()
        found: Made = self.made[key]
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _elsewhere, (self.folder, self.data, registry.in_use())  # another process computes its own values


def _elsewhere(folder: Path | None, data: tuple[Any, ...], plugins: tuple[registry.Plugin, ...]) -> Shared:
    registry.add(plugins)
    return Shared(folder, data)


class _Graph(Protocol):
    """The part of graph.Graph that `shared` uses. `parts`: results of `Shared.part` by names of fields; empty at
    first."""

    recipe: Any
    shared: Shared
    parts: dict[str, int]


P = ParamSpec("P")
G = TypeVar("G", bound=_Graph)


def shared(*fields: str) -> Callable[[Callable[Concatenate[G, P], Made]], Callable[Concatenate[G, P], Made]]:
    """Decorator: compute a method's result once for all recipes of a sweep that hold the same objects in `fields` (two
    or more). The result may depend on nothing else."""
    read: Callable[[Any], tuple[object, ...]] = attrgetter(*fields)
    names = " ".join(fields)

    def wrap(make: Callable[Concatenate[G, P], Made]) -> Callable[Concatenate[G, P], Made]:
        @wraps(make)
        def get(self: G, /, *args: P.args, **kwargs: P.kwargs) -> Made:
            if (part := self.parts.get(names)) is None:
                part = self.parts[names] = self.shared.part(self.recipe, read(self.recipe))
            key, made = (make, part, args, *kwargs.items()) if kwargs else (make, part, args), self.shared.made
            if key not in made:
                made[key] = make(self, *args, **kwargs)
            found: Made = made[key]
            return found

        return get

    return wrap
