"""Where a command's results go: the terminal, standard output, or a file that is whole or absent."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flopprof.errors import FlopprofError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

_PATIENCE_S = 1.0
STDOUT = "-"


def console(*, stderr: bool = False) -> Console:
    """A console that prints what it is given: no markup, no emoji codes, no guessed highlighting."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


@contextlib.contextmanager
def progress(message: str) -> Iterator[None]:
    """Shows a spinner on standard error, if that is a terminal, once the work has taken over a second."""
    if not sys.stderr.isatty():
        yield
        return
    status = console(stderr=True).status(message)
    timer = threading.Timer(_PATIENCE_S, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may be starting the spinner at this moment
        status.stop()


def require_writable(path: str | None) -> None:
    """Raises UsageError if `path` cannot become a file: said before the work, not after it."""
    if path is None or path == STDOUT:
        return
    file = Path(path)
    if file.is_dir():
        raise UsageError(f"{path!r} is a directory: give the name of a file.")
    if not file.parent.is_dir():
        raise UsageError(f"cannot write {path!r}: the directory {str(file.parent)!r} does not exist.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"cannot write {path!r}: permission denied.")


def require_outputs(**paths: str | None) -> None:
    """Raises UsageError before the work: for files that cannot be written, two on standard output, no plotly for html.

    paths: of every file option that the command has, by its name; None where it is not given.
    """
    if list(paths.values()).count(STDOUT) > 1:
        if len(paths) > 2:
            raise UsageError("several options ask for standard output by -: give all but one of them a file.")
        names = " and ".join(f"--{name}" for name in paths)
        raise UsageError(f"both {names} ask for standard output by -: give one of them a file.")
    for path in paths.values():
        require_writable(path)
    if paths.get("html") is not None:
        from flopprof.report.html.page import require_plotly

        require_plotly()


def read_bytes(path: str) -> bytes:
    """What a file holds; `-` is standard input. Raises UsageError where it cannot be read."""
    if path == STDOUT:
        return sys.stdin.buffer.read()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path!r}: {error.strerror or error}.") from error


def write_text(path: str, text: str) -> None:
    """Writes `text` to a file, whole or not at all; `-` is standard output, where it ends in a newline."""
    if path == STDOUT:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        return
    file = Path(path).resolve()  # a link stays a link: its target is replaced
    try:
        if file.exists() and not file.is_file():  # /dev/null, a pipe
            file.write_text(text, encoding="utf-8")
            return
        _replace(file, text)
    except OSError as error:
        raise FlopprofError(f"cannot write {path!r}: {error.strerror or error}.") from error


def _replace(file: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    draft = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
        draft.chmod(_mode(file))
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _mode(file: Path) -> int:
    """The permissions that the file has, or that a new file would get."""
    if file.exists():
        return file.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
