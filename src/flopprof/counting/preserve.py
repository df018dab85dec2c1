"""Run a model and leave it as it was: gradients, buffers, flags, cached attributes, random state."""

from __future__ import annotations

import inspect
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

# Held by a module and filled by a run: caches, lists of outputs.
_CONTAINERS = frozenset({dict, list, set, OrderedDict, defaultdict, deque})
_PLAIN = frozenset({type(None), bool, int, float, str})


class Keep:
    """What was there before, and how to put it back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._empty: list[Any] = []
        self._saved: set[int] = set()  # storages, and objects that modules hold; held by what puts them back
        self._package = ""  # of the module whose attributes are being kept

    def module(self, module: torch.nn.Module) -> None:
        """Every attribute of every submodule, by value where a forward writes: buffers, caches, renormed tables."""
        leaves: dict[int, torch.Tensor] = {}
        for submodule in module.modules():
            parameters = [tensor for tensor in submodule._parameters.values() if tensor is not None]
            lazy = [is_lazy(tensor) for tensor in parameters]
            leaves.update((id(leaf), leaf) for leaf, waits in zip(parameters, lazy, strict=True) if not waits)
            if any(lazy) or any(tensor is not None and is_lazy(tensor) for tensor in submodule._buffers.values()):
                continue  # its first call makes another module of it, for good
            self._package = type(submodule).__module__.partition(".")[0]
            self._container(submodule.__dict__, set())
            if getattr(submodule, "max_norm", None) is not None:  # nn.Embedding then rescales the rows it reads
                for parameter in parameters:
                    self.values(parameter)
        for leaf in leaves.values():
            self.gradient(leaf)

    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Its parameters, state and settings."""
        self._package = ""
        self._container(optimizer.__dict__, set())
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

    def _container(self, container: Any, above: set[int]) -> None:
        before = container.copy()
        above = above | {id(container)}
        for value in before.values() if isinstance(before, dict) else before:
            kind = type(value)
            if kind in _PLAIN:
                continue
            if kind in _CONTAINERS:
                if not value:  # as hooks mostly are, of which a large model has ten thousands
                    self._empty.append(value)
                elif id(value) not in above:
                    self._container(value, above)
            elif isinstance(value, torch.Tensor):
                if not isinstance(value, torch.nn.Parameter):
                    self.values(value)
            elif self._is_own(value) and id(value) not in self._saved:  # a cache of the model's own kind
                self._saved.add(id(value))
                self._container(value.__dict__, above)

        def undo() -> None:
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(before)

        self._undo.append(undo)

    def _is_own(self, value: Any) -> bool:
        """Is it a plain object of a class from where the module's comes from?"""
        return (
            type(value).__module__.partition(".")[0] == self._package != "torch"
            and type(getattr(value, "__dict__", None)) is dict
            and not isinstance(value, torch.nn.Module)
        )

    def values(self, tensor: torch.Tensor) -> None:
        """Its elements, in place; and that it has no graph, where it had none."""
        if tensor.is_leaf and (tensor.is_floating_point() or tensor.is_complex()):
            wanted = tensor.requires_grad
            self._undo.append(lambda: _cut(tensor, wanted))
        # By storage: whatever the type, overlaps included, and unseen by autograd, whose graphs may hold the tensor.
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # sparse: written to by no operator in place
            return
        if storage.device.type == "meta" or storage._cdata in self._saved:
            return
        self._saved.add(storage._cdata)
        before = storage.clone()
        self._undo.append(lambda: storage.copy_(before))

    def restore(self) -> None:
        """Put everything back, the latest first."""
        while self._undo:
            self._undo.pop()()
        for container in self._empty:
            container.clear()
        self._empty.clear()
        self._saved.clear()


def _cut(tensor: torch.Tensor, wanted: bool) -> None:
    """A tensor that was written to in place is no result any more."""
    if tensor.grad_fn is not None and not tensor._is_view():  # torch cannot cut a view from what it was written with
        tensor.detach_().requires_grad_(wanted)
        tensor.grad = None


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
        if optimizer is not None:
            keep.optimizer(optimizer)
        try:
            yield keep
        finally:
            keep.restore()
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
