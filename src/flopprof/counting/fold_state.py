"""What an object without attributes keeps between calls: places in random sequences, positions, bytes, slots."""

from __future__ import annotations

import itertools
import sys
from contextvars import ContextVar
from types import MemberDescriptorType
from typing import Any

_LARGEST = 1 << 16  # bytes of an array; a larger one is a table, which is known by its identity


def state_of(value: Any) -> Any:
    """Something to compare, which is another one once the object has changed; None: it keeps nothing that is known of.

    An iterator says nothing of how far it is: it is unlike itself.
    """
    cls = type(value)
    if cls is itertools.count:
        return repr(value)
    if hasattr(cls, "__next__"):
        return object()
    if cls is bytearray:
        return bytes(value)
    if cls is ContextVar:
        return value.get(None)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.BitGenerator):
        return repr(getattr(value, "bit_generator", value).state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return repr(value.get_state())
    if numpy is not None and isinstance(value, numpy.ndarray):
        return (value.shape, value.tobytes()) if value.nbytes <= _LARGEST and not value.dtype.hasobject else None
    return None


def slots_of(value: Any) -> dict[str, Any]:
    """What is in the slots of an object of a user's or library's class."""
    return {
        name: getattr(value, name)
        for cls in type(value).__mro__
        if cls.__module__.partition(".")[0] not in ("torch", "builtins", *sys.stdlib_module_names) or _is_main(cls)
        for name, slot in vars(cls).items()
        if type(slot) is MemberDescriptorType and hasattr(value, name)
    }


def _is_main(cls: type) -> bool:
    return cls.__module__ == "__main__"
