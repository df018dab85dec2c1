"""Questions about values that were asked of meta tensors, and failed: also where the model swallowed the error.

A model that wraps a question into `try` goes on, by a branch that it would not have taken: what it then does is no
count of it. The operators that can be asked are watched, so that whoever counts can tell.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_ASKED = frozenset({"aten::equal", "aten::allclose", "aten::_to_copy", "aten::is_nonzero"})
_state = threading.local()


def failures() -> int:
    """How many questions have failed in this thread so far."""
    return getattr(_state, "failures", 0)


def asks(func: Any) -> bool:
    """Does an operator give a number, or a shape that depends on values?"""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return False
    tags = func.tags
    dynamic = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
    return dynamic or schema.name in _ASKED


def watched(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, noting when it fails."""

    def ask(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except RuntimeError:
            _state.failures = failures() + 1
            raise

    return ask
