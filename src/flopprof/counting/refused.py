"""What torch's meta kernels refuse though devices run it: the shape of the result is told here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_TYPES = (torch.float16, torch.float32)


def accepted() -> AbstractContextManager[Any]:
    """What runs inside on meta is refused nothing, though no counter is open."""
    return _Shaped() if _refuses() else nullcontext()  # type: ignore[no-untyped-call]


@cache
def _refuses() -> bool:
    """Does this torch need help?"""
    a, ends = torch.empty(4, 4, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    try:
        torch.ops.aten._grouped_mm(a, a.expand(2, 4, 4), ends)
    except (AttributeError, RuntimeError):
        return True
    return False


class _Shaped(TorchDispatchMode):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name if isinstance(func, torch._ops.OpOverload) else ""
        return shaped(name, func)(*args, **(kwargs or {}))


def shaped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """What to call for the operator of that name; of most, `call` itself."""
    return _grouped_mm(call) if name == "aten::_grouped_mm" else call


def _grouped_mm(call: Callable[..., Any]) -> Callable[..., Any]:
    """Before torch 2.15, meta takes bfloat16 alone."""

    def grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
        try:
            return call(a, b, offs, bias, out_dtype)
        except RuntimeError as error:
            fits = a.dim() == b.dim() == 2 or a.shape[-1] == b.shape[-2]
            alike = a.dtype in _TYPES and b.dtype == a.dtype and a.device.type == b.device.type == "meta"
            if not (fits and alike and ("BF16" in str(error) or "BFloat16" in str(error))):
                raise
            return a.new_empty(_grouped_shape(a, b, offs), dtype=out_dtype)

    return grouped_mm


def _grouped_shape(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None) -> tuple[int, ...]:
    """(g, m, k) @ (g, k, n): either factor may have its groups one after another in a dimension, and no g."""
    groups = a.shape[:1] if a.dim() == 3 else () if offs is None else offs.shape
    return (*(groups if a.dim() == b.dim() else ()), a.shape[-2], b.shape[-1])
