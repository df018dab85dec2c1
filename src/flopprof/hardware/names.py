"""From a name to a row of the table: whole tokens, exactly those of the row; no part of a name ever stands for it."""

from __future__ import annotations

import difflib
import functools
import re

from flopprof.errors import UnknownDevice
from flopprof.hardware.table import Device, devices

# Drivers have dropped and added the maker's name over the years; it tells no two devices apart.
_MAKERS = (("nvidia",), ("amd",), ("intel", "r"), ("intel",))
_SUGGESTED = 4
_GIGA, _GIBI = 10**9, 2**30
_LEAST, _MOST = 0.85, 1.08


def typed(name: str) -> Device:
    """The row that a person means by an id, a printed name, an alias or a driver's name. Raises UnknownDevice."""
    found = _typed().get(tokens(name))
    if found is not None:
        return found
    near = difflib.get_close_matches(" ".join(tokens(name)), [" ".join(key) for key in _typed()], n=12, cutoff=0.5)
    names = list(dict.fromkeys(_typed()[tuple(text.split(" "))].name for text in near))[:_SUGGESTED]
    meant = f" Near: {', '.join(names)}." if names else ""
    raise UnknownDevice(
        f"no device of the table goes by {name!r}: `flopprof peaks` lists them; else give its peak in FLOP/s.{meant}"
    )


def reported(name: str, *, units: int | None = None, memory_bytes: int | None = None) -> Device:
    """The row of the exact name that a driver reports; never an alias. Raises UnknownDevice.

    units, memory_bytes: what the driver reports beside the name. A row that states another number of units, or quite
    another memory, is not this device: it is a part of it, or a sister of the same name.
    """
    rows = _reported().get(tokens(name), ())
    found = [row for row in rows if units in (None, row.units or units) and _holds(row, memory_bytes)]
    if len(found) == 1:
        return found[0]
    told = [f"{units} compute units"] if units is not None else []
    told += [f"{memory_bytes / _GIBI:.0f} GiB"] if memory_bytes is not None else []
    reason = f" with {' and '.join(told)} ({'; '.join(map(_told, rows))})" if rows and told else ""
    part = " (a slice of a GPU)" if "mig" in tokens(name) else ""
    raise UnknownDevice(
        f"no peak is known of {name!r}{part}{reason}: pass peak=... in FLOP/s, or measure it with "
        "`flopprof peaks --measure`."
    )


def _holds(row: Device, memory_bytes: int | None) -> bool:
    """Whether the memory seen is the row's: drivers keep up to a tenth for themselves, and vendors print GiB as GB."""
    if memory_bytes is None or row.memory_bytes is None:
        return True
    return _LEAST <= memory_bytes / (row.memory_bytes // _GIGA * _GIBI) <= _MOST


def _told(row: Device) -> str:
    memory = "" if row.memory_bytes is None else f" {row.memory_bytes // _GIGA} GB"
    units = "" if row.units is None else f" {row.units} units"
    return f"{row.name}:{units}{',' if units and memory else ''}{memory}"


def tokens(name: str) -> tuple[str, ...]:
    """The words of a name, in lower case, without the maker: `NVIDIA A100-SXM4-80GB` -> `a100 sxm4 80gb`."""
    words = tuple(re.findall(r"[^\s\-_/(),®™]+", name.casefold()))
    for maker in _MAKERS:
        if words[: len(maker)] == maker and len(words) > len(maker):
            return words[len(maker) :]
    return words


@functools.cache
def _reported() -> dict[tuple[str, ...], tuple[Device, ...]]:
    table: dict[tuple[str, ...], tuple[Device, ...]] = {}
    for row in devices():
        for key in {tokens(name) for name in row.detect}:
            table[key] = (*table.get(key, ()), row)
    return table


@functools.cache
def _typed() -> dict[tuple[str, ...], Device]:
    names = {tokens(name): row for row in devices() for name in (row.id, row.name, *row.alias)}
    return {key: rows[0] for key, rows in _reported().items() if len(rows) == 1} | names
