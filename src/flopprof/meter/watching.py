"""Sees a step's events: calls of the models, backward passes, optimizer steps; without modes, in no compiled code.

A forward pre-hook on each model runs outside what `torch.compile` makes of it, eagerly as compiled: torch calls a
compiled model's hooks itself. Inside a compiled function of the user's no hook is seen. The autograd engine's entry
and torch's own list of optimizer hooks tell the rest; they are in place from a meter's first step until it is closed
or gone, because putting them there in every step would cost more than they do.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Mapping
from types import FrameType, ModuleType
from typing import Any, Protocol

import torch
from torch._C._dynamo import eval_frame as _eval_frame
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from flopprof.counting.imports import WhenImported
from flopprof.counting.instrument import StandIn

_node = torch._C._current_autograd_node
_thread = threading.get_ident
_compiling = torch.compiler.is_dynamo_compiling  # False; a compiler that looks inside a hook reads True


class Listener(Protocol):
    """Who is told; only of what its own thread does while a step is open."""

    thread: int  # 0 between steps

    def called(self, index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model of that number is called."""

    def known(self, event: Any) -> Any:
        """None where that must be told of at length."""

    def differentiated(self, structure: tuple[Any, ...]) -> None:
        """A backward pass starts that is not known to follow here."""

    def stepped(self, optimizer: torch.optim.Optimizer, *, closure: bool, over: bool) -> None:
        """An optimizer's step begins; over: that of one with a closure has ended."""


_listeners: tuple[weakref.ref[Listener], ...] = ()  # those that have begun a step; each says in which thread it is


def silent(*_: Any) -> None:
    """What a copied or unpickled model has in the place of a meter's hook."""


def _silent() -> Any:
    return silent


class Before:
    """The forward pre-hook of one model; copies of the model, and pickles, get one that does nothing."""

    __slots__ = ("_index", "_listener", "_module")

    def __init__(self, listener: Listener, index: int, module: torch.nn.Module) -> None:
        self._listener, self._index, self._module = weakref.ref(listener), index, weakref.ref(module)

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tells the meter, unless this runs in another thread, in a backward, in a copy, or is being compiled."""
        if _compiling():
            return
        listener = self._listener()
        if listener is None or _node() is not None or self._module() is not module:
            return
        if listener.thread == _thread() or not listener.thread:
            listener.called(self._index, module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _silent, ()


# Hooks of a compiled model run while the compiler looks for frames to compile: these are none.
_SKIP = _eval_frame._FrameExecStrategy(_eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.SKIP)
_eval_frame.set_code_exec_strategy(Before.__call__.__code__, _SKIP)


class _Engine(StandIn):
    """The autograd engine, telling of each backward pass that is started from outside one."""

    def run_backward(self, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        for reference in _listeners:
            listener = reference()
            if listener is not None and listener.thread == _thread() and _node() is None:
                # Roots, the graph kept or not, a graph of its own or not, inputs: what tells backward passes apart.
                event = "backward", len(tensors), args[1:3], len(args) > 3 and len(args[3] or ())
                if listener.known(event) is None:
                    listener.differentiated(event)
        return self.engine.run_backward(tensors, *args, **kwargs)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _listeners and not _compiling() and _node() is None:  # else in a backward: part of it
        closure = (len(args) > 1 or bool(kwargs)) and has_closure(args, kwargs)
        if closure:
            instruments.see_closures()
        for reference in _listeners:
            listener = reference()
            if listener is not None and listener.thread == _thread():
                listener.stepped(optimizer, closure=closure, over=False)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _listeners and not _compiling() and has_closure(args, kwargs):
        for reference in _listeners:
            listener = reference()
            if listener is not None and listener.thread == _thread():
                listener.stepped(optimizer, closure=True, over=True)


def has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Is the step of an optimizer given a function to call?"""
    return any(callable(value) for value in args[1:]) or callable(kwargs.get("closure"))


