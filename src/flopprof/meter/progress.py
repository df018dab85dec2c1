"""One line about a loop under way, on standard error: rewritten on a terminal, else printed once in a while."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from flopprof.meter.summary import format_time, percent
from flopprof.units import format_si

if TYPE_CHECKING:
    from flopprof.meter.meter import Meter

_EVERY_S = 0.2
_EVERY_STEPS = 100


class Progress:
    """The line of one loop."""

    def __init__(self, meter: Meter, total: int | None) -> None:
        self._meter, self._total = meter, total
        self._steps, self._last = 0, 0.0
        self._terminal = sys.stderr.isatty()
        self._width = 0

    def update(self) -> None:
        """One more step is done."""
        self._steps += 1
        if self._terminal:
            now = time.monotonic()
            if now - self._last >= _EVERY_S:
                self._last = now
                self._rewrite()
        elif self._steps % _EVERY_STEPS == 0:
            sys.stderr.write(f"{self.line()}\n")

    def close(self) -> None:
        """The loop is over: its last line stays."""
        if self._terminal and self._steps:
            self._rewrite()
            sys.stderr.write("\n")

    def line(self) -> str:
        """`step 120/1000  MFU 41.2 %  HFU 52.0 %  412.1 TFLOP/s  81.22 ktokens/s  120.31 ms`."""
        parts = [f"step {self._steps}" + (f"/{self._total}" if self._total is not None else "")]
        current = self._meter.figures()
        if current is None:
            return "  ".join([*parts, "counting"])
        if current.mfu is not None:
            parts += [f"MFU {percent(current.mfu)}", f"HFU {percent(current.hfu)}"]
        else:
            parts.append("MFU - (no peak known)")
        parts.append(format_si(current.model_flops_per_s, "FLOP/s"))
        if current.tokens_per_s is not None:
            parts.append(format_si(current.tokens_per_s, "tokens/s"))
        elif current.samples_per_s is not None:
            parts.append(format_si(current.samples_per_s, "samples/s"))
        parts.append(f"{format_time(current.step_time_s.median)}/step")
        return "  ".join(parts)

    def _rewrite(self) -> None:
        line = self.line()
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)
