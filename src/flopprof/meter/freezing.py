"""Sees parameters frozen and thawed, so that no step need ask each of them whether it wants a gradient.

Asking reads three cold lines of memory for each: a fifth of what metering costs. Reading `requires_grad` goes to
torch's own getter still. Classes derived from torch.nn.Parameter keep theirs: compilers take a property of a class of
the user's for his.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from flopprof.counting.imports import replaced

_flag: Any = torch._C.TensorBase.requires_grad  # the descriptor
_wants = _flag.__get__
_METHODS = ("requires_grad_", "detach_")


def seen(parameter: torch.Tensor) -> bool:
    """Is it told when this one is frozen or thawed? Not of other classes (sharded, quantised), which must be asked."""
    return type(parameter) is torch.nn.Parameter


def see(changed: Callable[[], object]) -> Callable[[], None]:
    """`changed` is told from now on, until what this returns is called."""

    def assign(self: torch.nn.Parameter, value: Any) -> None:
        before = _wants(self)
        _flag.__set__(self, value)
        if _wants(self) is not before:
            changed()

    def telling(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: torch.nn.Parameter, *args: Any, **kwargs: Any) -> Any:
            before = _wants(self)
            result = original(self, *args, **kwargs)
            if _wants(self) is not before:
                changed()
            return result

        return method

    kind = torch.nn.Parameter
    undo = [replaced(each, name, found) for each, name, found in _kept_by(kind.__subclasses__())]
    undo.append(replaced(kind, "requires_grad", property(_wants, assign, _flag.__delete__, _flag.__doc__)))
    undo += [replaced(kind, name, telling(getattr(torch._C.TensorBase, name))) for name in _METHODS]

    def leave() -> None:
        while undo:
            undo.pop()()

    return leave


def _kept_by(kinds: Iterable[type]) -> list[tuple[type, str, Any]]:
    """What each of these classes does not define itself."""
    names = ("requires_grad", *_METHODS)
    return [
        (kind, name, inspect.getattr_static(kind, name)) for kind in kinds for name in names if name not in vars(kind)
    ]
