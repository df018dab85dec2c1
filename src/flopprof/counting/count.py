"""count(): one call counts a model or callable, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from flopprof.counting.ends import own_inputs, to_differentiate
from flopprof.counting.fold_call import Doubt
from flopprof.counting.fold_charge import ordered
from flopprof.counting.fold_trial import foldable
from flopprof.counting.folding import folded
from flopprof.counting.guesses import named
from flopprof.counting.preserve import modules_within, preserved
from flopprof.counting.questions import failures
from flopprof.counting.routing import Told, checked
from flopprof.counting.runtime import FlopCounter
from flopprof.counting.values import carried, moved, needs_values, on_meta
from flopprof.errors import UsageError
from flopprof.formulas.attention import LENGTHS_ON_META
from flopprof.profile import Attention, Profile

_MOST_FOLDED_RUNS = 3  # each leaves more blocks alone


def count(  # noqa: PLR0915 - how a run is tried again, beside what each try is
    model: Callable[..., Any],
    *args: Any,
    backward: bool = False,
    loss: Callable[[Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    attention: Attention = "full",
    lines: bool = False,
    fold: bool | None = None,
    routing: Mapping[str, Sequence[Any]] | None = None,
    **kwargs: Any,
) -> Profile:
    """FLOPs of `model(*args, **kwargs)`: per operator, module and phase; one multiply-add is 2.

    model      a module or any callable; it runs where it lives: meta, cpu or cuda
    backward   also count the backward pass of `loss(output)`, or of the sum of the output's floating tensors
    loss       output -> scalar; given, backward is counted
    optimizer  also count one step of it (phase `optimizer`); given, backward is counted
    lines      also tell the line of source of every count: `profile.by_line()`
    fold       on meta, run a repeated block once and charge it to each, where that is proved to be the same; None:
               yes. Elsewhere every block runs.
    routing    on meta, tokens for each expert by the module that routes or one around it, as patterns; the first that
               fits holds. Without it, routing is even where it must be known, and the profile says so.
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
    meta = on_meta(model, args, kwargs)
    told = None if routing is None else Told(checked(routing, "routing"))
    if told is not None and not meta:
        raise UsageError("routing is told on meta alone: elsewhere the model itself chooses its experts.")
    mixed = on_meta(None, args, kwargs)  # then a CPU tensor is the caller's choice: packed lengths must be one

    def run(*, values: bool, barred: frozenset[str] | None = None) -> Profile:
        counter = FlopCounter(module, attention=attention, lines=lines)
        within = modules_within(model, args, kwargs, loss)
        with preserved(within, (args, kwargs), optimizer) as keep, ExitStack() as stack:
            if values:
                choose = None if told is None else partial(_chosen, told, counter)
                stack.enter_context(carried(counter.assume, named(model, args, kwargs), choose, module))
            given, also = (moved(args), moved(kwargs)) if values or (meta and not mixed) else (args, kwargs)
            if backward:
                given, also = own_inputs(given), own_inputs(also)
                stack.enter_context(torch.enable_grad())
            if optimizer is not None:
                optimizer.zero_grad()
            stack.enter_context(counter)
            folds = None
            if module is not None and barred is not None:
                folds = stack.enter_context(folded(module, counter, barred))
            leaves = to_differentiate(model(*given, **also), loss)
            if folds is not None:
                folds.read(leaves, backward=backward)
            if backward:
                keep.gradients(leaves)
                if leaves:
                    # The gradient of a sum is a one for each element: handed over, the sum is in no count.
                    torch.autograd.backward(leaves, [torch.ones_like(leaf) for leaf in leaves])
                if optimizer is not None:
                    if folds is not None:
                        folds.fill_gradients()
                    optimizer.step()
        profile = counter.profile if folds is None else folds.charge(counter.profile)
        return ordered(profile, module)

    def attempt(*, values: bool) -> Profile:
        if fold is not False and meta and foldable(model, (args, kwargs)):
            barred: frozenset[str] = frozenset()
            for _ in range(_MOST_FOLDED_RUNS):
                try:
                    return run(values=values, barred=barred)
                except Doubt as doubt:
                    if not doubt.suspects:
                        break
                    barred |= doubt.suspects
        return run(values=values)

    if told is not None:  # each block has experts and a load of its own: nothing is folded
        profile = run(values=True)
        told.require_followed()
        return profile
    # Most models ask for no values on meta, and are counted faster where none are carried. One that asks fails, goes
    # on by another branch, or leaves lengths unread that a formula needs.
    failed = failures()
    try:
        profile = attempt(values=False)
    except Exception as error:
        if not meta or not needs_values(error):
            raise
        return attempt(values=True)
    if meta and (failures() > failed or any(row.reason == LENGTHS_ON_META for row in profile.uncounted_rows)):
        return attempt(values=True)
    return profile


def _chosen(told: Told, counter: FlopCounter, rows: int, width: int, experts: int) -> tuple[int, ...] | None:
    return told.tokens(counter.where.frame.fqn, rows, width, experts)
