"""Simulate a real model on a mesh of devices: a rank's shards are counted on meta, stage by stage.

The shards are those of the model's own plans (`tp_plan` and `ep_plan` of transformers' models), cut as their tensor
parallelism does: a rank multiplies its slices of the weights, and what would be sent follows from the shapes that were
multiplied. Tests compare both with DTensor's own operators and collectives on a fake process group. Imports torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import msgspec
from torch import nn

from flopprof.analytic import TransformerShape
from flopprof.errors import UsageError
from flopprof.models import Workload
from flopprof.plan.memory import Layout, activation_bytes, logits_bytes, state_bytes
from flopprof.plan.mesh_axes import Axes
from flopprof.plan.mesh_context import require_divisible
from flopprof.plan.mesh_result import Alike, Mesh, Stage, Traffic
from flopprof.plan.mesh_shards import EMBEDDINGS, Sharded, experts, shard, whole_experts
from flopprof.plan.mesh_stages import Blocks, cut
from flopprof.plan.mesh_traffic import Sent, exchanged, reduced, same_inputs, sent
from flopprof.profile import Profile

_PHASES = ("forward", "backward", "recompute")
_UNSPLIT = "activations as if tensor parallel ranks split all of attention: what they do alike they keep in full, too"
_BALANCED = "each rank's experts are sent as many tokens as any other's"


def simulate(
    workload: Workload,
    axes: Axes,
    *,
    micro_batches: int | None = None,
    layout: Layout | None = None,
    shape: TransformerShape | None = None,
) -> Mesh:
    """A training step of the workload's batch as one micro-batch, `micro_batches` times (None: pp) on each replica.

    layout  precision, optimizer, zero and checkpointing, for the memory. shape: of the model; without it, activations
            are not known. Checkpointing changes memory here, and no FLOPs.

    The workload's model is cut into shards in place. Raises UsageError where the model cannot be cut so.
    """
    layout = replace(layout or Layout(), tp=axes.tp, pp=axes.pp, sequence_parallel=axes.sp)
    model, times = workload.model, axes.pp if micro_batches is None else micro_batches
    if times < 1:
        raise UsageError(f"a step has 1 or more micro-batches, got {times}.")
    if workload.device != "meta":
        raise UsageError(f"{workload.name} is on {workload.device}: a mesh is simulated on the meta device.")
    if axes.cp > 1 and (shape is None or shape.encoder_layers):
        raise UsageError(
            f"{workload.name} is no decoder or encoder of a known shape, so what context parallel ranks exchange is "
            "not known: give cp=1."
        )
    axes = whole_experts(model, axes)
    whole = workload.count(backward=True)
    if axes.cp > 1:
        require_divisible(workload, whole, axes.cp)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    shared = _tied(model)
    sharded = shard(model, axes)
    of_experts = experts(model, axes, sharded)
    profile = replace(workload, on_cpu=None).count(backward=True) if axes.tp > 1 else whole
    blocks = cut(model, profile, axes.pp)
    local = _parameters(model, axes, sharded, sizes, of_experts)
    if axes.pp == 1:  # the head's slice is the embedding's own; on a stage of its own it would be a copy
        local = {name: size for name, size in local.items() if name in sizes or name not in shared}
    flops = _of_a_rank(profile, axes, of_experts)
    moved = sent(profile, model, axes, sharded, of_experts, same_inputs(workload, sharded))
    rank = _Rank(
        workload=workload,
        axes=axes,
        layout=layout,
        shape=shape,
        times=times,
        blocks=blocks,
        profile=profile,
        local=local,
        of_experts={name for names in of_experts.values() for name in names},
        flops=flops,
        moved=moved,
        split_heads=any(each.style == "colwise" and "att" in each.fqn for each in sharded),
    )
    found = Mesh(
        model=workload.name,
        tp=axes.tp,
        pp=axes.pp,
        dp=axes.dp,
        cp=axes.cp,
        ep=axes.ep,
        etp=axes.expert_tp,
        sp=axes.sp,
        zero=layout.zero,
        seq=None if not workload.tokens or not workload.samples else workload.tokens // workload.samples,
        micro_batch=workload.samples or 1,
        micro_batches=times,
        stages=tuple(_stage(rank, index) for index in range(axes.pp)),
        whole_flops=axes.dp * times * whole.hardware_flops,
        replicated=_replicated(whole, flops, axes, axes.dp * times),
        assumptions=tuple(dict.fromkeys([*profile.assumptions, *((_BALANCED,) if axes.ep > 1 else ())])),
    )
    if shape is not None and any("att" in row.module for row in found.replicated):
        found = msgspec.structs.replace(found, assumptions=(*found.assumptions, _UNSPLIT))
    assert found.ranks_flops == found.whole_flops + found.replicated_flops
    return found


# --- what a rank does -----------------------------------------------------------------------------------
def _of_a_rank(profile: Profile, axes: Axes, of_experts: Collection[str]) -> dict[tuple[str, str], int]:
    """FLOPs of one micro-batch by module and phase, without what is below it. Raises UsageError for uneven shares.

    Context parallel ranks have a share of each product (require_divisible). Experts that lie whole are split by tokens.
    Expert parallel ranks have fewer experts, and as many times the tokens.
    """
    found = Counter[tuple[str, str]]()
    for row in profile.operators:
        if row.phase in _PHASES:
            found[row.fqn, row.phase] += row.flops
    for (fqn, phase), flops in found.items():
        share = axes.cp * (axes.tp if axes.expert_tp == 1 and fqn in of_experts else 1)
        if flops % share:
            raise UsageError(f"{fqn or 'the model'} does {flops:,} FLOPs, which {share} ranks do not share evenly.")
        found[fqn, phase] = flops // share
    return dict(found)


def _replicated(whole: Profile, flops: Mapping[tuple[str, str], int], axes: Axes, steps: int) -> tuple[Alike, ...]:
    """Modules whose products every tensor parallel rank does alike. Raises UsageError where work is lost."""
    before = Counter[str](whole.by_module(own=True))
    after = Counter[str]()
    for (fqn, _), count in flops.items():
        after[fqn] += axes.tp * axes.cp * count
    lost = [fqn for fqn, count in before.items() if after[fqn] < count]
    if lost:
        raise UsageError(f"the ranks of tp={axes.tp} together do less than {lost[0]} does alone: give tp=1.")
    more = Counter[str]()
    for fqn, count in after.items():
        if count != before[fqn]:
            more[re.sub(r"\.\d+(?=\.|$)", ".*", fqn)] += steps * (count - before[fqn])
    return tuple(Alike(module=module, flops=count) for module, count in more.items())


# --- what it holds --------------------------------------------------------------------------------------
def _parameters(
    model: nn.Module,
    axes: Axes,
    sharded: Collection[Sharded],
    sizes: Mapping[str, int],
    of_experts: Mapping[str, Collection[str]],
) -> dict[str, int]:
    """Elements of each parameter on one rank."""
    local = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for each in sharded:
        if each.style in EMBEDDINGS:  # looked up whole here, so that no index leaves the table
            name = f"{each.fqn}.weight"
            weight = dict(model.named_parameters(remove_duplicate=False))[name]
            if weight.shape[EMBEDDINGS[each.style]] % axes.tp:
                rows = weight.shape[EMBEDDINGS[each.style]]
                raise UsageError(f"{each.fqn} has {rows} entries or features, which tp={axes.tp} does not divide.")
            local[name] = sizes.get(name, weight.numel()) // axes.tp
    for names in of_experts.values():
        local |= {name: local[name] // axes.ep for name in names}
    return local


def _tied(model: nn.Module) -> list[str]:
    """Every name of a parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [name for group in names.values() if len(group) > 1 for name in group]


