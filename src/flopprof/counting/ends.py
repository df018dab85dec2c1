"""The two ends of a counted run: inputs that are nobody else's, and outputs to differentiate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


def own_inputs(inputs: Any) -> Any:
    """Inputs whose gradients land in no tensor of the caller's."""
    return tree_map_only(
        torch.Tensor, lambda leaf: leaf.detach().requires_grad_() if leaf.requires_grad else leaf, inputs
    )


def to_differentiate(output: Any, loss: Callable[[Any], torch.Tensor] | None) -> list[torch.Tensor]:
    """What backward starts from: the loss, or every floating tensor of the output that has a graph."""
    values = [loss(output)] if loss is not None else list(tensors_in(output))
    return [value for value in values if value.requires_grad and (value.is_floating_point() or value.is_complex())]


def tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """Every tensor of an output, inside mappings, sequences and dataclasses too."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple | set):
        for value in output:
            yield from tensors_in(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for item in fields(output):
            yield from tensors_in(getattr(output, item.name))
