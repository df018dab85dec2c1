"""What a meter is given, checked: what it cannot take is one sentence, before anything runs."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from flopprof.errors import UsageError


def check_models(models: Iterable[Any], attention: Any) -> None:
    """Raises UsageError for what is no module, and for an unknown attention."""
    for item in models:
        if not isinstance(item, torch.nn.Module):
            raise UsageError(f"Meter takes modules, got {type(item).__name__}.")
    if attention not in ("full", "causal"):
        raise UsageError(f"attention {attention!r} is neither 'full' nor 'causal'.")


def whole(name: str, value: Any, least: int, *, otherwise: str = "") -> int:
    """The whole number, numpy's too. otherwise: what else it might be. Raises UsageError."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise UsageError(f"{name} is a whole number of at least {least}{otherwise}, got {value!r}.")
    return number


def size(name: str, value: Any) -> Any:
    """Tokens or samples of a step: None, a function of the batch, or a whole number. Raises UsageError."""
    if value is None or callable(value):
        return value
    return whole(name, value, 0, otherwise=", or a function of the batch")


def check_function(name: str, value: Any) -> None:
    """Raises UsageError for what cannot be called."""
    if not callable(value):
        raise UsageError(f"{name} is a function, got {value!r}.")


def check_records(path: Any) -> None:
    """Raises UsageError for what is no path of a file."""
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"records is the path of a file, got {path!r}.")
    if Path(path).is_dir():
        raise UsageError(f"records is the path of a file, got {str(path)!r}, which is a directory.")