class _Instruments:
    """What is put in place process-wide, counted: the first meter puts it there, the last one takes it away."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._users = 0
        self._closures = False
        self._handles: list[Any] = []
        self._engine: _Engine | None = None
        self.compilations = 0
        self.rebuilt = 0  # modules and parameters that were put into modules
        self._compiler = WhenImported("torch._dynamo.callback", self._listen)

    def acquire(self) -> None:
        with self.lock:
            self._users += 1
            if self._users == 1:
                self._engine = _Engine()
                self._handles = [
                    register_optimizer_step_pre_hook(_before_step),
                    register_module_module_registration_hook(self._rebuild),
                    register_module_parameter_registration_hook(self._rebuild),
                ]
                self._closures = False
                self._compiler.install()

    def _rebuild(self, *_: Any) -> None:
        self.rebuilt += 1

    def see_closures(self) -> None:
        """An optimizer is given a closure: the end of its step matters, too, which else is not looked at."""
        if not self._closures and self._handles:
            self._closures = True
            self._handles.append(register_optimizer_step_post_hook(_after_step))

    def release(self) -> None:
        with self.lock:
            self._users -= 1
            if self._users == 0 and self._engine is not None:
                self._engine.leave()
                self._engine = None
                while self._handles:
                    self._handles.pop().remove()
                self._compiler.remove()

    def _listen(self, module: ModuleType) -> Any:
        def note(_: Any) -> None:
            self.compilations += 1

        callbacks = module.callback_handler.start_callbacks
        callbacks.append(note)
        return lambda: callbacks.remove(note) if note in callbacks else None


instruments = _Instruments()


class Watch:
    """The hooks of one meter: on its models, and process-wide from its first step on, until it is removed or gone."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._release: weakref.finalize[Any, Any] | None = None
        self._forget = weakref.finalize(self, _remove, self._handles)

    def add(self, listener: Listener, index: int, module: torch.nn.Module) -> None:
        """See calls of this model."""
        hook = Before(listener, index, module)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    @property
    def begun(self) -> bool:
        """Has its first step begun?"""
        return self._release is not None

    def begin(self, listener: Listener) -> None:
        """Its first step begins."""
        instruments.acquire()
        self._release = weakref.finalize(self, _end, _listen(listener))

    def remove(self) -> None:
        """Take the hooks off."""
        self._forget()
        if self._release is not None:
            self._release()
            self._release = None


def _listen(listener: Listener) -> weakref.ref[Listener]:
    global _listeners  # noqa: PLW0603 - read at every event of every step
    reference = weakref.ref(listener)
    with instruments.lock:  # else one that ends in another thread meanwhile would take this one away
        _listeners = (*_listeners, reference)
    return reference


def _end(reference: weakref.ref[Listener]) -> None:
    global _listeners  # noqa: PLW0603
    with instruments.lock:
        _listeners = tuple(other for other in _listeners if other is not reference and other() is not None)
    instruments.release()


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def compiled_call() -> tuple[bool, bool]:
    """Of the call that a hook tells of in a step that is counted: (is it that of a compiled model, is it inside more?)

    A compiled function runs eagerly to be counted. Inside one, no hook will run once the step is not counted; those of
    a model that is itself compiled will.
    """
    frame: FrameType | None = sys._getframe(1)
    itself = False
    while frame is not None and frame.f_code.co_filename.endswith(_ENTRY):
        itself |= _is_compiled(frame)
        frame = frame.f_back
    while frame is not None:
        if _is_compiled(frame):
            return itself, True
        frame = frame.f_back
    return itself, False


def _is_compiled(frame: FrameType) -> bool:
    return frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith("eval_frame.py")


_ENTRY = (
    *("meter/watching.py", "meter/recorder.py", "counting/instrument.py"),
    *("nn/modules/module.py", "_dynamo/eval_frame.py", "_dynamo/external_utils.py"),
)


def anything_compiled() -> bool:
    """Has anything been compiled in this process?"""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    return frames is not None and bool(getattr(frames, "FRAME_COUNTER", 1))


def compiled_within(module: torch.nn.Module) -> bool:
    """Does a part of the model run compiled?"""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return False
    wrapped = sys.modules["torch._dynamo.eval_frame"].OptimizedModule
    parts = module.modules()
    return any(isinstance(part, wrapped) or part.__dict__.get("_compiled_call_impl") is not None for part in parts)
