"""Which models run other code where they are exported: their source asks whether they are."""

from __future__ import annotations

import inspect
import linecache
import re
from pathlib import Path

import torch

EXPORTED = "{} asks whether it is exported, and may run other code then: that is what was counted."
_ASKS = re.compile(r"\bis_(?:torchdynamo_)?exporting\(")


def asking(model: torch.nn.Module) -> list[str]:
    """The files of source, of the parts of a model, that ask."""
    classes = dict.fromkeys(map(type, model.modules()))
    files = dict.fromkeys(_file(cls) for cls in classes if not cls.__module__.startswith("torch."))
    return [Path(file).name for file in files if any(map(_ASKS.search, linecache.getlines(file)))]


def _file(cls: type[torch.nn.Module]) -> str:
    """Where its forward is written; empty where it is not written in Python."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return "" if code is None else str(code.co_filename)
