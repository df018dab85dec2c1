"""Print and read quantities: FLOPs, parameters, bytes, seconds. Scaling happens here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

from flopprof.errors import UsageError

_SI = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_SCALES = {"": 0, "k": 1, "K": 1, "M": 2, "B": 3, "G": 3, "T": 4, "P": 5, "E": 6, "Z": 7, "Y": 8}
MOST = 1e36  # of a count that is given: what is made of several still fits a float
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_si(value: int | float, unit: str = "", digits: int = 4) -> str:
    """`value` with an SI prefix and about `digits` significant digits: `8.178 GFLOPs`.

    Integers below 1000 print whole; the sign is kept.
    """
    sign, magnitude = ("-", -value) if value < 0 else ("", value)
    step = 0
    scaled = float(magnitude)
    while step < len(_SI) - 1 and float(f"{scaled:.{digits}g}") >= 1000:
        step += 1
        scaled = float(magnitude) / 1000.0**step
    text = str(magnitude) if step == 0 and isinstance(value, int) else _significant(scaled, digits)
    suffix = _SI[step] + unit
    return f"{sign}{text} {suffix}" if suffix else f"{sign}{text}"


def _significant(value: float, digits: int) -> str:
    whole = len(str(int(float(f"{value:.{digits}g}"))))
    return f"{value:.{max(digits - whole, 0)}f}"


def format_flops(flops: int, unit: str = "flop") -> str:
    """FLOPs (`8.178 GFLOPs`), or with `unit="mac"` multiply-adds (`4.089 GMACs`)."""
    return format_si(flops // 2, "MACs") if unit == "mac" else format_si(flops, "FLOPs")


def common_step(values: Iterable[int]) -> int:
    """The power of 1000 that prints the largest of `values` with one to three digits before the point."""
    largest, step = max((abs(value) for value in values), default=0), 0
    # 999,999.6 would print as 1000.000 k in three decimals
    while step < len(_SI) - 1 and 2000 * largest >= (2_000_000 - 1) * 1000**step:
        step += 1
    return step


def unit_name(step: int, unit: str) -> str:
    """The unit with the prefix of that power of 1000: `GFLOPs`."""
    return _SI[step] + unit


def format_fixed(value: int, step: int, decimals: int = 3) -> str:
    """`value` in units of 1000**step with fixed decimals, so that a column lines up and adds up.

    Zero is `-`; what would round to zero is `<0.001`; without a prefix the integer itself.
    """
    if value == 0:
        return "-"
    if step == 0:
        return str(value)
    parts = int(10**decimals)
    tick = int(1000**step) // parts
    ticks = (2 * abs(value) + tick) // (2 * tick)
    if ticks == 0:
        return f"<{10**-decimals:.{decimals}f}"
    whole, fraction = divmod(ticks, parts)
    return f"{'-' if value < 0 else ''}{whole}.{fraction:0{decimals}d}"


def format_bytes(count: int) -> str:
    """Bytes in binary units: `97.49 MiB`."""
    scaled, step = float(count), 0
    while scaled >= 1024 and step < len(_BINARY) - 1:
        scaled, step = scaled / 1024, step + 1
    return f"{count} B" if step == 0 else f"{_significant(scaled, 4)} {_BINARY[step]}"


def format_share(part: int, whole: int) -> str:
    """`part` of `whole` as a percentage with one decimal; empty where the whole is 0."""
    return "" if whole == 0 else f"{100 * part / whole:.1f}%"


def parse_count(text: str) -> int:
    """The integer that `4.2G`, `26M`, `7e9` or `1,000` stands for. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([kKMBGTPEZY]?)\s*", text)
    if match is None:
        raise UsageError(f"cannot read {text!r} as a count: write it as 4.2G, 26M or 7e9.")
    number = match[1].replace(",", "").replace("_", "")
    scaled = float(number) * float(1000 ** _SCALES[match[2]])
    if scaled > MOST:
        raise UsageError(f"{text[:40]!r} is more than the {MOST:g} that anything is counted to.")
    if "." not in number and "e" not in number.lower():
        return int(number) * int(1000 ** _SCALES[match[2]])
    return round(scaled)


def parse_share(text: str) -> Fraction:
    """The exact share that `0.5%` or `0.005` stands for. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%?)\s*", text)
    if match is None:
        raise UsageError(f"cannot read {text!r} as a share: write it as 0.5% or 0.005.")
    return Fraction(match[1]) / (100 if match[2] else 1)
