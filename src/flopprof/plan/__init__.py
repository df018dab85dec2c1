"""Plan training or serving: from some of model, tokens, FLOPs, devices, days, money and MFU, the rest. No torch.

`flopprof.plan` is the function of that name too: what is called is `flopprof.plan.make.plan`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flopprof.plan.make import plan as plan
    from flopprof.plan.result import Plan as Plan

_HOME = {"Plan": "flopprof.plan.result", "plan": "flopprof.plan.make"}
__all__ = ["Plan", "plan"]


def __getattr__(name: str) -> Any:  # the value is whatever the public name is
    if name not in _HOME:
        raise AttributeError(f"module 'flopprof.plan' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


class _Callable(ModuleType):
    """A package that is also a function: importing any part of it binds it over the function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
