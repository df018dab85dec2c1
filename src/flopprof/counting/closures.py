"""The closure among the arguments of an optimizer's step, and what stands in for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch

_KEYWORD = "closure"


def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where the closure is, by position or keyword: the step's parameter of that name, or else its first function.

    args begin with the optimizer. None where there is no closure: a module is none, nor is any other callable.
    """
    if _closes(kwargs.get(_KEYWORD)):
        return _KEYWORD
    if len(args) < 2:  # the optimizer alone
        return None
    try:
        parameters = list(inspect.signature(type(args[0]).step).parameters)
    except (AttributeError, TypeError, ValueError):  # no step of its own, or one of a compiled extension
        parameters = []
    if _KEYWORD in parameters:
        position = parameters.index(_KEYWORD)
        return position if position < len(args) and _closes(args[position]) else None
    return 1 if isinstance(args[1], FunctionType | MethodType) else None


def _closes(value: Any) -> bool:
    return callable(value) and not isinstance(value, torch.nn.Module)


class Closure:
    """A closure that is called through `call`: attributes, class, signature, equality are those of the closure."""

    __slots__ = ("_call", "_closure")

    def __init__(self, closure: Any, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_closure", closure)
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `call` returns, mostly the closure's loss."""
        return object.__getattribute__(self, "_call")(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_closure"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_closure"), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(object.__getattribute__(self, "_closure"), name)

    def __eq__(self, other: object) -> bool:
        return other is self or bool(object.__getattribute__(self, "_closure") == other)

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_closure"))
