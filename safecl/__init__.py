"""safecl: which continual-learning method keeps a fine-tuned language model safe, and what it costs in usefulness.

In Python: `safecl.plan(SWEEP)` and `safecl.run(SWEEP)` do what the commands do.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safecl.api import plan as plan
    from safecl.api import run as run

_FROM = {
    "plan": "api",
    "run": "api",
}  # imported when they are first asked for: the package stays light


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'safecl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"safecl.{_FROM[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FROM])
