"""Which models run other code where they are exported: their source asks whether they are."""

from __future__ import annotations

import inspect
import re
import sys

import torch

EXPORTED = "{} asks whether it is exported, and may run other code then: that is what was counted."
_ASKS = re.compile(r"\bis_(?:torchdynamo_)?exporting\(")


def asking(model: torch.nn.Module) -> list[str]:
    """The files of source, as modules of Python, of the parts of a model that ask."""
    files = dict.fromkeys(type(module).__module__ for module in model.modules())
    return [name for name in files if not name.startswith("torch.") and _ASKS.search(_source(name))]


def _source(name: str) -> str:
    try:
        return inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):  # typed at a prompt
        return ""
