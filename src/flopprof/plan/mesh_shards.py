"""One rank's shards of a model, by its own tensor and expert parallel plans. Imports torch.

Styles are those of transformers' `tp_plan` and `ep_plan`, cut as its own tensor parallelism cuts them. A style that is
not known here is refused: its ranks would do another work than what is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flopprof.errors import UsageError
from flopprof.plan.mesh_axes import Axes

# style -> the dimension of a Linear's weight that is split; None: nothing is
_MODULES: dict[str, int | None] = {
    "colwise": 0,
    "packed_colwise": 0,
    "colwise_gather_output": 0,
    "colwise_rep": 0,
    "rowwise": 1,
    "rowwise_split_input": 1,
    "rowwise_rep": 1,
    "embedding_rowwise": None,  # looked up whole here, so that no index leaves the table
    "embedding_colwise": None,
    "replicated_with_grad_allreduce": None,
    "mla_kv_a_proj": None,
    "moe_tp_experts": None,
    "moe_identity_expert": None,
    "all_reduce": None,
    "local_params": None,
    "replicate": None,
}
_SAME = {"packed_colwise": "colwise", "colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}
# style -> the dimension, from the end, of a parameter that holds the matrices of all experts, (expert, out, in)
_STACKED = {"packed_colwise": -2, "colwise": -2, "rowwise": -1, "packed_rowwise": -1}
EMBEDDINGS = {"embedding_rowwise": 0, "embedding_colwise": 1}
_EXPERTS, _LATENT = "moe_tp_experts", "mla_kv_a_proj"
_EXPERT_PARAMETER, _DISPATCH = "grouped_gemm", "ep_dispatch_experts"


@dataclass(frozen=True)
class Sharded:
    """A module that the plan names, and how."""

    fqn: str
    style: str


def shard(model: nn.Module, axes: Axes) -> list[Sharded]:
    """Cuts the weights of the model's plan to those of one rank, in place. Raises UsageError."""
    name, tp = type(model).__name__, axes.tp
    if tp == 1:
        return []
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    if not plan:
        raise UsageError(f"{name} has no tensor parallel plan (tp_plan): give a mesh with tp=1.")
    found = []
    for fqn, module in model.named_modules():
        style = _style(plan, fqn)
        if style is None:
            continue
        if style not in _MODULES or (_MODULES[style] is not None and not isinstance(module, nn.Linear)):
            raise UsageError(f"{name} has {style!r} for {fqn} in its tp_plan, which is not simulated: give tp=1.")
        if style == _LATENT and not rope_width(model):
            raise UsageError(f"{name} has {style!r} for {fqn}, but no qk_rope_head_dim in its config: give tp=1.")
        found.append(Sharded(fqn, _SAME.get(style, style)))
    _require_heads(model, found, tp)
    for each in found:
        _cut(model, each, tp)
    owners = {each.fqn: each.style for each in found}
    for fqn, parameter in list(model.named_parameters()):
        style = _style(plan, fqn)
        owner, _, attribute = fqn.rpartition(".")
        if style is None:
            continue
        split = _of_parameter(style, owners.get(owner), parameter)
        if split is None:
            raise UsageError(f"{name} has {style!r} for {fqn} in its tp_plan, which is not simulated: give tp=1.")
        if owners[owner] != _EXPERTS or axes.expert_tp > 1:
            setattr(model.get_submodule(owner), attribute, _slice(parameter, split, tp, fqn))
    return found


