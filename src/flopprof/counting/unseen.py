"""Work that never reaches the dispatcher: found by outputs whose storage no seen operator produced."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch.utils._pytree import tree_leaves

OUTSIDE = "its output was produced outside the dispatcher"

_Saved: Any = getattr(torch.utils.checkpoint, "_CachedTorchDispatchMode", ())
_plain_dispatch = torch.Tensor.__torch_dispatch__


class Unseen:
    """While watching, the storages that seen operators produced."""

    def __init__(self) -> None:
        self.produced: set[int] | None = None

    def watch(self) -> set[int] | None:
        """Begin to watch; returns what unwatch needs."""
        previous = self.produced
        self.produced = set() if previous is None else previous
        return previous

    def saw(self, result: Any) -> None:
        """A seen operator wrote this result: no view, and no mere allocation, which another kernel may fill."""
        if self.produced is not None:
            self.produced |= storages(result)

    def unwatch(self, token: set[int] | None, inputs: Any, output: Any) -> bool:
        """Stop watching; was there an output that no seen operator produced and no input holds?

        An input that wraps other tensors may hold any: then nothing is known.
        """
        produced = self.produced or set()
        made = storages(output) - produced if output is not None else set()
        missing = bool(made and made - storages(inputs)) and not any(map(_is_wrapper, tree_leaves(inputs)))
        missing = missing and not saved_by_policy()
        self.produced = token
        if token is not None:
            token |= made
        return missing


def follow(counting: Callable[[], list[Any]], name: str, output: Any) -> None:
    """The forward of an autograd.Function was not seen: watch the gradients that its backward makes."""
    leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
    node = next((leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None), None)
    if node is None:
        return
    watched: list[tuple[Any, set[int] | None]] = []

    def before(gradients: Any) -> None:
        watched[:] = [(counter, counter.unseen.watch()) for counter in counting()]

    def after(made: Any, gradients: Any) -> None:
        while watched:
            counter, token = watched.pop()
            if counter.unseen.unwatch(token, gradients, made):
                counter.uncounted(name, gradients, OUTSIDE)

    node.register_prehook(before)
    node.register_hook(after)


def storages(tree: Any) -> set[int]:
    """Identities of the storages below: tensors with elements only, and no wrappers around others."""
    found = set()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and not _is_wrapper(leaf):
            try:
                if leaf.numel():
                    found.add(leaf.untyped_storage()._cdata)
            except (RuntimeError, NotImplementedError):  # sparse, nested, functorch: no storage to look at
                continue
    return found


def saved_by_policy() -> bool:
    """Is a checkpoint replayed whose policy saved some results? Then those come from where it keeps them."""
    modes = (torch._C._get_dispatch_stack_at(index) for index in range(torch._C._len_torch_dispatch_stack()))
    return any(isinstance(mode, _Saved) for mode in modes)


def cached(output: Any) -> bool:
    """Did an earlier call make this output: one that a functools.lru_cache holds, or that a checkpoint saved?"""
    if saved_by_policy():
        return True
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return bool(leaves) and all(_is_cached(leaf, output) for leaf in leaves)


def _is_cached(leaf: torch.Tensor, output: Any) -> bool:
    """Also as one of several results, or seen through a view; a cache without a limit is a dictionary."""
    holders: list[Any] = [leaf if leaf._base is None else leaf._base, output]
    for _ in range(3):
        holders = gc.get_referrers(*holders)
        if any(type(holder).__name__ in ("_lru_list_elem", "_lru_cache_wrapper") for holder in holders):
            return True
        holders = [holder for holder in holders if type(holder) in (dict, tuple, list)]
    return False


def _is_wrapper(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and type(leaf).__torch_dispatch__ is not _plain_dispatch


def passed_through(inputs: Any, output: Any) -> bool:
    """Is the output the first input, or a view of it? (Dropout in evaluation, Identity, Flatten.)"""
    first = inputs[0][0] if inputs[0] else None
    if first is output:
        return True
    if type(first) is not torch.Tensor or type(output) is not torch.Tensor:
        return False
    try:
        return bool(first.untyped_storage()._cdata == output.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse, nested, functorch: no storage to look at
        return False
