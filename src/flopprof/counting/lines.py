"""Which line of the user's own code is running? Read off the Python stack, or off the text of a stack trace.

Of the innermost running module that is not torch's own, the innermost line in the file of its class: `q @ k` in the
model, rather than the library function that the model hands it to. Without such a module, or where no line of its file
is running, the innermost line outside torch.
"""

from __future__ import annotations

import inspect
import linecache
import os
import re
import sys
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch

from flopprof.counting import instrument
from flopprof.counting.whereabouts import Whereabouts
from flopprof.profile import Phase

_MODULE_CALL: CodeType = instrument.module_call(len, []).__code__  # every wrapper that it makes has this code
_FUNCTION_APPLY: CodeType = instrument.function_apply(None, []).__code__
_ENGINE: CodeType = instrument._Engine.run_backward.__code__

# The folders of torch and of flopprof.
_INSIDE = tuple(f"{os.path.dirname(place)}{os.sep}" for place in (torch.__file__, os.path.dirname(__file__)))
# What calls count() there is no code of the user's.
_COMMANDS = tuple(os.path.join(_INSIDE[1], folder, "") for folder in ("models", "crosscheck", "cli"))
# Code that torch wrote, or that Python froze: nobody can open its file.
_GENERATED = ("<eval_with_key>", "<torch_package", "<frozen ")
_LIBRARIES = re.compile(r".*[/\\](?:site|dist)-packages[/\\]")
_known_files: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()
_TRACED = re.compile(r'File "([^"\n]+)", line (\d+)')


def line_now(where: Whereabouts, phase: Phase) -> str:
    """The line of the operator that runs now: where nothing but torch runs in a backward, that of its forward."""
    line = running_line()
    return line if line or phase not in ("backward", "recompute") else where.line()


def remember_line(where: Whereabouts, line: str, *, own_node: bool) -> None:
    """Note for the backward of the operator that just ran that it was called on this line.

    own_node: it made a node of its own. It may have made one also where none of its factors seems to want a gradient
    (under torch.func's transforms), and inside an autograd.Function the Function's was made before.
    """
    if own_node:
        where.remember_line(line)
    elif torch.is_grad_enabled() or _within_function():
        where.remember_line(line, first=True)


def running_line() -> str:
    """The line that runs now, as `/whole/path/to/model.py:123`; inside a backward pass, of what the pass runs.

    Empty where only torch's own code runs: then, in a backward, its forward operator tells.
    """
    innermost: FrameType | None = None
    by_file: dict[str, FrameType] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _MODULE_CALL:
            files = _files(type(frame.f_locals["self"]))
            found = next((by_file[file] for file in files if file in by_file), innermost)
            if files and found is not None:
                return f"{found.f_code.co_filename}:{found.f_lineno}"
        elif code is _ENGINE or code.co_filename.startswith(_COMMANDS):
            break
        elif _is_outside(code.co_filename) and code.co_filename not in by_file:
            by_file[code.co_filename] = frame
            innermost = innermost or frame
        frame = frame.f_back
    return "" if innermost is None else f"{innermost.f_code.co_filename}:{innermost.f_lineno}"


def _within_function() -> bool:
    """Is the forward of an autograd.Function running?"""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _ENGINE:
        if frame.f_code is _FUNCTION_APPLY:
            return True
        frame = frame.f_back
    return False


def line_in_trace(trace: str | None, classes: Sequence[type | str] = ()) -> str:
    """The line that a stack trace's text (outermost call first) names, by the rule of running_line.

    classes: of the modules that were running, outermost first, as types or qualified names. Empty without a trace.
    """
    places = [(file, int(number)) for file, number in _TRACED.findall(trace or "") if _is_outside(file)]
    innermost = dict(places)
    for cls in reversed(classes):
        files = _files(cls) if isinstance(cls, type) else _files_of_name(cls)
        if files:
            found = next((file for file in files if file in innermost), None)
            if found is not None:
                return shorten(f"{found}:{innermost[found]}")
            break
    return shorten(f"{places[-1][0]}:{places[-1][1]}") if places else ""


def source_text(line: str) -> str:
    """The source at `path/to/model.py:123`, stripped; empty where it cannot be read."""
    path, _, number = line.rpartition(":")
    if not path or not number.isdigit():
        return ""
    candidates = [Path(path), *(Path(folder) / path for folder in sys.path)]
    for file in candidates:
        if text := linecache.getline(str(file), int(number)):
            return text.strip()
    return ""


def shorten(line: str) -> str:
    """`file:number` with the path as one would write it: below its site-packages, else below the working directory."""
    if line.startswith("<"):
        return line
    try:
        path, here = os.path.abspath(line), f"{os.getcwd()}{os.sep}"
    except OSError:  # the working directory is gone
        return line
    below = _LIBRARIES.match(path)
    return path[below.end() :] if below is not None else path.removeprefix(here)


@cache
def _is_outside(file: str) -> bool:
    """Is the file neither torch's nor flopprof's, and one that can be opened?"""
    return not file.startswith((*_INSIDE, *_GENERATED))


def _files(cls: type) -> tuple[str, ...]:
    """Files of a module class and of its bases, the nearest first, without torch's."""
    files = _known_files.get(cls)
    if files is None:
        files = _known_files[cls] = tuple(dict.fromkeys(file for base in cls.__mro__ if (file := _written_in(base))))
    return files


def _written_in(cls: type) -> str:
    if cls is object or cls.__module__ == "torch" or cls.__module__.startswith("torch."):
        return ""
    origin = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if isinstance(origin, str) and origin.endswith(".py"):
        return origin
    # Of a notebook, or run by exec: what its functions say.
    functions = (inspect.unwrap(value) for value in vars(cls).values() if isinstance(value, FunctionType))
    return next((function.__code__.co_filename for function in functions), "")


def _files_of_name(qualified: str) -> tuple[str, ...]:
    """As _files, of a class by its qualified name: `package.module.Class`."""
    parts = qualified.split(".")
    for length in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:length]))
        for name in parts[length:] if found is not None else ():
            found = getattr(found, name, None)
        if isinstance(found, type):
            return _files(found)
    return ()
