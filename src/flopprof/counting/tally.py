"""Counts under way, aggregated as they come; and the Profile made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from msgspec.structs import replace
from torch.utils._pytree import tree_leaves

from flopprof.counting.attribution import Frame, unwrap, walk
from flopprof.counting.idle import idle_experts
from flopprof.counting.lines import shorten
from flopprof.counting.operands import Source
from flopprof.counting.operators import Entry
from flopprof.counting.parameters import dtype_name, elements, held, packed, unique_parameters
from flopprof.counting.routing import Seen
from flopprof.profile import (
    Attention,
    ElementwiseRow,
    ModuleRow,
    Operand,
    OperatorRow,
    ParameterRow,
    Phase,
    Profile,
    UncountedRow,
    ancestors,
)

_ACTIVATION = Source("activation", "")


class Row:
    """Calls of one counted operator that nothing distinguishes, described by the first of them."""

    __slots__ = ("calls", "joint", "operands", "outputs", "parameter")

    def __init__(self, parameter: str, operands: tuple[Any, ...], outputs: tuple[tuple[Any, torch.dtype], ...]) -> None:
        self.parameter = parameter  # multiplied, or its gradient made
        self.joint: Row | None = None  # the row that made the autograd node whose backward this one shares
        self.operands = operands  # of each tensor: position of its argument, shape, dtype, gradient wanted, source
        self.outputs = outputs  # shape and dtype of each result
        self.calls = 0


class Tally:
    """Calls by everything that distinguishes them; their number does not grow with repeated steps."""

    def __init__(self) -> None:
        # (entry, frame, phase, row of the forward operator, identity of the factors, flops, causal flops, mask known)
        self.counted: dict[tuple[Any, ...], Row] = {}
        # (entry, frame, phase, flops) -> calls
        self.elementwise: dict[tuple[Entry, Frame, Phase, int], int] = {}
        self.uncounted: dict[tuple[str, Frame, Phase, Any, str], int] = {}
        self.assumptions: dict[str, None] = {}
        self.device: str | None = None
        self.routing = Seen(self.counted)
        self._parameters: tuple[ParameterRow, ...] = ()
        self._packed = 0  # elements of packed weights, which are no Parameters
        self._closed: list[Frame] | None = None  # in order and measured, since nothing runs any more

    def add_row(self, key: tuple[Any, ...], operands: tuple[Any, ...], out: Any) -> Row:
        """The row of calls that were not seen before."""
        entry, origin = key[0], key[3]
        factors = zip(operands[::5], operands[4::5], strict=True)
        names = (s.name for position, s in factors if s and s.kind == "parameter" and position in entry.positions)
        parameter = next(names, "" if origin is None else origin.parameter)
        results = (out,) if isinstance(out, torch.Tensor) else out if isinstance(out, list | tuple) else ()
        tensors = [item for item in results if isinstance(item, torch.Tensor)]
        row = self.counted[key] = Row(parameter, operands, tuple((tensor.shape, tensor.dtype) for tensor in tensors))
        if self.device is None:
            self.device = device_of(out)
        return row

    def add_uncounted(self, name: str, frame: Frame, phase: Phase, tensors: Any, reason: str) -> None:
        """One more call of an operator without a count."""
        key = (name, frame, phase, _shapes(tensors), reason)
        self.uncounted[key] = self.uncounted.get(key, 0) + 1

    def add_elementwise(self, entry: Entry, frame: Frame, phase: Phase, flops: int) -> None:
        """One more call of an elementwise operator; FlopCounter does as much itself for all but a few."""
        key = (entry, frame, phase, flops)
        self.elementwise[key] = self.elementwise.get(key, 0) + 1

    def reopen(self) -> None:
        """More is to come."""
        self._closed = None

    def close(self, frames: dict[str, Frame], model: torch.nn.Module | None) -> None:
        """Nothing more comes for now: note how many parameters there are while the modules live."""
        self._closed = self._measured(frames, model)

    def _measured(self, frames: dict[str, Frame], model: torch.nn.Module | None) -> list[Frame]:
        """The frames in order, their parameters and those of all modules counted."""
        ordered = _in_order(frames, model)
        _measure(ordered, model)
        modules = _modules(ordered, model)
        parameters = unique_parameters(modules)
        parameters += _of_those_that_are_gone(ordered, {row.name for row in parameters})
        in_packs = sum(packed(module) for _name, module in modules)
        if elements(parameters) + in_packs >= elements(self._parameters) + self._packed:
            self._parameters, self._packed = parameters, in_packs
        return ordered

    def profile(
        self, frames: dict[str, Frame], model: torch.nn.Module | None, attention: Attention = "full"
    ) -> Profile:
        """Everything so far, names resolved."""
        ordered = self._closed if self._closed is not None else self._measured(frames, model)
        sites = _sites(self.counted)
        rows = tuple(_operator_row(key, row, sites, attention) for key, row in self.counted.items())
        profile = Profile(
            modules=tuple(_module_row(frame) for frame in ordered),
            operators=rows,
            elementwise=_elementwise_rows(self.elementwise),
            uncounted_rows=tuple(
                UncountedRow(op=op, fqn=frame.fqn, phase=phase, calls=calls, shapes=shapes, reason=reason)
                for (op, frame, phase, shapes, reason), calls in self.uncounted.items()
            ),
            routing=self.routing.rows(),
            assumptions=tuple(self.assumptions),
            attention=attention,
            device=self.device or "cpu",
            n_params=elements(self._parameters) + self._packed,
            n_params_trainable=elements(row for row in self._parameters if row.trainable),
            parameters=self._parameters,
            torch_version=str(torch.__version__),
        )
        idle = idle_experts(profile, self.routing.choices)
        return replace(profile, experts=idle) if idle else profile


def _sites(counted: dict[tuple[Any, ...], Row]) -> dict[Row, str]:
    """A name for every row that others are joined to, and for every forward one: `layers.0.mlp#2`."""
    origins = {origin for _entry, _frame, _phase, origin, *_rest in counted if origin is not None}
    numbers: dict[str, int] = {}
    sites: dict[Row, str] = {}
    for (_entry, frame, phase, *_rest), row in counted.items():
        if phase == "forward" or row in origins:
            if row.joint is not None and row.joint in sites:
                sites[row] = sites[row.joint]
            else:
                number = numbers[frame.fqn] = numbers.get(frame.fqn, -1) + 1
                sites[row] = f"{frame.fqn}#{number}"
    return sites


def _operator_row(key: Any, row: Row, sites: dict[Row, str], attention: Attention) -> OperatorRow:
    entry, frame, phase, origin, _identity, flops, causal, known = key
    calls, operands, moved, multiplied = row.calls, [], 0, []
    for position, shape, dtype, wants, source in zip(*[iter(row.operands)] * 5, strict=True):
        kind, name = source or _ACTIVATION
        factor = position in entry.positions
        operands.append(
            Operand(
                shape=tuple(shape), dtype=dtype_name(dtype), kind=kind, name=name, requires_grad=wants, factor=factor
            )
        )
        moved += _size(shape) * dtype.itemsize
        if factor:
            multiplied.append((dtype, source))
    for shape, dtype in row.outputs:
        moved += _size(shape) * dtype.itemsize
    # A complex multiply-add is four real multiplications and four real additions.
    each = 4 if multiplied and all(dtype.is_complex for dtype, _source in multiplied) else 1
    flops, causal = calls * each * flops, calls * each * causal
    return OperatorRow(
        op=entry.name,
        fqn=frame.fqn,
        phase=phase,
        dtype=dtype_name(multiplied[0][0]) if multiplied else "",
        operands=tuple(operands),
        outputs=tuple(tuple(shape) for shape, _dtype in row.outputs),
        calls=calls,
        flops=causal if attention == "causal" else flops,
        flops_full=flops,
        flops_causal=causal,
        mask_known=known,
        bytes=calls * moved,
        parameter=row.parameter,
        site=sites.get(row, ""),
        joined_to=sites.get(origin, ""),
        line=shorten(frame.line) if frame.line else "",
    )


def _elementwise_rows(counter: dict[tuple[Entry, Frame, Phase, int], int]) -> tuple[ElementwiseRow, ...]:
    sums: dict[tuple[str, str, Phase], tuple[int, int]] = {}
    for (entry, frame, phase, flops), calls in counter.items():
        before = sums.get((entry.name, frame.fqn, phase), (0, 0))
        sums[entry.name, frame.fqn, phase] = before[0] + calls, before[1] + calls * flops
    return tuple(
        ElementwiseRow(op=op, fqn=fqn, phase=phase, calls=calls, flops=flops)
        for (op, fqn, phase), (calls, flops) in sums.items()
    )


def _shapes(tree: Any) -> tuple[tuple[int, ...], ...]:
    shapes = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and not leaf.is_nested:
            shapes.append(tuple(leaf.shape))
    return tuple(shapes)


def device_of(out: Any) -> str | None:
    """Device type of the first tensor in a result."""
    return next((leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)), None)


def first_shape(output: Any) -> tuple[int, ...] | None:
    """Shape of the first tensor in a module's output: tensor, tuple, dict or dataclass; None where there is none."""
    if isinstance(output, torch.Tensor):
        return None if output.is_nested else tuple(output.shape)
    if isinstance(output, dict):
        values: Any = output.values()
    elif isinstance(output, tuple | list):
        values = output
    elif is_dataclass(output):
        values = (getattr(output, item.name) for item in fields(output))
    else:
        return None
    return next((shape for value in values if (shape := first_shape(value)) is not None), None)


