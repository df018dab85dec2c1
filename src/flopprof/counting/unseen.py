"""Work that never reaches the dispatcher: found by outputs whose storage no seen operator produced."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

# These only allocate: a kernel that nobody saw may have filled what they return.
_ALLOCATE = ("aten::empty", "aten::new_empty")


class Unseen:
    """While watching, the storages that seen operators produced."""

    def __init__(self) -> None:
        self.produced: set[int] | None = None

    def watch(self) -> set[int] | None:
        """Begin to watch; returns what unwatch needs."""
        previous = self.produced
        self.produced = set() if previous is None else previous
        return previous

    def saw(self, name: str, result: Any) -> None:
        """This operator produced this result."""
        if self.produced is not None and not name.startswith(_ALLOCATE):
            self.produced |= storages(result)

    def unwatch(self, token: set[int] | None, inputs: Any, output: Any) -> bool:
        """Stop watching; was there an output that no seen operator produced and no input holds?"""
        produced = self.produced or set()
        made = storages(output) - produced if output is not None else set()
        missing = bool(made and made - storages(inputs))
        self.produced = token
        if token is not None:
            token |= made
        return missing


def storages(tree: Any) -> set[int]:
    """Identities of the storages below: tensors with elements only."""
    found = set()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            try:
                if leaf.numel():
                    found.add(leaf.untyped_storage()._cdata)
            except (RuntimeError, NotImplementedError):  # sparse, nested, functorch: no storage to look at
                continue
    return found
