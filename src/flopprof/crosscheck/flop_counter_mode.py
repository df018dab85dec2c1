"""torch.utils.flop_counter.FlopCounterMode on a workload: its totals, and what it says of each operator and module."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flopprof.counting.operators import Kind, base_name, learn
from flopprof.counting.runtime import FlopCounter
from flopprof.crosscheck.cells import Sheet
from flopprof.crosscheck.result import Side
from flopprof.crosscheck.running import run
from flopprof.models import Workload

_ARITHMETIC = (Kind.COUNTED, Kind.OPAQUE, Kind.HIGHER_ORDER)


def totals(workload: Workload, *, backward: bool) -> tuple[int, int | None]:
    """(forward, backward) FLOPs as it counts them when it runs alone; what is computed again is in backward."""
    forward = 0

    def modes() -> tuple[FlopCounterMode, list[AbstractContextManager[Any]]]:
        mode = FlopCounterMode(display=False)
        return mode, [mode]

    def between(mode: FlopCounterMode) -> None:
        nonlocal forward
        forward = mode.get_total_flops()

    total = run(workload, modes, backward=backward, between=between).get_total_flops()
    return forward, total - forward if backward else None


def sheet(workload: Workload, *, backward: bool) -> Sheet:
    """What it says of each operator in each module: by how much its counts grow over every operator that runs."""

    def modes() -> tuple[Sheet, list[AbstractContextManager[Any]]]:
        found, mode = Sheet(), FlopCounterMode(display=False)
        counter = FlopCounter(workload.model)  # knows which module and pass is running
        return found, [counter, mode, _Watch(counter, mode, found)]

    return run(workload, modes, backward=backward)


class _Watch(TorchDispatchMode):
    """Sees each operator just before FlopCounterMode does."""

    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounter, mode: FlopCounterMode, found: Sheet) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter, self._mode, self._found = counter, mode, found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._totals()
        out = func(*args, **(kwargs or {}))
        frame, phase = self._counter.where.now()
        side: Side = "forward" if phase == "forward" else "backward"
        place, grown = (frame.fqn, side), False
        for packet, flops in self._totals().items():
            if flops != before.get(packet, 0):
                self._found.counts[place][_name(packet)] += flops - before.get(packet, 0)
                grown = True
        if not grown and learn(func).kind in _ARITHMETIC:
            self._found.blind[place][base_name(func)] += 1
        return out

    def _totals(self) -> dict[Any, int]:
        return dict(self._mode.flop_counts["Global"])


def _name(packet: Any) -> str:
    """`aten::addmm`, as ours."""
    qualified = getattr(packet, "_qualified_op_name", None)
    return str(qualified) if qualified is not None else f"higher_order::{packet}"
