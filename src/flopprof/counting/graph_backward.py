"""The backward contractions of one forward call: which products autograd would run for the gradients it wants.

A product has one backward product for each factor that wants a gradient, of exactly its own FLOPs; the shapes are
those that autograd multiplies. Attention is taken apart as it runs without a fused kernel. Operators that are not
listed here are run by themselves, on meta, with autograd (`alone`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from flopprof.counting.gradients import Step
from flopprof.counting.operands import Source
from flopprof.counting.operators import Entry, entries, learn
from flopprof.formulas import Cost
from flopprof.formulas.attention import broadcast, count_pairs
from flopprof.formulas.registry import product

_aten = torch.ops.aten
Shape = tuple[int, ...]


class Factor(NamedTuple):
    """One tensor of a backward product."""

    shape: Shape
    dtype: torch.dtype
    source: Source | None = None
    wants: bool = False


class Product(NamedTuple):
    """One backward contraction: the operator, what it multiplies, its result, and FLOPs of both conventions."""

    entry: Entry
    factors: tuple[Factor, ...]
    results: tuple[tuple[Shape, torch.dtype], ...]
    flops: int
    causal: int
    known: bool = False
    parameter: str | None = None  # None: the one that the forward multiplies


def entry_of(func: Any) -> Entry:
    """How this operator is treated."""
    return entries().get(id(func)) or learn(func)


class _Call:
    """A forward call, read for its backward."""

    def __init__(self, step: Step, cost: int | Cost) -> None:
        self.step = step
        self.out = step.out if isinstance(step.out, torch.Tensor) else step.out[0]
        self.dtype = self.out.dtype
        self.flops = cost.flops if isinstance(cost, Cost) else cost

    def factor(self, position: int, shape: Shape | None = None) -> Factor:
        """The forward's operand at this argument, perhaps in another shape."""
        for where, tensor, value in self.step.operands:
            if where == position:
                return Factor(shape or tuple(tensor.shape), self.dtype, value.source)
        raise LookupError(f"{self.step.entry.name} has no tensor at argument {position}")

    def gradient(self, shape: Shape | None = None) -> Factor:
        """The gradient of the result."""
        return Factor(shape or tuple(self.out.shape), self.dtype)

    def product(self, func: Any, a: Factor, b: Factor, shape: Shape) -> Product:
        """A product that costs what the forward does."""
        return Product(entry_of(func), (a, b), ((shape, self.dtype),), self.flops, self.flops)


def _matrices(call: _Call, a: int, b: int) -> Iterator[Product]:
    """(..., m, k) @ (..., k, n): dA = dC @ B^T and dB = A^T @ dC."""
    left, right = call.factor(a), call.factor(b)
    if len(left.shape) == 1 or len(right.shape) == 1:
        yield from _vectors(call, a, b)
        return
    (m, k), n = left.shape[-2:], right.shape[-1]
    batch: Shape = tuple(call.out.shape[:-2])
    if len(left.shape) == 2 and len(right.shape) == 2:
        func, batch = _aten.mm.default, ()
    elif len(right.shape) == 2:  # torch folds the batch into the rows
        func, m, batch = _aten.mm.default, product(left.shape[:-1]), ()
    else:
        func, batch = _aten.bmm.default, (product(batch),)
    if call.step.wanted_at(a):
        yield call.product(func, call.gradient((*batch, m, n)), call.factor(b, (*batch, n, k)), (*batch, m, k))
    if call.step.wanted_at(b):
        yield call.product(func, call.factor(a, (*batch, k, m)), call.gradient((*batch, m, n)), (*batch, k, n))


def _vectors(call: _Call, a: int, b: int) -> Iterator[Product]:
    """A product with a vector: the gradient of the vector is one too, that of the matrix an outer product."""
    for position, other in ((a, b), (b, a)):
        if call.step.wanted_at(position):
            wanted, given = call.factor(position), call.factor(other)
            outer = len(wanted.shape) > 1 or len(given.shape) == 1
            func = _aten.mul.Tensor if outer else _aten.mv.default
            yield call.product(func, call.gradient(), given, wanted.shape)


def _two(call: _Call) -> Iterator[Product]:
    return _matrices(call, 0, 1)


def _added(call: _Call) -> Iterator[Product]:
    return _matrices(call, 1, 2)


