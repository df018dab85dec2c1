"""What stands in for scaled_dot_product_attention: the products of unfused causal attention do not know their mask.

It is told from the original by identity alone: name, module, equality and hash are the original's, and overrides
(`__torch_function__` of arguments, function modes) get it as the function, since they compare with what they find in
`torch.nn.functional`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from flopprof.counting.foreign import symbols_counted
from flopprof.formulas.attention import count_pairs

_NAMES = ("query", "key", "value", "attn_mask")
_CAUSAL = 5  # position of is_causal


class Attention:
    """Calls the original, its products masked for every open counter; after `leave`, the original and nothing else."""

    def __init__(self, original: Callable[..., Any], counting: Callable[[], list[Any]]) -> None:
        while isinstance(original, Attention):  # one that was put back after its counter had left
            original = original.__wrapped__
        self.__wrapped__: Callable[..., Any] = original
        self._counting = counting
        self._standing = True
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(self, name, getattr(original, name, None))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns."""
        original = self.__wrapped__
        if isinstance(original, BuiltinFunctionType):  # another function asks for overrides itself, or does not
            given = (*args[: len(_NAMES)], *(kwargs[name] for name in _NAMES if name in kwargs))
            if has_torch_function(given):
                if any(map(_knows_the_original, given)):
                    return original(*args, **kwargs)
                return handle_torch_function(self, given, *args, **kwargs)
        if torch.compiler.is_compiling():  # a compiler folds the rest away
            return original(*args, **kwargs)
        pairs = _visible(args, kwargs) if self._standing else None
        counters = self._counting() if pairs is not None else []
        calls = [(counter, counter.where.enter(None, visible=pairs)) for counter in counters]
        try:
            return original(*args, **kwargs)
        finally:
            for counter, call in reversed(calls):
                counter.where.leave(call)

    def __eq__(self, other: object) -> bool:
        return other is self or bool(self.__wrapped__ == other)

    def __hash__(self) -> int:
        return hash(self.__wrapped__)

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    def __reduce__(self) -> Any:  # what is copied or saved is the original
        return copy.copy, (self.__wrapped__,)

    def leave(self) -> None:
        """Stand in no longer, wherever it may still be held."""
        self._standing = False


def _knows_the_original(item: Any) -> bool:
    """A proxy writes it into a graph, which outlives this; nested tensors find it in torch's own bindings."""
    return isinstance(item, torch.fx.Proxy) or (isinstance(item, torch.Tensor) and item.is_nested)


def _visible(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Of all pairs of a query and a key (second), how many a causal mask lets through (first); None: no such mask."""
    causal = args[_CAUSAL] if len(args) > _CAUSAL else kwargs.get("is_causal", False)
    if causal is not True or torch._C._get_tracing_state() is not None:  # a traced size is an operator of the trace
        return None
    query, key = (args[i] if len(args) > i else kwargs.get(_NAMES[i]) for i in (0, 1))
    if not isinstance(query, torch.Tensor) or not isinstance(key, torch.Tensor) or query.is_nested or key.is_nested:
        return None
    if query.dim() < 2 or key.dim() < 2:  # the original refuses it
        return None
    sizes = query.shape[-2], key.shape[-2]
    if not all(type(size) is int for size in sizes) and not symbols_counted():
        return None
    everything, seen = count_pairs([sizes], 1, (None, 0))
    assert seen is not None  # the window is given
    return seen, everything
