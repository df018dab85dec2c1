"""Models of one's own: `path/to/file.py:attribute`, a function or class that returns a module."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from flopprof.errors import FlopprofError, ModelFailed, UsageError
from flopprof.models.inputs import first_line, place, samples_in, tensors_in, tokens_in
from flopprof.models.request import Request, construct, undisturbed_random_state
from flopprof.models.workload import Workload


def names_file(target: str) -> bool:
    """Whether the target is `file.py` or `file.py:attribute`."""
    return target.endswith(".py") or ".py:" in target


def load(target: str, request: Request) -> Workload:
    """The module that the attribute returns, with the inputs it returns beside it or `--input` gives.

    The file runs once, under a name of its own (never `__main__`).
    """
    if request.image_size is not None:
        raise UsageError(f"--image-size is for models that flopprof builds; {target} takes its shapes from --input.")
    path, _, attribute = target.rpartition(":") if not target.endswith(".py") else (target, "", "")
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"no file {path!r}: give the path of a Python file, as in path/to/file.py:function.")
    namespace = _import(file)
    candidates = _candidates(namespace)
    if not attribute or not hasattr(namespace, attribute):
        offered = f"it defines {', '.join(candidates)}" if candidates else "it defines no function or class"
        problem = f"{path} has no {attribute!r}" if attribute else f"{path} does not say which function or class"
        raise UsageError(f"{problem}: {offered}; write {path}:NAME.")
    return _on(request.device or "meta", target, file, getattr(namespace, attribute), request)


def _on(device: str, target: str, file: Path, source: Any, request: Request) -> Workload:
    arguments = _arguments(target, source, request)
    returned: list[Any] = []

    def build() -> nn.Module:
        with _importable(file):
            returned[:] = [_call(target, source, arguments)]
        return _split(target, returned[0])[0]

    model = construct(build, name=target, device=device, request=request)
    args, kwargs = _split(target, returned[0])[1:]
    if request.inputs:
        args, kwargs = request.tensors(device), {}
    if not tensors_in([*args, *kwargs.values()]):
        raise UsageError(
            f"{target} returns a module and no inputs: give one --input SHAPE for each of {_signature(model)}, "
            "or return (module, inputs)."
        )
    return Workload(
        model=model,
        args=place(args, device, request.dtype),
        kwargs=place(kwargs, device, request.dtype),
        name=target,
        device=device,
        tokens=tokens_in(args, kwargs),
        samples=request.batch if "batch" in arguments else samples_in(tensors_in([*args, *kwargs.values()])[0]),
        on_cpu=partial(_on, "cpu", target, file, source, request)
        if request.device is None and device == "meta"
        else None,
    )


def _import(file: Path) -> ModuleType:
    """The file as a module. After a failure nothing of it remains."""
    name = f"flopprof_target_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[name] = module  # dataclasses and pickles look their module up here
    try:
        with _importable(file), undisturbed_random_state():
            spec.loader.exec_module(module)
    except BaseException as error:
        for imported in set(sys.modules) - before:
            if imported == name or _lies_beside(sys.modules[imported], file):
                del sys.modules[imported]
        if isinstance(error, FlopprofError) or not isinstance(error, Exception | SystemExit):
            raise
        raise ModelFailed(
            f"{file} could not be imported: {type(error).__name__}: {first_line(error)} "
            "Run it with Python to see where, or see the whole error with --traceback."
        ) from error
    return module


@contextmanager
def _importable(file: Path) -> Iterator[None]:
    """The file's folder comes first on sys.path, as it does for `python file.py`; afterwards sys.path is as it was."""
    path = list(sys.path)
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        yield
    finally:
        sys.path[:] = path


def _lies_beside(module: ModuleType | None, file: Path) -> bool:
    origin = getattr(module, "__file__", None)
    return origin is not None and file.parent.resolve() in Path(origin).resolve().parents


def _candidates(namespace: ModuleType) -> list[str]:
    """Functions, classes and modules that the file itself defines."""
    return [
        name
        for name, value in vars(namespace).items()
        if not name.startswith("_")
        and (isinstance(value, nn.Module) or (callable(value) and value.__module__ == namespace.__name__))
    ]


def _arguments(target: str, source: Any, request: Request) -> dict[str, Any]:
    """--model-arg, and the batch size where the function takes one by that name."""
    arguments = dict(request.model_args)
    if isinstance(source, nn.Module) or not callable(source):
        if arguments:
            raise UsageError(f"{target} is a {type(source).__name__}, not a function: it takes no --model-arg.")
        parameters: Mapping[str, inspect.Parameter] = {}
    else:
        parameters = inspect.signature(source).parameters
    if "batch" in parameters and "batch" not in arguments and request.batch != 1:
        arguments["batch"] = request.batch
    elif request.batch != 1 and "batch" not in parameters:
        raise UsageError(f"{target} has no parameter batch: write the batch size into the shape of --input.")
    return arguments


def _call(target: str, source: Any, arguments: Mapping[str, Any]) -> Any:
    if isinstance(source, nn.Module):
        return copy.deepcopy(source)  # the file's own stays where it is, for a second run on another device
    if not callable(source):
        raise UsageError(f"{target} is a {type(source).__name__}: name a function, a class or a module.")
    try:
        inspect.signature(source).bind(**arguments)
    except TypeError as error:
        raise UsageError(
            f"{target} cannot be called with {sorted(arguments) or 'no arguments'}: {first_line(error)} "
            "Give --model-arg name=value."
        ) from error
    return source(**arguments)


def _split(target: str, returned: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """module | (module, inputs), inputs a tensor, a tuple or a dict: the module, its args and its kwargs."""
    module, inputs = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, ())
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"{target} returned a {type(module).__name__}: return a torch.nn.Module, or (module, inputs) "
            "with inputs a tensor, a tuple or a dict."
        )
    if isinstance(inputs, torch.Tensor):
        return module, (inputs,), {}
    if isinstance(inputs, Mapping):
        return module, (), dict(inputs)
    if isinstance(inputs, (list, tuple)):
        return module, tuple(inputs), {}
    raise UsageError(f"{target} returned inputs of type {type(inputs).__name__}: use a tensor, a tuple or a dict.")


def _signature(model: nn.Module) -> str:
    return f"forward{inspect.signature(model.forward)}"
