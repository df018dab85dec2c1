"""Models and profiles side by side: what each costs, what changed between two, and whether one keeps a budget.

`flopprof.compare` is the function of that name too: what is called is `flopprof.compare.run.compare`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flopprof.compare.budget import Budget, Excess, Limit, Verdict
from flopprof.compare.difference import Change, Difference, diff

if TYPE_CHECKING:
    from flopprof.compare.comparison import Comparison as Comparison
    from flopprof.compare.comparison import Row as Row
    from flopprof.compare.run import compare as compare

_HOME = {
    "Comparison": "flopprof.compare.comparison",
    "Row": "flopprof.compare.comparison",
    "compare": "flopprof.compare.run",
}
__all__ = [
    "Budget",
    "Change",
    "Comparison",
    "Difference",
    "Excess",
    "Limit",
    "Row",
    "Verdict",
    "compare",
    "diff",
]


def __getattr__(name: str) -> Any:  # the value is whatever the public name is
    if name not in _HOME:
        raise AttributeError(f"module 'flopprof.compare' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


class _Callable(ModuleType):
    """A package that is also a function: importing any part of it binds it over the function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compare(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
