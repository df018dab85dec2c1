"""What a block is, and what it is called with, as values that can be compared: do two siblings do the same work?

Everything that a block's code can reach without leaving it is described: classes, scalars, shapes, training flags,
configuration objects, closures, class attributes, plain globals of its classes' modules. Equal descriptions, equal
work; what cannot be described raises Unlike, and such a block is not folded.
"""

from __future__ import annotations

import builtins
import logging
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from functools import lru_cache, partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from flopprof.counting.fold_state import slots_of, state_of

_SCALARS = frozenset({
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.memory_format,
    torch.layout, type(Ellipsis), range, slice,
})  # fmt: skip
_SEQUENCES = frozenset({list, tuple, deque})
_MAPPINGS = frozenset({dict, OrderedDict, defaultdict})
_STANDARD = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MOST_VALUES = 20_000
_DEEPEST = 12
_MOST_GLOBALS = 32  # a longer one is a table of names, which is known by its length


class Unlike(Exception):
    """This cannot be compared, so it is like nothing else."""


class Description:
    """facts: comparable between siblings. identities: what may differ between them, but must not change in a call."""

    def __init__(self, index: int | None = None) -> None:
        self.facts: list[Any] = []
        self.identities: list[int] = []
        self.numbers: list[tuple[int, dict[str, Any], str]] = []  # (position among the facts, holder, attribute)
        self.tables: list[list[Any] | tuple[Any, ...]] = []  # sequences, which an index may pick from
        self.tensors: list[torch.Tensor] = []
        self.places: list[tuple[dict[str, Any], str, Any]] = []  # (holder, attribute, the block's own element)
        self.lists: list[list[Any]] = []  # the list that each place is in
        self.index = index  # of the block among its siblings
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # made on the way: their ids must not be taken by others
        self._depth = 0

    def holders(self, position: int) -> Iterator[tuple[dict[str, Any], str]]:
        """Where the number at this position among the facts is kept: (attributes of its module, name)."""
        for place, holder, attribute in self.numbers:
            if place == position:
                yield holder, attribute

    def unchanged_since(self, earlier: Description) -> bool:
        """Is everything the very same as it was described before?"""
        return self.facts == earlier.facts and self.identities == earlier.identities

    # --- modules -----------------------------------------------------------------------------------
    def module(self, module: nn.Module) -> None:
        """A module and everything below it."""
        facts, held = self.facts, module.__dict__
        for hooks in _HOOKS:
            if held[hooks]:
                raise Unlike("a hook")
        cls = type(module)
        self._seen[id(module)] = len(facts)
        facts.append(cls)
        facts.append(module.training)
        for tensors in (held["_parameters"], held["_buffers"]):
            for key, tensor in tensors.items():
                facts.append(key)
                if tensor is None:
                    facts.append(None)
                    continue
                if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
                    raise Unlike("a tensor hook")
                if not tensor.is_meta or is_lazy(tensor):
                    raise Unlike("a tensor outside the meta device")
                facts += (type(tensor), tensor.shape, tensor.dtype, tensor.requires_grad, tensor.stride())
                self.identities.append(id(tensor))
        for key, value in held.items():
            if key in _STANDARD:
                continue
            facts.append(key)
            if type(value) is int or type(value) is float:
                facts.append(type(value))
                self.numbers.append((len(facts), held, key))
                facts.append(value)
            else:
                self.value(value)
        for holder, name in _state_of_class(cls):  # type: ignore[arg-type]  # a class is hashable
            facts.append(name)
            self.value(vars(holder).get(name))
        for names, name in _globals_of_class(cls):  # type: ignore[arg-type]
            value = names.get(name)
            size = len(value) if isinstance(value, list | dict | set | deque) else 0
            if size > _MOST_GLOBALS:
                facts += (name, id(value), size)
            elif type(value) not in _PLAIN:  # an object that may count, or collect
                facts += (name, id(value), _surface(value), state_of(value))
            else:
                self.value(value)
        children = held["_modules"]
        facts.append(len(children))
        for key, child in children.items():
            facts.append(key)
            if child is not None:
                self.module(child)

    # --- values ------------------------------------------------------------------------------------
    def value(self, value: Any) -> None:
        """Any other value: by content where it has one, by identity where it has none."""
        facts = self.facts
        cls = type(value)
        if cls in _SCALARS:
            facts.append(cls)
            facts.append(value)
            return
        seen = self._seen.get(id(value))
        if seen is not None:
            facts.append(("again", seen))
            return
        self._seen[id(value)] = len(facts)
        self._alive.append(value)
        if len(facts) > _MOST_VALUES or self._depth > _DEEPEST:
            raise Unlike("too much to compare")
        self._depth += 1
        if isinstance(value, torch.Tensor):
            self.tensor(value)
        elif cls in _SEQUENCES:
            facts.append(cls)
            facts.append(len(value))
            if len(value) > 1 and cls is not deque:
                self.tables.append(value)
            for item in value:
                self.value(item)
        elif cls in _MAPPINGS:
            facts.append(cls)
            facts.append(len(value))
            for key, item in value.items():
                self.value(key)
                self.value(item)
        elif cls in (set, frozenset):
            facts.append(cls)
            facts.append(frozenset(item if type(item) in _SCALARS else id(item) for item in value))
        else:
            self._object(value, cls)
        self._depth -= 1

    def tensor(self, tensor: torch.Tensor) -> None:
        """A tensor that is neither parameter nor buffer: on meta by its shape, elsewhere by identity."""
        if not tensor.is_meta or tensor.layout is not torch.strided or tensor.is_nested:
            self.facts.append((id(tensor), None if tensor.is_inference() else tensor._version))
            return
        self.facts += (type(tensor), tensor.shape, tensor.dtype, tensor.requires_grad, tensor.stride())
        self.identities.append(id(tensor))

    def _object(self, value: Any, cls: type) -> None:
        facts = self.facts
        if isinstance(value, Enum):
            facts += (cls, value.name)
        elif cls is FunctionType:
            facts.append(value.__code__)
            for cell in value.__closure__ or ():
                try:
                    self.value(cell.cell_contents)
                except ValueError:  # not yet assigned
                    facts.append("empty")
            self.value(value.__defaults__)
            self.value(value.__kwdefaults__)
            self.value(vars(value))
        elif cls is MethodType:
            self.value(value.__func__)
            self.value(value.__self__)
        elif isinstance(value, partial):
            self.value(value.func)
            self.value(value.args)
            self.value(value.keywords)
        elif isinstance(value, type | nn.Module | ModuleType | BuiltinFunctionType | logging.Logger | weakref.ref):
            facts.append(id(value))
        elif isinstance(value, list | tuple | dict) and cls.__module__ != "builtins":
            # a named tuple, a model's output, a user's own container: by content, and by what it keeps besides
            facts += (cls, len(value))
            for item in value.items() if isinstance(value, dict) else value:
                self.value(item)
            self._attributes(getattr(value, "__dict__", {}))
        elif type(getattr(value, "__dict__", None)) is dict:
            facts.append(cls)
            self._attributes(value.__dict__)
        else:
            facts += (id(value), state_of(value))
            slots = slots_of(value)
            if slots:
                self._attributes(slots)

    def _attributes(self, held: dict[str, Any]) -> None:
        self.facts.append(len(held))
        for key, item in held.items():
            self.facts.append(key)
            own = self._own_place(item)
            if own is None:
                self.value(item)
            else:
                self.facts += ("a place for each", len(item))
                self.places.append((held, key, own))
                self.lists.append(item)

    def _own_place(self, item: Any) -> Any:
        """The block's own element of a list that has an object for each sibling, as caches do; else None."""
        if self.index is None or type(item) is not list or not 0 <= self.index < len(item):
            return None
        own = item[self.index]
        if isinstance(own, torch.Tensor | nn.Module) or type(getattr(own, "__dict__", None)) is not dict:
            return None
        return own


