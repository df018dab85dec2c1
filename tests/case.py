"""One row of the case table: an operator, how to run it, what it must cost and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One operator, how to run it, and what it must cost.

    args       a tuple stands for a tensor of that shape, a list of tuples for a list of tensors, the rest is passed
               as it is; a function instead runs torch itself (autograd, modules), and every call adds up
    flops      the literal; arithmetic: the expression that gives it
    device     where the operands live: cpu, meta, or "shapes" for stand-ins that only have a shape
    dtype      of the operands; overload: of the operator, where it is not the default
    causal     over the pairs that the operator's mask lets through; None: it names no mask
    recompute  what a fused backward computes again
    out        of stand-ins: the shape of the result; wanted: which edges of the node need a gradient
    """

    op: str
    args: list[Any] | Callable[[], Any]
    flops: int
    arithmetic: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"
    overload: str = "default"
    causal: int | None = None
    recompute: int = 0
    out: Any = None
    wanted: tuple[bool, ...] | None = None

    def __str__(self) -> str:
        return f"{self.op}: {self.arithmetic}"


def on_meta(op: str, args: Any, flops: int, arithmetic: str, **more: Any) -> Case:
    """A case without data: the kernel is for another device."""
    return Case(op, args, flops, arithmetic, device="meta", **more)


def on_shapes(op: str, args: list[Any], flops: int, arithmetic: str, **more: Any) -> Case:
    """A case whose formula sees stand-ins: no kernel of it can run here."""
    return Case(op, args, flops, arithmetic, device="shapes", **more)
