"""What is this tensor: a parameter (through views, casts and copies), a buffer, or an activation?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from flopprof.counting.foreign import inner
from flopprof.counting.parameters import untraced
from flopprof.profile import Kind

_SEQUENCES = (list, tuple)

# Copies of parameters die with the step that made them; their records are swept once this many are held.
_SWEEP_AT = 1024
# What so many parameters are added up to (a norm over all weights) is no weight.
_MOST_MERGED = 16
_AND = " + "


class Source(NamedTuple):
    """Where a tensor's values come from."""

    kind: Kind
    name: str


class Sources:
    """Storages of parameters and buffers, and of copies made of nothing else."""

    def __init__(self) -> None:
        self.known: dict[int, Source] = {}
        # Storages that several lie in (flattened weights): where each begins and ends, in bytes.
        self.shared: dict[int, list[tuple[int, int, Source]]] = {}
        self._extents: dict[int, list[tuple[int, int, Source]]] = {}
        self.lazy: list[tuple[torch.nn.Parameter, Source]] = []  # not yet initialised: no shape, no storage
        self._alive: dict[int, StorageWeakRef] = {}  # a dead storage's address must not be taken for it
        self._sweep_at = _SWEEP_AT

    def add_module(self, submodules: Iterable[tuple[str, torch.nn.Module]]) -> None:
        """Learn every parameter and buffer of these (fqn, module), under its first name."""
        with untraced():
            self._learn(submodules)

    def _learn(self, submodules: Iterable[tuple[str, torch.nn.Module]]) -> None:
        for name, submodule in submodules:
            prefix = f"{name}." if name else ""
            for key, parameter in submodule._parameters.items():
                if parameter is not None:
                    source = Source("parameter", prefix + key)
                    if torch.nn.parameter.is_lazy(parameter):
                        self.lazy.append((parameter, source))
                    else:
                        self._register(parameter, source)
            for key, buffer in submodule._buffers.items():
                if buffer is not None and not torch.nn.parameter.is_lazy(buffer):
                    self._register(buffer, Source("buffer", prefix + key))

    def settle(self) -> None:
        """Learn the lazy parameters that have been initialised meanwhile."""
        waiting, self.lazy = self.lazy, []
        for parameter, source in waiting:
            if torch.nn.parameter.is_lazy(parameter):
                self.lazy.append((parameter, source))
            else:
                self._register(parameter, source)

    def of(self, tensor: torch.Tensor) -> Source | None:
        """What a tensor is; of several that lie in its memory, all. Raises as `untyped_storage` does."""
        key = tensor.untyped_storage()._cdata
        if key not in self.shared:
            return self.known.get(key)
        begin, end = _extent(tensor)
        met = [(first, last, source) for first, last, source in self.shared[key] if first < end and begin < last]
        around = [(last - first, source) for first, last, source in met if first <= begin and end <= last]
        if around:
            return min(around, key=lambda pair: pair[0])[1]
        return merged([source for _first, _last, source in met]) if met else None

    def apart(self, storages: set[int]) -> bool:
        """Does none of these storages hold a parameter or buffer?"""
        return storages.isdisjoint(self.known) and storages.isdisjoint(self.shared)

    def derive(self, args: Any, result: Any) -> None:
        """`result` was computed from `args`: where all of them are parameters or buffers, so is it."""
        sources = []
        for item in args:
            for tensor in (item,) if isinstance(item, torch.Tensor) else item if isinstance(item, _SEQUENCES) else ():
                if not isinstance(tensor, torch.Tensor):
                    break
                try:
                    source = self.of(tensor)
                except (RuntimeError, NotImplementedError):
                    return
                if source is None:
                    return
                sources.append(source)
        if sources:
            source = sources[0] if len(sources) == 1 else merged(sources)
            if source.name.count(_AND) > _MOST_MERGED:
                return
            for item in result if isinstance(result, _SEQUENCES) else (result,):
                if isinstance(item, torch.Tensor):
                    self._add(item, source)

    def describe(self, args: Any, kwargs: Any, own: Iterable[tuple[str, Any]] = ()) -> tuple[Any, ...]:
        """Of each tensor five things, in one row: its argument's position, shape, dtype, gradient wanted, source.

        own: parameters of the running module by name: sharded ones are gathered into new storages every step.
        Raises RuntimeError where a tensor has no shape (strided nested ones).
        """
        graded = torch.is_grad_enabled()
        operands: list[Any] = []
        for position, item in enumerate((*args, *kwargs.values()) if kwargs else args):
            if isinstance(item, torch.Tensor):
                tensors: Any = (item,)
            elif type(item) in _SEQUENCES and item and isinstance(item[0], torch.Tensor):
                tensors = [tensor for tensor in item if tensor is not None]
            else:
                continue
            for tensor in tensors:
                try:
                    source = self.of(tensor)
                except (RuntimeError, NotImplementedError):  # sparse and functorch tensors have no storage
                    source = None
                if source is None:
                    source = next((Source("parameter", name) for name, held in own if _share(held, tensor)), None)
                operands += (position, tensor.shape, tensor.dtype, graded and tensor.requires_grad, source)
        return tuple(operands)

    def _register(self, tensor: torch.Tensor, source: Source) -> None:
        """Learn one of a module's own: others may lie beside it in the same storage."""
        try:
            key, extent = tensor.untyped_storage()._cdata, _extent(tensor)
        except (RuntimeError, NotImplementedError):  # sparse, nested
            return
        if hasattr(tensor, "__tensor_flatten__"):
            self._add(tensor, source)
            return
        held = self._extents.setdefault(key, []) if key in self.known or key in self.shared else []
        self._extents[key] = held
        if not any(first <= extent[0] and extent[1] <= last for first, last, _source in held):
            held.append((*extent, source))
        if len(held) == 1:
            self._add(tensor, source)
        else:
            self.known.pop(key, None)
            self.shared[key] = held

    def _add(self, tensor: torch.Tensor, source: Source) -> None:
        held = inner(tensor)
        if held is not None:  # a wrapper, whose own storage holds nothing: its tensors are what is multiplied
            for part in held.values():
                self._add(part, source)
            return
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # sparse, nested
            return
        key = storage._cdata
        if key in self.known or key in self.shared:
            return
        self.known[key] = source
        self._alive[key] = StorageWeakRef(storage)
        if len(self._alive) > self._sweep_at:
            self._sweep()

    def _sweep(self) -> None:
        for key in [key for key, ref in self._alive.items() if ref.expired()]:
            del self._alive[key]
            for table in (self.known, self.shared, self._extents):
                table.pop(key, None)
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._alive))


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Are they the same memory?"""
    try:
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return False


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage between which a tensor lies."""
    begin = tensor.storage_offset()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = begin + last + 1 if tensor.numel() else begin
    return int(begin) * tensor.element_size(), int(end) * tensor.element_size()


def merged(sources: list[Source]) -> Source:
    """What a tensor made of these is: a parameter as soon as one of them is."""
    parameters = [source for source in dict.fromkeys(sources) if source.kind == "parameter"]
    if not parameters:
        return sources[0]
    names = dict.fromkeys(name for source in parameters for name in source.name.split(_AND))
    return Source("parameter", _AND.join(names))
