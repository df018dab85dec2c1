"""Dispatch modes of others around a counter's."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _pop_mode, _push_mode

from flopprof.counting.runtime import FlopCounter

_modes = torch._C._len_torch_dispatch_stack
_mode_at = torch._C._get_dispatch_stack_at


def close(counter: FlopCounter) -> None:
    """Close it, wherever it is among the open ones."""
    above = []
    while _modes() and _mode_at(_modes() - 1) is not counter:  # somebody left a mode of their own open
        above.append(_pop_mode())
    counter.__exit__(None, None, None)
    for mode in reversed(above):
        _push_mode(mode)
