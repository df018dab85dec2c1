"""What a call of a model is to a meter: its structure, and the integers that may vary inside it.

Structure and integers together are the signature: two calls with the same multiply the same. The structure alone says
between which calls a form over shapes may be fitted.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import itertools
import math
import numbers
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from flopprof.meter.freezing import seen
from flopprof.meter.padding import Padding
from flopprof.meter.places import number

Structure = tuple[Any, ...]  # nested tuples of hashable things
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_PLAIN = (bool, type(None), torch.dtype, torch.device, torch.memory_format)
_autocast = torch.is_autocast_enabled
_AMONG_THEM = ("cpu", "cuda")
_autocast_dtype = torch.get_autocast_dtype
_grad_enabled = torch.is_grad_enabled
_wants = attrgetter("requires_grad")
_BOUNDARIES = ("cu_seq", "cu_len")
MAY_TELL_BOUNDARIES = (*_BOUNDARIES, "position_ids")  # how such names begin
_DEEPEST = 8
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_functorch = torch._C._functorch
_TOKENS = ("decoder_input_ids", "input_ids", "tokens", "idx")
_WORDS = 24  # characters: what is longer is a text, no choice
_FLOAT, TEXT = "a float", "a text"  # with a space, as no text that is kept has
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "module")  # what wrappers call the module inside
_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


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
    return name.startswith(_BOUNDARIES)


def uses_flash(module: torch.nn.Module) -> bool | None:
    """Is a transformers model's attention flash attention? None: it is no such model."""
    chosen = _said(module, "_attn_implementation")
    return None if chosen is None else "flash" in str(chosen)


def _layers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module, and what DistributedDataParallel, FSDP or a compiler wrapped in it, from the outside in."""
    inner: Any = module
    for _ in range(_DEEPEST):
        yield inner
        parts = (getattr(inner, name, None) for name in _WRAPPED)
        inner = next((part for part in parts if isinstance(part, torch.nn.Module)), None)
        if inner is None:
            return


def _said(module: torch.nn.Module, name: str) -> Any:
    """What the config of a transformers model says, of one that is wrapped, too; None where it says nothing."""
    told = (getattr(getattr(layer, "config", None), name, None) for layer in _layers(module))
    return next((value for value in told if value is not None), None)


def _names(module: torch.nn.Module) -> tuple[str, ...]:
    """Of the arguments by position of its forward; of a wrapper that hands on whatever it gets, of what it wraps."""
    for layer in _layers(module):
        try:
            parameters = inspect.signature(layer.forward).parameters.values()
        except (TypeError, ValueError):
            return ()
        names = tuple(parameter.name for parameter in parameters if parameter.kind in _NAMED)
        if names:
            return names
    return ()


class Root:
    """A model, and what of it is part of every call's structure."""

    __slots__ = (
        "__weakref__", "_asked", "_casts", "_flags", "_own", "_shapes", "apart", "bounds_at", "device", "first",
        "flash", "fresh", "index", "module", "names", "number", "parameters", "parts", "shaped", "stale", "trained",
        "two_stacks",
    )  # fmt: skip

    def __init__(self, module: torch.nn.Module, index: int) -> None:
        self.module, self.index = module, index
        self.trained = False
        self._flags: list[bool] | None = None
        self.parameters: list[torch.nn.Parameter] = []  # that it held when they were looked up, perhaps in a call
        self._own: list[torch.nn.Parameter] | None = None  # that it holds between its calls; None: not looked up
        self.first: torch.nn.Parameter | None = None
        self.fresh = False  # no parameter was replaced, frozen or thawed since they were looked at
        self.stale = False  # a part of it was replaced
        self._asked = False  # nobody tells when one of the parameters is frozen
        self._shapes = ""
        self.number = 0  # for the parameters' shapes and the set of those that want a gradient
        self.shaped = 0  # for the shapes alone: below 0
        self.refresh()

    def refresh(self) -> bool:
        """Look its parts and parameters up again; are these others than before?"""
        self.stale, self._own = False, None
        self.parts = frozenset(map(id, self.module.modules()))
        before = self.parameters
        self.parameters, self._flags, self.fresh = list(self.module.parameters()), None, False
        self._asked = not all(map(seen, self.parameters))
        shapes = shapes_of(self.parameters)
        if shapes != self._shapes:  # another head, say: the same arguments multiply something else now
            self._shapes = shapes
            self.shaped = -number(shapes)
        self.first = next(iter(self.parameters), None)
        self.flash = uses_flash(self.module)
        self.two_stacks = bool(_said(self.module, "is_encoder_decoder"))
        self.device = "cpu" if self.first is None else self.first.device.type
        self.names = _names(self.module)  # of the arguments by position
        # Of these, the first one that may tell where packed sequences begin.
        self.bounds_at = next((i for i, name in enumerate(self.names) if self._tells_boundaries(name)), sys.maxsize)
        self._casts = torch.amp.is_autocast_available(self.device)
        self.apart = self._casts and self.device not in _AMONG_THEM
        return list(map(id, before)) != list(map(id, self.parameters))

    def _tells_boundaries(self, name: str) -> bool:
        if name == "position_ids":
            return self.device == "cpu" if self.flash is None else self.flash
        return name.startswith(_BOUNDARIES)

    def cast(self) -> torch.dtype | None:
        """What autocast computes in here; None where it is off."""
        return _autocast_dtype(self.device) if self._casts and _autocast(self.device) else None

    def renew(self) -> None:
        """Look at the parameters again, if they were replaced; and at which of them want a gradient."""
        if self.stale:
            self.refresh()
        self.fresh = not self._asked
        flags = list(map(_wants, self.parameters))
        if flags != self._flags:
            self._flags = flags
            self.number = number(repr((flags, self._shapes)))

    def owned(self) -> list[torch.nn.Parameter]:
        """Its parameters, asked for where it is not being called: functional_call puts others there meanwhile."""
        if self._own is None or self.stale:
            self._own = list(self.module.parameters())
        return self._own

    def trains(self) -> bool:
        """Would a call of it now be differentiated, down to parameters of its own?"""
        return _grad_enabled() and any(map(_wants, self.parameters))

    def forget(self) -> None:
        """Keep no parameter alive."""
        self.parameters.clear()
        self._own = self.first = None