# --- a stage --------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class _Rank:
    """What all stages are made of: a rank's parameters, FLOPs by module and phase, and bytes sent."""

    workload: Workload
    axes: Axes
    layout: Layout
    shape: TransformerShape | None
    times: int
    blocks: Blocks
    profile: Profile
    local: Mapping[str, int]
    of_experts: Collection[str]
    flops: Mapping[tuple[str, str], int]
    moved: Collection[Sent]
    split_heads: bool


def _stage(rank: _Rank, index: int) -> Stage:
    """What one rank of the stage does, holds and sends."""
    axes, blocks, times, local = rank.axes, rank.blocks, rank.times, rank.local
    first, last = blocks.spans[index]
    element = {name: parameter.element_size() for name, parameter in rank.workload.model.named_parameters()}
    names = [name for name in local if blocks.stage_of(name) == index]
    names += [name for name in blocks.tied_again(rank.workload.model, index) if name not in names]
    groups = [[name for name in names if (name in rank.of_experts) is expert] for expert in (False, True)]
    counts = [sum(local[name] for name in group) for group in groups]
    gradients = [sum(local[name] * element.get(name, blocks.element) for name in group) for group in groups]
    replicas = (axes.replicas, axes.expert_replicas)
    states = sum(sum(state_bytes(count, rank.layout, size)) for count, size in zip(counts, replicas, strict=True))
    by_phase = dict.fromkeys(_PHASES, 0)
    for (fqn, phase), count in rank.flops.items():
        if blocks.stage_of(fqn) == index:
            by_phase[phase] += count
    kept, context = None, 0
    if rank.shape is not None and rank.workload.tokens is not None:
        tokens, layers = rank.workload.tokens, last - first + 1
        # stages behind this one have not yet sent back as many micro-batches (1F1B)
        under_way = layers * min(axes.pp - index, times)
        kept = activation_bytes(rank.shape, rank.layout, tokens // axes.cp, under_way)
        kept += logits_bytes(rank.shape, rank.layout, tokens // axes.cp) if index == axes.pp - 1 else 0
        context = exchanged(rank.shape, axes, layers, tokens, blocks.element, split=rank.split_heads)
    here = [each for each in rank.moved if blocks.stage_of(each.fqn) == index]
    # of a text's boundary each context parallel rank has its part, and with sequence parallelism each tp rank too
    parts = axes.cp * (axes.tp if axes.sp else 1)
    return Stage(
        first=first,
        last=last,
        forward_flops=times * by_phase["forward"],
        backward_flops=times * by_phase["backward"],
        recompute_flops=times * by_phase["recompute"],
        params=sum(counts),
        expert_params=counts[1],
        states_bytes=states,
        activations_bytes=kept,
        traffic=Traffic(
            tensor=times * sum(each.tensor for each in here) // axes.cp,
            tensor_each=times * sum(each.tensor_each for each in here) // axes.cp,
            gathered_again=times * sum(each.gathered_again for each in here) // axes.cp,
            expert=times * sum(each.expert for each in here) // axes.cp,
            context=times * context,
            pipeline=times * blocks.boundary(rank.profile, index) // parts,
            data=sum(reduced(size, rank.layout.zero, ranks) for size, ranks in zip(gradients, replicas, strict=True)),
        ),
    )
