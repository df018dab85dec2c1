"""Compiled functions run eagerly in a thread that counts, and stay compiled.

A compiled region runs kernels that no dispatch mode sees, so under a counter the original function runs instead:
torch has a switch for that, asked at every call of a compiled function, which nothing else notices. It is in
torch._dynamo, whose import takes seconds: where nobody has imported it yet, the switch is turned once somebody does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

_DYNAMO = "torch._dynamo.eval_frame"


class EagerCompiled:
    """The switch, while it is turned: `install` and `remove`."""

    def __init__(self, counting: Callable[[], Any]) -> None:
        self._counting = counting
        self._lock = threading.Lock()
        self._undo: list[Callable[[], object]] = []
        self._wanted = False

    def install(self) -> None:
        """From now on, threads that count run compiled functions eagerly."""
        self._wanted = True
        if _DYNAMO not in sys.modules:
            sys.meta_path.insert(0, self)
        self._turn()

    def remove(self) -> None:
        """Leave torch as it was."""
        with self._lock:
            self._wanted = False
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            while self._undo:
                self._undo.pop()()

    def _turn(self) -> None:
        with self._lock:
            dynamo = sys.modules.get(_DYNAMO)
            if not self._wanted or self._undo or dynamo is None:
                return
            if hasattr(dynamo, "_is_eager_on_nested_compile"):
                self._replace(dynamo, "_is_eager_on_nested_compile", self._eager)
            elif hasattr(dynamo, "_callback_from_stance"):  # torch before 2.13 or so
                self._replace(dynamo, "_callback_from_stance", self._no_callback)

    def _replace(self, dynamo: ModuleType, name: str, replacement: Callable[[Any], Any]) -> None:
        original = getattr(dynamo, name)
        setattr(dynamo, name, replacement(original))
        self._undo.append(lambda: setattr(dynamo, name, original))

    def _eager(self, original: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: original() or (bool(self._counting()) and not compiling_higher_order())

    def _no_callback(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        eager = self._eager(lambda: False)
        return lambda callback: None if eager() else original(callback)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Stand in the way of one import, to turn the switch right after it (the protocol of sys.meta_path)."""
        spec = PathFinder.find_spec(name, path) if name == _DYNAMO else None
        loader: Any = spec.loader if spec is not None else None
        if loader is None:
            return None

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            loader.exec_module(module)
            self._turn()

        loader.exec_module = exec_module
        return spec


def compiling_higher_order() -> bool:
    """Is torch setting up a control-flow operator (cond, scan, flex_attention ...) for its eager run?

    That compiles the operator's bodies, and insists on it.
    """
    utils = sys.modules.get("torch._higher_order_ops.utils")
    return bool(getattr(getattr(utils, "_hop_compile_tls", None), "in_hop_compile", False))


class UncompiledCall:
    """In place of Module._compiled_call_impl, which `module.compile()` sets: None in a thread that counts.

    What is compiled there is the bound `_call_impl` of that time: run eagerly, it would pass by our own. No property,
    since TorchScript compiles the properties of a module.
    """

    def __init__(self, counting: Callable[[], Any]) -> None:
        self._counting = counting

    def __get__(self, module: torch.nn.Module | None, owner: type | None = None) -> Any:
        compiled = None if module is None else module.__dict__.get("_compiled_call_impl")
        if compiled is None or torch.compiler.is_compiling() or compiling_higher_order() or not self._counting():
            return compiled
        return None

    def __set__(self, module: torch.nn.Module, compiled: Any) -> None:
        module.__dict__["_compiled_call_impl"] = compiled

    def __delete__(self, module: torch.nn.Module) -> None:
        module.__dict__.pop("_compiled_call_impl", None)


def compile_with(call: Callable[..., Any]) -> Callable[..., None]:
    """In place of Module.compile: what is compiled is torch's own call, which outlives the counter."""

    def compile(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        self._compiled_call_impl = torch.compile(call.__get__(self), *args, **kwargs)

    return compile
