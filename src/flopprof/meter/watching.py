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
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, Protocol

import torch
from torch._C._dynamo import eval_frame as _eval_frame
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from flopprof.counting.imports import WhenImported, replaced
from flopprof.counting.in_place import IN_A_CALL, Watcher, alone, carried, leave, past, stay, watch
from flopprof.counting.in_use import WhileUsed
from flopprof.counting.instrument import StandIn
from flopprof.meter.arguments import MAY_TELL_BOUNDARIES, tells_boundaries
from flopprof.meter.freezing import see
from flopprof.meter.signature import Root
from flopprof.meter.steps import Repeat
from flopprof.meter.timing import Timer

_node = torch._C._current_autograd_node
_thread = threading.get_ident
_frame, _references = sys._getframe, sys.getrefcount
_grad_enabled = torch.is_grad_enabled
_nodes_made = torch._C._autograd._get_sequence_nr
_any_autocast = torch._C._is_any_autocast_enabled  # of many devices: quicker to ask than one
_Tensor = torch.Tensor
_ref = weakref.ref
_QUICK = frozenset({bool, type(None), int, float, str, torch.dtype})
_compiling = torch.compiler.is_dynamo_compiling  # False; a compiler that looks inside a hook reads True


class Listener(Protocol):
    """Who is told; only of what its own thread does while a step is open."""

    repeat: Repeat
    timer: Timer
    clock: Callable[[], float]

    def called(self, root: Root, parts: list[Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A model is called."""

    def rebuilt(self, module: torch.nn.Module) -> None:
        """A module or a parameter was put into that module."""

    def frozen(self) -> None:
        """A parameter was frozen, or thawed."""

    def differentiated(self, parts: tuple[Any, ...]) -> None:
        """A backward pass starts."""

    def stepped(self, optimizer: torch.optim.Optimizer, *, closure: bool, over: bool) -> None:
        """An optimizer's step begins; over: that of one with a closure has ended."""


# Of the listeners that have begun a step, what says in which thread it is, and what comes next in it.
_repeats: tuple[Repeat, ...] = ()


class _Nothing:
    """Is called in the place of a module whose call is under way, and told of by a hook."""

    _forward_pre_hooks = ()

    def _call_impl(self, *_args: Any, **_kwargs: Any) -> None: ...


NOTHING = _Nothing()


class Before(Watcher):
    """What stands before the calls of one model, or of a module that was found, and tells a meter of them.

    callee: whose `_call_impl` is called then; `NOTHING` where a hook tells.
    """

    __slots__ = ("_repeat", "_root")

    def __init__(self, repeat: Repeat, root: Root, callee: Any) -> None:
        super().__init__(callee)
        self._repeat, self._root = repeat, root

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call's result; the meter is told, unless this runs in another thread, or in a backward.

        It runs at every call of a model, and is one function for that.
        """
        callee = self.callee
        if _compiling():
            return callee._call_impl(*args, **kwargs)
        if _references(self) != self.held:  # somebody else holds it, too: perhaps a copy of the model
            caller = _frame(1).f_locals.get("self")
            if caller is not callee and carried(self, caller):
                return alone(caller)(*args, **kwargs)
        repeat, root = self._repeat, self._root
        thread = repeat.thread
        if thread and thread != _thread():
            return past(self, callee)(*args, **kwargs)
        if callee._forward_pre_hooks and self.behind is None:
            return self._hooked(callee, args, kwargs)
        parts: list[Any] | None = None
        if thread and len(args) <= root.bounds_at:
            if not root.fresh:
                root.renew()
            first, grad = root.first, _grad_enabled()
            parts = [
                0 if repeat.blind else _nodes_made() - repeat.made,
                root.index,
                root.module.training,
                root.number if grad else root.shaped,
                root.cast() if root.apart or _any_autocast() else None,
                None if first is None else first.dtype,
            ]
            try:
                for value in args:
                    kind = type(value)
                    if kind is _Tensor:
                        parts += value.shape, value.dtype, value.requires_grad
                    elif kind in _QUICK:
                        parts += kind, value
                    else:
                        parts = None
                        break
                else:
                    for name, value in kwargs.items() if kwargs else ():  # to ask costs less
                        kind = type(value)
                        if kind is _Tensor and not (
                            name.startswith(MAY_TELL_BOUNDARIES) and tells_boundaries(name, value, root.flash)
                        ):
                            parts += name, value.shape, value.dtype, value.requires_grad
                        elif kind in _QUICK:
                            parts += name, kind, value
                        else:
                            parts = None
                            break
            except RuntimeError:  # a nested tensor has no shape
                parts = None
            # One in a backward has other nodes before it, if it records any.
            if repeat.on and parts == repeat.events[repeat.at] and ((grad and not repeat.blind) or _node() is None):
                repeat.at += 1
                behind = self.behind
                return callee._call_impl(*args, **kwargs) if behind is None else behind(*args, **kwargs)
        if _node() is None:
            _tell(repeat, root, parts, args, kwargs)
        return past(self, callee)(*args, **kwargs)

    def _hooked(self, callee: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call that goes through hooks of the user's: they may change what the model is called with."""
        tell = Before(self._repeat, self._root, NOTHING)
        hook = callee.register_forward_pre_hook(tell.hook, with_kwargs=True)
        try:
            return callee._call_impl(*args, **kwargs)
        finally:
            hook.remove()

    def hook(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The last of those that run before a call."""
        self(*args, **kwargs)

    def twin(self) -> Before:
        """Another one that tells the same."""
        return Before(self._repeat, self._root, self.callee)


def _tell(repeat: Repeat, root: Root, parts: list[Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    listener = repeat.listener()
    if listener is not None:
        listener.called(root, parts, args, kwargs)


# A compiled model is called while the compiler looks for frames to compile: these are none, nor what they call; but
# what is called past the first two is the model.
_LOOK, _SKIP = _eval_frame._FrameAction.DEFAULT, _eval_frame._FrameAction.SKIP
_CALLING: tuple[Any, ...] = (Before.__call__, Before._hooked)
_TELLING: tuple[Any, ...] = (Before.hook, _tell, past, carried, alone, tells_boundaries, Root.renew, Root.cast)
for _function in (*_CALLING, *_TELLING):
    _within = _LOOK if _function in _CALLING else _SKIP
    _eval_frame.set_code_exec_strategy(_function.__code__, _eval_frame._FrameExecStrategy(_SKIP, _within))


class _Engine(StandIn):
    """The autograd engine, telling of each backward pass that is started from outside one."""

    def run_backward(
        self,
        tensors: Any,
        grad_tensors: Any,
        keep_graph: Any = False,
        create_graph: Any = False,
        inputs: Any = (),
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        for repeat in _repeats:
            if repeat.thread == _thread():
                # What tells backward passes apart: roots, the graph kept or not, a graph of its own or not, inputs.
                nodes = 0 if repeat.blind else _nodes_made() - repeat.made
                told = told_inputs(inputs) if inputs else 0
                parts = nodes, "backward", len(tensors), keep_graph, create_graph, told
                # One inside the latest is none; nor is it taken for the next, unless that follows at once.
                if repeat.on and parts == repeat.events[repeat.at] and (not repeat.in_a_row or _node() is None):
                    repeat.at += 1
                    continue
                listener = repeat.listener()
                if listener is not None and _node() is None:
                    listener.differentiated(parts)
        return self.engine.run_backward(tensors, grad_tensors, keep_graph, create_graph, inputs, *args, **kwargs)


def told_inputs(inputs: Iterable[Any]) -> tuple[Any, ...]:
    """What a backward pass goes down to: parameters by their ids, other tensors by their shapes."""
    return tuple([id(item) if isinstance(item, torch.nn.Parameter) else _shape(item) for item in inputs])


def _shape(item: Any) -> tuple[int, ...]:
    """Nothing of an edge of the graph, nor of a nested tensor."""
    return tuple(item.shape) if isinstance(item, _Tensor) and not item.is_nested else ()


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _repeats or _compiling():
        return
    closure = (len(args) > 1 or bool(kwargs)) and has_closure(args, kwargs)
    if closure:
        instruments.see_closures()
    for repeat in _repeats:
        if repeat.thread == _thread():
            nodes = 0 if repeat.blind else _nodes_made() - repeat.made  # the backward makes some where it recomputes
            if repeat.on and not closure and (nodes, _ref(optimizer)) == repeat.events[repeat.at]:
                repeat.at += 1
                continue
            listener = repeat.listener()
            if listener is not None and _node() is None:  # in a backward: part of it
                listener.stepped(optimizer, closure=closure, over=False)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _repeats and not _compiling() and has_closure(args, kwargs):
        for repeat in _repeats:
            listener = repeat.listener()
            if repeat.thread == _thread() and listener is not None:
                listener.stepped(optimizer, closure=True, over=True)


def has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Is the step of an optimizer given a function to call?"""
    return any(callable(value) for value in args[1:]) or callable(kwargs.get("closure"))


def _frozen() -> None:
    for repeat in _repeats:
        listener = repeat.listener()
        if listener is not None:
            listener.frozen()


class _Instruments(WhileUsed):
    """What sees the events of all steps: in place from the first step of the first meter on."""

    def __init__(self) -> None:
        super().__init__()
        self._closures = False
        self.compilations = 0
        self._compiler = WhenImported("torch._dynamo.callback", self._listen)

    def change(self) -> None:
        """See backward passes, optimizer steps, modules that are put together anew, frozen parameters, compilations."""
        self._closures = False
        handles = (
            register_optimizer_step_pre_hook(_before_step),
            register_module_module_registration_hook(self._rebuild),
            register_module_parameter_registration_hook(self._rebuild),
        )
        self._undo += [_Engine().leave, *(handle.remove for handle in handles), see(_frozen), self._compiler.remove]
        self._compiler.install()

    def _rebuild(self, module: torch.nn.Module, *_: Any) -> None:
        for repeat in _repeats:
            listener = repeat.listener()
            if listener is not None:
                listener.rebuilt(module)

    def see_closures(self) -> None:
        """An optimizer is given a closure: the end of its step matters, too, which else is not looked at."""
        if not self._closures and self._undo:
            self._closures = True
            self._undo.append(register_optimizer_step_post_hook(_after_step).remove)

    def _listen(self, module: ModuleType) -> Any:
        def note(_: Any) -> None:
            self.compilations += 1
            for repeat in _repeats:
                repeat.left = -1

        handler = module.callback_handler
        clear, callbacks = handler.clear, handler.start_callbacks

        def keep() -> None:  # torch._dynamo.reset() forgets every callback
            clear()
            handler.start_callbacks.append(note)

        def undo() -> None:
            undo_clear()
            callbacks = handler.start_callbacks
            if note in callbacks:
                callbacks.remove(note)

        callbacks.append(note)
        undo_clear = replaced(handler, "clear", keep)
        return undo


instruments = _Instruments()


# What stands where; a finalizer keeps it, which is why it keeps neither.
_Standing = tuple[weakref.ref[torch.nn.Module], weakref.ref[Before]]


class Watch:
    """What one meter has on its models, and process-wide from its first step on, until it is removed or gone."""

    def __init__(self) -> None:
        self._befores: list[Before] = []
        self._standing: list[_Standing] = []
        self._release: weakref.finalize[Any, Any] | None = None
        self._forget = weakref.finalize(self, _remove, self._standing)

    def add(self, listener: Listener, root: Root) -> None:
        """See calls of this model."""
        before = Before(listener.repeat, root, root.module)
        before.held = IN_A_CALL + 1  # by the list
        watch(before)
        self._befores.append(before)
        self._standing.append((weakref.ref(root.module), weakref.ref(before)))

    def stay(self) -> bool:
        """Still see them, whatever others have put before them; have they?"""
        lost = [before for before in self._befores if stay(before)]
        return bool(lost)

    def follow(self, listener: Listener) -> None:
        """A step begins; with the first one, what is process-wide."""
        if self._release is None:
            instruments.acquire()
            self._release = weakref.finalize(self, _end, _listen(listener))
        self.stay()

    def remove(self) -> None:
        """Take the hooks off."""
        self._forget()
        self._befores.clear()
        if self._release is not None:
            self._release()
            self._release = None


def _listen(listener: Listener) -> Repeat:
    global _repeats  # noqa: PLW0603 - read at every event of every step
    with instruments.lock:  # else one that ends in another thread meanwhile would take this one away
        _repeats = (*_repeats, listener.repeat)
    return listener.repeat


def _end(repeat: Repeat) -> None:
    global _repeats  # noqa: PLW0603
    with instruments.lock:
        _repeats = tuple(other for other in _repeats if other is not repeat)
    instruments.release()


def _remove(standing: list[_Standing]) -> None:
    while standing:
        module, before = standing.pop()
        leave(module(), before())
