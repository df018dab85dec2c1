"""Run a workload under other counters' modes, and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import torch

from flopprof.counting.ends import own_inputs, to_differentiate
from flopprof.counting.guesses import named
from flopprof.counting.preserve import modules_within, preserved
from flopprof.counting.values import carried
from flopprof.counting.values_inputs import moved, needs_values
from flopprof.models import Workload

T = TypeVar("T")


def run(
    workload: Workload,
    modes: Callable[[], tuple[T, list[AbstractContextManager[Any]]]],
    *,
    backward: bool,
    between: Callable[[T], object] = lambda _: None,
) -> T:
    """What `modes` gives first, once the workload ran with the modes that it gives second open, in that order.

    As count() does: the backward pass of the sum of the outputs; on meta with small values carried where the model
    asks for them. between: called with the first after the forward pass.
    """

    def once(*, values: bool) -> T:
        result, opened = modes()
        model, args, kwargs = workload.model, workload.args, dict(workload.kwargs)
        with preserved(modules_within(model, args, kwargs), (args, kwargs)) as keep, ExitStack() as stack:
            if values:
                stack.enter_context(carried(lambda _: None, named(model, args, kwargs)))
                args, kwargs = moved(args), moved(kwargs)
            if backward:
                args, kwargs = own_inputs(args), own_inputs(kwargs)
                stack.enter_context(torch.enable_grad())
            for mode in opened:
                stack.enter_context(mode)
            output = model(*args, **kwargs)
            between(result)
            leaves = to_differentiate(output, None) if backward else []
            if leaves:
                keep.gradients(leaves)
                torch.autograd.backward(leaves, [torch.ones_like(leaf) for leaf in leaves])
        return result

    try:
        return once(values=False)
    except Exception as error:
        if workload.device != "meta" or not needs_values(error):
            raise
    return once(values=True)
