"""Simulate a real model on a mesh of devices: its tensor parallel shards are counted on meta, stage by stage.

The shards are those of the model's own plan (`tp_plan` of transformers' models), cut as torch's tensor parallelism
does: a rank multiplies its slices of the weights, and what would be sent follows from the shapes that were multiplied.
Tests compare both with DTensor's own operators and collectives on a fake process group. Imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flopprof.analytic import TransformerShape
from flopprof.errors import UsageError
from flopprof.models import Workload
from flopprof.plan.memory import Layout, activation_bytes, logits_bytes, state_bytes
from flopprof.plan.mesh_result import Mesh, Stage, Traffic
from flopprof.profile import OperatorRow, Profile

_AXES = ("tp", "pp", "dp")
# style -> the dimension of the weight that is split; None: every rank has all of it
_SPLIT = {
    "colwise": 0,
    "colwise_gather_output": 0,
    "rowwise": 1,
    "embedding_rowwise": 0,
    "replicated_with_grad_allreduce": None,
}


def parse_mesh(text: str) -> dict[str, int]:
    """`tp=8,pp=16,dp=128` as sizes by axis. Raises UsageError."""
    sizes = dict.fromkeys(_AXES, 1)
    for part in text.split(","):
        axis, _, value = part.strip().partition("=")
        if axis not in sizes or not value.isdecimal() or int(value) < 1:
            raise UsageError(f"cannot read {part!r} of the mesh: write it as tp=8,pp=4,dp=16.")
        sizes[axis] = int(value)
    return sizes


@dataclass(frozen=True)
class _Sharded:
    """A module whose weight is split: by which style, and of which parameters."""

    fqn: str
    style: str


def simulate(
    workload: Workload,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    micro_batches: int | None = None,
    layout: Layout | None = None,
    shape: TransformerShape | None = None,
) -> Mesh:
    """A training step of the workload's batch as one micro-batch, `micro_batches` times (None: pp) on each replica.

    layout  precision, optimizer, zero and checkpointing, for the memory. shape: of the model; without it, activations
            are not known. Checkpointing changes memory here, and no FLOPs.

    The workload's model is cut into shards in place. Raises UsageError where the model cannot be cut so.
    """
    layout = replace(layout or Layout(), tp=tp, pp=pp)
    model, times = workload.model, pp if micro_batches is None else micro_batches
    if min(tp, pp, dp, times) < 1:
        raise UsageError(f"a mesh has 1 or more ranks an axis, and micro-batches: got {tp}, {pp}, {dp} and {times}.")
    if workload.device != "meta":
        raise UsageError(f"{workload.name} is on {workload.device}: a mesh is simulated on the meta device.")
    whole = workload.count(backward=True)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    tied = {id(weight) for weight in _tied(model)}
    shared = [name for name, weight in model.named_parameters(remove_duplicate=False) if id(weight) in tied]
    sharded = _shard(model, tp) if tp > 1 else []
    profile = workload.count(backward=True) if tp > 1 else whole
    local = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for each in sharded:
        if each.style == "embedding_rowwise":  # looked up whole here, so that no index leaves the table
            local[f"{each.fqn}.weight"] = sizes[f"{each.fqn}.weight"] // tp
    blocks = _blocks(model, profile, pp)
    if pp == 1:  # the head's slice is the embedding's own; on a stage of its own it would be a copy
        local = {name: size for name, size in local.items() if name in sizes or name not in shared}
    element = {name: parameter.element_size() for name, parameter in model.named_parameters()}
    exchange = _exchange(profile, sharded, local, element, tp)
    stages = []
    for index, (first, last) in enumerate(blocks.spans):
        where = [blocks.stage_of(name) == index for name in local]
        params = sum(count for count, here in zip(local.values(), where, strict=True) if here)
        copies = blocks.tied_again(model, index)
        params += sum(local[name] for name in copies)
        gradient = sum(local[name] * element[name] for name, here in zip(local, where, strict=True) if here)
        gradient += sum(local[name] * element[name] for name in copies)
        flops = _flops(profile, blocks, index)
        kept = None
        if shape is not None and workload.tokens is not None:
            # stages behind this one have not yet sent back as many micro-batches (1F1B)
            under_way = min(pp - index, times)
            kept = activation_bytes(shape, layout, workload.tokens, (last - first + 1) * under_way)
            kept += logits_bytes(shape, layout, workload.tokens) if index == pp - 1 else 0
        sent = sum(moved for fqn, moved in exchange if blocks.stage_of(fqn) == index)
        stages.append(
            Stage(
                first=first,
                last=last,
                forward_flops=times * flops["forward"],
                backward_flops=times * flops["backward"],
                recompute_flops=times * flops["recompute"],
                params=params,
                states_bytes=sum(state_bytes(params, layout, dp)),
                activations_bytes=kept,
                traffic=Traffic(
                    tensor=times * sent,
                    pipeline=times * _boundary(profile, blocks, index),
                    data=_reduced(gradient, layout.zero, dp),
                ),
            )
        )
    return Mesh(
        model=workload.name,
        tp=tp,
        pp=pp,
        dp=dp,
        zero=layout.zero,
        seq=None if not workload.tokens or not workload.samples else workload.tokens // workload.samples,
        micro_batch=workload.samples or 1,
        micro_batches=times,
        stages=tuple(stages),
        whole_flops=dp * times * whole.hardware_flops,
        replicated=_replicated(whole, profile, tp),
    )


# --- tensor parallel shards --------------------------------------------------------------------------
def _shard(model: nn.Module, tp: int) -> list[_Sharded]:
    """Cuts the weights of the model's own plan to those of one rank, in place. Raises UsageError."""
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    if not plan:
        raise UsageError(f"{type(model).__name__} has no tensor parallel plan (tp_plan): give a mesh with tp=1.")
    tied = {id(weight) for weight in _tied(model)}
    found = []
    for fqn, module in model.named_modules():
        style = next((style for pattern, style in plan.items() if _matches(pattern, fqn)), None)
        if style is None:
            continue
        if style not in _SPLIT or (_SPLIT[style] is not None and not isinstance(module, nn.Linear | nn.Embedding)):
            raise UsageError(
                f"the tensor parallel plan of {type(model).__name__} has {style!r} for {fqn}, which is not simulated: "
                "give a mesh with tp=1."
            )
        found.append(_Sharded(fqn, style))
    for pattern in plan:
        if not any(_matches(pattern, each.fqn) for each in found) and _names_parameter(model, pattern):
            raise UsageError(
                f"the tensor parallel plan of {type(model).__name__} splits {pattern}, no module, which is not "
                "simulated: give a mesh with tp=1."
            )
    _require_heads(model, tp)
    for each in found:
        dimension = _SPLIT[each.style]
        if dimension is None or each.style == "embedding_rowwise":
            continue
        module = model.get_submodule(each.fqn)
        weight: nn.Parameter = module.weight  # type: ignore[assignment]  # of a Linear or an Embedding
        if id(weight) in tied and each.style != "colwise_gather_output":
            raise UsageError(f"{each.fqn} shares its weight, which is not simulated: give a mesh with tp=1.")
        module.weight = _slice(weight, dimension, tp, each.fqn)
        bias = getattr(module, "bias", None)
        if dimension == 0 and isinstance(bias, nn.Parameter):
            module.bias = _slice(bias, 0, tp, each.fqn)
    return found


