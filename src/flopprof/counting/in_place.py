"""What stands before a module's own call: what `module.compile()` made of it, and who watches it.

torch asks each module at every call for `_compiled_call_impl`, and calls that instead if there is one. Who stands there
sees each call, of a module compiled in place too, outside of what was compiled; compilers pass it by, or are let past;
copies and pickles of the module leave it out. A hook would make torch go through every kind of hook there is, which
takes ten times as long; and it would run inside the compiled call, where it is too late to count one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from flopprof.counting.compiled import compiling_higher_order
from flopprof.counting.imports import replaced
from flopprof.counting.in_use import WhileUsed

_NAME = "_compiled_call_impl"


class Watcher:
    """Stands before the call of one module: of a kind that is called as the module is, and goes on `past` itself.

    callee: the module; None once nobody is told any more.
    held: references to it while the module is called, if no other module has it; 0: not known.
    """

    __slots__ = ("__weakref__", "behind", "callee", "held")

    def __init__(self, callee: Any) -> None:
        self.behind: Any = None  # another one, or what is compiled; None: the module's own call
        self.callee = callee
        self.held = 0

    def __bool__(self) -> bool:
        """Is anything compiled there? So do others ask who want to know whether the module is."""
        return bool(self.behind)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def twin(self) -> Watcher:
        """Another one that tells the same."""
        raise NotImplementedError

    def eagerly(self) -> Watcher:
        """One that tells the same of the module's own call, though that is compiled."""
        if not self:
            return self
        twin = self.twin()
        twin.behind = _eager(self.behind)
        return twin


class _Held(Watcher):
    """Answers a call with the references to itself."""

    __slots__ = ()

    def __call__(self) -> int:
        return sys.getrefcount(self)


def _in_a_call() -> int:
    module = torch.nn.Module()
    module.__dict__[_NAME] = _Held(module)
    references: int = module()
    return references


# References to what stands before a module's call, while it is called, where nobody but the module holds it.
IN_A_CALL = _in_a_call()


def carried(watcher: Watcher, caller: Any) -> bool:
    """Is that another module, which took all that the watched one has? (`clone.__dict__ = module.__dict__.copy()`)"""
    standing = caller.__dict__.get(_NAME) if isinstance(caller, torch.nn.Module) else None
    return watcher.callee is None or (isinstance(standing, Watcher) and standing.callee is watcher.callee)


def alone(module: Any) -> Callable[..., Any]:
    """What a module calls that nobody watches; from now on nobody stands before it."""
    compiled = compiled_in_place(module)
    _put(module, compiled)
    own: Callable[..., Any] = module._call_impl
    return own if compiled is None else compiled


def past(watcher: Watcher, callee: Any) -> Callable[..., Any]:
    """What a watcher calls when it has told of the call: where this thread is counted by then, nothing compiled.

    callee: the watcher's, when the call began; it may have been left since.
    """
    own: Callable[..., Any] = callee._call_impl
    behind = watcher.behind
    if behind is not None:
        standing = vars(torch.nn.Module)[_NAME]
        if isinstance(standing, UncompiledCall) and standing.applies():
            behind = _eager(behind)
    return own if behind is None else behind


def watch(watcher: Watcher) -> None:
    """From now on it stands before the module's call."""
    kept.acquire()
    stay(watcher)


def stay(watcher: Watcher) -> bool:
    """Stand there again, if somebody has set torch's attribute, which takes all away who stood there; was it so?"""
    held = watcher.callee.__dict__
    if any(standing is watcher for standing in _watchers(watcher.callee)):
        return False
    watcher.behind = held.get(_NAME)
    held[_NAME] = watcher
    return True


def leave(module: torch.nn.Module | None, watcher: Watcher | None) -> None:
    """No more. None: it is gone."""
    kept.release()
    if watcher is not None:
        watcher.callee = None
    watchers = [] if module is None else _watchers(module)
    if module is None or watcher is None or watcher not in watchers:  # somebody took all of them away
        return
    at = watchers.index(watcher)
    if at:
        watchers[at - 1].behind = watcher.behind
    else:
        _put(module, watcher.behind)