def experts(model: nn.Module, axes: Axes, sharded: Iterable[Sharded]) -> dict[str, list[str]]:
    """Modules that hold the matrices of many experts, and their names. Raises UsageError where ep has no plan."""
    name = type(model).__name__
    plan: Mapping[str, str] = getattr(model, "ep_plan", None) or {}
    named = [fqn for fqn, _ in model.named_modules() if _style(plan, fqn) == _DISPATCH]
    if axes.ep > 1 and not named:
        raise UsageError(f"{name} has no experts with an expert parallel plan (ep_plan): give a mesh with ep=1.")
    found: dict[str, list[str]] = {}
    for fqn in dict.fromkeys([*named, *(each.fqn for each in sharded if each.style == _EXPERTS)]):
        found[fqn] = []
        for parameter, tensor in model.get_submodule(fqn).named_parameters(prefix=fqn):
            if axes.ep == 1 or _style(plan, parameter) == _EXPERT_PARAMETER:
                found[fqn].append(parameter)
                if tensor.shape[0] % axes.ep:
                    raise UsageError(f"{fqn} has {tensor.shape[0]} experts, which ep={axes.ep} does not divide.")
    return found


def rope_width(model: nn.Module) -> int:
    """Features of latent attention's keys that every head shares; 0 where there are none."""
    return int(getattr(_text_config(model), "qk_rope_head_dim", 0) or 0)


def _text_config(model: nn.Module) -> Any:  # a transformers configuration, or None
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def whole_experts(model: nn.Module, axes: Axes) -> Axes:
    """The axes, experts lying whole where the model's tensor parallel plan does not split them. Raises UsageError."""
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    if axes.tp == 1 or axes.ep == 1 or _EXPERTS in plan.values():
        return axes
    if axes.etp not in (None, 1):
        name = type(model).__name__
        raise UsageError(f"{name} does not split experts in its tp_plan, but etp={axes.etp} would: give etp=1.")
    return replace(axes, etp=1)


def _of_parameter(style: str, owner: str | None, parameter: torch.Tensor) -> int | None:
    """The dimension that a parameter without a module of its own is split at; None: not known."""
    if owner == _EXPERTS and parameter.dim() == 3:
        return _STACKED.get(style)
    if owner == _EXPERTS and parameter.dim() == 2:  # a bias for each expert: split as the outputs are
        return -1 if style in ("packed_colwise", "colwise") else None
    if owner == "local_params" and parameter.dim() == 1 and style == "colwise":
        return 0
    return None


def _cut(model: nn.Module, each: Sharded, tp: int) -> None:
    dimension = _MODULES[each.style]
    if dimension is None:
        return
    module = model.get_submodule(each.fqn)
    assert isinstance(module, nn.Linear)
    module.weight = _slice(module.weight, dimension, tp, each.fqn)
    if dimension == 0 and isinstance(module.bias, nn.Parameter):
        module.bias = _slice(module.bias, 0, tp, each.fqn)
    if each.style == "colwise_gather_output":  # what follows sees the outputs of all ranks
        module.register_forward_hook(lambda _module, _inputs, output: torch.cat([output] * tp, dim=-1))
    if each.style == "rowwise_split_input":
        width = module.weight.shape[1]
        module.register_forward_pre_hook(lambda _module, inputs: (inputs[0].narrow(-1, 0, width), *inputs[1:]))


def _slice(parameter: torch.Tensor, dimension: int, tp: int, fqn: str) -> nn.Parameter:
    sizes = list(parameter.shape)
    if sizes[dimension] % tp:
        raise UsageError(f"{fqn} has {sizes[dimension]} features, which tp={tp} does not divide.")
    sizes[dimension] //= tp
    return nn.Parameter(parameter.new_empty(sizes), requires_grad=parameter.requires_grad)


def _style(plan: Mapping[str, str], fqn: str) -> str | None:
    """`layers.*.mlp.up_proj` matches that module wherever the list lies."""
    for pattern, style in plan.items():
        regex = r"\d+".join(re.escape(part) for part in pattern.split("*"))
        if re.fullmatch(rf"(?:.*\.)?{regex}", fqn):
            return style
    return None


def _require_heads(model: nn.Module, found: Iterable[Sharded], tp: int) -> None:
    """Heads are split whole: a rank with a part of one would do what no rank does."""
    if not any(each.style == "colwise" and "att" in each.fqn for each in found):
        return
    config = _text_config(model)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % tp:
            raise UsageError(f"{type(model).__name__} has {heads} heads ({name}), which tp={tp} does not divide.")
