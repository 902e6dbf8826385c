"""safecl: which continual-learning method keeps a fine-tuned language model safe, and what it costs in usefulness.

In Python: `safecl.plan(SWEEP)` and `safecl.run(SWEEP)` do what the commands do; `safecl.results(SWEEP)` and
`safecl.generations(SWEEP)` are a sweep's numbers and answers as pandas frames.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safecl.api import plan as plan
    from safecl.api import run as run
    from safecl.frames import generations as generations
    from safecl.frames import results as results

_FROM = {
    "plan": "api",
    "run": "api",
    "results": "frames",
    "generations": "frames",
}  # imported when they are first asked for: the package stays light


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'safecl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"safecl.{_FROM[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FROM])
