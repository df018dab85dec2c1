"""A script or a module, run as Python runs it: as __main__, with what Python gives it and says when it ends."""

from __future__ import annotations

import builtins
import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from flopprof.errors import FlopprofError, UsageError

_INTERRUPTED = 130
_PACKAGE = str(Path(__file__).parents[1])
_HOOK = sys.excepthook  # Python's own: a command line sets another


@dataclass(frozen=True)
class Program:
    """What is run as __main__."""

    code: types.CodeType
    arguments: list[str]
    directory: str
    about: dict[str, Any]


def of_file(script: str, arguments: list[str]) -> Program:
    """A script. Raises UsageError, and FlopprofError for what is not Python."""
    path = Path(script)
    if path.is_dir():
        raise UsageError(f"{script!r} is a directory: give the script, or `-m` and the name of a package.")
    whole = script if path.is_absolute() else f"{Path.cwd()}{os.sep}{script}"  # as Python does: not normalised
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the script {script!r}: {error.strerror or error}.") from error
    try:
        code = compile(source, whole, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise FlopprofError(f"{script}{where} is not Python: {message}.") from error
    loader = importlib.machinery.SourceFileLoader("__main__", whole)
    about = {"__file__": whole, "__spec__": None, "__package__": None, "__loader__": loader, "__cached__": None}
    return Program(code, [script, *arguments], str(path.resolve().parent), about)


def of_module(name: str, arguments: list[str]) -> Program:
    """What `python -m` runs. Raises UsageError."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UsageError(f"no module named {name!r} can be run: {error}.") from error
    finally:
        sys.path.remove(here)
    loader: Any = None if spec is None else spec.loader
    code = loader.get_code(name) if hasattr(loader, "get_code") else None
    if spec is None or code is None:
        raise UsageError(f"no module named {name!r} can be run: give the name that `python -m` takes.")
    about = {
        "__file__": spec.origin,
        "__spec__": spec,
        "__loader__": loader,
        "__cached__": spec.cached,
        "__package__": name.rpartition(".")[0],
    }
    return Program(code, [spec.origin or name, *arguments], here, about)


def execute(program: Program, *, before: Callable[[], object], after: Callable[[], object]) -> BaseException | None:
    """Runs it; what ended it. It stays __main__: what it pickles or leaves to run at exit needs it.

    before, after  called at its ends, whatever happens; none of them may raise
    """
    main = types.ModuleType("__main__")
    if hasattr(sys.modules["__main__"], "__annotations__"):
        vars(main)["__annotations__"] = {}
    vars(main).update(program.about, __builtins__=builtins)
    sys.modules["__main__"] = main
    sys.argv[:] = program.arguments
    if not sys.flags.safe_path:
        sys.path[0] = program.directory
    sys.excepthook = _HOOK
    before()
    try:
        exec(program.code, vars(main))
    except BaseException as error:
        ended: BaseException | None = error
    else:
        ended = None
    finally:
        after()
    return ended if ended is None or isinstance(ended, SystemExit) else _told(ended)


def end(ended: BaseException | None) -> NoReturn:
    """The end of the process, as Python ends after this."""
    if ended is None:
        raise SystemExit(0)
    if isinstance(ended, SystemExit):
        raise ended.with_traceback(None)
    raise SystemExit(_INTERRUPTED if isinstance(ended, KeyboardInterrupt) else 1)


def say(text: str, stream: Any, descriptor: int) -> str:
    """Writes to a stream as it was at the start; where the script closed it, to what is under it. Else: why not."""
    for current in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            current.flush()
    try:
        stream.write(text)
    except (AttributeError, ValueError, OSError):
        if stream is not None:
            try:
                with open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False) as under:
                    under.write(text)
            except OSError as error:
                return error.strerror or str(error)
    try:
        stream.flush()
    except OSError as error:
        return error.strerror or str(error)
    except Exception:  # closed, or none: it was written to what is under it
        pass
    return ""


def _told(ended: BaseException) -> BaseException:
    """Hands an exception that ended the script to its hook, as Python does; what ends it then."""
    _without_us(ended, set())
    sys.last_type, sys.last_value, sys.last_traceback = type(ended), ended, ended.__traceback__
    if sys.version_info >= (3, 12):
        sys.last_exc = ended
    hook = getattr(sys, "excepthook", None)
    failed: BaseException | None = None
    try:
        if hook is not None:
            hook(type(ended), ended, ended.__traceback__)
    except SystemExit as left:
        return left
    except BaseException as error:
        failed = error
    if hook is None:
        _write("sys.excepthook is missing\n")
    elif failed is None:
        return ended
    else:
        _without_us(failed, set())
        _write("Error in sys.excepthook:\n")
        sys.__excepthook__(type(failed), failed, failed.__traceback__)
        _write("\nOriginal exception was:\n")
    sys.__excepthook__(type(ended), ended, ended.__traceback__)
    return ended


def _write(text: str) -> None:
    with contextlib.suppress(Exception):
        sys.stderr.write(text)


def _without_us(error: BaseException, seen: set[int]) -> None:
    """Take our own frames out of what a script's traceback shows, here and in its causes."""
    seen.add(id(error))
    kept = []
    step = error.__traceback__
    while step is not None:
        if not step.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            kept.append(step)
        step = step.tb_next
    for one, following in zip(kept, [*kept[1:], None], strict=False):
        one.tb_next = following
    error.__traceback__ = kept[0] if kept else None
    grouped = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for other in (error.__cause__, error.__context__, *grouped):
        if other is not None and id(other) not in seen:
            _without_us(other, seen)