def described(module: nn.Module) -> Description:
    """The description of a module. Raises Unlike."""
    description = Description()
    description.module(module)
    return description


def containers_in(attributes: list[dict[str, Any]]) -> list[Any]:
    """Lists, dictionaries and sets that modules keep of their own."""
    kinds = (list, dict, set, deque, OrderedDict, defaultdict)
    return [
        value
        for held in attributes
        if len(held) > len(_STANDARD)
        for key, value in held.items()
        if key not in _STANDARD and type(value) in kinds
    ]


# --- what a class keeps besides its instances -----------------------------------------------------------------------
_PLAIN = (bool, int, float, str, list, dict, set, deque, type(None))


@lru_cache(maxsize=512)
def _own_classes(cls: type) -> tuple[type, ...]:
    """The classes of a user's or library's making: torch's own keep no state."""
    return tuple(base for base in cls.__mro__ if base is not object and not base.__module__.startswith("torch."))


@lru_cache(maxsize=512)
def _state_of_class(cls: type) -> tuple[tuple[type, str], ...]:
    return tuple(
        (base, name)
        for base in _own_classes(cls)
        for name, value in vars(base).items()
        if not name.startswith("__") and isinstance(value, (*_PLAIN, torch.Tensor))
    )


@lru_cache(maxsize=512)
def _globals_of_class(cls: type) -> tuple[tuple[dict[str, Any], str], ...]:
    """Module variables that the methods of a class name and that may keep something between calls."""
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    for base in _own_classes(cls):
        for method in vars(base).values():
            function = _function(method)
            if function is None:
                continue
            for name in _names(function.__code__):
                value = function.__globals__.get(name, builtins)
                if type(value) in _PLAIN or _keeps(value):
                    found[id(function.__globals__), name] = (function.__globals__, name)
    return tuple(found.values())


