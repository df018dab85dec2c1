"""One registry of formulas: operator name -> rule. Adding an operator is one decorated function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flopprof.errors import FormulaError


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call costs, where one int does not say it all.

    flops      every multiply-add at 2, attention over every pair (`full`)
    causal     the same over only the pairs that the mask lets through; None: as full
    recompute  executed beside `flops`, and charged to phase `recompute` (a fused backward's second QK^T)
    recompute_causal  the same over only the unmasked pairs; None: as recompute
    mask_known whether the operator itself says which pairs it computes
    """

    flops: int
    causal: int | None = None
    recompute: int = 0
    recompute_causal: int | None = None
    mask_known: bool = False


class LengthsUnknown(Exception):
    """A formula needs values (ragged lengths, indices) that this tensor does not carry: uncounted, named."""


Formula = Callable[..., "int | Cost"]
F = TypeVar("F", bound=Formula)


@dataclass(frozen=True, slots=True)
class Rule:
    """How one operator is counted.

    name      schema base name: `aten::mm` stands for mm, mm.out, mm_
    formula   called with the operator's own arguments and `out=` its result; returns FLOPs
    operands  positions of the arguments that are multiplied (a position may hold a list of tensors)
    wanted    pass `wanted=`: for a fused backward, which inputs of its forward need a gradient
              (tuple of bool in the order of the autograd node's edges; None: not known, so all)
    """

    name: str
    formula: Formula
    operands: tuple[int, ...] = (0, 1)
    wanted: bool = False
    doc: str = field(default="", compare=False)


RULES: dict[str, Rule] = {}


_registrations = [0]


def generation() -> int:
    """How many registrations there were: whoever keeps a table of rules rebuilds it when this has changed."""
    return _registrations[0]


def formula(
    *names: str, operands: tuple[int, ...] = (0, 1), wanted: bool = False, replace: bool = False
) -> Callable[[F], F]:
    """Decorator: the function below is the cost of these operators.

    It gets the operator's arguments as they were passed (only `.shape`, and for ragged or sparse operands
    their lengths, may be read), plus `out=`; it returns an int or a Cost and must not touch data otherwise.
    """

    def register(function: F) -> F:
        for name in names:
            if name.count("::") != 1 or (name.endswith("_") and not name.endswith("__")):
                raise FormulaError(f"{name!r} is no operator name: write it as 'namespace::operator'.")
            if name in RULES and not replace:
                raise FormulaError(f"{name} has a formula already: {RULES[name].formula.__module__}.")
            _registrations[0] += 1
            RULES[name] = Rule(name, function, operands, wanted, (function.__doc__ or "").strip())
        return function

    return register


def product(sizes: Any) -> int:
    """Product of sizes as an exact integer; 1 for none."""
    return math.prod(sizes)
