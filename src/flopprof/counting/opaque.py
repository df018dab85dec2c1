"""Operators that no table knows: run exactly as they would, with the counter looking inside."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from flopprof.counting import flex
from flopprof.counting.operators import Entry, Kind, is_composite, keys_below_python
from flopprof.counting.values import bypassed

if TYPE_CHECKING:
    from flopprof.counting.runtime import FlopCounter


def run(counter: FlopCounter, entry: Entry, args: Any, kwargs: Any) -> Any:
    """The operator's own result; what it runs inside is counted, and named where nothing could be."""
    if entry.kind is Kind.CHOICE:
        out = entry.call(*args, **kwargs)
        frame, phase = counter.where.now()
        if phase == "forward":
            counter.tally.routing.note(counter.where.names.frames, frame, entry.name, args, out)
        if entry.elementwise is not None:
            counter.tally.add_elementwise(entry, frame, phase, counter.elementwise(entry, args, kwargs, out))
        return out
    if entry.kind is Kind.UNCOUNTED:
        counter.uncounted(entry.name, args, entry.reason)
        out = entry.call(*args, **kwargs)
    elif entry.kind is Kind.HIGHER_ORDER:
        out = _higher_order(counter, entry, args, kwargs)
    else:
        before = counter.counted_calls
        out = see_through(counter, entry.func, args, kwargs)
        if counter.counted_calls == before and not _explained(entry):
            counter.uncounted(entry.name, args, "no formula, and no counted operator inside")
    counter.where.note_line()  # of a decomposition, the backward multiplies
    return out


def see_through(counter: FlopCounter, func: Any, args: Any, kwargs: Any) -> Any:
    """Run the kernel that would have run, with the counter active for what it calls.

    The operator is dispatched again below the Python key, so nothing is decomposed that was whole.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    try:
        with counter.again():
            return func._handle.redispatch_boxed(keys_below_python(tensors), *args, **kwargs)
    finally:
        bypassed(func, args, kwargs)


def _explained(entry: Entry) -> bool:
    # A torch operator written in terms of others is the sum of what it called, also where that is nothing.
    return entry.kind is Kind.COUNTED or (entry.name.startswith("aten::") and is_composite(entry.func))


def _higher_order(counter: FlopCounter, entry: Entry, args: Any, kwargs: Any) -> Any:
    """Run it as it would run, its branches and bodies with the counter active; attention by its shapes and mask."""
    if entry.name in (flex.FORWARD, flex.BACKWARD):
        return _flex_attention(counter, entry, args, kwargs)
    wrapped_args, wrapped_kwargs = tree_map(partial(_inside, counter), (args, kwargs))
    counter.where.higher += 1
    try:
        return entry.func(*wrapped_args, **wrapped_kwargs)
    finally:
        counter.where.higher -= 1


def _flex_attention(counter: FlopCounter, entry: Entry, args: Any, kwargs: Any) -> Any:
    signed = counter.identify(entry, args[:3], None)
    out = entry.func(*args, **kwargs)
    try:
        cost = flex.cost(counter, entry.name, args, kwargs, torch._C._current_autograd_node())
    except Exception as error:  # as for any formula: what ran is right, only its count is not known
        counter.uncounted(entry.name, args[:3], f"its mask cannot be read: {type(error).__name__}: {error}")
    else:
        frame, phase = counter.where.now()
        counter.charge(entry, frame, phase, signed, args[:3], None, out, cost)
    return out


def _inside(counter: FlopCounter, leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor | type) or not callable(leaf):
        return leaf

    def counted(*args: Any, **kwargs: Any) -> Any:
        with counter.again():
            return leaf(*args, **kwargs)

    return counted
