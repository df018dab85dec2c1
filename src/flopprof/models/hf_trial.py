"""Does a model run on these inputs? Asked where its layout of them is not written down."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from flopprof.counting.preserve import preserved
from flopprof.counting.values import carried, moved, needs_values
from flopprof.errors import ValuesUnknown
from flopprof.models.hf_maker import Maker
from flopprof.models.inputs import first_line

logger = logging.getLogger(__name__)


def runs(maker: Maker, kwargs: Mapping[str, Any]) -> bool:
    """Whether one forward goes through, or stops only for want of values. The model is left as it was."""
    try:
        with preserved([maker.model], ((), kwargs), None), torch.no_grad(), carried(lambda _: None, model=maker.model):
            maker.model(**(moved(kwargs) if maker.device == "meta" else kwargs))
    except ValuesUnknown:
        return True
    except Exception as error:  # whatever a model raises of a layout that it does not take
        if maker.device == "meta" and needs_values(error):
            return True
        logger.debug("%s does not take these inputs: %s", type(maker.model).__name__, first_line(error))
        return False
    return True
