"""What a call of a model is to a meter: its structure, and the integers that may vary inside it.

Structure and integers together are the signature: two calls with the same multiply the same. The structure alone says
between which calls a form over shapes may be fitted.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from operator import attrgetter
from typing import Any

import torch
from torch.nn.parameter import is_lazy

Structure = tuple[Any, ...]  # nested tuples of hashable things
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_PLAIN = (bool, type(None), torch.dtype, torch.device, torch.memory_format)
_autocast = torch.is_autocast_enabled
_AMONG_THEM = ("cpu", "cuda")
_autocast_dtype = torch.get_autocast_dtype
wants = attrgetter("requires_grad")
_BOUNDARIES = ("cu_seq", "cu_len")
MAY_TELL_BOUNDARIES = (*_BOUNDARIES, "position_ids")  # how such names begin
_DEEPEST = 8
_TOKENS = ("decoder_input_ids", "input_ids", "tokens", "idx")
_WORDS = 24  # characters: what is longer is a text, no choice


def arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], flash: bool | None = None
) -> tuple[Structure, tuple[int, ...]]:
    """Structure and integers of a call's arguments: dtypes, shapes, flags; no values of tensors but packed lengths."""
    parts: list[Any] = []
    ints: list[int] = []
    for value in args:
        _add(value, parts, ints, 0)
    for name, value in kwargs.items():
        parts.append(name)
        _add(value, parts, ints, 0)
        if type(value) is _Tensor and tells_boundaries(name, value, flash):
            _add_boundaries(name, value, parts, ints)
    return tuple(parts), tuple(ints)


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
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return None if chosen is None else "flash" in str(chosen)


class Root:
    """A model, and what of it is part of every call's structure."""

    __slots__ = (
        "__weakref__", "_casts", "_flags", "_shapes", "apart", "device", "flash", "fresh", "frozen", "index", "module",
        "number", "parameters", "parts", "trained", "wanting",
    )  # fmt: skip

    def __init__(self, module: torch.nn.Module, index: int) -> None:
        self.module, self.index = module, index
        self.trained = False
        self._flags: list[bool] | None = None
        self.parameters: list[torch.nn.Parameter] = []
        self.wanting: list[torch.nn.Parameter] = []  # of these, those that wanted a gradient at the latest call
        self.frozen: list[torch.nn.Parameter] = []
        self.fresh = False  # nothing but these can have changed since then
        self._shapes = b""
        self.number = 0  # for the parameters' shapes and the set of those that want a gradient
        self.refresh()

    def refresh(self) -> None:
        """Look its parts and parameters up again."""
        self.parts = frozenset(map(id, self.module.modules()))
        self.parameters, self._flags, self.fresh = list(self.module.parameters()), None, False
        shapes = repr([tuple(parameter.shape) for parameter in self.parameters if not is_lazy(parameter)]).encode()
        if shapes != self._shapes:  # another head, say: the same arguments multiply something else now
            self._shapes = shapes
        tensor = next(iter(self.parameters), None)
        self.flash = uses_flash(self.module)
        self.device = "cpu" if tensor is None else tensor.device.type
        self._casts = torch.amp.is_autocast_available(self.device)
        self.apart = self._casts and self.device not in _AMONG_THEM

    def cast(self) -> torch.dtype | None:
        """What autocast computes in here; None where it is off."""
        return _autocast_dtype(self.device) if self._casts and _autocast(self.device) else None

    def weight(self) -> torch.dtype | None:
        """Of the first parameter."""
        return self.parameters[0].dtype if self.parameters else None

    def wanted(self) -> int:
        """A number for the parameters' shapes, and the set of those that want a gradient."""
        flags = list(map(wants, self.parameters))
        if flags != self._flags:
            self._flags = flags
            self.wanting = [*itertools.compress(self.parameters, flags)]
            self.frozen = [parameter for parameter, flag in zip(self.parameters, flags, strict=True) if not flag]
            # The same in every process, and never 0, which stands for none.
            self.number = 1 + int.from_bytes(blake2b(bytes(flags) + self._shapes, digest_size=7).digest())
        self.fresh = True
        return self.number

    def forget(self) -> None:
        """Keep no parameter alive."""
        for parameters in (self.parameters, self.wanting, self.frozen):
            parameters.clear()


def _add(value: Any, parts: list[Any], ints: list[int], depth: int) -> None:
    kind = type(value)
    if isinstance(value, _Tensor) and value.is_nested:
        _add_nested(value, parts, ints)
    elif kind is _Tensor or kind is _Parameter:
        shape = value.shape
        parts += (value.dtype, len(shape), value.requires_grad)
        ints += shape
    elif kind in _PLAIN:
        parts.append(value)
    elif kind is int:
        parts.append("int")
        ints.append(value)
    elif kind is str:
        parts.append(value if len(value) <= _WORDS and " " not in value else "text")
    elif kind is list or kind is tuple:
        parts += (kind.__name__, len(value))
        if depth < _DEEPEST:
            for item in value:
                _add(item, parts, ints, depth + 1)
    elif isinstance(value, Mapping):
        parts += (_named(kind), len(value))
        if depth < _DEEPEST:
            for name, item in value.items():
                parts.append(name if isinstance(name, str | int) else None)
                _add(item, parts, ints, depth + 1)
    elif isinstance(value, _Tensor):  # a subclass: sharded, fake, quantised, masked ...
        parts += (_named(kind), value.dtype, value.dim(), value.requires_grad)
        ints += value.shape
    else:
        parts.append(_named(kind))
        if depth < _DEEPEST:
            for item in _inside(value):
                _add(item, parts, ints, depth + 1)


def _named(kind: type) -> str:
    """A class by its name: structures are kept in checkpoints."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _inside(value: Any) -> Iterator[Any]:
    """What an object of another class holds: the keys and values of a cache, the fields of a batch."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name) for field in dataclasses.fields(value))
    elif isinstance(value, tuple | list | set | frozenset):
        yield from value
    elif not isinstance(value, type | torch.nn.Module) and not callable(value):
        yield from vars(value).values() if hasattr(value, "__dict__") else ()


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


def size_of(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int, bool]:
    """(tokens, samples, whether an attention mask tells padding from them) that a call holds; 0 where it has none.

    Tokens are the integers of a (batch, length) input, those of the decoder where there are two stacks, or the
    positions of `inputs_embeds`; samples are the rows of the first tensor.
    """
    named = next((kwargs[name] for name in _TOKENS if name in kwargs), None)
    if "labels" in kwargs and "decoder_input_ids" not in kwargs and _two_stacks(module):
        named = kwargs["labels"]
    if named is None and "inputs_embeds" in kwargs:
        shape: Any = getattr(kwargs["inputs_embeds"], "shape", ())
        if len(shape) == 3:
            return shape[0] * shape[1], shape[0], _masked(kwargs, shape[:2])
    for value in (named, *args, *kwargs.values()):
        if isinstance(value, _Tensor) and value.dim() > 0:
            if value.is_nested:
                return 0, int(value.size(0)), False
            shape = value.shape
            if len(shape) == 1 and value is named:
                return shape[0], 1, False
            if len(shape) == 2 and not value.is_floating_point() and not value.is_complex():
                return shape[0] * shape[1], shape[0], _masked(kwargs, shape)
            return 0, shape[0], False
    return 0, 0, False


def _two_stacks(module: torch.nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _masked(kwargs: Mapping[str, Any], shape: Any) -> bool:
    mask = kwargs.get("attention_mask")
    return isinstance(mask, _Tensor) and mask.shape == shape and mask.device.type != "meta"
