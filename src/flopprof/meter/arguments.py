"""What the arguments of a call tell: a structure, and the integers that may vary inside it.

Two calls with the same of both multiply the same. The structure alone says between which calls a form over shapes may
be fitted.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
import numbers
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from flopprof.meter.places import number

Structure = tuple[Any, ...]  # nested tuples of hashable things
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_FLAGS = (bool, type(None))
_PLAIN = (torch.dtype, torch.device, torch.memory_format)
BOUNDARIES = ("cu_seq", "cu_len")
MAY_TELL_BOUNDARIES = (*BOUNDARIES, "position_ids")  # how such names begin
DEEPEST = 8
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_functorch = torch._C._functorch
_WORDS = 24  # characters: what is longer is a text, no choice
_RECORD = 3  # a tuple of more things is a sequence
_FLOAT, TEXT, OF_THESE = "a float", "a text", "a float of these"  # with a space, as no text that is kept has
_CLOSED = (type, torch.nn.Module, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], flash: bool | None = None, names: tuple[str, ...] = ()
) -> tuple[Structure, tuple[int, ...]]:
    """Structure and integers of a call's arguments: dtypes, shapes, flags; no values of tensors but packed lengths.

    names: of the arguments by position, where they are known.
    """
    told = _Told(flash)
    for name, value in itertools.zip_longest(names[: len(args)], args, fillvalue=""):
        told.add(value, name)
    for name, value in kwargs.items():
        told.parts.append(name)
        told.add(value, name)
    return tuple(told.parts), tuple(told.ints)


def plain(values: Iterable[Any]) -> bool:
    """Do shapes and dtypes tell these inputs? Not of sparse ones, and not where vmap hides a dimension."""
    return not torch._C._are_functorch_transforms_active() and all(
        value.layout is torch.strided for value in values if isinstance(value, _Tensor)
    )


def tells_boundaries(name: str, value: torch.Tensor, flash: bool | None) -> bool:
    """Do this tensor's values tell where the sequences of a packed batch begin?

    flash: the model's attention is flash attention, which takes them from positions; None: not known, and positions
    that are on a device are not waited for.
    """
    if name == "position_ids":
        return value.device.type == "cpu" if flash is None else flash
    return name.startswith(BOUNDARIES)


class _Told:
    """What arguments tell, one after another. flash: as in `tells_boundaries`."""

    def __init__(self, flash: bool | None) -> None:
        self.parts: list[Any] = []
        self.ints: list[int] = []
        self._flash = flash
        self._samples: _Samples | None = None  # of the sequence under way

    def add(self, value: Any, name: Any = "", depth: int = 0) -> None:
        """One more value, under that name."""
        parts, ints, kind = self.parts, self.ints, type(value)
        if isinstance(value, _Tensor):
            value, times = unwrapped(value)
            parts += ["within"] * times  # vmap hides a dimension, grad none
        if isinstance(value, _Tensor) and value.is_nested:
            _add_nested(value, parts, ints)
        elif kind is _Tensor or kind is _Parameter:
            shape = value.shape
            parts += (value.dtype, len(shape), value.requires_grad)
            ints += shape
            if value.layout is not torch.strided and value.layout in _SPARSE:
                parts.append(str(value.layout))
                ints.append(value._nnz())
            if kind is _Tensor and isinstance(name, str) and tells_boundaries(name, value, self._flash):
                _add_boundaries(name, value, parts, ints)
        elif kind in _FLAGS:
            self._leaf(value)
        elif kind in _PLAIN:
            parts.append(value)
        elif kind is int and value >= 0:
            parts.append("int")
            ints.append(value)
        elif kind is int:
            parts += ("int", value)  # among integers, one below 0 is a number of nodes
        elif isinstance(value, enum.Enum):
            parts += (_named(kind), value.name)
        elif isinstance(value, str):
            self._leaf(TEXT, value if len(value) <= _WORDS and " " not in value else "a long text")
        elif kind is list or (kind is tuple and len(value) > _RECORD):
            self._add_sequence(value, depth)
        elif kind is tuple:
            self._begin("tuple", len(value))
            self._within(((str(i), item) for i, item in enumerate(value)), depth)
        elif isinstance(value, Mapping):
            self._begin(_named(kind), *(key if isinstance(key, str | int) else None for key in value))
            self._within(value.items(), depth)
        elif isinstance(value, slice | range):
            self._begin(kind.__name__)
            self._within((("", end) for end in (value.start, value.stop, value.step)), depth)
        elif isinstance(value, _Tensor):  # a subclass: sharded, fake, quantised, masked ...
            parts += (_named(kind), value.dtype, value.dim(), value.requires_grad)
            ints += value.shape
        elif isinstance(value, numbers.Number) or hasattr(value, "__array_interface__"):
            self._add_number(value)
        else:
            self._begin(_named(kind))
            self._within(_inside(value), depth)

    def _within(self, values: Iterable[tuple[Any, Any]], depth: int) -> None:
        if depth < DEEPEST:
            samples = self._samples
            path = () if samples is None else samples.path
            for name, item in values:
                if samples is not None and name != "":
                    samples.path = (*path, name)
                self.add(item, name, depth + 1)
            if samples is not None:
                samples.path = path

    def _leaf(self, *told: Any) -> None:
        """A flag, a float or a text."""
        if self._samples is None:
            self.parts += told
        else:
            self._samples.add(told[-1], leaf=True)

    def _begin(self, *told: Any) -> None:
        """Something that holds others."""
        if self._samples is None:
            self.parts += told
        else:
            self._samples.add(told)

    def _add_sequence(self, value: list[Any] | tuple[Any, ...], depth: int) -> None:
        outermost = self._samples is None
        if outermost:
            self._samples = _Samples()
        self._begin("sequence", len(value))
        self._within((("", item) for item in value), depth)
        if outermost and self._samples is not None:
            samples, self._samples = self._samples, None
            self.parts += samples.told()

    def _add_number(self, value: Any) -> None:
        """Those of numpy are as Python's are; of an array, dtype and shape."""
        if isinstance(value, numbers.Integral):
            self.add(int(value))
        elif isinstance(value, numbers.Real):
            told = float(value)
            self._leaf(_FLOAT, "not a number" if math.isnan(told) else told)  # which is not equal to itself
        elif isinstance(value, numbers.Complex):
            self._begin("complex")
            self._add_number(value.real)
            self._add_number(value.imag)
        elif str(getattr(value, "dtype", None)) == "bool" and value.ndim == 0:
            self._leaf(bool(value))
        else:
            self.parts += (_named(type(value)), str(getattr(value, "dtype", "")), getattr(value, "ndim", 0))
            self.ints += getattr(value, "shape", ())


