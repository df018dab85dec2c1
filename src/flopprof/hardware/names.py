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


def typed(name: str) -> Device:
    """The row that a person means by an id, a printed name, an alias or a driver's name. Raises UnknownDevice."""
    found = _typed().get(tokens(name))
    if found is not None:
        return found
    near = difflib.get_close_matches(" ".join(tokens(name)), [" ".join(key) for key in _typed()], n=12, cutoff=0.5)
    names = list(dict.fromkeys(_typed()[tuple(text.split(" "))].name for text in near))[:_SUGGESTED]
    meant = f" Near: {', '.join(names)}." if names else ""
    raise UnknownDevice(
        f"no device of the table goes by {name!r}: `flopprof peaks` lists them; else pass peak=... in FLOP/s.{meant}"
    )


def reported(name: str, *, units: int | None = None) -> Device:
    """The row of the exact name that a driver reports; never an alias. Raises UnknownDevice.

    units: its multiprocessors, compute units or cores; a row that states another number is not this device.
    """
    found = _reported().get(tokens(name))
    if found is None:
        raise UnknownDevice(
            f"no peak is known of {name!r}: pass peak=... in FLOP/s, or measure it with `flopprof peaks --measure`."
        )
    if found.units is not None and units is not None and units != found.units:
        raise UnknownDevice(
            f"no peak is known of {name!r} with {units} compute units; {found.name} has {found.units}: pass peak=... "
            "in FLOP/s, or measure it with `flopprof peaks --measure`."
        )
    return found


def tokens(name: str) -> tuple[str, ...]:
    """The words of a name, in lower case, without the maker: `NVIDIA A100-SXM4-80GB` -> `a100 sxm4 80gb`."""
    words = tuple(re.findall(r"[^\s\-_/(),®™]+", name.casefold()))
    for maker in _MAKERS:
        if words[: len(maker)] == maker and len(words) > len(maker):
            return words[len(maker) :]
    return words


@functools.cache
def _reported() -> dict[tuple[str, ...], Device]:
    return {tokens(name): row for row in devices() for name in row.detect}


@functools.cache
def _typed() -> dict[tuple[str, ...], Device]:
    table = {tokens(name): row for row in devices() for name in (row.id, row.name, *row.alias)}
    return _reported() | table
