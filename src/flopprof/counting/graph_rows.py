"""Rows for the steps of a flow: what each call costs forward, and what its backward runs."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch

from flopprof.counting.alone import Alone
from flopprof.counting.gradients import CUTS, FIRST_ONLY, Flow, Severed, Step, Value, tensors_of
from flopprof.counting.graph_backward import (
    RECURRENT,
    Factor,
    Product,
    backward,
    known,
    recurrent_backward,
    recurrent_forward,
)
from flopprof.counting.operands import Source
from flopprof.counting.operators import Kind, is_composite
from flopprof.counting.parameters import dtype_name
from flopprof.formulas import Cost, LengthsUnknown
from flopprof.formulas.elementwise import elementwise_flops
from flopprof.profile import ElementwiseRow, Operand, OperatorRow, Phase, Profile, UncountedRow

_ACTIVATION = Source("activation", "")
_NARROW = (torch.bfloat16, torch.float16)
_WIDE = (torch.float32, torch.float64)


class _Row:
    """Calls that nothing distinguishes."""

    __slots__ = ("calls", "site")

    def __init__(self, site: str) -> None:
        self.calls = 0
        self.site = site


class Rows:
    """Rows of a Profile, as they are found."""

    def __init__(self) -> None:
        self.assumptions: dict[str, None] = {}
        self._alone = Alone()
        # one call's row, with no calls and no site yet -> its calls
        self._operators: dict[OperatorRow, _Row] = {}
        self._elementwise: dict[tuple[str, str, Phase], tuple[int, int]] = {}
        self._uncounted: dict[UncountedRow, int] = {}
        self._sites: dict[str, int] = {}

    def add(self, flow: Flow, outputs: list[Value]) -> None:
        """Every step, forward, and backward where it is live; `outputs` are what a backward pass starts from."""
        for step in flow.steps:
            self._step(step)
        self._accumulate(flow, outputs)

    def extend(self, profile: Profile) -> Profile:
        """The profile with these rows, and what had to be guessed."""
        lines = [
            ElementwiseRow(op=op, fqn=fqn, phase=phase, calls=calls, flops=flops)
            for (op, fqn, phase), (calls, flops) in self._elementwise.items()
        ]
        return msgspec.structs.replace(
            profile,
            operators=tuple(_times(one, row.calls, site=row.site) for one, row in self._operators.items()),
            elementwise=tuple(lines),
            uncounted_rows=tuple(msgspec.structs.replace(one, calls=n) for one, n in self._uncounted.items()),
            assumptions=tuple(dict.fromkeys((*profile.assumptions, *self.assumptions))),
        )

    def _step(self, step: Step) -> None:
        entry, differentiated = step.entry, step.live and any(step.wants)
        everything: tuple[Phase, ...] = ("forward", "backward", "recompute")
        if entry.kind is Kind.COUNTED and not _taken_apart(step):
            cost = self._cost(step)
            if cost is None:
                return
            if step.entry.name in RECURRENT:
                self._recurrent(step, differentiated=differentiated)
                return
            site = self._forward(step, cost)
            if known(step):
                self._backward(step, cost, site)
                self._run_alone(step, light=("forward", "backward"))
            elif differentiated:
                self._run_alone(step, heavy=("backward", "recompute"), light=("forward", "backward"), joined_to=site)
        elif entry.elementwise is not None:
            # A composite is counted by what it runs, as it is when it runs.
            if not is_composite(entry.func):
                self._add_elementwise(step)
                if differentiated:
                    self._run_alone(step, heavy=("backward",), light=("backward",))
            elif not self._run_alone(step, heavy=("forward", "backward"), light=("forward", "backward")):
                self._add_elementwise(step)
        elif entry.kind in (Kind.FREE, Kind.CHOICE):
            if differentiated:
                self._run_alone(step, heavy=("backward",), light=("backward",))
        elif entry.kind in (Kind.OPAQUE, Kind.COUNTED):
            if not self._run_alone(step, heavy=everything, light=everything):
                self._not_counted(step, "no formula, and it cannot be run by itself")
        else:
            self._not_counted(step, entry.reason or "control flow that the graph walk does not know")

    def _cost(self, step: Step) -> int | Cost | None:
        named: dict[str, Any] = {**step.kwargs, "out": step.out}
        if step.entry.wanted:
            named["wanted"] = None
        try:
            return step.entry.formula(*step.args, **named)
        except LengthsUnknown as unknown:
            self._not_counted(step, str(unknown))
        except Exception as error:  # a user's formula may raise anything
            self._not_counted(step, f"its formula failed: {type(error).__name__}: {error}")
        return None

    def _forward(self, step: Step, cost: int | Cost) -> str:
        narrow = next((out.dtype for out in tensors_of(step.out) if out.dtype in _NARROW), None)
        factors = []
        for (position, tensor, value), wants in zip(step.operands, step.wants, strict=True):
            # Autocast casts on the way to the operator, below the level of the graph.
            dtype = narrow if narrow is not None and tensor.dtype in _WIDE else tensor.dtype
            factors.append((position, Factor(tuple(tensor.shape), dtype, value.source, wants)))
        full = cost.flops if isinstance(cost, Cost) else cost
        causal = cost.causal if isinstance(cost, Cost) and cost.causal is not None else full
        results = tuple((tuple(out.shape), out.dtype) for out in tensors_of(step.out))
        product = Product(step.entry, (), results, full, causal, isinstance(cost, Cost) and cost.mask_known)
        return self._add(_row(step, "forward", product, factors), step.times, sited=True)

    def _recurrent(self, step: Step, *, differentiated: bool) -> None:
        """One row for each weight matrix and kind of steps; a backward not worked out here is joined to all of them."""
        here = known(step)
        shared = "" if here else self._site(step.frame.fqn)
        sites = {
            key: self._add(_row(step, "forward", one), step.times, sited=True, site=shared)
            for key, one in recurrent_forward(step)
        }
        if here:
            try:
                products = recurrent_backward(step)
            except LookupError as error:
                self._not_counted(step, str(error), "backward")
                products = []
            for key, one in products:
                self._add(msgspec.structs.replace(_row(step, "backward", one), joined_to=sites[key]), step.times)
            self._run_alone(step, light=("forward", "backward"))
        elif differentiated:
            self._run_alone(step, heavy=("backward", "recompute"), light=("forward", "backward"), joined_to=shared)

    def _backward(self, step: Step, cost: int | Cost, site: str) -> None:
        try:
            products = backward(step, cost)
        except LookupError as error:
            self._not_counted(step, str(error), "backward")
            return
        for product in products:
            row = _row(step, "backward", product)
            self._add(msgspec.structs.replace(row, joined_to=site), step.times)

    def _add(self, one: OperatorRow, calls: int, *, sited: bool = False, site: str = "") -> str:
        """So many calls like this one; returns the site where they are one: `site`, if none is known of them."""
        row = self._operators.get(one)
        if row is None:
            row = self._operators[one] = _Row(site or self._site(one.fqn) if sited else "")
        row.calls += calls
        return row.site

    def _site(self, fqn: str) -> str:
        number = self._sites[fqn] = self._sites.get(fqn, -1) + 1
        return f"{fqn}#{number}"

    def _add_elementwise(self, step: Step) -> None:
        assert step.entry.elementwise is not None
        try:
            cost_of = step.entry.elementwise.cost_of
            if cost_of is not None and "out" not in step.kwargs:
                flops = cost_of(*step.args, out=step.out, **step.kwargs)
            else:
                flops = elementwise_flops(step.entry.elementwise, step.args, step.kwargs, step.out)
        except Exception as error:  # as in _cost
            self._not_counted(step, f"its elementwise cost is not known: {error}")
            return
        self._add_light(step.entry.name, step.frame.fqn, "forward", step.times, flops * step.times)

    def _add_light(self, op: str, fqn: str, phase: Phase, calls: int, flops: int) -> None:
        before = self._elementwise.get((op, fqn, phase), (0, 0))
        self._elementwise[op, fqn, phase] = (before[0] + calls, before[1] + flops)

    def _not_counted(self, step: Step, reason: str, phase: Phase = "forward") -> None:
        shapes = tuple(tuple(tensor.shape) for _position, tensor, _value in step.operands)
        one = UncountedRow(op=step.entry.name, fqn=step.frame.fqn, phase=phase, calls=0, shapes=shapes, reason=reason)
        self._uncounted[one] = self._uncounted.get(one, 0) + step.times

    def _run_alone(
        self, step: Step, *, heavy: tuple[Phase, ...] = (), light: tuple[Phase, ...] = (), joined_to: str = ""
    ) -> bool:
        """Rows of the call run by itself: `heavy` ones of counted operators, `light` elementwise ones; could it be?"""
        found = self._alone.run(step)
        if found.severed:
            raise Severed(step.entry.func)
        fqn, times = step.frame.fqn, step.times
        if found.problem:
            if heavy and step.live and any(step.wants) and step.entry.kind is Kind.COUNTED:
                self._not_counted(step, found.problem, "backward")
            return False
        sites: dict[str, str] = {}
        for row in found.profile.operators:
            if row.phase in heavy:
                one = msgspec.structs.replace(_once(row), fqn=fqn, site="", line=step.line)
                if row.site:
                    sites[row.site] = self._add(one, row.calls * times, sited=True)
                else:
                    origin = sites.get(row.joined_to, joined_to)
                    self._add(msgspec.structs.replace(one, joined_to=origin), row.calls * times)
        for line in found.profile.elementwise:
            if line.phase in light:
                self._add_light(line.op, fqn, line.phase, line.calls * times, line.flops * times)
        for missing in found.profile.uncounted_rows:
            if missing.phase in heavy:
                lacking = msgspec.structs.replace(missing, fqn=fqn, calls=0)
                self._uncounted[lacking] = self._uncounted.get(lacking, 0) + missing.calls * times
        self.assumptions.update(dict.fromkeys(found.profile.assumptions))
        return True

    def _accumulate(self, flow: Flow, outputs: list[Value]) -> None:
        """A tensor read in several places gets the sum of their gradients."""
        uses: dict[Any, int] = {}
        held: dict[Any, tuple[Any, str]] = {}
        for step in flow.steps:
            if step.live and step.entry.name not in CUTS:
                origins = list(zip(step.operands, step.origins, strict=True))
                for (_position, tensor, _value), origin in origins[:1] if step.entry.name in FIRST_ONLY else origins:
                    if origin is not None:
                        uses[origin] = uses.get(origin, 0) + (step.times if isinstance(origin[0], Value) else 1)
                        held[origin] = tensor, (origin[0] if isinstance(origin[0], Step) else step).frame.fqn
        for value in outputs:
            origin = value.origin()
            uses[origin] = uses.get(origin, 0) + 1
        for origin, (tensor, fqn) in held.items():
            if uses[origin] > 1:
                self._add_light("aten::add", fqn, "backward", uses[origin] - 1, (uses[origin] - 1) * tensor.numel())


def _row(step: Step, phase: Phase, product: Product, given: list[tuple[int, Factor]] | None = None) -> OperatorRow:
    """One call, with no calls noted."""
    entry = product.entry
    # The factors of a product that is not the graph's own call are all that it multiplies.
    factors = [(entry.positions[0], factor) for factor in product.factors] if given is None else given
    multiplied = [factor.dtype for position, factor in factors if position in entry.positions]
    # A complex multiply-add is four real multiplications and four real additions.
    each = 4 if multiplied and all(dtype.is_complex for dtype in multiplied) else 1
    moved = [(factor.shape, factor.dtype) for _position, factor in factors] + list(product.results)
    return OperatorRow(
        op=entry.name,
        fqn=step.frame.fqn,
        phase=phase,
        dtype=dtype_name(multiplied[0]) if multiplied else "",
        operands=tuple(_operand(factor, position in entry.positions) for position, factor in factors),
        outputs=tuple(shape for shape, _dtype in product.results),
        calls=0,
        flops=each * product.flops,
        flops_full=each * product.flops,
        flops_causal=each * product.causal,
        mask_known=product.known,
        bytes=sum(math.prod(shape) * dtype.itemsize for shape, dtype in moved),
        parameter=_parameter(step) if product.parameter is None else product.parameter,
        line=step.line,
    )


def _operand(factor: Factor, multiplied: bool) -> Operand:
    source = factor.source or _ACTIVATION
    return Operand(
        shape=factor.shape,
        dtype=dtype_name(factor.dtype),
        kind=source.kind,
        name=source.name,
        requires_grad=factor.wants,
        factor=multiplied,
    )


def _once(row: OperatorRow) -> OperatorRow:
    """One call of a row that may hold several."""
    sums = {name: getattr(row, name) // row.calls for name in _SUMS}
    return msgspec.structs.replace(row, calls=0, **sums)


def _times(one: OperatorRow, calls: int, *, site: str) -> OperatorRow:
    sums = {name: getattr(one, name) * calls for name in _SUMS}
    return msgspec.structs.replace(one, calls=calls, site=site, **sums)


def step_cost(step: Step) -> int:
    """Forward FLOPs of one call, as far as its formula tells: for choosing between branches."""
    if step.entry.kind is not Kind.COUNTED:
        return 0
    try:
        cost = step.entry.formula(*step.args, **{**step.kwargs, "out": step.out})
    except Exception:  # counting the branch itself will say so
        return 0
    return cost.flops if isinstance(cost, Cost) else cost


_CELLS = frozenset(f"aten::{kind}_cell" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
_SUMS = ("flops", "flops_full", "flops_causal", "bytes")


def _taken_apart(step: Step) -> bool:
    """Is the call counted by what it runs: several weights at once, or three real convolutions?"""
    return step.entry.name in _CELLS or (step.entry.complex_inside and bool(step.args[0].is_complex()))


def _parameter(step: Step) -> str:
    for position, _tensor, value in step.operands:
        source = value.source
        if position in step.entry.positions and source is not None and source.kind == "parameter":
            return source.name
    return ""
