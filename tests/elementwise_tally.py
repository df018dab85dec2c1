"""A tally of elementwise FLOPs that is not the package's counter, and the row of a case table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flopprof.formulas.elementwise import ELEMENTWISE, elementwise_flops


def base_name(func) -> str:
    name = func._schema.name
    return name if name.endswith("__") or not name.endswith("_") else name[:-1]


class Tally(TorchDispatchMode):
    """Elementwise FLOPs by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        entry = ELEMENTWISE.get(base_name(func))
        if entry is not None:
            self.flops[base_name(func)] += elementwise_flops(entry, args, kwargs or {}, out)
        return out


def tally(call: Callable[[], object]) -> dict[str, int]:
    with Tally() as mode:
        call()
    return {name.removeprefix("aten::"): flops for name, flops in mode.flops.items() if flops}


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[], object]
    flops: int
    words: str


def ones(*shape: int, **kwargs) -> torch.Tensor:
    return torch.ones(shape, **kwargs)


X = ones(2, 3)
IMAGE = ones(2, 3, 8, 8)


def meta(name: str, *args, namespace: str = "aten", out=None) -> None:
    """Charge a call that this machine's kernels cannot run: tuples stand for tensors of that shape."""
    operands = [torch.empty(arg, device="meta") if isinstance(arg, tuple) else arg for arg in args]
    result = torch.empty(out or args[0], device="meta")
    entry = ELEMENTWISE[f"{namespace}::{name}"]
    mode = torch.utils._python_dispatch._get_current_dispatch_mode()
    mode.flops[f"{namespace}::{name}"] += elementwise_flops(entry, operands, {}, result)
