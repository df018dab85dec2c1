"""Process-wide instrumentation, in place only while a counter is open.

Four things are not visible to a dispatch mode: which module is called, whether a backward builds a graph
of its own, which checkpoint is replayed, and that the products of unfused attention are masked. Each is observed
by wrapping one function of torch, whatever is there when the first counter opens; the wrappers serve every open
counter of the running thread (a counter is found through the dispatch mode stack, which autograd carries to its
device threads) and are removed when the last counter closes. One that somebody else has wrapped or replaced
meanwhile stays as they left it, and does nothing any more.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import BuiltinFunctionType, FrameType
from typing import Any

import torch
import torch.jit._builtins
import torch.utils.checkpoint
from torch.autograd.variable import Variable
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from flopprof.counting.attend import Attention
from flopprof.counting.closures import Closure, find
from flopprof.counting.compiled import run_eagerly
from flopprof.counting.imports import replaced
from flopprof.counting.in_place import UncompiledCall, kept
from flopprof.counting.in_use import WhileUsed
from flopprof.counting.sharding import unseen_sharding
from flopprof.counting.unseen import OUTSIDE, follow

_ATTENTION = "scaled_dot_product_attention"

_stack_size = torch._C._len_torch_dispatch_stack
_stack_at = torch._C._get_dispatch_stack_at


# The classes of counters, filled by the module that defines them: this one is below it.
counter_types: set[type] = set()


def active() -> list[Any]:
    """The open counters of this thread, outermost first."""
    modes = (_stack_at(index) for index in range(_stack_size()))
    return [mode for mode in modes if type(mode) in counter_types]


def module_call(original: Callable[..., Any], left: list[bool]) -> Callable[..., Any]:
    """In place of Module._call_impl, until something is in `left`."""

    def _module_call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # In this order: a compiler folds the first away.
        if torch.compiler.is_compiling() or not _stack_size() or left:
            return original(self, *args, **kwargs)
        counter = _stack_at(0)
        if _stack_size() == 1 and type(counter) in counter_types:  # as it usually is, and this runs at every call
            call = counter.where.enter(self)
            seen = counter.seen
            try:
                output = original(self, *args, **kwargs)
            finally:
                counter.where.leave(call)
            counter.returned(call[2], seen, (args, kwargs), output)
            return output
        counters = active()
        calls = [(counter, counter.where.enter(self), counter.seen) for counter in counters]
        try:
            output = original(self, *args, **kwargs)
        finally:
            for counter, call, _seen in reversed(calls):
                counter.where.leave(call)
        for counter, call, seen in calls:
            counter.returned(call[2], seen, (args, kwargs), output)
        return output

    return _module_call


class StandIn:
    """Stands in for the autograd engine, or for another stand-in; those may leave in another order than they came."""

    def __init__(self) -> None:
        self.engine: Any = Variable._execution_engine
        Variable._execution_engine = self  # type: ignore[assignment]  # stands in for it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def leave(self) -> None:
        """Stand in no longer."""
        outer: Any = Variable._execution_engine
        if outer is self:
            Variable._execution_engine = self.engine
        while isinstance(outer, StandIn):
            if outer.engine is self:
                outer.engine = self.engine
            outer = outer.engine


class _Engine(StandIn):
    """Tells open counters of each backward pass and whether it builds a graph."""

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        retain_graph = args[2] if len(args) > 2 else kwargs.get("keep_graph", False)
        create_graph = args[3] if len(args) > 3 else kwargs.get("create_graph", False)
        counters = active()
        for counter in counters:
            counter.where.enter_pass(retain_graph=bool(retain_graph), create_graph=bool(create_graph))
        # Nodes are numbered per thread. On a device the engine would run, and number what a graph of its own adds,
        # in another thread than the one whose numbers tell modules apart.
        elsewhere = bool(counters) and bool(create_graph) and torch._C._is_multithreading_enabled()
        if elsewhere:
            torch._C._set_multithreading_enabled(False)
        try:
            return self.engine.run_backward(*args, **kwargs)
        finally:
            if elsewhere:
                torch._C._set_multithreading_enabled(True)
            for counter in counters:
                counter.where.leave_pass()


# Checkpointed regions by their recompute frame: where each open counter was, and on which line, when it ran forward.
_regions: weakref.WeakKeyDictionary[Any, list[tuple[Any, Any, str]]] = weakref.WeakKeyDictionary()


def _remember_region(hook: type) -> Callable[..., None]:
    original: Callable[..., None] = hook.__init__  # type: ignore[misc]  # replaced as a whole

    def __init__(self: Any, frame: Any) -> None:  # noqa: N807 - stands in for a constructor
        original(self, frame)
        counters = active()
        if counters:
            _regions[frame] = [(weakref.ref(c), c.where.frame, c.where.line_here()) for c in counters]

    return __init__


def _replay(hook: type) -> tuple[Callable[..., None], Callable[..., Any], Callable[..., Any]]:
    original: Callable[..., None] = hook.__init__  # type: ignore[misc]  # replaced as a whole
    enter: Callable[..., Any] = hook.__enter__  # type: ignore[attr-defined]  # a context manager
    leave: Callable[..., Any] = hook.__exit__  # type: ignore[attr-defined]

    def __init__(self: Any, frame_ref: Any, gid: Any) -> None:  # noqa: N807
        original(self, frame_ref, gid)
        self._flopprof = frame_ref

    def __enter__(self: Any) -> Any:  # noqa: N807
        frame = self._flopprof()
        places = {id(ref()): place for ref, *place in _regions.get(frame, ())}
        self._flopprof_tokens = [(c, c.where.enter_replay(*places.get(id(c), (None,)))) for c in active()]
        return enter(self)

    def __exit__(self: Any, *error: Any) -> Any:  # noqa: N807
        try:
            return leave(self, *error)
        finally:
            for counter, token in reversed(self._flopprof_tokens):
                counter.where.leave_replay(token)

    return __init__, __enter__, __exit__


def _reentrant_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        run_function = ctx.run_function

        def replay(*args: Any) -> Any:
            tokens = [(counter, counter.where.enter_replay(None)) for counter in active()]
            try:
                return run_function(*args)
            finally:
                for counter, token in reversed(tokens):
                    counter.where.leave_replay(token)

        ctx.run_function = replay
        try:
            return original(ctx, *gradients)
        finally:
            ctx.run_function = run_function

    return backward


def _before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    counters = active()
    step = sys._getframe(1)
    for counter in counters:
        counter.where.steps.append(step)
    return closure_outside(step, args, kwargs) if counters else None


def closure_outside(step: FrameType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments of an optimizer's step, whose closure runs forward and backward, not optimizer; None without one.

    step: the frame of the step, which a counter that is opened in the closure is in from then on.
    """
    place = find(args, kwargs)
    if place is None:
        return None
    closure = args[place] if isinstance(place, int) else kwargs[place]

    def outside(*given: Any, **also: Any) -> Any:
        under_way = {counter: counter.where.steps for counter in active()}
        for counter in under_way:
            counter.where.steps = []
        try:
            return closure(*given, **also)
        finally:
            for counter in {**under_way, **dict.fromkeys(active())}:
                counter.where.steps = under_way.get(counter, [step])

    standing = Closure(closure, outside)
    if isinstance(place, int):
        return (*args[:place], standing, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: standing}


