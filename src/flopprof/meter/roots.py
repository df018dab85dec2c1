"""Finds the modules that a loop calls from outside any module, and tells of each such call.

One global forward pre-hook of torch, which is there only while no module runs: the call that it sees takes it away,
and the end of that call puts it back. So the calls of submodules cost nothing, and no module carries a hook of ours
when it is copied, pickled, scripted or compiled.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as _modules

from flopprof.counting.imports import WhenImported, replaced
from flopprof.meter.compiling import compiled_within
from flopprof.meter.recorder import Recorder
from flopprof.meter.signature import Root
from flopprof.meter.timing import CudaTimer
from flopprof.meter.watching import NOTHING, Before

if TYPE_CHECKING:
    from flopprof.meter.meter import Meter

_node = torch._C._current_autograd_node
_thread = threading.get_ident
_tracing = torch._C._is_tracing
_modes = torch._C._len_torch_dispatch_stack
_armed = _modules._global_forward_pre_hooks
_KEY = -1  # a number that torch gives to no hook

Called = Callable[[torch.nn.Module, tuple[Any, ...], Mapping[str, Any]], None]


# Modules of torch that multiply nothing and are often called beside the model; no classes derived from them.
_ARITHMETIC = frozenset(
    getattr(torch.nn, name)
    for name in (
        *("CrossEntropyLoss", "NLLLoss", "MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "KLDivLoss", "BCELoss"),
        *("BCEWithLogitsLoss", "Identity", "Flatten", "Dropout", "Softmax", "LogSoftmax", "Sigmoid", "Tanh"),
        *("ReLU", "LeakyReLU", "GELU", "SiLU", "Softplus"),
    )
)


class Roots:
    """Tells `called` of each call of a module in this thread that is inside no other one, nor in a backward pass."""

    def __init__(self, called: Called) -> None:
        self._called = called
        self._hook = self._before  # one object: a compiler compares it
        self._thread = 0
        self._left: list[torch.nn.Module] = []  # modules whose call ended in an exception
        self._marked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # those whose keywords are told
        self._compiler = WhenImported("torch._dynamo.eval_frame", self._around_compiled)

    def install(self) -> None:
        """From now on."""
        self._thread = _thread()
        self._compiler.install()
        self.arm()

    def remove(self) -> None:
        """No more."""
        self.disarm()
        self._thread = 0
        for module in self._marked:
            module._forward_pre_hooks_with_kwargs.pop(_KEY, None)
        self._marked.clear()
        self._compiler.remove()

    def arm(self) -> None:
        """No module of this thread runs now, whatever became of the last call."""
        if self._thread:
            while self._left:
                self._forget(self._left.pop())
            _armed[_KEY] = self._hook

    def disarm(self) -> None:
        """What is called from here on is inside."""
        _armed.pop(_KEY, None)

    def outside(self) -> bool:
        """Is this outside any module, in the thread that is watched, and no backward pass?"""
        return _KEY in _armed and self._thread == _thread() and _node() is None

    def around(self, module: torch.nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of a call that stands for one of the module, told of."""
        self.disarm()
        try:
            self._called(module, args, kwargs)
            return call(*args, **kwargs)
        finally:
            self.arm()

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        if torch.compiler.is_compiling() or _tracing():
            return
        if self._thread != _thread() or type(module) in _ARITHMETIC or _node() is not None:
            return
        _armed.pop(_KEY, None)
        module._forward_hooks[_KEY] = self._after
        module._forward_hooks_always_called[_KEY] = True
        if kwargs is None:
            # A global pre-hook is given the keywords of those modules alone that say so; else they are the caller's.
            kwargs = sys._getframe(1).f_locals.get("kwargs") or {}
            module._forward_pre_hooks_with_kwargs[_KEY] = True
            self._marked.add(module)
        self._called(module, args, kwargs)

    def _after(self, module: torch.nn.Module, _args: Any, _result: Any) -> None:
        if sys.exc_info()[1] is None:
            self._forget(module)
        else:  # torch may be going through these very hooks
            self._left.append(module)
        if self._thread == _thread():
            _armed[_KEY] = self._hook

    @staticmethod
    def _forget(module: torch.nn.Module) -> None:
        module._forward_hooks.pop(_KEY, None)
        module._forward_hooks_always_called.pop(_KEY, None)

    def _around_compiled(self, dynamo: ModuleType) -> Callable[[], object]:
        """A compiled model warns of global hooks: around its calls there is none."""
        original = dynamo.OptimizedModule.__call__

        def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not self.outside():
                return original(module, *args, **kwargs)
            return self.around(module, original.__get__(module), args, kwargs)

        return replaced(dynamo.OptimizedModule, "__call__", call)


