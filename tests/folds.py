"""Counting with and without folding: the profiles must be equal in every field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from conservation import conserved
from flopprof import count
from flopprof.counting import fold_call
from flopprof.profile import Profile


def to_meta(tree: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), tree)


@contextmanager
def folds() -> Iterator[list[str]]:
    """The names of modules whose call was not run while this was open, in order."""
    names: list[str] = []
    original = fold_call.Outcome.again

    def again(self: Any, call: Any, *args: Any) -> Any:
        names.append(call.member.fqn)
        return original(self, call, *args)

    fold_call.Outcome.again = again  # type: ignore[method-assign]
    try:
        yield names
    finally:
        fold_call.Outcome.again = original  # type: ignore[method-assign]


def same(model: Callable[..., Any], *args: Any, **how: Any) -> list[str]:
    """The names of the modules that were folded, when the count was found to be what it is without."""
    with folds() as names:
        profile = conserved(count(model, *args, **how))
    with folds() as none:
        plain = count(model, *args, fold=False, **how)
    assert none == []
    assert_equal(profile, plain)
    return names


def assert_equal(folded: Profile, plain: Profile) -> None:
    for name in folded.__struct_fields__:
        mine, theirs = getattr(folded, name), getattr(plain, name)
        if isinstance(mine, tuple) and mine != theirs:
            assert [row for row in mine if row not in theirs] == []
            assert [row for row in theirs if row not in mine] == []
        assert mine == theirs, name
    assert folded == plain
