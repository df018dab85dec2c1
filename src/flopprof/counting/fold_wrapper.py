"""Where folding sees calls: Module._call_impl, wrapped while some thread folds, around what a counter put there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from flopprof.counting.folding import Folding

_lock = threading.Lock()
_open: dict[int, Folding] = {}  # by thread
_beneath: list[Callable[..., Any]] = []


def _call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    beneath = _beneath[0]
    if torch.compiler.is_compiling():
        return beneath(self, *args, **kwargs)
    folding = _open.get(threading.get_ident())
    if folding is None or (id(self) not in folding.members and id(self) not in folding.owners):
        return beneath(self, *args, **kwargs)
    return folding.call(beneath, self, args, kwargs)


@contextmanager
def wrapped(folding: Folding) -> Iterator[None]:
    """While open, this thread's calls of the modules that `folding` knows go through it."""
    thread = threading.get_ident()
    with _lock:
        outer = _open.get(thread)
        _open[thread] = folding
        if not _beneath:
            _beneath.append(torch.nn.Module._call_impl)
            torch.nn.Module._call_impl = _call  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _lock:
            if outer is None:
                del _open[thread]
            else:
                _open[thread] = outer
            if not _open:
                torch.nn.Module._call_impl = _beneath.pop()  # type: ignore[method-assign]
