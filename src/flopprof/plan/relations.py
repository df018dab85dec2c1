"""Four equations between model, tokens, FLOPs, utilisation, devices, days and money, solved for what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping

from flopprof.errors import UsageError

HOUR_S, DAY_H = 3600, 24
_AGREE = 5e-3  # figures that are given twice over may be rounded

# name -> (product on the left, product on the right): every equation says that two products are equal
Equation = tuple[str, tuple[str, ...], tuple[str, ...]]
EQUATIONS: tuple[Equation, ...] = (
    ("flops per token = 6 x active params", ("flops_per_token",), ("six", "active_params")),
    ("flops = flops per token x tokens", ("flops",), ("flops_per_token", "tokens")),
    ("flops = 3600 x peak x MFU x device-hours", ("flops",), ("hour_s", "peak_flops_per_s", "mfu", "device_hours")),
    ("device-hours = 24 x devices x days", ("device_hours",), ("day_h", "devices", "days")),
    ("cost = price x device-hours", ("cost_usd",), ("usd_per_device_hour", "device_hours")),
)


def solve(given: Mapping[str, float]) -> dict[str, float]:
    """All that follows from `given` (name -> positive number). Raises UsageError where they contradict each other."""
    known = {"six": 6, "hour_s": HOUR_S, "day_h": DAY_H, **given}
    progress = True
    while progress:
        progress = False
        for name, left, right in EQUATIONS:
            missing = [term for term in (*left, *right) if term not in known]
            if len(missing) == 1:
                known[missing[0]] = _missing(missing[0], left, right, known)
                progress = True
            elif not missing:
                _agree(name, left, right, known)
    return known


def _missing(term: str, left: tuple[str, ...], right: tuple[str, ...], known: Mapping[str, float]) -> float:
    side, other = (left, right) if term in left else (right, left)
    top = math.prod(known[name] for name in other)
    bottom = math.prod(known[name] for name in side if name != term)
    if isinstance(top, int) and bottom == 1:
        return top
    return top / bottom


def _agree(name: str, left: tuple[str, ...], right: tuple[str, ...], known: Mapping[str, float]) -> None:
    a, b = (math.prod(known[term] for term in side) for side in (left, right))
    if not math.isclose(a, b, rel_tol=_AGREE):
        raise UsageError(f"these contradict each other: {name}, but {a:.6g} is not {b:.6g}. Leave one of them out.")