def _keeps(value: Any) -> bool:
    """Is it an object with attributes of its own, none of a language's or a library's fixtures?"""
    fixtures = type | nn.Module | ModuleType | FunctionType | BuiltinFunctionType | MethodType | logging.Logger
    if isinstance(value, fixtures | weakref.ref):
        return False
    return type(getattr(value, "__dict__", None)) is dict or state_of(value) is not None or bool(slots_of(value))


def _surface(value: Any) -> tuple[Any, ...]:
    """The scalars that an object keeps, and how much else."""
    return tuple(
        (key, item if type(item) in _SCALARS else len(item) if type(item) in (list, dict, set, deque) else id(item))
        for key, item in {**getattr(value, "__dict__", {}), **slots_of(value)}.items()
    )


def _function(method: Any) -> FunctionType | None:
    while not isinstance(method, FunctionType):
        method = getattr(method, "__func__", getattr(method, "fget", None))
        if method is None:
            return None
    return getattr(method, "__wrapped__", None) or method


def _names(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _names(constant)


# --- calls ------------------------------------------------------------------------------------------------------
class Signature(Description):
    """What a block is called with. Tensors count by shape and by which of them are the same or share memory."""

    def __init__(self, index: int | None, source: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(index)
        self._source = source
        self._storages: dict[int, int] = {}
        self._given = 0, 0

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any) -> None:
        """Everything that a call is given, and the state of torch at it; last what its own places hold."""
        self.value(args)
        self.value(kwargs)
        self.facts.append(state)
        self._given = len(self.facts), len(self.identities)
        for _holder, _attribute, own in list(self.places):
            self.value(own)

    def unchanged_since(self, earlier: Description) -> bool:
        """Is everything but what its own places hold the very same?"""
        facts, identities = self._given
        return (
            isinstance(earlier, Signature)
            and self._given == earlier._given
            and self.facts[:facts] == earlier.facts[:facts]
            and self.identities[:identities] == earlier.identities[:identities]
        )

    def tensor(self, tensor: torch.Tensor) -> None:
        """A tensor argument: what is known of its values or its source must be the same, so it must be the same."""
        if type(tensor) is not torch.Tensor and type(tensor) is not nn.Parameter:
            raise Unlike("a tensor subclass")
        if not tensor.is_meta or tensor.layout is not torch.strided or tensor.is_nested:
            super().tensor(tensor)
            return
        storage = tensor.untyped_storage()._cdata
        self.facts += (
            tensor.shape, tensor.dtype, tensor.stride(), tensor.requires_grad, tensor.is_leaf,
            self._storages.setdefault(storage, len(self._storages)), self._source(tensor),
        )  # fmt: skip
        self.tensors.append(tensor)
        self.identities += (id(tensor), storage, -1 if tensor.is_inference() else tensor._version)


def state_of_torch() -> tuple[Any, ...]:
    """What torch itself keeps that changes what a block does, cheap enough to ask at each call."""
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda"),
        torch._C._get_math_sdp_enabled(), torch._C._get_flash_sdp_enabled(), torch._C._get_mem_efficient_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
