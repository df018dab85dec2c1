"""Change a module of torch that may not be imported yet, without importing it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class WhenImported:
    """`change(module)` is called now, or right after somebody imports the module; what it returns undoes it."""

    def __init__(self, name: str, change: Callable[[ModuleType], Callable[[], object]]) -> None:
        self._name = name
        self._change = change
        self._lock = threading.Lock()
        self._undo: Callable[[], object] | None = None
        self._wanted = False

    def install(self) -> None:
        """From now on, the module is changed."""
        self._wanted = True
        if self._name not in sys.modules:
            sys.meta_path.insert(0, self)
        self._apply()

    def remove(self) -> None:
        """Leave everything as it was."""
        with self._lock:
            self._wanted = False
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            if self._undo is not None:
                self._undo()
                self._undo = None

    def _apply(self) -> None:
        with self._lock:
            module = sys.modules.get(self._name)
            if self._wanted and self._undo is None and module is not None:
                self._undo = self._change(module)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Stand in the way of one import, to act right after it (the protocol of sys.meta_path)."""
        spec = PathFinder.find_spec(name, path) if name == self._name else None
        loader: Any = spec.loader if spec is not None else None
        if loader is None:
            return None

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            loader.exec_module(module)
            self._apply()

        loader.exec_module = exec_module
        return spec


def replaced(owner: Any, name: str, value: Any) -> Callable[[], object]:
    """Set an attribute; returns what puts it back, or takes it away where the owner itself had none.

    What somebody else has put there meanwhile stays as they left it.
    """
    had, original = name in vars(owner), vars(owner).get(name)

    def put_back() -> None:
        if vars(owner).get(name) is not value:
            return
        if had:
            setattr(owner, name, original)
        else:
            delattr(owner, name)

    setattr(owner, name, value)
    return put_back
