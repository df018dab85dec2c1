"""Run a model and leave it as it was: gradients, buffers, flags, cached attributes, random state."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Kept by reference in a module's __dict__ and filled by a run: caches, lists of outputs.
_CONTAINERS = (dict, list, set)


class Keep:
    """What was there before, and how to put it back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def module(self, module: torch.nn.Module) -> None:
        """Every attribute of every submodule, buffers by value."""
        for submodule in module.modules():
            self._attributes(submodule)
        for buffer in module.buffers():
            if not buffer.is_meta:
                self._values(buffer)
        for parameter in module.parameters():
            self.gradient(parameter)

    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Parameters by value, and the optimizer's state."""
        for group in optimizer.param_groups:
            self._undo.append(lambda group=group, before=dict(group): (group.clear(), group.update(before)))
            for parameter in group["params"]:
                self._values(parameter)
                self.gradient(parameter)
        state = optimizer.state
        before = {key: copy.deepcopy(value) for key, value in state.items()}
        self._undo.append(lambda: (state.clear(), state.update(before)))

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

    def _attributes(self, module: torch.nn.Module) -> None:
        attributes = module.__dict__
        before = dict(attributes)
        inside = [(value, copy.copy(value)) for value in before.values() if type(value) in _CONTAINERS]

        def undo() -> None:
            for value, content in inside:
                value.clear()
                if isinstance(value, list):
                    value.extend(content)
                else:
                    value.update(content)
            attributes.clear()
            attributes.update(before)

        self._undo.append(undo)

    def _values(self, tensor: torch.Tensor) -> None:
        if tensor.is_meta:
            return
        before = tensor.detach().clone()

        def undo() -> None:
            with torch.no_grad():
                tensor.copy_(before)

        self._undo.append(undo)

    def restore(self) -> None:
        """Put everything back, the latest first."""
        while self._undo:
            self._undo.pop()()


@contextmanager
def preserved(module: torch.nn.Module | None, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Keep]:
    """Whatever runs inside leaves the module, the optimizer and the random state as they were."""
    keep = Keep()
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.is_cuda}) if module is not None else []
    with torch.random.fork_rng(devices=devices):
        if module is not None:
            keep.module(module)
        if optimizer is not None:
            keep.optimizer(optimizer)
        try:
            yield keep
        finally:
            keep.restore()
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
