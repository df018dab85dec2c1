"""Does a model run on these inputs, and where does it stop? Asked where their layout is not written down."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from flopprof.counting.preserve import preserved
from flopprof.counting.values import carried, moved, needs_values
from flopprof.errors import ValuesUnknown
from flopprof.models.hf_maker import Maker
from flopprof.models.inputs import first_line

logger = logging.getLogger(__name__)


def failing(
    maker: Maker, kwargs: Mapping[str, Any], watch: AbstractContextManager[Any] | None = None
) -> tuple[str, int] | None:
    """The line on which a forward fails, as (file, number); None where it goes through, or stops for want of values.

    The model is left as it was. `watch` is open around the forward alone.
    """
    try:
        with preserved([maker.model], ((), kwargs), None), torch.no_grad(), carried(lambda _: None, model=maker.model):
            given = moved(kwargs) if maker.device == "meta" else kwargs
            with watch or nullcontext():
                maker.model(**given)
    except ValuesUnknown:
        return None
    except Exception as error:  # whatever a model raises of a layout that it does not take
        if maker.device == "meta" and needs_values(error):
            return None
        logger.debug("%s does not take these inputs: %s", type(maker.model).__name__, first_line(error))
        return _where(error)
    return None


def lengths(maker: Maker, kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Places for each sample in what modules gave before a forward failed, the last first; None where it goes through.

    What a tower gives is as long as what stands for it must be.
    """
    found: dict[int, None] = {}
    batch = maker.request.batch

    def note(module: Any, args: Any, output: Any) -> None:
        for tensor in list(_rows(output))[:1]:
            places = tensor.numel() // tensor.shape[-1]
            if places % batch == 0:
                found.pop(places // batch, None)
                found[places // batch] = None

    handle = register_module_forward_hook(note)
    try:
        failed = failing(maker, kwargs) is not None
    finally:
        handle.remove()
    return tuple(reversed(found)) if failed else None


def _rows(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.dim() in (2, 3) and output.numel():
            yield output
    elif isinstance(output, Mapping | tuple | list):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _rows(item)


def _where(error: Exception) -> tuple[str, int]:
    """The innermost line outside torch and this package."""
    found = ("", 0)
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and "flopprof" not in file:
            found = (file, trace.tb_lineno)
        trace = trace.tb_next
    return found
