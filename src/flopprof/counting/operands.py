"""What is this tensor: a parameter (through views, casts and copies), a buffer, or an activation?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from flopprof.profile import Kind

_SEQUENCES = (list, tuple)

# Copies of parameters die with the step that made them; their records are swept once this many are held.
_SWEEP_AT = 1024


class Source(NamedTuple):
    """Where a tensor's values come from."""

    kind: Kind
    name: str


class Sources:
    """Storages of parameters and buffers, and of copies made of nothing else."""

    def __init__(self) -> None:
        self.known: dict[int, Source] = {}
        self.lazy: list[tuple[torch.nn.Parameter, Source]] = []  # not yet initialised: no shape, no storage
        self._alive: dict[int, StorageWeakRef] = {}  # a dead storage's address must not be taken for it
        self._sweep_at = _SWEEP_AT

    def add_module(self, submodules: Iterable[tuple[str, torch.nn.Module]]) -> None:
        """Learn every parameter and buffer of these (fqn, module), under its first name."""
        for name, submodule in submodules:
            prefix = f"{name}." if name else ""
            for key, parameter in submodule._parameters.items():
                if parameter is not None:
                    source = Source("parameter", prefix + key)
                    if torch.nn.parameter.is_lazy(parameter):
                        self.lazy.append((parameter, source))
                    else:
                        self._add(parameter, source)
            for key, buffer in submodule._buffers.items():
                if buffer is not None and not torch.nn.parameter.is_lazy(buffer):
                    self._add(buffer, Source("buffer", prefix + key))

    def settle(self) -> None:
        """Learn the lazy parameters that have been initialised meanwhile."""
        waiting, self.lazy = self.lazy, []
        for parameter, source in waiting:
            if torch.nn.parameter.is_lazy(parameter):
                self.lazy.append((parameter, source))
            else:
                self._add(parameter, source)

    def derive(self, args: Any, result: Any) -> None:
        """`result` was computed from `args`: where all of them are parameters or buffers, so is it."""
        known, sources = self.known, []
        for item in args:
            for tensor in (item,) if isinstance(item, torch.Tensor) else item if isinstance(item, _SEQUENCES) else ():
                if not isinstance(tensor, torch.Tensor):
                    break
                try:
                    source = known.get(tensor.untyped_storage()._cdata)
                except (RuntimeError, NotImplementedError):
                    return
                if source is None:
                    return
                sources.append(source)
        if sources:
            source = merged(sources)
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
                    source = self.known.get(tensor.untyped_storage()._cdata)
                except (RuntimeError, NotImplementedError):  # sparse and functorch tensors have no storage
                    source = None
                if source is None:
                    source = next((Source("parameter", name) for name, held in own if _share(held, tensor)), None)
                operands += (position, tensor.shape, tensor.dtype, graded and tensor.requires_grad, source)
        return tuple(operands)

    def _add(self, tensor: torch.Tensor, source: Source) -> None:
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is not None:  # a wrapper, whose own storage holds nothing: its tensors are what is multiplied
            names, _context = flatten()
            for inner in (getattr(tensor, name) for name in names):
                if isinstance(inner, torch.Tensor):
                    self._add(inner, source)
            return
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # sparse, nested
            return
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = source
        self._alive[key] = StorageWeakRef(storage)
        if len(self._alive) > self._sweep_at:
            self._sweep()

    def _sweep(self) -> None:
        for key in [key for key, ref in self._alive.items() if ref.expired()]:
            del self._alive[key], self.known[key]
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._alive))


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Are they the same memory?"""
    try:
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return False


def merged(sources: list[Source]) -> Source:
    """What a tensor made of these is: a parameter as soon as one of them is."""
    parameters = list(dict.fromkeys(source for source in sources if source.kind == "parameter"))
    if not parameters:
        return sources[0]
    return parameters[0] if len(parameters) == 1 else Source("parameter", " + ".join(p.name for p in parameters))
