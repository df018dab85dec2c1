"""One rank's shards of a model, by its own tensor parallel plan, and what they send. Imports torch.

Styles are those of transformers' `tp_plan`, cut and sent as torch's tensor parallelism does. A style that is not known
here is refused: its ranks would do another work than what is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flopprof.errors import UsageError
from flopprof.profile import OperatorRow, Profile

# style -> the dimension of a Linear's or an Embedding's weight that is split; None: nothing is
_MODULES: dict[str, int | None] = {
    "colwise": 0,
    "colwise_gather_output": 0,
    "rowwise": 1,
    "rowwise_split_input": 1,
    "embedding_rowwise": None,  # looked up whole here, so that no index leaves the table
    "replicated_with_grad_allreduce": None,
    "moe_tp_experts": None,
}
# style -> the dimension, from the end, of a parameter that holds the matrices of all experts, (expert, out, in)
_STACKED = {"packed_colwise": -2, "rowwise": -1}


@dataclass(frozen=True)
class Sharded:
    """A module that the plan names, and how."""

    fqn: str
    style: str


def shard(model: nn.Module, tp: int) -> list[Sharded]:
    """Cuts the weights of the model's plan to those of one rank, in place. Raises UsageError."""
    name = type(model).__name__
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    if not plan:
        raise UsageError(f"{name} has no tensor parallel plan (tp_plan): give a mesh with tp=1.")
    found = []
    for fqn, module in model.named_modules():
        style = next((style for pattern, style in plan.items() if _matches(pattern, fqn)), None)
        if style is None:
            continue
        if style not in _MODULES or (_MODULES[style] is not None and not isinstance(module, nn.Linear)):
            raise UsageError(f"{name} has {style!r} for {fqn} in its tp_plan, which is not simulated: give tp=1.")
        found.append(Sharded(fqn, style))
    experts = {each.fqn for each in found if each.style == "moe_tp_experts"}
    _require_heads(model, found, tp)
    for each in found:
        _cut(model, each, tp)
    for fqn, parameter in list(model.named_parameters()):
        style = next((style for pattern, style in plan.items() if _matches(pattern, fqn)), None)
        owner, _, attribute = fqn.rpartition(".")
        if style is None:
            continue
        if style not in _STACKED or owner not in experts or parameter.dim() != 3:
            raise UsageError(f"{name} has {style!r} for {fqn} in its tp_plan, which is not simulated: give tp=1.")
        setattr(model.get_submodule(owner), attribute, _slice(parameter, _STACKED[style], tp, fqn))
    return found


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


def _matches(pattern: str, fqn: str) -> bool:
    """`layers.*.mlp.up_proj` matches that module wherever the list lies."""
    regex = r"\d+".join(re.escape(part) for part in pattern.split("*"))
    return re.fullmatch(rf"(?:.*\.)?{regex}", fqn) is not None


def _require_heads(model: nn.Module, found: Iterable[Sharded], tp: int) -> None:
    """Heads are split whole: a rank with a part of one would do what no rank does."""
    if not any(each.style == "colwise" and "att" in each.fqn for each in found):
        return
    config: Any = getattr(model, "config", None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % tp:
            raise UsageError(f"{type(model).__name__} has {heads} heads ({name}), which tp={tp} does not divide.")


def sent(
    profile: Profile, sharded: Iterable[Sharded], local: Mapping[str, int], element: Mapping[str, int], tp: int
) -> list[tuple[str, int]]:
    """(module, bytes that a rank sends of it in forward and backward): one collective for each split product.

    Forward: the sum of a row-wise product, and of experts, is reduced; gathered outputs are gathered. Backward: the
    gradient of a column-wise product's input is reduced, that of an input which was split is gathered.
    """
    rows: dict[str, list[OperatorRow]] = {}
    for row in profile.operators:
        if row.phase == "forward":
            rows.setdefault(row.fqn, []).append(row)
    modules = {row.fqn: row for row in profile.modules}
    found = []
    for each in sharded:
        reduced = gathered = 0
        own = {name: size for name, size in local.items() if name.startswith(f"{each.fqn}.")}
        width = max((element[name] for name in own), default=0)
        output = _numel(modules[each.fqn].output_shape) * modules[each.fqn].calls * width if each.fqn in modules else 0
        if each.style == "replicated_with_grad_allreduce":
            reduced += sum(size * element[name] for name, size in own.items())
        elif each.style == "embedding_rowwise":
            reduced += output
        elif each.style == "moe_tp_experts":  # its input is as large; routing weights, a thousandth, are left out
            reduced += 2 * output
        else:
            for row in rows.get(each.fqn, ()):
                more = _of_product(row, each.style, tp)
                reduced, gathered = reduced + more[0], gathered + more[1]
        found.append((each.fqn, (2 * reduced + gathered) * (tp - 1) // tp))
    return found


def _of_product(row: OperatorRow, style: str, tp: int) -> tuple[int, int]:
    """Bytes that are reduced, and bytes that are gathered, of a Linear's product."""
    entry = next(operand for operand in row.operands if operand.factor and operand.kind != "parameter")
    size = torch.empty((), dtype=getattr(torch, row.dtype), device="meta").element_size()
    result, given = _numel(row.outputs[0]) * row.calls * size, _numel(entry.shape) * row.calls * size
    back = given if entry.requires_grad else 0
    return {
        "colwise": (back, 0),
        "colwise_gather_output": (back, result * tp),
        "rowwise": (result, 0),
        "rowwise_split_input": (result, back * tp),
    }[style]


def _numel(shape: Iterable[int] | None) -> int:
    count = 1
    for size in shape or (0,):
        count *= size
    return count
