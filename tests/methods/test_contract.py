"""The contract (safecl.testing), over every file of methods/."""

from __future__ import annotations

from typing import Any

from safecl import methods
from safecl.testing import MethodContract

for _name in methods.names():
    _class: Any = type(f"Test_{_name}", (MethodContract,), {"method": _name, "__module__": __name__})
    globals()[_class.__name__] = _class
