"""Simulate a real model on a mesh of devices: its tensor parallel shards are counted on meta, stage by stage.

The shards are those of the model's own plan (`tp_plan` of transformers' models), cut as torch's tensor parallelism
does: a rank multiplies its slices of the weights, and what would be sent follows from the shapes that were multiplied.
Tests compare both with DTensor's own operators and collectives on a fake process group. Imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from flopprof.analytic import TransformerShape
from flopprof.errors import UsageError
from flopprof.models import Workload
from flopprof.plan.memory import Layout, activation_bytes, logits_bytes, state_bytes
from flopprof.plan.mesh_result import Mesh, Stage, Traffic
from flopprof.plan.mesh_shards import sent, shard
from flopprof.profile import Profile

_AXES = ("tp", "pp", "dp")


def parse_mesh(text: str) -> dict[str, int]:
    """`tp=8,pp=16,dp=128` as sizes by axis. Raises UsageError."""
    sizes = dict.fromkeys(_AXES, 1)
    for part in text.split(","):
        axis, _, value = part.strip().partition("=")
        if axis not in sizes or not value.isdecimal() or int(value) < 1:
            raise UsageError(f"cannot read {part!r} of the mesh: write it as tp=8,pp=4,dp=16.")
        sizes[axis] = int(value)
    return sizes


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
    shared = _tied(model)
    sharded = shard(model, tp) if tp > 1 else []
    profile = workload.count(backward=True) if tp > 1 else whole
    local = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for each in sharded:
        if each.style == "embedding_rowwise":  # looked up whole here, so that no index leaves the table
            local[f"{each.fqn}.weight"] = sizes[f"{each.fqn}.weight"] // tp
    blocks = _blocks(model, profile, pp)
    if pp == 1:  # the head's slice is the embedding's own; on a stage of its own it would be a copy
        local = {name: size for name, size in local.items() if name in sizes or name not in shared}
    element = {name: parameter.element_size() for name, parameter in model.named_parameters()}
    exchange = sent(profile, sharded, local, element, tp)
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
        moved = sum(size for fqn, size in exchange if blocks.stage_of(fqn) == index)
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
                    tensor=times * moved,
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


# --- what is sent to sisters and neighbours ---------------------------------------------------------
def _tied(model: nn.Module) -> list[str]:
    """Every name of a parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [name for group in names.values() if len(group) > 1 for name in group]


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


def _replicated(whole: Profile, local: Profile, tp: int) -> tuple[str, ...]:
    """Modules whose products every rank does alike, in part or in full. Raises UsageError where work is lost."""
    before, after = whole.by_module(own=True), local.by_module(own=True)
    lost = [fqn for fqn, flops in before.items() if after.get(fqn, 0) * tp < flops]
    if lost:
        raise UsageError(f"the ranks of tp={tp} together do less than {lost[0]} does alone: give a mesh with tp=1.")
    names = [re.sub(r"\.\d+", ".*", fqn) for fqn, flops in after.items() if flops * tp != before.get(fqn, 0)]
    return tuple(dict.fromkeys(names))
