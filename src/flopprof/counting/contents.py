"""What an object holds, and how to put it back: containers, slots, generators of random numbers, arrays."""

from __future__ import annotations

import mmap
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch

# Filled by a run: caches, lists of outputs.
HELD = frozenset({dict, list, set, OrderedDict, defaultdict, deque, Counter})
# Packages whose objects are looked into; None: any but those of Python and torch.
Own = frozenset[str] | None
_NEVER = frozenset({"torch", "builtins", *sys.stdlib_module_names}) - {"__main__"}
_UNSET = object()

Undo = Callable[[], object]


def package_of(value: Any) -> str:
    """The package that its class comes from."""
    return str(type(value).__module__).partition(".")[0]


def own_package(value: Any, own: Own) -> Own:
    """The packages whose objects are looked into inside this object; None: it is not looked into itself.

    A cache may come from another package than the module that holds it, and so do its parts.
    """
    if type(value) is SimpleNamespace:
        return own if own is not None else frozenset()
    package = package_of(value)
    if package in _NEVER or isinstance(value, torch.nn.Module | type | ModuleType | FunctionType | MethodType):
        return None
    if own is None:
        return frozenset({package})
    if package in own:
        return own
    return own | {package} if any("cache" in cls.__name__.lower() for cls in type(value).__mro__) else None


def put_back(container: Any) -> tuple[Undo, Iterable[Any]]:
    """(what restores a container's items, those items). One that nothing was changed in is left alone."""
    if isinstance(container, dict):
        return _put_back_mapping(container)
    base: Any = next(cls for cls in (list, set, deque) if isinstance(container, cls))
    before = list(base.__iter__(container))

    def undo() -> None:
        now = list(base.__iter__(container))
        if len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True)):
            base.clear(container)
            (base.update if base is set else base.extend)(container, before)

    return undo, before


def _put_back_mapping(container: dict[Any, Any]) -> tuple[Undo, Iterable[Any]]:
    base: Any = OrderedDict if isinstance(container, OrderedDict) else dict
    before = dict(base.items(container))

    def undo() -> None:
        now = list(base.items(container))
        pairs = zip(now, before.items(), strict=False)
        if len(now) != len(before) or any(a[0] is not b[0] or a[1] is not b[1] for a, b in pairs):
            base.clear(container)
            for key, value in before.items():
                base.__setitem__(container, key, value)

    return undo, before.values()


def slots_of(value: Any) -> tuple[Undo, list[Any]]:
    """(what restores an object's slots, what is in them)."""
    slots = [slot for cls in type(value).__mro__ for slot in vars(cls).values() if type(slot) is MemberDescriptorType]
    before = [_slot(slot, value) for slot in slots]

    def undo() -> None:
        for slot, held in zip(slots, before, strict=True):
            if _slot(slot, value) is held:
                continue
            if held is _UNSET:
                slot.__delete__(value)
            else:
                slot.__set__(value, held)

    return undo, [held for held in before if held is not _UNSET]


def _slot(slot: MemberDescriptorType, value: Any) -> Any:
    try:
        return slot.__get__(value, type(value))
    except AttributeError:
        return _UNSET


def state_of(value: Any) -> Undo | None:
    """What restores a generator of random numbers or the elements of an array; None: it is neither."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if type(value) is random.Random:
        drawn = value.getstate()
        return lambda: value.setstate(drawn)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if type(value) is numpy.ndarray and value.flags.writeable and not _is_file(value):
        before = value.copy()
        return lambda: numpy.copyto(value, before)
    if isinstance(value, numpy.random.Generator):
        bits, place = value.bit_generator, value.bit_generator.state
        return lambda: setattr(bits, "state", place)
    if isinstance(value, numpy.random.RandomState):
        then = value.get_state()
        return lambda: value.set_state(then)
    return None


def _is_file(array: Any) -> bool:
    """Is it mapped from a file? That is data, which may be larger than the memory."""
    while array is not None:
        if isinstance(array, mmap.mmap):
            return True
        array = getattr(array, "base", None)
    return False
