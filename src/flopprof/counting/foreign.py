"""Arguments that are not counted as they come: subclasses with a dispatch of their own, and symbolic sizes."""

from __future__ import annotations

from typing import Any

import torch

SYMBOLIC = "its sizes are symbolic: what is traced so is counted when it runs"

_plain_dispatch = torch._C._disabled_torch_dispatch_impl
_SHAPES_ONLY = frozenset({"FakeTensor"})  # stands for a plain tensor: counted here, by its shapes
_FUNCTIONAL = "FunctionalTensor"
_unhashable = torch.SymInt.__hash__


def foreign(types: Any) -> bool:
    """Does a tensor subclass with its own dispatch take part? Then its inner operators are counted, not it."""
    for cls in types:
        dispatch = cls.__torch_dispatch__
        if dispatch is not _plain_dispatch and cls is not torch.Tensor and cls.__name__ not in _SHAPES_ONLY:
            return True
    return False


def functional(types: Any) -> bool:
    """Is this a trace that takes mutation away? Its own mode, below every other, then handles its tensors."""
    return (
        any(cls.__name__ == _FUNCTIONAL for cls in types)
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None
    )


def inner(tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """The tensors that hold a wrapper's elements, by attribute; None of a tensor that has no such method."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return None
    found = {name: getattr(tensor, name) for name in flatten()[0]}
    return {name: part for name, part in found.items() if isinstance(part, torch.Tensor)}


def symbolic(args: Any, kwargs: Any) -> bool:
    """Has a tensor among these a size that is no number, which nobody has made fit to be counted?

    Asked where tensor subclasses are: to compute with such sizes would fix what the trace leaves open.
    """
    if symbols_counted():
        return False
    for item in (*args, *kwargs.values()) if kwargs else args:
        for tensor in item if isinstance(item, list | tuple) else (item,):
            if isinstance(tensor, torch.Tensor) and tensor._has_symbolic_sizes_strides:
                return True
    return False


def symbols_counted() -> bool:
    """Can symbolic sizes be keys, and so be counted? Closed forms make them so."""
    return torch.SymInt.__hash__ is not _unhashable
