"""Compiled functions run eagerly in a thread that counts, and stay compiled.

A compiled region runs kernels that no dispatch mode sees, so under a counter the original function runs instead:
torch has a switch for that, asked at every call of a compiled function, which nothing else notices. It is in
torch._dynamo, whose import takes seconds: where nobody has imported it yet, the switch is turned once somebody does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from flopprof.counting.imports import WhenImported, replaced


def run_eagerly(counting: Callable[[], Any]) -> WhenImported:
    """Turns the switch for threads that count."""

    def eager() -> bool:
        return bool(counting()) and not compiling_higher_order()

    def turn(dynamo: ModuleType) -> Callable[[], object]:
        nested = getattr(dynamo, "_is_eager_on_nested_compile", None)
        if nested is not None:
            return replaced(dynamo, "_is_eager_on_nested_compile", lambda: nested() or eager())
        # Older torch asks the stance instead, whose answer None stands for eager.
        callback = dynamo._callback_from_stance
        return replaced(dynamo, "_callback_from_stance", lambda given: None if eager() else callback(given))

    return WhenImported("torch._dynamo.eval_frame", turn)


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
