"""The models of a meter, and what is seen of them while a step is counted: calls of what they wrap."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flopprof.meter.compiling import compiled_within
from flopprof.meter.signature import Root


class Roots(list[Root]):
    """The models, in the order in which they were given. evaluated: told of a model that is, though not called."""

    def __init__(self, evaluated: Callable[[Root], object]) -> None:
        super().__init__()
        self._evaluated = weakref.WeakMethod(evaluated)
        self._handles: list[Any] = []

    def placed(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What `told_inputs` told, with the places of the models' parameters for their ids."""
        parameters = (parameter for root in self for parameter in root.owned())
        places = {id(parameter): place for place, parameter in enumerate(parameters)}
        return tuple(places.get(item, -1) if isinstance(item, int) else item for item in inputs)

    def named(self) -> torch.nn.Module | None:
        """What names the counter's modules."""
        return self[0].module if len(self) == 1 else None

    def compiled(self) -> bool:
        """Does a part of the models run compiled?"""
        return any(compiled_within(root.module) for root in self)

    def opened(self) -> None:
        """A counter sees every module now."""
        if not self._handles:
            for root in self:
                hook = _Inside(self._evaluated, root)
                self._handles += [module.register_forward_pre_hook(hook) for module in _inside(root)]

    def closed(self) -> None:
        """It sees them no more."""
        while self._handles:
            self._handles.pop().remove()


def silent(*_: Any) -> None:
    """What a copied or unpickled model has in the place of a meter's hook."""


def made_silent() -> Any:
    """What copying and unpickling call."""
    return silent


class _Inside:
    """The hook on what a model wraps: called for its own sake in evaluation, that is the model's.

    (`model.module` of DistributedDataParallel, `generate` of an adapted model.)
    """

    __slots__ = ("_evaluated", "_root")

    def __init__(self, evaluated: weakref.WeakMethod[Callable[[Root], object]], root: Root) -> None:
        self._evaluated, self._root = evaluated, weakref.ref(root)

    def __call__(self, module: torch.nn.Module, _: Any) -> None:
        root, evaluated = self._root(), self._evaluated()
        if module.training or torch.is_grad_enabled() or root is None or not root.trained or evaluated is None:
            return
        if not _is_running(root.module):
            evaluated(root)

    def __reduce__(self) -> tuple[Any, ...]:
        return made_silent, ()


def _inside(root: Root) -> Iterator[torch.nn.Module]:
    """The parts that hold all that is trained in the model, from the outside in."""
    trained = {id(parameter) for parameter in root.parameters if parameter.requires_grad}
    found: torch.nn.Module | None = root.module
    while found is not None and trained:
        parts = found.children()
        found = next((part for part in parts if trained <= set(map(id, part.parameters()))), None)
        if found is not None and not isinstance(found, torch.jit.ScriptModule):  # which takes no hooks
            yield found


def _is_running(module: torch.nn.Module) -> bool:
    """Is it being called, in this thread?"""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back  # type: ignore[assignment]  # None above the first one
    return False
