"""count(): one call counts a model or callable, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from flopprof.counting.preserve import modules_within, preserved
from flopprof.counting.runtime import FlopCounter
from flopprof.profile import Attention, Profile


def count(
    model: Callable[..., Any],
    *args: Any,
    backward: bool = False,
    loss: Callable[[Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    attention: Attention = "full",
    lines: bool = False,
    **kwargs: Any,
) -> Profile:
    """FLOPs of `model(*args, **kwargs)`: per operator, module and phase; one multiply-add is 2.

    model      a module or any callable; it runs where it lives: meta, cpu or cuda
    backward   also count the backward pass of `loss(output)`, or of the sum of the output's floating tensors
    loss       output -> scalar; given, backward is counted
    optimizer  also count one step of it (phase `optimizer`); given, backward is counted
    lines      also tell the line of source of every count: `profile.by_line()`
    attention  `full` counts every query-key pair, `causal` only those that the operator's mask lets through

    Parameters, gradients, buffers, inputs, optimizer state, random state, training mode and cached attributes are
    afterwards as they were before; of a function, those of the modules that it is given or closes over.

    >>> import torch
    >>> count(torch.nn.Linear(4, 5), torch.randn(3, 4), backward=True).by_phase()
    {'forward': 120, 'backward': 120, 'recompute': 0, 'optimizer': 0}
    """
    if not callable(model):
        raise TypeError(f"count takes a module or a callable, got {type(model).__name__}.")
    module = model if isinstance(model, torch.nn.Module) else None
    backward = backward or loss is not None or optimizer is not None
    counter = FlopCounter(module, attention=attention, lines=lines)
    with preserved(modules_within(model, args, kwargs, loss), (args, kwargs), optimizer) as keep:
        if not backward:
            with counter:
                model(*args, **kwargs)
        else:
            if optimizer is not None:
                optimizer.zero_grad()
            args, kwargs = _own(args), _own(kwargs)
            with torch.enable_grad(), counter:
                leaves = _to_differentiate(model(*args, **kwargs), loss)
                keep.gradients(leaves)
                if leaves:
                    # The gradient of a sum is a one for each element: handed over, the sum is in no count.
                    torch.autograd.backward(leaves, [torch.ones_like(leaf) for leaf in leaves])
                if optimizer is not None:
                    optimizer.step()
    return counter.profile


def _own(inputs: Any) -> Any:
    """Inputs whose gradients land in no tensor of the caller's."""
    return tree_map_only(
        torch.Tensor, lambda leaf: leaf.detach().requires_grad_() if leaf.requires_grad else leaf, inputs
    )


def _to_differentiate(output: Any, loss: Callable[[Any], torch.Tensor] | None) -> list[torch.Tensor]:
    values = [loss(output)] if loss is not None else list(_tensors(output))
    return [value for value in values if value.requires_grad and (value.is_floating_point() or value.is_complex())]


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple | set):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for item in fields(output):
            yield from _tensors(getattr(output, item.name))
