"""What is changed in torch for all of a process: in place while anybody uses it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class WhileUsed:
    """The first who uses it changes torch, the last one puts everything back."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._users = 0
        self._undo: list[Callable[[], object]] = []

    def acquire(self) -> None:
        """One more uses it."""
        with self.lock:
            self._users += 1
            if self._users == 1:
                self.change()

    def release(self) -> None:
        """One less."""
        with self.lock:
            self._users -= 1
            if self._users == 0:
                while self._undo:
                    self._undo.pop()()

    def change(self) -> None:
        """Change torch: of each change, what undoes it goes to the end of `_undo`."""
        raise NotImplementedError
