"""Rows for the steps of a flow: what each call costs forward, and what its backward runs."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from flopprof.counting.alone import Alone
from flopprof.counting.gradients import Flow, Step, tensors_of
from flopprof.counting.graph_backward import backward, known
from flopprof.counting.operators import Entry, Kind
from flopprof.counting.tally import Row, Tally
from flopprof.formulas import Cost, LengthsUnknown
from flopprof.formulas.elementwise import elementwise_flops
from flopprof.profile import ElementwiseRow, OperatorRow, Phase, Profile, UncountedRow

_NARROW = (torch.bfloat16, torch.float16)
_WIDE = (torch.float32, torch.float64)


class Rows:
    """Rows of a Profile, as they are found."""

    def __init__(self) -> None:
        self.tally = Tally()
        self._alone = Alone()
        self._operators: list[OperatorRow] = []
        self._elementwise: list[ElementwiseRow] = []
        self._uncounted: list[UncountedRow] = []

    def add(self, flow: Flow) -> None:
        """Every step, forward, and backward where it is live."""
        for step in flow.steps:
            self._step(step)

    def extend(self, profile: Profile) -> Profile:
        """The profile with the rows that other operators' own runs gave."""
        return msgspec.structs.replace(
            profile,
            operators=(*profile.operators, *self._operators),
            elementwise=(*profile.elementwise, *self._elementwise),
            uncounted_rows=(*profile.uncounted_rows, *self._uncounted),
        )

    def _step(self, step: Step) -> None:
        kind = step.entry.kind
        if kind is Kind.COUNTED and not _complex_inside(step):
            cost = self._cost(step)
            if cost is None:
                return
            self._forward(step, cost)
            if known(step):
                self._backward(step, cost)
            elif step.live and any(step.wants):
                self._run_alone(step, ("backward", "recompute"))
        elif kind is Kind.ELEMENTWISE:
            self._add_elementwise(step)
            if step.live and any(step.wants):
                self._run_alone(step, ("backward", "recompute"))
        elif kind is Kind.FREE:
            return
        elif kind in (Kind.UNCOUNTED, Kind.HIGHER_ORDER):
            self._not_counted(step, step.entry.reason or "control flow that the graph walk does not know")
        else:
            self._run_alone(step, ("forward", "backward", "recompute"))

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

    def _forward(self, step: Step, cost: int | Cost) -> None:
        narrow = next((out.dtype for out in tensors_of(step.out) if out.dtype in _NARROW), None)
        operands: list[Any] = []
        for (position, tensor, value), wants in zip(step.operands, step.wants, strict=True):
            # Autocast casts on the way to the operator, below the level of the graph.
            dtype = narrow if narrow is not None and tensor.dtype in _WIDE else tensor.dtype
            operands += [position, tuple(tensor.shape), dtype, wants, value.source]
        results = tuple((tuple(out.shape), out.dtype) for out in tensors_of(step.out))
        full = cost.flops if isinstance(cost, Cost) else cost
        causal = cost.causal if isinstance(cost, Cost) and cost.causal is not None else full
        masked = isinstance(cost, Cost) and cost.mask_known
        self._row(step, "forward", step.entry, tuple(operands), results, (full, causal, masked))

    def _backward(self, step: Step, cost: int | Cost) -> None:
        try:
            products = backward(step, cost)
        except LookupError as error:
            self._not_counted(step, str(error), "backward")
            return
        for item in products:
            operands: list[Any] = []
            for position, factor in enumerate(item.factors):
                operands += [position, factor.shape, factor.dtype, factor.wants, factor.source]
            figures = (item.flops, item.causal, item.known)
            self._row(step, "backward", item.entry, tuple(operands), item.results, figures)

    def _row(
        self, step: Step, phase: Phase, entry: Entry, operands: tuple[Any, ...], results: Any, figures: Any
    ) -> None:
        key = (entry, step.frame, phase, _parameter(step), (operands, results), *figures)
        row = self.tally.counted.get(key)
        if row is None:
            row = self.tally.counted[key] = Row(operands, results)
        row.calls += step.times

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
        key = (step.entry, step.frame, "forward", flops)
        self.tally.elementwise[key] = self.tally.elementwise.get(key, 0) + step.times

    def _not_counted(self, step: Step, reason: str, phase: Phase = "forward") -> None:
        tensors = [tensor for _position, tensor, _value in step.operands]
        for _call in range(step.times):
            self.tally.add_uncounted(step.entry.name, step.frame, phase, tensors, reason)

    def _run_alone(self, step: Step, phases: tuple[Phase, ...]) -> None:
        found = self._alone.run(step)
        if found.problem:
            self._not_counted(step, found.problem)
            return
        place = {"fqn": step.frame.fqn}
        for row in found.profile.operators:
            if row.phase in phases:
                sums = {name: getattr(row, name) * step.times for name in _SUMS}
                self._operators.append(msgspec.structs.replace(row, **place, **sums))
        for light in found.profile.elementwise:
            if light.phase in phases:
                sums = {"calls": light.calls * step.times, "flops": light.flops * step.times}
                self._elementwise.append(msgspec.structs.replace(light, **place, **sums))
        for missing in found.profile.uncounted_rows:
            if missing.phase in phases:
                self._uncounted.append(msgspec.structs.replace(missing, **place, calls=missing.calls * step.times))
        for sentence in found.profile.assumptions:
            self.tally.assumptions[sentence] = None


def step_cost(step: Step) -> int:
    """Forward FLOPs of one call, as far as its formula tells: for choosing between branches."""
    if step.entry.kind is not Kind.COUNTED:
        return 0
    try:
        cost = step.entry.formula(*step.args, **{**step.kwargs, "out": step.out})
    except Exception:  # counting the branch itself will say so
        return 0
    return cost.flops if isinstance(cost, Cost) else cost


_SUMS = ("calls", "flops", "flops_full", "flops_causal", "bytes")


def _complex_inside(step: Step) -> bool:
    return step.entry.complex_inside and bool(step.args[0].is_complex())


def _parameter(step: Step) -> str:
    for position, _tensor, value in step.operands:
        source = value.source
        if position in step.entry.positions and source is not None and source.kind == "parameter":
            return source.name
    return ""
