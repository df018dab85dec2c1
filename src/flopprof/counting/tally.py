"""Counts under way, aggregated as they come; and the Profile made of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from flopprof.counting.attribution import Frame, unwrap, walk
from flopprof.counting.operands import Source
from flopprof.counting.operators import Entry
from flopprof.profile import (
    Attention,
    ElementwiseRow,
    ModuleRow,
    Operand,
    OperatorRow,
    Phase,
    Profile,
    UncountedRow,
    ancestors,
)

_ACTIVATION = Source("activation", "")


class Tally:
    """Rows keyed by everything that distinguishes them; their number does not grow with repeated steps."""

    def __init__(self) -> None:
        # key -> [calls, flops, causal flops, mask known, scale: 4 where a multiply-add is complex,
        #         1 where a backward may come and will want to know the parameter]
        self.counted: dict[Any, list[int]] = {}
        # key -> [calls, flops]
        self.elementwise: dict[tuple[Entry, Frame, Phase], list[int]] = {}
        self.uncounted: dict[tuple[str, Frame, Phase, Any, str], int] = {}
        self.assumptions: dict[str, None] = {}
        self.device: str | None = None
        self._sizes = (0, 0)  # parameters, trainable ones

    def new_row(self, key: Any, mask_known: bool, out: Any) -> list[int]:
        """The row of a key that was not seen before."""
        entry, _frame, _phase, graded, parameter, signature, _outputs = key
        multiplied = [item for position in entry.positions for item in described(signature, position)]
        complex_product = bool(multiplied) and all(dtype.is_complex for _shape, dtype, _wants, _source in multiplied)
        differentiable = graded and bool(parameter) and any(wants for _shape, _dtype, wants, _source in multiplied)
        row = self.counted[key] = [0, 0, 0, int(mask_known), 4 if complex_product else 1, int(differentiable)]
        if self.device is None and (tensors := [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]):
            self.device = tensors[0].device.type
        return row

    def add_uncounted(self, name: str, frame: Frame, phase: Phase, tensors: Any, reason: str) -> None:
        """One more call of an operator without a count."""
        key = (name, frame, phase, _shapes(tensors), reason)
        self.uncounted[key] = self.uncounted.get(key, 0) + 1

    def measure(self, frames: Collection[Frame], model: torch.nn.Module | None) -> None:
        """Note how many parameters there are, in all and in each module, while the modules live."""
        _measure(frames, model)
        parameters = _unique_parameters(frames, model)
        count = sum(parameter.numel() for parameter in parameters)
        if count >= self._sizes[0]:
            self._sizes = count, sum(parameter.numel() for parameter in parameters if parameter.requires_grad)

    def profile(
        self, frames: dict[str, Frame], model: torch.nn.Module | None, attention: Attention = "full"
    ) -> Profile:
        """Everything so far, names resolved."""
        ordered = _in_order(frames, model)
        self.measure(ordered, model)
        rows = tuple(_operator_row(key, counts, attention) for key, counts in self.counted.items())
        return Profile(
            modules=tuple(_module_row(frame) for frame in ordered),
            operators=rows,
            elementwise=tuple(
                ElementwiseRow(op=entry.name, fqn=frame.fqn, phase=phase, calls=calls, flops=flops)
                for (entry, frame, phase), (calls, flops) in self.elementwise.items()
            ),
            uncounted_rows=tuple(
                UncountedRow(op=op, fqn=frame.fqn, phase=phase, calls=calls, shapes=shapes, reason=reason)
                for (op, frame, phase, shapes, reason), calls in self.uncounted.items()
            ),
            assumptions=tuple(self.assumptions),
            attention=attention,
            device=self.device or "cpu",
            n_params=self._sizes[0],
            n_params_trainable=self._sizes[1],
            torch_version=str(torch.__version__),
        )


def described(signature: Any, position: int) -> list[Any]:
    """(shape, dtype, gradient wanted, source) of each tensor in one argument of a call."""
    item = signature[position] if position < len(signature) else None
    if item is None:
        return []
    return [item] if isinstance(item[0], torch.Size) else [inner for inner in item if inner is not None]


def _operator_row(key: Any, counts: list[int], attention: Attention) -> OperatorRow:
    entry, frame, phase, graded, site, signature, outputs = key
    calls, flops, causal, known, _scale, _differentiable = counts
    operands, moved, multiplied = [], 0, []
    for position in range(len(signature)):
        for shape, dtype, wants, source in described(signature, position):
            kind, name = source or _ACTIVATION
            operands.append(
                Operand(
                    shape=tuple(shape), dtype=dtype_name(dtype), kind=kind, name=name, requires_grad=wants and graded
                )
            )
            moved += _size(shape) * dtype.itemsize
            if position in entry.positions:
                multiplied.append((dtype, source))
    for shape, dtype in outputs:
        moved += _size(shape) * dtype.itemsize
    parameter = next((source.name for _dtype, source in multiplied if source and source.kind == "parameter"), "")
    return OperatorRow(
        op=entry.name,
        fqn=frame.fqn,
        phase=phase,
        dtype=dtype_name(multiplied[0][0]) if multiplied else "",
        operands=tuple(operands),
        outputs=tuple(tuple(shape) for shape, _dtype in outputs),
        calls=calls,
        flops=causal if attention == "causal" else flops,
        flops_full=flops,
        flops_causal=causal,
        mask_known=bool(known),
        bytes=calls * moved,
        parameter=parameter or site,
    )


def _shapes(tree: Any) -> tuple[tuple[int, ...], ...]:
    shapes = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and not leaf.is_nested:
            shapes.append(tuple(leaf.shape))
    return tuple(shapes)


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


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `float32`."""
    return str(dtype).removeprefix("torch.")


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
            frame.parameters = (
                sum(_numel(parameter) for parameter in module.parameters()),
                sum(_numel(p) for p in {id(p): p for p in module._parameters.values() if p is not None}.values()),
            )


def _unique_parameters(frames: Iterable[Frame], model: torch.nn.Module | None) -> list[torch.nn.Parameter]:
    modules = [model] if model is not None else []
    modules += [m for frame in frames if frame.module is not None and (m := frame.module()) is not None]
    unique = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return [parameter for parameter in unique.values() if _numel(parameter)]


def _numel(parameter: torch.nn.Parameter) -> int:
    lazy = torch.nn.parameter.is_lazy(parameter)
    return 0 if lazy else parameter.numel()
