"""The multiply-adds that torchvision publishes with a model's weights: billions, to three decimals."""

from __future__ import annotations

from typing import Any

import torch

from flopprof.models import Workload, load
from flopprof.models.inputs import describe_inputs, tensors_in

ROUNDING = "torchvision rounds to three decimals of a GMAC"
_UNIT = 1_000_000  # the last decimal, in multiply-adds


def published_flops(workload: Workload) -> int:
    """Its published forward FLOPs. Raises LookupError, saying why, where nothing is published for this workload."""
    from torchvision.models import get_model_weights

    name = workload.name.lower()
    weights: Any = get_model_weights(name)
    default = getattr(weights, "DEFAULT", None)
    operations = default.meta.get("_ops") if default is not None else None
    if operations is None:
        raise LookupError(f"no figure is published for {name}")
    usual = load(name)
    if workload.model.training:
        raise LookupError("published for evaluation")
    if _shapes(usual) != _shapes(workload):
        raise LookupError(f"published for input {describe_inputs(usual.args, usual.kwargs)}")
    if _parameters(usual.model) != _parameters(workload.model):
        raise LookupError("published for the model's default arguments")
    return 2 * _UNIT * round(float(operations) * 1000)


def is_rounding(difference: int) -> bool:
    """Is it no more than half of the last published decimal?"""
    return abs(difference) <= _UNIT


def _shapes(workload: Workload) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_in([*workload.args, *workload.kwargs.values()])]


def _parameters(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