def _size(shape: Any) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _module_row(frame: Frame) -> ModuleRow:
    total, own = frame.parameters or (0, 0)
    return ModuleRow(
        fqn=frame.fqn,
        cls=frame.cls,
        calls=frame.calls,
        parameters=total,
        own_parameters=own,
        output_shape=frame.output_shape,
    )


def _in_order(frames: dict[str, Frame], model: torch.nn.Module | None) -> list[Frame]:
    """Frames as the model registers them, with the containers of those that ran; the unregistered ones after."""
    above = {name for fqn in frames for name in ancestors(fqn)}
    ordered = {"": frames[""]}
    for name, module in walk(model) if model is not None else ():
        if name in above and name not in ordered:
            ordered[name] = frames.get(name) or Frame(name, type(module).__name__, module)
    return list({**ordered, **frames}.values())


def _measure(frames: Iterable[Frame], model: torch.nn.Module | None) -> None:
    for frame in frames:
        module = frame.module() if frame.module is not None else None
        if frame.fqn == "" and model is not None:
            module = unwrap(model)
        if module is not None:
            frame.parameters = held(module)


def _of_those_that_are_gone(frames: list[Frame], known: set[str]) -> tuple[ParameterRow, ...]:
    """The parameters of modules that nobody holds any more, as they were when those were first called."""
    gone = [row for frame in frames if frame.module and frame.module() is None for row in frame.seen]
    rows = tuple({row.name: row for row in gone if row.name not in known}.values())
    total, own = Counter[str](), Counter[str]()
    for row in rows:
        owners = ancestors(row.name)[1:]
        own[owners[0]] += row.numel
        total.update(dict.fromkeys(owners, row.numel))
    for frame in frames:
        if frame.fqn and frame.parameters is None and total[frame.fqn]:
            frame.parameters = (total[frame.fqn], own[frame.fqn])
    return rows


def _modules(frames: Iterable[Frame], model: torch.nn.Module | None) -> list[tuple[str, torch.nn.Module]]:
    """Every module once, under its first name."""
    roots = [("", model)] if model is not None else []
    for frame in frames:
        module = frame.module() if frame.module is not None else None
        if module is not None:  # never for truth: a compiled one has a length only where the original has
            roots.append((frame.fqn, module))
    found: dict[int, tuple[str, torch.nn.Module]] = {}
    for fqn, root in roots:
        if id(root) not in found:
            for name, module in walk(root, fqn):
                found.setdefault(id(module), (name, module))
    return list(found.values())