def _linear(call: _Call) -> Iterator[Product]:
    """(rows, k) @ (n, k)^T: dX = dY @ W and dW = dY^T @ X."""
    x, weight = call.factor(0), call.factor(1)
    if len(x.shape) == 1 or len(weight.shape) == 1:
        yield from _vectors(call, 0, 1)
        return
    rows, (n, k) = product(x.shape[:-1]), weight.shape
    if call.step.wanted_at(0):
        yield call.product(_aten.mm.default, call.gradient((rows, n)), call.factor(1), (rows, k))
    if call.step.wanted_at(1):
        yield call.product(_aten.mm.default, call.gradient((n, rows)), call.factor(0, (rows, k)), (n, k))


def _convolution(call: _Call) -> Iterator[Product]:
    """One operator for both gradients, each of the forward's FLOPs."""
    x, weight = call.factor(0), call.factor(1)
    wanted = [factor for position, factor in enumerate((x, weight)) if call.step.wanted_at(position)]
    if wanted:
        flops = call.flops * len(wanted)
        results = tuple((factor.shape, factor.dtype) for factor in wanted)
        entry = entry_of(_aten.convolution_backward.default)
        yield Product(entry, (call.gradient(), x, weight), results, flops, flops)


def _attention(call: _Call) -> Iterator[Product]:
    """As it runs unfused: S = Q K^T and O = P V, so dV = P^T dO, dP = dO V^T, dQ = dS K, dK = dS^T Q."""
    step = call.step
    query, key, value = (call.factor(position) for position in range(3))
    (s, d), (t, dv) = query.shape[-2:], value.shape[-2:]
    causal = step.kwargs.get("is_causal", step.args[5] if len(step.args) > 5 else False)
    grouped = step.kwargs.get("enable_gqa", False) and len(key.shape) > 2
    lead = (*key.shape[:-3], query.shape[-3]) if grouped else key.shape[:-2]
    scores, values = product(broadcast(query.shape[:-2], lead)), product(call.out.shape[:-2])
    for_q, for_k, for_v, for_mask = (step.wanted_at(position) for position in range(4))

    def bmm(a: Factor, b: Factor, pairs: int, shape: Shape) -> Product:
        flops = 2 * product(shape) * a.shape[-1]
        seen = flops
        if causal:
            visible, everything = sdpa_pairs(s, t)
            seen = flops * visible // everything if everything else 0
        return Product(entry_of(_aten.bmm.default), (a, b), ((shape, call.dtype),), flops, seen, bool(causal))

    def grad(shape: Shape) -> Factor:
        return Factor(shape, call.dtype)

    if for_v:
        yield bmm(grad((values, t, s)), grad((values, s, dv)), values, (values, t, dv))
    if for_q or for_k or for_mask:
        yield bmm(grad((values, s, dv)), call.factor(2, (values, dv, t)), values, (values, s, t))
    if for_q:
        yield bmm(grad((scores, s, t)), call.factor(1, (scores, t, d)), scores, (scores, s, d))
    if for_k:
        yield bmm(grad((scores, t, s)), call.factor(0, (scores, s, d)), scores, (scores, t, d))


def sdpa_pairs(queries: int, keys: int) -> tuple[int, int]:
    """(pairs that a causal mask lets through, all pairs)."""
    everything, seen = count_pairs([(queries, keys)], 1, (None, 0))
    return seen or 0, everything


class _Segment(NamedTuple):
    """Rows of a sequence that meet one weight matrix: all, the first step's or the later ones'."""

    weight: int
    of: str
    rows: int
    wants: bool  # the gradient of what the weight is multiplied by


