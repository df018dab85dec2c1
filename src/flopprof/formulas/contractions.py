"""Matrix products: every way torch spells `(m, k) @ (k, n)`."""

from __future__ import annotations

from typing import Any

from flopprof.formulas.registry import formula, product


@formula("aten::mm")
def mm(a: Any, b: Any, *, out: Any, **_: Any) -> int:
    """(m, k) @ (k, n): 2 m k n."""
    m, k = a.shape
    _k, n = b.shape
    return 2 * m * k * n


@formula("aten::addmm", operands=(1, 2))
def addmm(bias: Any, a: Any, b: Any, *, out: Any, **_: Any) -> int:
    """bias + (m, k) @ (k, n): 2 m k n; the bias addition is elementwise."""
    return mm(a, b, out=out)


@formula("aten::bmm")
def bmm(a: Any, b: Any, *, out: Any, **_: Any) -> int:
    """(b, m, k) @ (b, k, n): 2 b m k n."""
    batch, m, k = a.shape
    *_batch, n = b.shape
    return 2 * batch * m * k * n