def _after_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step = sys._getframe(1)
    for counter in active():
        counter.where.leave_step(step)


def function_apply(original: Any, left: list[bool]) -> Callable[..., Any]:
    """In place of autograd.Function.apply, until something is in `left`."""

    def _function_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        apply = original.__get__(None, cls)
        if torch.compiler.is_compiling() or not _stack_size() or left or torch._C._get_tracing_state() is not None:
            return apply(*args, **kwargs)
        counters = active()
        tokens = [counter.unseen.watch() for counter in counters]
        output = None
        try:
            output = apply(*args, **kwargs)
        finally:
            found = [
                counter.unseen.unwatch(token, (args, kwargs), output)
                for counter, token in zip(counters, tokens, strict=True)
            ]
        for counter, missing in zip(counters, found, strict=True):
            if missing:
                counter.uncounted(cls.__name__, args, OUTSIDE)
        if any(found):
            follow(active, cls.__name__, output)
        return output

    return _function_apply


class _Installed(WhileUsed):
    """The wrappers: the first counter puts them in place, the last one takes them away."""

    def change(self) -> None:
        """See what no dispatch mode does."""
        left: list[bool] = []
        self._undo.append(lambda: left.append(True))
        self._undo.append(kept.release)
        kept.acquire()
        self._replace(torch.nn.Module, "_call_impl", module_call(torch.nn.Module._call_impl, left))
        self._replace(torch.nn.Module, "_compiled_call_impl", UncompiledCall(active))
        for change in (run_eagerly(active), unseen_sharding(active)):
            self._undo.append(change.remove)
            change.install()
        apply = torch.autograd.Function.__dict__["apply"]
        self._replace(torch.autograd.Function, "apply", classmethod(function_apply(apply, left)))
        self._stand_in_for_attention()
        self._undo.append(_Engine().leave)
        region = getattr(torch.utils.checkpoint, "_checkpoint_hook", None)
        if region is not None:
            self._replace(region, "__init__", _remember_region(region))
        replay = getattr(torch.utils.checkpoint, "_recomputation_hook", None)
        if replay is not None:
            for name, function in zip(("__init__", "__enter__", "__exit__"), _replay(replay), strict=True):
                self._replace(replay, name, function)
        reentrant = torch.utils.checkpoint.CheckpointFunction
        self._replace(reentrant, "backward", staticmethod(_reentrant_backward(reentrant.backward)))
        self._undo.append(register_optimizer_step_pre_hook(_before_step).remove)
        self._undo.append(register_optimizer_step_post_hook(_after_step).remove)

    def _stand_in_for_attention(self) -> None:
        original = torch.nn.functional.scaled_dot_product_attention
        standing = Attention(original, active)
        self._undo.append(standing.leave)
        self._replace(torch.nn.functional, _ATTENTION, standing)
        if isinstance(original, BuiltinFunctionType):  # TorchScript knows its own functions by identity
            builtins, name = torch.jit._builtins, f"aten::{_ATTENTION}"
            builtins._builtin_ops.append((standing, name))
            if builtins._builtin_table is not None:
                builtins._builtin_table[id(standing)] = name

            def forget() -> None:
                builtins._builtin_ops[:] = [known for known in builtins._builtin_ops if known[0] is not standing]
                if builtins._builtin_table is not None:
                    builtins._builtin_table.pop(id(standing), None)

            self._undo.append(forget)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append(replaced(owner, name, value))


installed = _Installed()
