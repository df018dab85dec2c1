"""Calls on the meta device: whether one is, what it is given, and whether it failed for want of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

_COMPLAINTS = ("meta", "data-dependent", "fake impl")


def needs_values(error: BaseException) -> bool:
    """Was this raised for want of values: of meta tensors, or by an operator that has no meta kernel?"""
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
