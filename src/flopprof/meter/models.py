"""The models of a meter, and what is seen of them while a step is counted: calls of what they wrap."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from flopprof.meter.compiling import compiled_within
from flopprof.meter.signature import Root


class Roots(list[Root]):
    """The models, in the order in which they were given. evaluated: told of a model that is, though not called."""

    def __init__(self, evaluated: Callable[[Root], object]) -> None:
        super().__init__()
        self._evaluated = weakref.WeakMethod(evaluated)
        self._handle: Any = None

    def placed(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What `told_inputs` told, with the places of the models' parameters for their ids."""
        parameters = (parameter for root in self for parameter in root.parameters)
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
        if self._handle is None:
            self._handle = register_module_forward_pre_hook(self._seen)

    def closed(self) -> None:
        """It sees them no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _seen(self, module: torch.nn.Module, _: Any) -> None:
        """A module is called: where it is all of a model but the wrapper, in evaluation, the model is evaluated.

        (`model.module` of DistributedDataParallel, `generate` of an adapted model.)
        """
        if module.training or torch.is_grad_enabled():
            return
        root = next((root for root in self if root.trained and _is_inside(module, root)), None)
        evaluated = self._evaluated()
        if root is not None and evaluated is not None and not _is_running(root.module):
            evaluated(root)


def _is_inside(module: torch.nn.Module, root: Root) -> bool:
    """Is it a part of the model with all that is trained in it?"""
    if module is root.module or id(module) not in root.parts:
        return False
    own = set(map(id, module.parameters()))
    return all(id(parameter) in own for parameter in root.parameters if parameter.requires_grad)


def _is_running(module: torch.nn.Module) -> bool:
    """Is it being called, in this thread?"""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back  # type: ignore[assignment]  # None above the first one
    return False