def _slice(parameter: nn.Parameter, dimension: int, tp: int, fqn: str) -> nn.Parameter:
    sizes = list(parameter.shape)
    if sizes[dimension] % tp:
        raise UsageError(f"{fqn} has {sizes[dimension]} features, which tp={tp} does not divide.")
    sizes[dimension] //= tp
    return nn.Parameter(parameter.new_empty(sizes), requires_grad=parameter.requires_grad)


def _matches(pattern: str, fqn: str) -> bool:
    """`layers.*.mlp.up_proj` matches that module wherever the list lies."""
    regex = r"\d+".join(re.escape(part) for part in pattern.split("*"))
    return re.fullmatch(rf"(?:.*\.)?{regex}", fqn) is not None


def _names_parameter(model: nn.Module, pattern: str) -> bool:
    return any(_matches(pattern, name) for name, _ in model.named_parameters())


def _require_heads(model: nn.Module, tp: int) -> None:
    config: Any = getattr(model, "config", None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % tp:
            raise UsageError(f"{type(model).__name__} has {heads} heads ({name}), which tp={tp} does not divide.")


def _tied(model: nn.Module) -> list[nn.Parameter]:
    seen: dict[int, int] = {}
    weights = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        seen[id(parameter)] = seen.get(id(parameter), 0) + 1
        weights[id(parameter)] = parameter
    return [weights[key] for key, times in seen.items() if times > 1]


# --- what is sent ------------------------------------------------------------------------------------
def _exchange(
    profile: Profile, sharded: Iterable[_Sharded], local: Mapping[str, int], element: Mapping[str, int], tp: int
) -> list[tuple[str, int]]:
    """(module, bytes that a rank sends of it in a micro-batch): one collective for each split product, as torch has it.

    Forward: the sum of a row-wise product is reduced, gathered outputs are gathered. Backward: the gradient of a
    column-wise product's input is reduced.
    """
    rows: dict[tuple[str, str], list[OperatorRow]] = {}
    for row in profile.operators:
        rows.setdefault((row.fqn, row.phase), []).append(row)
    modules = {row.fqn: row for row in profile.modules}
    found = []
    for each in sharded:
        payload = 0
        if each.style == "replicated_with_grad_allreduce":
            payload += 2 * sum(size * element[name] for name, size in local.items() if name.startswith(f"{each.fqn}."))
        elif each.style == "embedding_rowwise":
            output = modules[each.fqn].output_shape if each.fqn in modules else ()
            payload += 2 * _numel(output) * element.get(f"{each.fqn}.weight", 0)
        for row in rows.get((each.fqn, "forward"), ()):
            activation = next(operand for operand in row.operands if operand.factor and operand.kind != "parameter")
            size = torch.empty((), dtype=getattr(torch, row.dtype), device="meta").element_size()
            result, entry = _numel(row.outputs[0]) * row.calls * size, _numel(activation.shape) * row.calls * size
            if each.style == "rowwise":
                payload += 2 * result
            else:
                payload += 2 * entry if activation.requires_grad else 0
                payload += result * tp if each.style == "colwise_gather_output" else 0
        found.append((each.fqn, payload * (tp - 1) // tp))
    return found


def _numel(shape: Iterable[int] | None) -> int:
    count = 1
    for size in shape or (0,):
        count *= size
    return count


def _reduced(gradient_bytes: int, zero: int, dp: int) -> int:
    """Gradients reduced over data parallel ranks; with the weights shared out, those are gathered twice too."""
    return (3 if zero == 3 else 2) * gradient_bytes * (dp - 1) // dp


def _boundary(profile: Profile, blocks: _Blocks, index: int) -> int:
    """Bytes to the next stage in forward, and to the one before in backward: what passes between two blocks."""
    if len(blocks.spans) == 1:
        return 0
    edges = [last for _, last in blocks.spans[:-1]]
    sides = [edge for at, edge in enumerate(edges) if at in (index, index - 1)]
    shapes = {row.fqn: row.output_shape for row in profile.modules}
    return sum(_numel(shapes[f"{blocks.fqn}.{edge}"]) * blocks.element for edge in sides)


# --- pipeline stages ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Blocks:
    """The list of blocks that is cut into stages, and the spans (first, last) of each."""

    fqn: str
    spans: tuple[tuple[int, int], ...]
    before: frozenset[str]
    element: int

    def stage_of(self, name: str) -> int:
        """The stage of a module or parameter: that of its block, or an end."""
        inside = re.match(rf"{re.escape(self.fqn)}\.(\d+)(?:\.|$)", name) if self.fqn else None
        if inside is not None:
            return next(i for i, (first, last) in enumerate(self.spans) if first <= int(inside[1]) <= last)
        return 0 if any(name == part or name.startswith(f"{part}.") for part in self.before) else len(self.spans) - 1

    def tied_again(self, model: nn.Module, index: int) -> set[str]:
        """Parameters that the last stage holds a copy of, being shared with the first."""
        if len(self.spans) == 1 or index != len(self.spans) - 1:
            return set()
        first = {id(p): name for name, p in model.named_parameters()}
        return {
            first[id(parameter)]
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if self.stage_of(name) == index != self.stage_of(first[id(parameter)])
        }


def _blocks(model: nn.Module, profile: Profile, pp: int) -> _Blocks:
    """The list of modules with the most FLOPs, cut evenly, earlier stages one longer. Raises UsageError."""
    totals = profile.by_module()
    lists = [
        (fqn, module) for fqn, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    lists = [(fqn, module) for fqn, module in lists if fqn and len(module) >= pp]
    found = {fqn: sum(totals.get(f"{fqn}.{i}", 0) for i in range(len(module))) for fqn, module in lists}
    parameter = next(model.parameters(), None)
    element = 4 if parameter is None else parameter.element_size()
    if pp == 1 and not found:
        return _Blocks("", ((0, 0),), frozenset(), element)
    if not found:
        raise UsageError(f"{type(model).__name__} has no list of {pp} blocks or more to cut into stages: give pp=1.")
    fqn = max(found, key=found.__getitem__)
    count = len(dict(lists)[fqn])
    spans, start = [], 0
    for stage in range(pp):
        length = count // pp + (stage < count % pp)
        spans.append((start, start + length - 1))
        start += length
    names = [name for name, _ in model.named_modules() if name]
    above = {fqn[: at.start()] for at in re.finditer(r"\.", fqn)}
    before = frozenset(name for name in names[: names.index(fqn)] if name not in above)
    return _Blocks(fqn, tuple(spans), before, element)


def _flops(profile: Profile, blocks: _Blocks, index: int) -> dict[str, int]:
    """FLOPs of one micro-batch by phase, of what lies on the stage."""
    found = dict.fromkeys(("forward", "backward", "recompute"), 0)
    for row in profile.operators:
        if row.phase in found and blocks.stage_of(row.fqn) == index:
            found[row.phase] += row.flops
    return found


def _replicated(whole: Profile, shard: Profile, tp: int) -> tuple[str, ...]:
    """Modules whose products every rank does alike, in part or in full."""
    before, after = whole.by_module(own=True), shard.by_module(own=True)
    names = [re.sub(r"\.\d+", ".*", fqn) for fqn, flops in after.items() if flops * tp != before.get(fqn, 0)]
    return tuple(dict.fromkeys(names))