class _Samples:
    """What a sequence tells beside its tensors and integers: the flags, floats and texts of all samples at once.

    One value stands for all of their file names, one for all of their labels: told one by one, choices of so many
    samples would hardly come a second time. Floats are told by the least and the greatest, too.
    """

    def __init__(self) -> None:
        self.path: tuple[Any, ...] = ()  # names on the way to what is being looked at
        self._found: dict[tuple[Any, ...], list[Any]] = {}
        self._leaves: set[tuple[Any, ...]] = set()

    def add(self, value: Any, *, leaf: bool = False) -> None:
        """One more, under the names on the way to it."""
        self._found.setdefault(self.path, []).append(value)
        if leaf:
            self._leaves.add(self.path)

    def told(self) -> Iterator[Any]:
        """The parts of a structure that stand for all of them."""
        for path, values in sorted(self._found.items(), key=repr):
            if path in self._leaves or len({*values[1:]}) > 1:  # keys that some of the samples lack
                floats = [value for value in values if type(value) is float]
                yield from (TEXT, f"{number(repr((path, values))):x}")
                yield from (OF_THESE, min(floats), OF_THESE, max(floats)) if floats else ()
            else:
                yield path, tuple(values)


def _named(kind: type) -> str:
    """A class by its name: structures are kept in checkpoints."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object of another class holds, with names: the keys and values of a cache, the fields of a batch."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return
    if isinstance(value, tuple | list | set | frozenset | deque):
        names = getattr(value, "_fields", ())
        yield from itertools.zip_longest(names[: len(value)], value, fillvalue="")
    if not isinstance(value, _CLOSED):
        slots = (name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name))
        yield from ((name, getattr(value, name)) for name in slots)
        yield from getattr(value, "__dict__", {}).items()


def _slots(kind: type) -> Iterable[str]:
    """What objects of this class hold beside a dictionary."""
    names = vars(kind).get("__slots__", ()) or vars(kind).get("__struct_fields__", ())
    return [name for name in ([names] if isinstance(names, str) else names) if not name.startswith("__")]


def _add_nested(value: Any, parts: list[Any], ints: list[int]) -> None:
    jagged = value.layout is torch.jagged
    parts += ("nested", value.dtype, value.dim(), value.requires_grad)
    if jagged:
        ints += (size for size in value.shape if isinstance(size, int))
        _add_lengths(value.offsets().diff().tolist(), ints)
    else:
        parts.append(value.size(0))
        ints += (size for item in value.unbind() for size in item.shape)


def _add_boundaries(name: str, value: torch.Tensor, parts: list[Any], ints: list[int]) -> None:
    """Where the sequences of a packed batch begin: what attention over each of them costs depends on it."""
    if value.is_floating_point() or value.numel() == 0 or value.device.type == "meta":
        return
    parts.append("packed")
    if name == "position_ids":
        flat = value.flatten()
        starts = (flat == flat.min()).nonzero().flatten().tolist()
        bounds = [*starts, flat.numel()]
    else:
        bounds = value.flatten().tolist()
    _add_lengths([after - before for before, after in itertools.pairwise(bounds)], ints)


def _add_lengths(lengths: list[int], ints: list[int]) -> None:
    ints += (len(lengths), sum(lengths), sum(length * length for length in lengths))


def unwrapped(value: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What the transformations of torch.func wrap, and how many of them do."""
    times = 0
    while _functorch.is_functorch_wrapped_tensor(value):
        value = _functorch.get_unwrapped(value)
        times += 1
    return value, times
