"""Inference: FLOPs, cache and bytes of a prefill, of a decoded token, or of a whole generation. Lazily, as the package.

`flopprof.inference` is the function of that name too: what is called is `flopprof.inference.run.inference`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flopprof.inference.result import Inference as Inference
    from flopprof.inference.run import inference as inference

_HOME = {"Inference": "flopprof.inference.result", "inference": "flopprof.inference.run"}
__all__ = ["Inference", "inference"]


def __getattr__(name: str) -> Any:  # the value is whatever the public name is
    if name not in _HOME:
        raise AttributeError(f"module 'flopprof.inference' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


class _Callable(ModuleType):
    """A package that is also a function: importing any part of it binds it over the function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inference(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
