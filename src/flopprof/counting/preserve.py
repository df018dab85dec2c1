"""Run a model and leave it as it was: gradients, buffers, flags, cached attributes, random state."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from flopprof.counting.contents import HELD, Own, own_package, package_of, put_back, slots_of, state_of
from flopprof.counting.foreign import inner

_PLAIN = frozenset({type(None), bool, int, float, str})


class Keep:
    """What was there before, and how to put it back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._empty: list[Any] = []
        self._saved: set[Any] = set()  # storages, and objects that modules hold; held by what puts them back

    def module(self, module: torch.nn.Module) -> None:
        """Every attribute of every submodule, by value where a forward writes: buffers, caches, renormed tables."""
        leaves: dict[int, torch.Tensor] = {}
        for submodule in module.modules():
            parameters = [tensor for tensor in submodule._parameters.values() if tensor is not None]
            lazy = [is_lazy(tensor) for tensor in parameters]
            leaves.update((id(leaf), leaf) for leaf, waits in zip(parameters, lazy, strict=True) if not waits)
            if any(lazy) or any(tensor is not None and is_lazy(tensor) for tensor in submodule._buffers.values()):
                continue  # its first call makes another module of it, for good
            self.held(submodule.__dict__, own=frozenset({package_of(submodule)}))
            if getattr(submodule, "max_norm", None) is not None:  # nn.Embedding then rescales the rows it reads
                for parameter in parameters:
                    self.values(parameter)
        for leaf in leaves.values():
            self._wanted(leaf)
            self.gradient(leaf)

    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Its parameters, state and settings."""
        self.held(optimizer.__dict__, own=frozenset())
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.values(parameter)
                self.gradient(parameter)

    def gradients(self, outputs: list[torch.Tensor]) -> None:
        """Gradients of every leaf that a backward from `outputs` will reach."""
        seen: set[Any] = set()
        stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
        for output in outputs:
            if output.is_leaf:
                self.gradient(output)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, torch.Tensor):
                self.gradient(leaf)
            stack += [following for following, _index in node.next_functions if following is not None]

    def gradient(self, leaf: torch.Tensor) -> None:
        """The gradient of one leaf; it is taken away for the run, so that nothing is added to it."""
        gradient = leaf.grad
        leaf.grad = None
        self._undo.append(lambda: setattr(leaf, "grad", gradient))

    def _wanted(self, leaf: torch.Tensor) -> None:
        wanted = leaf.requires_grad

        def undo() -> None:
            if leaf.is_leaf and leaf.requires_grad != wanted:
                leaf.requires_grad_(wanted)

        self._undo.append(undo)

    def held(self, value: Any, *, own: Own) -> None:
        """Whatever is found in a container or object: its items and attributes, and the values of those.

        own: the packages whose objects are looked into; None: of what the caller gives, any but Python's and torch's.
        """
        stack = [(value, own)]
        while stack:
            value, own = stack.pop()
            kind = type(value)
            if kind in _PLAIN:
                continue
            if isinstance(value, torch.Tensor):
                if not isinstance(value, torch.nn.Parameter):
                    self.values(value)
                continue
            if kind in HELD and not value:  # as hooks mostly are, of which a large model has ten thousands
                self._empty.append(value)
                continue
            if kind is tuple or (isinstance(value, tuple) and hasattr(kind, "_fields")):
                stack += [(item, own) for item in value]
                continue
            within = own if kind in HELD else own_package(value, own)
            if within is None and kind not in HELD:
                undo = state_of(value)
                if undo is not None:
                    self._undo.append(undo)
                continue
            if (id(value), own) in self._saved:
                continue
            self._saved.add((id(value), own))
            for part in (value, getattr(value, "__dict__", None)) if kind not in HELD else (value,):
                if isinstance(part, tuple(HELD)):
                    undo, items = put_back(part)
                    self._undo.append(undo)
                    stack += [(item, within) for item in items]
            if kind not in HELD:
                undo, items = slots_of(value)
                self._undo.append(undo)
                stack += [(item, within) for item in items]

    def values(self, tensor: torch.Tensor) -> None:
        """Its elements, in place, and its shape; and that it has no graph, where it had none."""
        if tensor.is_leaf and (tensor.is_floating_point() or tensor.is_complex()):
            wanted = tensor.requires_grad
            self._undo.append(lambda: _cut(tensor, wanted))
        # By storage: whatever the type, overlaps included, and unseen by autograd, whose graphs may hold the tensor.
        try:
            storage = tensor.untyped_storage()
            place = storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())
        except (RuntimeError, NotImplementedError):  # sparse: written to by no operator in place
            return
        self._undo.append(lambda: _place(tensor, storage, place))
        if storage.device.type == "meta" or storage._cdata in self._saved:
            return
        self._saved.add(storage._cdata)
        try:
            before = storage.clone()
        except RuntimeError:  # a wrapper has none of its own
            self._wrapped(tensor)
            return

        def undo() -> None:
            if storage.nbytes() != before.nbytes():
                storage.resize_(before.nbytes())
            storage.copy_(before)

        self._undo.append(undo)

    def _wrapped(self, wrapper: torch.Tensor) -> None:
        """What a subclass holds its elements in: DTensor, nested tensors that are jagged, masked ones."""
        held = inner(wrapper)
        if held is None:
            held = {name: part for name, part in vars(wrapper).items() if isinstance(part, torch.Tensor)}
        for name, part in held.items():
            self._undo.append(partial(_hold, wrapper, name, part))
            self.values(part)

    def restore(self) -> None:
        """Put everything back, the latest first; all the rest also where one thing cannot be. Raises then."""
        failed: Exception | None = None
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:
                failed = failed or error
        for container in self._empty:
            container.clear()
        self._empty.clear()
        self._saved.clear()
        if failed is not None:
            raise failed


def _hold(wrapper: torch.Tensor, name: str, part: torch.Tensor) -> None:
    """A wrapper holds again what it held."""
    if getattr(wrapper, name, None) is not part:
        setattr(wrapper, name, part)


def _cut(tensor: torch.Tensor, wanted: bool) -> None:
    """A tensor that was written to in place is no result any more, and wants a gradient as it did."""
    if tensor.grad_fn is not None and not tensor._is_view():  # torch cannot cut a view from what it was written with
        tensor.detach_().requires_grad_(wanted)
        tensor.grad = None
    elif tensor.is_leaf and tensor.requires_grad != wanted:
        tensor.requires_grad_(wanted)


def _place(tensor: torch.Tensor, storage: torch.UntypedStorage, place: tuple[Any, ...]) -> None:
    """A tensor that was resized, or given other data, lies again where it lay."""
    _key, offset, shape, stride = place
    now = tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())
    if now != place:
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, offset, shape, stride)


def modules_within(*values: Any) -> list[torch.nn.Module]:
    """Modules among arguments, and those that a function, method or partial among them will find by itself."""
    found: dict[int, torch.nn.Module] = {}
    stack = [leaf for leaf in tree_leaves(values) if callable(leaf)]
    for value in stack:  # grows as it goes
        if isinstance(value, torch.nn.Module):
            found[id(value)] = value
        elif isinstance(value, partial):
            stack += [leaf for leaf in tree_leaves((value.func, value.args, value.keywords)) if callable(leaf)]
        elif isinstance(value, MethodType):
            stack.append(value.__self__)
        elif isinstance(value, FunctionType):
            names = inspect.getclosurevars(value)
            stack += [
                held
                for held in tree_leaves([list(names.nonlocals.values()), list(names.globals.values())])
                if isinstance(held, torch.nn.Module)
            ]
    return list(found.values())


@contextmanager
def preserved(
    modules: list[torch.nn.Module], inputs: Any = (), optimizer: torch.optim.Optimizer | None = None
) -> Iterator[Keep]:
    """Whatever runs inside leaves modules, inputs, optimizer and random state as they were."""
    keep = Keep()
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    used = [*tensors, *(parameter for module in modules for parameter in module.parameters())]
    devices = sorted({tensor.device.index or 0 for tensor in used if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        for module in modules:
            keep.module(module)
        for tensor in tensors:
            keep.values(tensor)
        keep.held(inputs, own=None)
        if optimizer is not None:
            keep.optimizer(optimizer)
        try:
            yield keep
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
            keep.restore()
