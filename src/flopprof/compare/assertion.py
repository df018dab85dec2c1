"""assert_flops: a budget as a line of a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from flopprof.compare.budget import Budget
from flopprof.counting.count import count
from flopprof.profile import Profile


def assert_flops(
    model: Callable[..., Any],
    inputs: Any = (),
    *,
    at_most: int | None = None,
    max_params: int | None = None,
    baseline: Profile | None = None,
    tolerance: Fraction | float = 0,
    backward: bool = False,
    **options: Any,
) -> Profile:
    """The profile of `model(*inputs)`; raises AssertionError, naming the modules, where it exceeds the budget.

    inputs      a tensor, a tuple of positional arguments, or a dictionary of keyword arguments
    at_most     model_flops allowed: forward, and with backward=True backward too; one multiply-add is 2
    max_params  parameters allowed, tied ones once
    baseline    a Profile that neither may exceed by more than the share `tolerance`
    options     as for `flopprof.count`

    >>> import torch
    >>> assert_flops(torch.nn.Linear(4, 5), torch.randn(3, 4), at_most=120).model_flops
    120
    """
    budget = Budget(max_flops=at_most, max_params=max_params, baseline=baseline, tolerance=tolerance)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = inputs
    else:
        args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    profile = count(model, *args, backward=backward, **options, **kwargs)
    excesses = budget.judge(profile).excesses
    if excesses:
        raise AssertionError("\n".join(excess.sentence for excess in excesses))
    return profile
