"""Where a command's results go: the terminal, standard output, or a file that is whole or absent."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from flopprof.errors import FlopprofError, ModelFailed, UsageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_PATIENCE_S = 1.0
_OF_CHECKPOINTS = ("config.json", ".safetensors", ".safetensors.index.json", ".py")
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")
STDOUT = "-"


def console(*, stderr: bool = False) -> Console:
    """A console that prints what it is given: no markup, no emoji codes, no guessed highlighting."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """What models do inside neither mixes with the results nor ends the command.

    What they print goes to standard error. SystemExit is ModelFailed: an exit code of theirs would be taken for ours.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except SystemExit as error:
        raise ModelFailed(
            f"the model's own code ended the process (SystemExit: {error.code}): see where with --traceback."
        ) from error
    except (MemoryError, RuntimeError) as error:  # of torch's allocators, which this file does not import
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in _OUT_OF_MEMORY):
            raise
        raise FlopprofError("out of memory: give smaller sizes, or --device meta, which takes none.") from error


@contextlib.contextmanager
def progress(message: str) -> Iterator[None]:
    """Where models are built and run: `apart`, with a spinner once it has taken over a second, on a terminal."""
    with apart(), _spinner(message):
        yield


@contextlib.contextmanager
def _spinner(message: str) -> Iterator[None]:
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


def require_outputs(*read: str | None, **paths: str | None) -> None:
    """Raises UsageError before the work: for files that cannot be written, one under two options, no plotly for html.

    read: files that the command reads or runs, which no output may replace. paths: of every file option that the
    command has, by its name; None where it is not given.
    """
    if list(paths.values()).count(STDOUT) > 1:
        if len(paths) > 2:
            raise UsageError("several options ask for standard output by -: give all but one of them a file.")
        names = " and ".join(f"--{name}" for name in paths)
        raise UsageError(f"both {names} ask for standard output by -: give one of them a file.")
    if STDOUT in paths.values():
        _require_open()
    for path in paths.values():
        require_writable(path)
    _require_apart(paths)
    require_spared(*read, **paths)
    if paths.get("html") is not None:
        from flopprof.report.html.page import require_plotly

        require_plotly()


def require_spared(*read: str | None, **paths: str | None) -> None:
    """Raises UsageError for an output in the place of a file that is read or run."""
    for option, path in paths.items():
        for source in read:
            if source is not None and path is not None and path != STDOUT and _one_file(path, source):
                raise UsageError(
                    f"--{option.replace('_', '-')} would write over {source!r}, which is read: "
                    "give it a file of its own."
                )


def file_of(target: str) -> str:
    """The file that a target names, where it names one: `net.py` of `net.py:build`."""
    path, _, _attribute = target.rpartition(":")
    return path if path.endswith(".py") else target


def _require_apart(paths: Mapping[str, str | None]) -> None:
    """Raises UsageError for one file under two options."""
    named: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None or path == STDOUT:
            continue
        file = Path(path).resolve()
        other = named.setdefault(file, option)
        if other != option and (file.is_file() or not file.exists()):
            both = " and ".join(f"--{name.replace('_', '-')}" for name in (other, option))
            raise UsageError(f"{both} both name {path!r}: give each a file of its own.")


def _one_file(path: str, other: str) -> bool:
    """Is it the other, or of the other where that is a checkpoint's directory?"""
    file, source = Path(path), Path(other)
    if not file.is_file():
        return False
    if source.is_dir():
        return file.resolve().parent == source.resolve() and file.name.endswith(_OF_CHECKPOINTS)
    return source.is_file() and file.samefile(source)


def read_bytes(path: str) -> bytes:
    """What a file holds; `-` is standard input. Raises UsageError where it cannot be read."""
    if path == STDOUT:
        return sys.stdin.buffer.read()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path!r}: {error.strerror or error}.") from error


def show(report: RenderableType) -> None:
    """Prints a report on standard output; `?` stands for what the terminal's encoding does not have."""
    with _standard_output() as stream:
        errors = getattr(stream, "errors", None)
        if not isinstance(stream, io.TextIOWrapper) or errors is None:
            console().print(report, crop=False)
            return
        stream.reconfigure(errors="replace")
        try:
            console().print(report, crop=False)
        finally:
            stream.reconfigure(errors=errors)


def _require_open() -> None:
    if sys.stdout is None or sys.stdout.closed:
        raise FlopprofError("cannot write to standard output: it is closed.")


@contextlib.contextmanager
def _standard_output() -> Iterator[TextIO]:
    """Standard output, flushed before and after. Raises FlopprofError where it is closed or full."""
    _require_open()
    try:
        sys.stdout.flush()
        yield sys.stdout
        sys.stdout.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:  # `| head`, which typer ends without a word
            raise
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:  # Python flushes again when it exits
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        raise FlopprofError(f"cannot write to standard output: {error.strerror or error}.") from error


def write_text(path: str, text: str) -> None:
    """Writes `text` to a file, whole or not at all; `-` is standard output, where it ends in a newline."""
    if path == STDOUT:
        text = text if text.endswith("\n") else f"{text}\n"
        with _standard_output() as stream:
            binary = getattr(stream, "buffer", None)  # UTF-8 as in a file, whatever the terminal's encoding
            if binary is None:
                stream.write(text)
            else:
                binary.write(text.encode())
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