class _Recurrence:
    """The arguments of aten::lstm, gru and rnn, of padded or of packed sequences."""

    def __init__(self, step: Step) -> None:
        args = step.args
        self.packed = not isinstance(args[3], bool)
        state, weights = (2, 3) if self.packed else (1, 2)
        self.x = args[0]
        self.state = args[state] if isinstance(args[state], torch.Tensor) else args[state][0]
        operands = [
            (position, Factor(tuple(tensor.shape), tensor.dtype, value.source, wants))
            for (position, tensor, value), wants in zip(step.operands, step.wants, strict=True)
        ]
        self.weights = [factor for position, factor in operands if position == weights]
        self.wants_x = any(factor.wants for position, factor in operands if position == 0)
        self.wants_state = [factor.wants for position, factor in operands if position == state]
        self.layers, self.bidirectional = int(args[weights + 2]), bool(args[weights + 5])
        self.rows = product(self.x.shape[:-1])

    def segments(self) -> Iterator[_Segment]:
        """What each weight matrix is multiplied by, and where that wants a gradient.

        As autograd runs it step by step: the state before the first step is hx, of the later ones a gradient is wanted
        whenever one of anything before them is, and of a layer's input whenever one of anything below it is.
        """
        first, directions = self.state.shape[-2], 1 + self.bidirectional
        hx, cx = [*self.wants_state, False][:2]
        stride, below = len(self.weights) // (self.layers * directions), self.wants_x
        for layer in range(self.layers):
            above = below or hx or cx
            for direction in range(directions):
                start = (layer * directions + direction) * stride
                own = [weight.wants for weight in self.weights[start : start + stride]]
                projected = stride > 2 and len(self.weights[start + stride - 1].shape) == 2
                gates = below or hx or cx or any(own[:-1] if projected else own)
                later = gates or any(own)
                yield _Segment(start, "input", self.rows, below)
                yield _Segment(start + 1, "hx", first, hx)
                yield _Segment(start + 1, "states", self.rows - first, later)
                if projected:
                    yield _Segment(start + stride - 1, "first", first, gates)
                    yield _Segment(start + stride - 1, "states", self.rows - first, later)
                above = above or any(own)
            below = above


def recurrent_forward(step: Step) -> list[tuple[tuple[int, str], Product]]:
    """Each weight matrix times its rows, and what tells these products apart."""
    read = _Recurrence(step)
    found = []
    for weight, of, rows, wants in read.segments():
        factor = read.weights[weight]
        taken = Factor((rows, factor.shape[-1]), read.x.dtype, wants=wants)
        found.append(((weight, of), _of_weight(step, taken, factor, 2 * rows * product(factor.shape))))
    return found


def recurrent_backward(step: Step) -> list[tuple[tuple[int, str], Product]]:
    """All layers and directions, as autograd runs them without a fused kernel, told apart as the forward's."""
    read = _Recurrence(step)
    if not step.live or not any(step.wants):
        return []
    if read.packed and read.bidirectional:
        raise LookupError("the lengths of packed sequences are not known")
    found = []
    for weight, of, rows, wants in read.segments():
        factor = read.weights[weight]
        flops = 2 * rows * product(factor.shape) * (factor.wants + wants)
        if flops:
            gradient = Factor((rows, factor.shape[0]), read.x.dtype)
            found.append(((weight, of), _of_weight(step, gradient, factor, flops)))
    return found


def _of_weight(step: Step, rows: Factor, weight: Factor, flops: int) -> Product:
    name = weight.source.name if weight.source is not None and weight.source.kind == "parameter" else ""
    return Product(step.entry, (rows, weight), (), flops, flops, parameter=name)


RECURRENT = frozenset({"aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"})
_BACKWARD: dict[str, Callable[[_Call], Iterator[Product]]] = {
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::matmul", "aten::linalg_matmul"), _two),
    **dict.fromkeys(("aten::mv", "aten::dot", "aten::vdot"), _two),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm", "aten::addbmm", "aten::addmv"), _added),
    "aten::linear": _linear,
    **dict.fromkeys((f"aten::conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)), _convolution),
    **dict.fromkeys(("aten::convolution", "aten::_convolution", "aten::_convolution_mode"), _convolution),
    "aten::scaled_dot_product_attention": _attention,
}


def known(step: Step) -> bool:
    """Is the backward of this call worked out here?"""
    if step.entry.name in RECURRENT and 0 not in step.differentiated():
        return False  # of the last states alone: the last steps are not differentiated whole
    return step.entry.name in (_BACKWARD.keys() | RECURRENT) and not (
        step.entry.complex_inside and step.args[0].is_complex()
    )


def backward(step: Step, cost: int | Cost) -> list[Product]:
    """The contractions that the backward of this call runs; none where no gradient is wanted or none reaches it."""
    if not step.live or not any(step.wants):
        return []
    return list(_BACKWARD[step.entry.name](_Call(step, cost)))
