"""Modules for a while on meta: their tensors, and those of modules that they hold without registering them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})


@contextmanager
def moved_to_meta(modules: list[nn.Module]) -> Iterator[Callable[[Any], Any]]:
    """The modules hold meta tensors; yields what moves a tree of inputs. The caller puts the modules back."""
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta":
            return tensor
        known = moved.get(id(tensor))
        if known is None:
            there: torch.Tensor = tensor.detach().to("meta")
            if isinstance(tensor, nn.Parameter):
                there = nn.Parameter(there, requires_grad=tensor.requires_grad)
            elif tensor.requires_grad and tensor.is_leaf:
                there.requires_grad_()
            known = moved[id(tensor)] = (tensor, there)
        return known[1]

    for module in reachable(modules):
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = move(tensor)  # type: ignore[assignment]  # a parameter gives a parameter
        for name, value in list(vars(module).items()):
            if name not in _REGISTRIES and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
                vars(module)[name] = tree_map_only(torch.Tensor, move, value)
    yield lambda tree: tree_map_only(torch.Tensor, move, tree)


def reachable(modules: list[nn.Module]) -> list[nn.Module]:
    """These modules, their submodules, and those that they hold in lists and other attributes without registering."""
    found: dict[int, nn.Module] = {}
    stack = list(modules)
    while stack:
        module = stack.pop()
        if id(module) not in found:
            found[id(module)] = module
            stack += [child for child in module._modules.values() if child is not None]
            for name, value in vars(module).items():
                if name not in _REGISTRIES:
                    stack += [leaf for leaf in tree_leaves(value) if isinstance(leaf, nn.Module)]
    return list(found.values())


def outermost(modules: list[nn.Module]) -> list[nn.Module]:
    """As many of these and of those that they hold as it takes to have each in a tree of registered ones."""
    kept = list(modules)
    inside = {id(part) for module in kept for part in module.modules()}
    for module in reachable(modules):
        if id(module) not in inside:
            kept.append(module)
            inside |= {id(part) for part in module.modules()}
    return kept