def compiled_in_place(module: torch.nn.Module) -> Any:
    """What `module.compile()` made; None where it was not compiled."""
    watchers = _watchers(module)
    return watchers[-1].behind if watchers else module.__dict__.get(_NAME)


def _watchers(module: torch.nn.Module) -> list[Watcher]:
    """Those who stand before its call, from the outside in."""
    found, standing = [], module.__dict__.get(_NAME)
    while isinstance(standing, Watcher):
        found.append(standing)
        standing = standing.behind
    return found


def _eager(behind: Any) -> Watcher | None:
    return behind.eagerly() if isinstance(behind, Watcher) else None


def _put(module: torch.nn.Module, standing: Any) -> None:
    if standing is None:
        module.__dict__.pop(_NAME, None)
    else:
        module.__dict__[_NAME] = standing


def _put_compiled(module: torch.nn.Module, compiled: Any) -> None:
    """Behind those who watch."""
    watchers = _watchers(module)
    if watchers:
        watchers[-1].behind = compiled
    else:
        _put(module, compiled)


class UncompiledCall:
    """In place of Module._compiled_call_impl while a counter is open: in a thread that counts, nothing is compiled.

    What is compiled there is the bound `_call_impl` of that time: run eagerly, it would pass by our own. No property,
    since TorchScript compiles the properties of a module.
    """

    def __init__(self, counting: Callable[[], Any]) -> None:
        self._counting = counting

    def applies(self) -> bool:
        """Does the thread that asks count?"""
        return not torch.compiler.is_compiling() and not compiling_higher_order() and bool(self._counting())

    def __get__(self, module: torch.nn.Module | None, owner: type | None = None) -> Any:
        standing = None if module is None else module.__dict__.get(_NAME)
        return standing if standing is None or not self.applies() else _eager(standing)

    def __set__(self, module: torch.nn.Module, compiled: Any) -> None:
        _put_compiled(module, compiled)

    def __delete__(self, module: torch.nn.Module) -> None:
        _put_compiled(module, None)


class _Kept(WhileUsed):
    """What keeps watchers where they are, and who is compiled behind them: there while anybody watches or counts."""

    def change(self) -> None:
        """As torch's own, but for what stands before a module's call."""
        module = torch.nn.Module
        self._undo += [
            _without(module.__annotations__, _NAME),  # TorchScript fails on it where the attribute is set
            replaced(module, "compile", _compile_behind(module._call_impl)),
            replaced(module, "__setstate__", _set_alone(module.__setstate__)),
            replaced(module, _REPLICATE, _replicate_alone(getattr(module, _REPLICATE))),
        ]


kept = _Kept()
_REPLICATE = "_replicate_for_data_parallel"


def _without(annotations: dict[str, Any], name: str) -> Callable[[], object]:
    """Take it out; returns what puts it back."""
    annotation = annotations.pop(name, None)
    return lambda: annotation is None or annotations.update({name: annotation})


def _compile_behind(call: Callable[..., Any]) -> Callable[..., None]:
    """In place of Module.compile: what is compiled is torch's own call, which outlives a counter."""

    def compile(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        own = self._call_impl
        if getattr(own, "__func__", None) is vars(torch.nn.Module)["_call_impl"]:  # and not a class's of the user's
            own = call.__get__(self)
        _put_compiled(self, torch.compile(own, *args, **kwargs))

    return compile


def _set_alone(original: Callable[..., None]) -> Callable[..., None]:
    """In place of what gives a copy its state, which may be all of the module's: a copy's call is its own."""

    def set_state(self: torch.nn.Module, state: dict[str, Any]) -> None:
        original(self, state)
        _put(self, compiled_in_place(self))

    return set_state


def _replicate_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of what makes the copies of DataParallel."""

    def _replicate_for_data_parallel(self: torch.nn.Module) -> Any:
        replica = original(self)
        _put(replica, compiled_in_place(self))
        return replica

    return _replicate_for_data_parallel