_CLOSED = (type, torch.nn.Module, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def shapes_of(parameters: Iterable[torch.Tensor]) -> str:
    """Of those that have one."""
    return repr([tuple(parameter.shape) for parameter in parameters if not is_lazy(parameter)])


class _Told:
    """What arguments tell, one after another. flash: as in `tells_boundaries`."""

    def __init__(self, flash: bool | None) -> None:
        self.parts: list[Any] = []
        self.ints: list[int] = []
        self._flash = flash

    def add(self, value: Any, name: Any = "", depth: int = 0) -> None:
        """One more value, under that name."""
        parts, ints, kind = self.parts, self.ints, type(value)
        if isinstance(value, _Tensor):
            value, times = _unwrapped(value)
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
            parts += (TEXT, value if len(value) <= _WORDS and " " not in value else "a long text")
        elif kind is list or kind is tuple:
            parts += (kind.__name__, len(value))
            self._within((("", item) for item in value), depth)
        elif isinstance(value, Mapping):
            parts += (_named(kind), len(value))
            if depth < _DEEPEST:
                for key, item in value.items():
                    parts.append(key if isinstance(key, str | int) else None)
                    self.add(item, key, depth + 1)
        elif isinstance(value, slice | range):
            parts.append(kind.__name__)
            self._within((("", end) for end in (value.start, value.stop, value.step)), depth)
        elif isinstance(value, _Tensor):  # a subclass: sharded, fake, quantised, masked ...
            parts += (_named(kind), value.dtype, value.dim(), value.requires_grad)
            ints += value.shape
        elif isinstance(value, numbers.Number) or hasattr(value, "__array_interface__"):
            self._add_number(value)
        else:
            parts.append(_named(kind))
            self._within(_inside(value), depth)

    def _within(self, values: Iterator[tuple[str, Any]], depth: int) -> None:
        if depth < _DEEPEST:
            for name, item in values:
                self.add(item, name, depth + 1)

    def _add_number(self, value: Any) -> None:
        """Those of numpy are as Python's are; of an array, dtype and shape."""
        if isinstance(value, numbers.Integral):
            self.add(int(value))
        elif isinstance(value, numbers.Real):
            number = float(value)
            self.parts += (_FLOAT, "not a number" if math.isnan(number) else number)  # which is not equal to itself
        elif isinstance(value, numbers.Complex):
            self.parts.append("complex")
            self._add_number(value.real)
            self._add_number(value.imag)
        elif str(getattr(value, "dtype", None)) == "bool" and value.ndim == 0:
            self.parts.append(bool(value))
        else:
            self.parts += (_named(type(value)), str(getattr(value, "dtype", "")), getattr(value, "ndim", 0))
            self.ints += getattr(value, "shape", ())


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


def size_of(root: Root, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int, Padding | None]:
    """(tokens, samples, what tells padding from the tokens) that a call holds; 0 and None where it has none.

    Tokens are the integers of a (batch, length) input, those of the decoder where there are two stacks, or the
    positions of `inputs_embeds`; samples are the rows of the first tensor, of all that `vmap` makes one of.
    """
    at: dict[str, int | str] = {name: i for i, name in zip(range(len(args)), root.names, strict=False)}
    at |= {name: name for name in kwargs}
    given = {name: args[where] if isinstance(where, int) else kwargs[where] for name, where in at.items()}
    given = {name: value for name, value in given.items() if value is not None}
    tokens = next((name for name in _TOKENS if name in given), None)
    if root.two_stacks and "labels" in given and "decoder_input_ids" not in given:
        tokens = "labels"
    named = None if tokens is None else given[tokens]
    if named is None and "inputs_embeds" in given:
        shape: Any = getattr(given["inputs_embeds"], "shape", ())
        if len(shape) == 3:
            return shape[0] * shape[1], shape[0], _padding(tokens, shape[:2], given, at)
    for value in (named, *args, *kwargs.values()):
        if isinstance(value, _Tensor) and value.dim() > 0:
            if value.is_nested:
                return 0, int(value.size(0)), None
            shape, times = value.shape, _mapped(value)
            if len(shape) == 1 and value is named:
                return times * shape[0], times, None
            if len(shape) == 2 and not value.is_floating_point() and not value.is_complex():
                padding = _padding(tokens, shape, given, at) if times == 1 else None
                return times * shape[0] * shape[1], times * shape[0], padding
            return 0, times if len(shape) == 1 and times > 1 else times * shape[0], None
    batch = next((value for value in (*args, *kwargs.values()) if isinstance(value, Mapping)), None)
    return (0, 0, None) if batch is None else (*size_of(root, (), batch)[:2], None)


def _unwrapped(value: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What the transformations of torch.func wrap, and how many of them do."""
    times = 0
    while _functorch.is_functorch_wrapped_tensor(value):
        value = _functorch.get_unwrapped(value)
        times += 1
    return value, times


def _mapped(value: torch.Tensor) -> int:
    """How many such tensors `vmap` makes one of."""
    return _unwrapped(value)[0].numel() // value.numel() if value.numel() else 1


def _padding(tokens: str | None, shape: Any, given: Mapping[str, Any], at: Mapping[str, int | str]) -> Padding | None:
    """What tells padding from these tokens: of a decoder beside an encoder its own mask, or the labels."""
    decoded = tokens in ("decoder_input_ids", "labels")
    choices = [("decoder_attention_mask" if decoded else "attention_mask", 0)]
    if decoded and "attention_mask" in given:  # padding is spoken of: then that of the labels is marked, too
        choices.append(("labels", -100))
    for name, value in choices:
        found = given.get(name)
        if isinstance(found, _Tensor) and found.shape == shape and found.device.type != "meta":
            return Padding(at[name], value, shape[0] * shape[1])
    return None
