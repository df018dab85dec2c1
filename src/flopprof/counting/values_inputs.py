"""Calls on the meta device: whether one is, what it is given, and whether it failed for want of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

_BUILT_WITH = "_flopprof_built_with"
_COMPLAINTS = ("meta", "data-dependent", "fake impl", "same device")


def needs_values(error: BaseException) -> bool:
    """Was this raised for want of values: of meta tensors, beside real ones, or of an operator with no meta kernel?"""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        text = str(following).lower()
        if isinstance(following, NotImplementedError) or any(word in text for word in _COMPLAINTS):
            return True
        following = following.__cause__ or following.__context__
    return False


def on_meta(model: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Does a call compute on the meta device: are the model's parameters there, or, where it has none, an input?"""
    held = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    if held:
        return all(parameter.is_meta for parameter in held)
    return any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs)))


def moved(inputs: Any) -> Any:
    """Inputs on the CPU, moved to meta: their values are carried along where values are."""

    def move(leaf: torch.Tensor) -> torch.Tensor:
        if leaf.device.type != "cpu" or not leaf.dim() or type(leaf) is not torch.Tensor:
            return leaf
        return leaf.detach().to("meta").requires_grad_(leaf.requires_grad)

    return tree_map_only(torch.Tensor, move, inputs)


def holds_numbers(model: torch.nn.Module) -> bool:
    """Does a model on meta hold whole numbers, or a single one, that its forward may ask for?"""
    return any(not held.dtype.is_floating_point or held.numel() == 1 for held in _held(model))


def remember(model: torch.nn.Module, value_of: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Keep with each small tensor that a model on meta holds what it was built with, where that is known."""
    for tensor in _held(model):
        value = value_of(tensor)
        if value is not None:
            setattr(tensor, _BUILT_WITH, value.clone())


def remembered(model: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors that a model holds on meta, with what they were built with."""
    if isinstance(model, torch.nn.Module):
        for tensor in _held(model):
            value = getattr(tensor, _BUILT_WITH, None)
            if value is not None:
                yield tensor, value


def _held(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        for held in (*module._buffers.values(), *module.__dict__.values()):
            if type(held) is torch.Tensor and held.is_meta:
                yield held
