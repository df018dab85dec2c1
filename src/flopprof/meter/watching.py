"""Sees a step's events: calls of the models, backward passes, optimizer steps; without modes, in no compiled code.

A forward pre-hook on each model runs outside what `torch.compile` makes of it, eagerly as compiled: torch calls a
compiled model's hooks itself. Inside a compiled function of the user's no hook is seen. Backward passes and optimizer
steps are observed only while a step is open.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any, Protocol

import torch
from torch._C._dynamo import eval_frame as _eval_frame
from torch.autograd.variable import Variable
from torch.optim import optimizer as _optimizers

_node = torch._C._current_autograd_node
_thread = threading.get_ident
_KEY = "flopprof.meter"


class Listener(Protocol):
    """Who is told."""

    thread: int  # the one whose events count; 0: no step is open

    def called(self, index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model of that number is called."""

    def differentiated(self, structure: tuple[Any, ...]) -> None:
        """A backward pass starts."""

    def stepped(self, optimizer: torch.optim.Optimizer, *, closure: bool, over: bool) -> None:
        """An optimizer's step begins; over: that of one with a closure has ended."""


def silent(*_: Any) -> None:
    """What a copied or unpickled model has in the place of a meter's hook."""


def _silent() -> Any:
    return silent


class Before:
    """The forward pre-hook of one model; copies of the model, and pickles, get one that does nothing."""

    def __init__(self, listener: Listener, index: int, module: torch.nn.Module) -> None:
        self._listener, self._index, self._module = weakref.ref(listener), index, weakref.ref(module)

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tells the meter, unless this runs in another thread, in a backward, in a copy, or is being compiled."""
        if torch.compiler.is_compiling():
            return
        listener = self._listener()
        if listener is None or self._module() is not module or _node() is not None:
            return
        if listener.thread == _thread() or not listener.thread:
            listener.called(self._index, module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _silent, ()


# Hooks of a compiled model run while the compiler looks for frames to compile: these are none.
_SKIP = _eval_frame._FrameExecStrategy(_eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.SKIP)
_eval_frame.set_code_exec_strategy(Before.__call__.__code__, _SKIP)


class _Engine:
    """The autograd engine, telling of each backward pass that is started from outside one."""

    def __init__(self, engine: Any, listener: Listener) -> None:
        self._engine, self._listener = engine, listener

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        listener = self._listener
        if listener.thread == _thread() and _node() is None:
            listener.differentiated(_described(args, kwargs))
        return self._engine.run_backward(*args, **kwargs)


def _described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells backward passes apart: from how many tensors of what kind, and whether the graph is kept or grows."""
    tensors = args[0] if args else kwargs.get("tensors", ())
    keep = args[2] if len(args) > 2 else kwargs.get("keep_graph", False)
    create = args[3] if len(args) > 3 else kwargs.get("create_graph", False)
    wanted = args[4] if len(args) > 4 else kwargs.get("inputs", ())
    first = tensors[0] if len(tensors) else None
    node = getattr(first, "grad_fn", None)
    return "backward", len(tensors), type(node), bool(keep), bool(create), len(wanted or ())


class Watch:
    """The hooks of one meter: on its models as long as it lives, on engine and optimizers while a step is open."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._handles: list[Any] = []
        self._engine: Any = None
        self._hook: Any = None

    def add(self, index: int, module: torch.nn.Module) -> None:
        """See calls of this model."""
        hook = Before(self._listener, index, module)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def open(self) -> None:
        """A step begins."""
        listener = self._listener
        self._engine = Variable._execution_engine
        Variable._execution_engine = _Engine(self._engine, listener)  # type: ignore[assignment]  # stands in for it

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if not torch.compiler.is_compiling() and listener.thread == _thread():
                listener.stepped(optimizer, closure=_has_closure(args, kwargs), over=False)

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if not torch.compiler.is_compiling() and listener.thread == _thread() and _has_closure(args, kwargs):
                listener.stepped(optimizer, closure=True, over=True)

        self._key = f"{_KEY}.{id(self)}"
        _optimizers._global_optimizer_pre_hooks[self._key] = before  # type: ignore[index]  # by any key
        _optimizers._global_optimizer_post_hooks[self._key] = after  # type: ignore[index]

    def close(self) -> None:
        """The step is over."""
        if self._engine is not None:
            if isinstance(Variable._execution_engine, _Engine):
                Variable._execution_engine = self._engine
            self._engine = None
            del _optimizers._global_optimizer_pre_hooks[self._key]  # type: ignore[arg-type]
            del _optimizers._global_optimizer_post_hooks[self._key]  # type: ignore[arg-type]

    def remove(self) -> None:
        """Take the hooks off the models."""
        self.close()
        while self._handles:
            self._handles.pop().remove()


def _has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(callable(value) for value in args[1:]) or callable(kwargs.get("closure"))


def compiled_around() -> bool:
    """Is the call that a hook tells of inside a compiled function, which now runs eagerly only to be counted?

    There no hook will run once the step is not counted. The compiled model's own frames do not matter.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.endswith(_ENTRY):
        frame = frame.f_back
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith("eval_frame.py"):
            return True
        frame = frame.f_back
    return False


_ENTRY = (
    *("meter/watching.py", "meter/recorder.py", "meter/meter.py", "counting/instrument.py"),
    *("nn/modules/module.py", "_dynamo/eval_frame.py", "_dynamo/external_utils.py"),
)