class _Gone(torch.nn.Module):
    """In the place of a module that is no more."""


class FoundRoot(Root):
    """A root that does not keep its module alive."""

    __slots__ = ("_ref", "kind")

    def __init__(self, module: torch.nn.Module, index: int) -> None:
        super().__init__(module, index)
        self.kind = kind_of(module)

    @property
    def module(self) -> torch.nn.Module:
        """The module; an empty one when it is gone."""
        module = self._ref()
        return _Gone() if module is None else module

    @module.setter
    def module(self, module: torch.nn.Module) -> None:
        self._ref = weakref.ref(module, lambda _: self.forget())

    @property
    def gone(self) -> bool:
        """Is it no more?"""
        return self._ref() is None


def kind_of(module: torch.nn.Module) -> tuple[Any, ...]:
    """Two modules of the same kind multiply the same: classes, plain attributes and shapes of all of their parts."""
    parts = tuple(
        (name, type(part), tuple((key, value) for key, value in vars(part).items() if _plain(key, value)))
        for name, part in module.named_modules()
    )
    tensors = (*module.named_parameters(), *module.named_buffers())
    return parts, tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)


def _plain(key: str, value: Any) -> bool:
    return key != "training" and isinstance(value, bool | int | float | str | None)


class Finder:
    """Gives a recorder the roots as they are found, each under a number that is its own as long as it lives."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._numbers: dict[int, int] = {}
        self._before: dict[int, Before] = {}
        self._steps: Counter[int] = Counter()  # that each of them was called in with gradients
        self._latest: dict[int, int] = {}  # of these

    def called(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The module is called, outside any other one."""
        number = self._numbers.get(id(module))
        roots = self._recorder._roots
        if number is None or roots[number].module is not module:
            number = self._number(module)
        if torch.is_grad_enabled():
            self._weigh(number)
        self._before[number](*args, **kwargs)

    def _weigh(self, number: int) -> None:
        """What is trained in most of the steps, and of such the first, is the model that the run is about.

        By two: of those trained in all of them, one is called in a step before another one is.
        """
        step = self._recorder.at_length()
        if step is not None and self._latest.get(number) != step.number:
            self._latest[number] = step.number
            self._steps[number] += 1
            if self._steps[number] > self._steps[self._recorder.main] + 1:
                self._recorder.main = number

    def _number(self, module: torch.nn.Module) -> int:
        roots = self._recorder._roots
        found = FoundRoot(module, len(roots))
        same = (i for i, root in enumerate(roots) if isinstance(root, FoundRoot) and root.gone)
        number = next((i for i in same if roots[i].kind == found.kind), len(roots))  # type: ignore[attr-defined]
        if number == len(roots):
            roots.append(found)
        else:  # made anew in every step
            found.index = number
            found.trained = roots[number].trained
            roots[number] = found
        self._numbers[id(module)] = number
        self._before[number] = Before(self._recorder.repeat, found, NOTHING)
        if compiled_within(module) or isinstance(module, CompiledFunction):
            self._recorder.tracker.lose_sight()
        return number


def find_roots(meter: Meter, parameter: torch.Tensor) -> Roots:
    """For a meter that was given no models: its steps are those of whatever is called, on that parameter's device."""
    move(meter, parameter)
    return Roots(Finder(meter._recorder).called)


def move(meter: Meter, parameter: torch.Tensor) -> None:
    """What the meter's steps train is where that parameter is."""
    meter._history.move(str(parameter.device))
    meter.device = meter._history.device
    if parameter.is_cuda:
        meter._recorder.timer = CudaTimer()


class CompiledFunction(torch.nn.Module):
    """Stands for a compiled function, which is called as a model is; its modules are those that it refers to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList()
        code = getattr(function, "__code__", None)
        values = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _filled(cell)]
        if code is not None:
            scope = getattr(function, "__globals__", {})
            values += [scope[name] for name in code.co_names if name in scope]
        self.refers(getattr(function, "__self__", None), *values)

    def refers(self, *values: Any) -> None:
        """Modules among these are its own, too."""
        for value in values:
            if isinstance(value, torch.nn.Module) and all(value is not part for part in self.parts):
                self.parts.append(value)

    @property
    def training(self) -> bool:
        """Do its modules train?"""
        parts = self._modules.get("parts")
        return not parts or any(part.training for part in parts)  # type: ignore[attr-defined]

    @training.setter
    def training(self, value: bool) -> None:
        pass


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True
