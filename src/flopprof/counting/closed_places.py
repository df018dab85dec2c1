"""Which dimensions of which arguments have a name, and the same arguments at other sizes."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from flopprof.errors import UsageError

Place = tuple[int | str, int]
Sizes = tuple[int, ...]  # one for each symbol, in their order


@dataclass(frozen=True)
class Symbol:
    """A named size: the (argument, dimension) that have it, and what it is in the arguments at hand."""

    name: str
    places: tuple[Place, ...]
    example: int


class Inputs:
    """Arguments of a call with named dimensions; `at` gives them at other sizes."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Mapping[str, Any]) -> None:
        """Raises UsageError for a name or place that is none, and for places of one name that differ in size."""
        self.args, self.kwargs = args, dict(kwargs)
        if not dynamic:
            raise UsageError("dynamic names no size: write it as {'batch': (0, 0), 'seq': (0, 1)}.")
        self.symbols = tuple(self._symbol(name, places) for name, places in dynamic.items())
        taken: dict[Place, str] = {}
        for symbol in self.symbols:
            for place in symbol.places:
                if taken.setdefault(place, symbol.name) != symbol.name:
                    raise UsageError(f"dynamic names {_spell(place)} twice: {taken[place]!r} and {symbol.name!r}.")

    def fixed(self, i: int, size: int) -> Inputs:
        """The same call with one named size fixed."""
        inputs = copy(self)
        inputs.args, inputs.kwargs = self.at((*self.example[:i], size, *self.example[i + 1 :]))
        inputs.symbols = (*self.symbols[:i], *self.symbols[i + 1 :])
        return inputs

    @property
    def example(self) -> Sizes:
        """The sizes of the arguments as they were given."""
        return tuple(symbol.example for symbol in self.symbols)

    @property
    def on_meta(self) -> bool:
        """Do all tensors live on meta, where a large size costs no more than a small one?"""
        return all(tensor.is_meta for tensor in self._tensors())

    def at(self, sizes: Sizes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments at these sizes: the given values, repeated or cut."""
        return self.made(sizes, _resized) if sizes != self.example else (self.args, dict(self.kwargs))

    def made(
        self, sizes: Iterable[Any], make: Callable[[torch.Tensor, dict[int, Any]], torch.Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments where `make` was given each tensor that has named dimensions, and these: dimension -> size."""
        changes: dict[int | str, dict[int, Any]] = {}
        for symbol, size in zip(self.symbols, sizes, strict=True):
            for argument, dimension in symbol.places:
                changes.setdefault(argument, {})[dimension] = size
        args, kwargs = list(self.args), dict(self.kwargs)
        for argument, sizes_of in changes.items():
            if isinstance(argument, int):
                args[argument] = make(args[argument], sizes_of)
            else:
                kwargs[argument] = make(kwargs[argument], sizes_of)
        return tuple(args), kwargs

    def spell(self, sizes: Sizes) -> str:
        """`batch=2, seq=5`."""
        return ", ".join(f"{symbol.name}={size}" for symbol, size in zip(self.symbols, sizes, strict=True))

    def _tensors(self) -> Iterable[torch.Tensor]:
        return (value for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor))

    def _symbol(self, name: str, places: Any) -> Symbol:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise UsageError(f"dynamic names a size {name!r}: a name is a word, so that .at(batch=8) can give it.")
        listed = [places] if isinstance(places, tuple) and _is_place(places) else places
        if not isinstance(listed, list | tuple) or not listed or not all(map(_is_place, listed)):
            raise UsageError(f"dynamic[{name!r}] is (argument, dimension), or a list of them, got {places!r}.")
        found = {self._place(name, place): self._size(name, place) for place in listed}
        if len(set(found.values())) > 1:
            sizes = ", ".join(f"{size} at {_spell(place)}" for place, size in found.items())
            raise UsageError(f"{name!r} names dimensions of different sizes: {sizes}.")
        return Symbol(name, tuple(found), next(iter(found.values())))

    def _place(self, name: str, place: Any) -> Place:
        argument, dimension = place
        if isinstance(argument, int) and argument < 0:
            argument += len(self.args)
        value = self._argument(name, argument)
        if not -value.dim() <= dimension < value.dim():
            raise UsageError(f"dynamic[{name!r}] names {_spell((argument, dimension))}, which has {value.dim()}.")
        return argument, dimension % value.dim()

    def _size(self, name: str, place: Any) -> int:
        argument, dimension = self._place(name, place)
        size = self._argument(name, argument).shape[dimension]
        if size < 1:
            raise UsageError(f"{name!r} is the size of an empty dimension, {_spell((argument, dimension))}.")
        return int(size)

    def _argument(self, name: str, argument: int | str) -> torch.Tensor:
        known: Mapping[Any, Any] = dict(enumerate(self.args)) if isinstance(argument, int) else self.kwargs
        if argument not in known:
            have = ", ".join(map(repr, (*range(len(self.args)), *self.kwargs)))
            raise UsageError(f"dynamic[{name!r}] names argument {argument!r}: there are {have}.")
        value = known[argument]
        if not isinstance(value, torch.Tensor) or value.is_nested or value.layout is not torch.strided:
            raise UsageError(f"dynamic[{name!r}] names argument {argument!r}, which is no dense tensor.")
        return value


def _is_place(place: Any) -> bool:
    return (
        isinstance(place, tuple | list)
        and len(place) == 2
        and isinstance(place[0], int | str)
        and isinstance(place[1], int)
    )


def _spell(place: Place) -> str:
    return f"dimension {place[1]} of argument {place[0]!r}"


def _resized(tensor: torch.Tensor, sizes: dict[int, int]) -> torch.Tensor:
    with torch.no_grad():
        result = tensor.detach()
        if tensor.is_meta:
            shape = [sizes.get(dimension, size) for dimension, size in enumerate(tensor.shape)]
            result = torch.empty(shape, dtype=tensor.dtype, device="meta")
        else:
            for dimension, size in sizes.items():
                index = torch.arange(size, device=tensor.device) % tensor.shape[dimension]
                result = result.index_select(dimension, index)
    return result.requires_grad_(tensor.requires_grad)
