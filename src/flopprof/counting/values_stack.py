"""The place of carried values among torch's dispatch modes: below every other, and not inside subclasses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

_stack_size = torch._C._len_torch_dispatch_stack
_stack_at = torch._C._get_dispatch_stack_at
_plain_dispatch = torch._C._disabled_torch_dispatch_impl


@contextmanager
def lifted(down_to: TorchDispatchMode | None = None) -> Iterator[None]:
    """The modes above the lowest place (or above this one) are off, and afterwards on again."""
    above = []
    while _stack_size() and _stack_at(_stack_size() - 1) is not down_to:
        if _stack_at(_stack_size() - 1).is_infra_mode():
            break
        above.append(_pop_mode())
    try:
        yield
    finally:
        for mode in reversed(above):
            _push_mode(mode)


def foreign(types: Any) -> bool:
    """Does a tensor subclass with its own dispatch take part? Then its inner operators are followed."""
    return any(cls is not torch.Tensor and cls.__torch_dispatch__ is not _plain_dispatch for cls in types)
