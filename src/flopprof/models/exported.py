"""Programs that torch.export saved: `model.pt2`, with the inputs that they were exported with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from flopprof.errors import ModelFailed, UsageError
from flopprof.models.inputs import first_line, samples_in, tensors_in
from flopprof.models.request import Request
from flopprof.models.workload import Workload


def names_file(target: str) -> bool:
    """Whether the target is a saved program."""
    return target.endswith(".pt2")


@contextmanager
def _silent() -> Iterator[None]:
    """torch logs what it could not load with a traceback; the error that it raises says it."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def load(target: str, request: Request) -> Workload:
    """The saved program, and its example inputs. Its graph is counted, and nothing in it runs.

    Raises UsageError for options that a graph cannot follow, ModelFailed for a file that torch.export cannot load.
    """
    file = Path(target)
    if not file.is_file():
        raise UsageError(f"no file {target!r}: give the path of a program that torch.export.save wrote.")
    refused = {
        "--batch": request.batch != 1,
        "--image-size": request.image_size is not None,
        "--input": bool(request.inputs),
        "--dtype": request.dtype is not None,
        "--train": request.train,
        "--model-arg": bool(request.model_args),
        "--device": request.device not in (None, "meta"),
    }
    for option in (option for option, given in refused.items() if given):
        raise UsageError(f"{target} is an exported graph with shapes, mode and types of its own: leave {option} out.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions, for programs that are to be run
        try:
            with _silent():
                program = torch.export.load(file)
        except Exception as error:  # zip, JSON, operators that are not registered
            raise ModelFailed(
                f"{target} could not be loaded: {type(error).__name__}: {first_line(error)} "
                "Is it what torch.export.save wrote, by this version of torch, with its operators imported?"
            ) from error
    args, kwargs = program.example_inputs or ((), {})
    tensors = tensors_in([*args, *kwargs.values()])
    return Workload(
        model=program.module(),
        args=tuple(args),
        kwargs=dict(kwargs),
        name=target,
        device="meta",
        program=program,
        samples=samples_in(tensors[0]) if tensors else None,
    )
