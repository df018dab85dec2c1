"""DTensor finds out how to shard an operator by running it on fake tensors of the global shape: not work of the model.

The local operators that it runs afterwards are counted, each rank its share.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from flopprof.counting.imports import WhenImported, replaced

_METHODS = ("propagate_op_sharding", "propagate_op_sharding_non_cached")


def unseen_sharding(counting: Callable[[], list[Any]]) -> WhenImported:
    """Mutes the counters of the running thread while DTensor looks for a sharding."""

    def muted(method: Callable[..., Any]) -> Callable[..., Any]:
        def propagate(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for counter in counting():
                    stack.enter_context(counter.muted())
                return method(*args, **kwargs)

        return propagate

    def change(module: ModuleType) -> Callable[[], object]:
        dispatcher = getattr(module.DTensor, "_op_dispatcher", None)
        propagator = getattr(dispatcher, "sharding_propagator", None)
        undo = [replaced(propagator, n, muted(getattr(propagator, n))) for n in _METHODS if hasattr(propagator, n)]
        return lambda: [put_back() for put_back in undo]

    return WhenImported("torch.distributed.tensor._api", change)
