"""What one rank sends: collectives of its shards, of experts and of texts that are split. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flopprof.analytic import TransformerShape
from flopprof.models import Workload
from flopprof.plan.mesh_axes import Axes
from flopprof.plan.mesh_shards import Sharded, rope_width
from flopprof.plan.mesh_stages import numel
from flopprof.profile import OperatorRow, Profile


@dataclass(frozen=True)
class Sent:
    """Bytes of one module, that a rank sends for one micro-batch of whole texts: fields as those of Traffic."""

    fqn: str
    tensor: int = 0
    tensor_each: int = 0
    gathered_again: int = 0
    expert: int = 0


@dataclass(frozen=True)
class _Bytes:
    """Bytes of one module's tensors: an all-reduce sends twice what a gather or a scatter does.

    entered: inputs that are reduced in backward, and by sequence parallelism gathered before; reduced, gathered: others
    """

    entered: int = 0
    gradient: int = 0
    reduced: int = 0
    gathered: int = 0


def sent(
    profile: Profile,
    model: nn.Module,
    axes: Axes,
    sharded: Iterable[Sharded],
    experts: Iterable[str],
    inputs: Mapping[str, object],
) -> list[Sent]:
    """What each module sends. profile: of a rank's shards; inputs: of modules, what tells that two have the same."""
    rows: dict[str, list[OperatorRow]] = {}
    for row in profile.operators:
        if row.phase == "forward":
            rows.setdefault(row.fqn, []).append(row)
    outputs = {row.fqn: numel(row.output_shape) * row.calls for row in profile.modules}
    found, reduced = [], set[object]()
    for each in sharded:
        own = _of_module(each, model, rows, outputs.get(each.fqn, 0), axes)
        entry = inputs.get(each.fqn, each.fqn)
        first = entry not in reduced
        if own.entered:
            reduced.add(entry)
        # without sequence parallelism an input's gradient is reduced; with it the input is gathered, that scattered
        enters = own.entered + own.gradient if axes.sp else 2 * own.gradient
        rest = 2 * own.reduced + own.gathered
        found.append(
            Sent(
                each.fqn,
                tensor=_ring(rest + (enters if first else 0), axes.tp),
                tensor_each=_ring(rest + enters, axes.tp),
                gathered_again=_ring(own.entered, axes.tp) if axes.sp and first else 0,
            )
        )
    for fqn in experts:
        pairs, size = _pairs(rows, fqn)
        whole = axes.expert_tp == 1 and axes.tp > 1  # each tensor parallel rank has its own share of the tokens
        # there and back, in forward and in backward
        moved = _ring(4 * size // (axes.tp if whole else 1), axes.ep)
        # the shares are gathered, forward and backward, unless sequence parallelism leaves them where they are
        share = (2 * outputs.get(fqn, 0) + pairs) * _width(rows, fqn) if whole and not axes.sp else 0
        gathered = _ring(share, axes.tp)
        found.append(Sent(fqn, expert=moved, tensor=gathered, tensor_each=gathered))
    return found


def exchanged(shape: TransformerShape, axes: Axes, layers: int, tokens: int, element: int, *, split: bool) -> int:
    """Bytes that a rank sends so that each has the keys and values of whole texts (Llama 3, 2407.21783, section 3.3.2).

    They are gathered in forward and again in backward, and their gradients are scattered: three times
    (cp - 1) / cp of them. split: heads are, over tensor parallel ranks
    """
    width = shape.kv_heads * (shape.d_head + shape.d_head_value) // (axes.tp if split else 1)
    return _ring(3 * layers * tokens * width * element, axes.cp)


def reduced(gradient_bytes: int, zero: int, ranks: int) -> int:
    """Gradients reduced over data parallel ranks; with the weights shared out, those are gathered twice too.

    ZeRO (1910.02054), section 7: 2, and with stage 3, 3 times the parameters.
    """
    return _ring((3 if zero == 3 else 2) * gradient_bytes, ranks)


def same_inputs(workload: Workload, sharded: Iterable[Sharded]) -> dict[str, object]:
    """Of modules whose inputs are split or reduced, what their inputs are: equal where they are the same tensors."""
    seen: dict[str, list[object]] = {}
    kept: list[torch.Tensor] = []  # alive, so that none is given the place of another
    handles = []

    def note(fqn: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor):
                kept.append(inputs[0])
                place = (inputs[0].untyped_storage()._cdata, inputs[0].storage_offset(), inputs[0].numel())
                seen.setdefault(fqn, []).append(place)

        return hook

    for each in sharded:
        if each.style in ("colwise", "colwise_gather_output"):
            module = workload.model.get_submodule(each.fqn)
            handles.append(module.register_forward_pre_hook(note(each.fqn)))
    try:
        if handles:
            replace(workload, on_cpu=None).count(fold=False)
    finally:
        for handle in handles:
            handle.remove()
    return {fqn: tuple(places) for fqn, places in seen.items()}


def _of_module(
    each: Sharded, model: nn.Module, rows: Mapping[str, list[OperatorRow]], output: int, axes: Axes
) -> _Bytes:
    module = model.get_submodule(each.fqn)
    width = max((parameter.element_size() for parameter in module.parameters()), default=_width(rows, each.fqn))
    match each.style:
        case "replicated_with_grad_allreduce":
            # of parameters: as much for a part of a text, by which the rest is divided, as for all of it
            wanted = (parameter for parameter in module.parameters() if parameter.requires_grad)
            return _Bytes(reduced=axes.cp * sum(parameter.numel() * parameter.element_size() for parameter in wanted))
        case "embedding_rowwise" | "all_reduce":
            return _Bytes(reduced=output * width)
        case "embedding_colwise":
            return _Bytes(gathered=output * width)
        case "moe_tp_experts":
            pairs, _ = _pairs(rows, each.fqn)
            # the output, the input's gradient, and the routing weights'; of whole experts there are no sums
            return _Bytes(reduced=(2 * output + pairs) * width if axes.expert_tp > 1 else 0)
    found = _Bytes()
    for row in rows.get(each.fqn, ()):
        entry = next((operand for operand in row.operands if operand.factor and operand.kind != "parameter"), None)
        if entry is None:
            continue
        size = _size(row.dtype)
        result, given = numel(row.outputs[0]) * row.calls * size, numel(entry.shape) * row.calls * size
        back = given if entry.requires_grad else 0
        match each.style:
            case "colwise":
                more = _Bytes(entered=given, gradient=back)
            case "colwise_gather_output":
                more = _Bytes(entered=given, gradient=back, gathered=result * axes.tp)
            case "rowwise":
                more = _Bytes(reduced=result)
            case "rowwise_split_input":
                more = _Bytes(reduced=result, gathered=back * axes.tp)
            case "mla_kv_a_proj":  # the rotated part of the keys goes to every head: its gradient is reduced
                more = _Bytes(reduced=result // row.outputs[0][-1] * rope_width(model))
            case _:
                more = _Bytes()
        found = _Bytes(*(a + b for a, b in zip(_fields(found), _fields(more), strict=True)))
    return found


def _fields(found: _Bytes) -> tuple[int, ...]:
    return found.entered, found.gradient, found.reduced, found.gathered


def _pairs(rows: Mapping[str, list[OperatorRow]], fqn: str) -> tuple[int, int]:
    """Tokens times the experts that each is sent to, and the bytes of that many tokens."""
    own = [row for row in rows.get(fqn, ()) if row.parameter]
    if not own:
        return 0, 0
    entering = [row for row in own if row.parameter == own[0].parameter]
    pairs = elements = 0
    for row in entering:
        entry = next(operand for operand in row.operands if operand.factor and operand.kind != "parameter")
        pairs += numel(entry.shape[:-1]) * row.calls
        elements += numel(entry.shape) * row.calls
    return pairs, elements * _size(own[0].dtype)


def _width(rows: Mapping[str, list[OperatorRow]], fqn: str) -> int:
    own = rows.get(fqn)
    return _size(own[0].dtype) if own else 4


def _size(dtype: str) -> int:
    return torch.empty((), dtype=getattr(torch, dtype), device="meta").element_size()


def _ring(size: int, ranks: int) -> int:
    return size * (ranks - 1) // ranks
