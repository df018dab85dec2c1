"""One line about a loop under way, on standard error: rewritten on a terminal, else printed once in a while."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from flopprof.meter.figures import Figures
from flopprof.meter.summary import format_time, most_used, percent
from flopprof.units import format_si

_EVERY_S = 0.25
_EVERY_STEPS = 100


class Progress:
    """The line of one loop. figures: those of the latest steps."""

    def __init__(self, figures: Callable[[], Figures | None], loader: Any) -> None:
        self._figures = figures
        self._total = _length(loader)
        self._steps, self._last = 0, 0.0
        self._terminal = sys.stderr.isatty()
        self._live: Any = None

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
            sys.stderr.flush()

    def close(self) -> None:
        """The loop is over: its last line stays."""
        if self._terminal and self._steps:
            self._rewrite()
            self._live.stop()

    def line(self) -> str:
        """What `line` says of the loop so far."""
        return line(self._steps, self._figures(), self._total)

    def _rewrite(self) -> None:
        from rich.text import Text

        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()
        self._live.update(Text(self.line(), no_wrap=True, overflow="ellipsis"), refresh=True)


def line(steps: int, current: Figures | None, total: int | None = None) -> str:
    """`step 120/1000  MFU 41.2 %  HFU 52.0 %  412.1 TFLOP/s  81.22 ktokens/s  120.3 ms/step`."""
    parts = [f"step {steps}" + (f"/{total}" if total is not None else "")]
    if current is None:
        return "  ".join([*parts, "no step is timed yet"])
    if current.mfu is not None:
        parts += [f"MFU {percent(current.mfu)}", f"HFU {percent(current.hfu)}"]
        if most_used(current) > 1:
            parts[-2 if current.mfu > 1 else -1] += " (cannot be: see the summary)"
    else:
        parts.append("MFU not known")
    parts.append(format_si(current.model_flops_per_s, "FLOP/s"))
    if current.tokens_per_s is not None:
        parts.append(format_si(current.tokens_per_s, "tokens/s"))
    elif current.samples_per_s is not None:
        parts.append(format_si(current.samples_per_s, "samples/s"))
    parts.append(f"{format_time(current.step_time_s.median)}/step")
    return "  ".join(parts)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
