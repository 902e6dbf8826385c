"""The syntax of a search space: the forms that a method's `search` allows for each parameter."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from safecl.base import Json
from safecl.store import canonical


def space_check(space: Mapping[str, Json], defaults: Mapping[str, Json] | None = None) -> list[str]:
    """All errors of a search space, one line each; empty if there is none.

    Forms: a list is a choice. `{low, high}` or `{low, high, log: true}` is a float range. `{low, high, step}` is an int
    range, ends included; it may be logarithmic if step is 1. With `defaults`, every searched parameter must have a
    default within the space, because trial 0 runs the defaults.
    """
    errors = []
    for name, form in space.items():
        problem = _form_problem(form)
        if problem is None and defaults is not None:
            if name not in defaults:
                problem = "is searched but has no default; expected one in the method's `config`: trial 0 runs it"
            elif not _contains(form, defaults[name]):
                problem = (
                    f"does not hold the default {json.dumps(defaults[name])}, which trial 0 runs; "
                    f"widen {json.dumps(form)} or set another default in `config`"
                )
        if problem is not None:
            errors.append(f"search.{name}: {problem}")
    return errors


def _form_problem(form: Json) -> str | None:
    forms = "a list, {low, high}, {low, high, log: true} or {low, high, step}"
    if isinstance(form, list | tuple):
        texts = [canonical(choice) for choice in form]
        if not texts:
            return "is an empty list; expected at least one choice"
        twice = sorted({text for text in texts if texts.count(text) > 1})
        return f"names {', '.join(twice)} more than once" if twice else None
    if not isinstance(form, dict):
        return f"expected {forms}, got {json.dumps(form)}"
    unknown = sorted(set(form) - {"low", "high", "log", "step"})
    missing = [key for key in ("low", "high") if key not in form]
    if unknown or missing:
        return f"expected {forms}, got " + ", ".join([f"no {k!r}" for k in missing] + [f"{k!r}" for k in unknown])
    numbers = ("low", "high", "step") if "step" in form else ("low", "high")
    kind: Any = int if "step" in form else (int, float)
    for key in numbers:
        value = form[key]
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            wanted = "an int (a range with `step` is of ints)" if "step" in form else "a number"
            return f"{key} is {json.dumps(value)}; expected {wanted}"
    low, high, step, log = form["low"], form["high"], form.get("step"), form.get("log", False)
    if not isinstance(log, bool):
        return f"log is {json.dumps(log)}; expected true or false"
    if low > high:  # type: ignore[operator]
        return f"low {low} is above high {high}"
    if log and step not in (None, 1):
        return f"has both `log` and `step: {step}`; expected one of them (or step: 1, a logarithmic range of ints)"
    if log and low <= 0:  # type: ignore[operator]
        return f"is logarithmic but low is {low}; expected low > 0"
    if step is not None and (step < 1 or (high - low) % step):  # type: ignore[operator]
        return f"step {step} does not lead from low {low} to high {high}; expected high = low + k * step"
    return None


def _contains(form: Json, value: Json) -> bool:
    if isinstance(form, list | tuple):
        return canonical(value) in [canonical(choice) for choice in form]
    assert isinstance(form, dict)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high, step = form["low"], form["high"], form.get("step")
    inside = bool(low <= value <= high)  # type: ignore[operator]
    if step is None:
        return inside
    return inside and isinstance(value, int) and (value - low) % step == 0  # type: ignore[operator]
