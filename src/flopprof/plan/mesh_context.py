"""Texts that are split over context parallel ranks: is a rank's work the whole's, divided? Imports torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from flopprof.errors import UsageError
from flopprof.models import Workload
from flopprof.profile import Profile


def require_divisible(workload: Workload, whole: Profile, cp: int) -> None:
    """Raises UsageError where cp ranks with a part of each text do not share the whole's FLOPs evenly.

    A rank has a cp-th of the queries and, once they are gathered, all keys and values. So products with weights must be
    linear in the length of the text, and products of two activations (attention) quadratic: both are counted, at the
    length of a part.
    """
    if not workload.tokens or not workload.samples:
        raise UsageError(f"{workload.name} reads no text: context parallelism splits texts; give cp=1.")
    seq = workload.tokens // workload.samples
    if seq % cp:
        raise UsageError(f"cp={cp} does not divide {seq} tokens: give another --seq.")
    part = replace(
        workload,
        args=tuple(_part(value, seq, cp) for value in workload.args),
        kwargs={name: _part(value, seq, cp) for name, value in workload.kwargs.items()},
        tokens=workload.tokens // cp,
        on_cpu=None,
    ).count(backward=True)
    linear, quadratic = _by_kind(whole)
    part_linear, part_quadratic = _by_kind(part)
    for fqn in linear.keys() | quadratic.keys():
        if linear[fqn] != cp * part_linear[fqn] or quadratic[fqn] != cp * cp * part_quadratic[fqn]:
            raise UsageError(
                f"{fqn or workload.name} of {workload.name} does not divide over parts of a text (it is neither "
                "attention over all pairs nor a product with weights): give cp=1."
            )


def _by_kind(profile: Profile) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """FLOPs by module: of products with a weight or a buffer, and of products of activations."""
    linear, quadratic = Counter[str](), Counter[str]()
    by_site = {row.site: row for row in profile.operators if row.site}
    for row in profile.operators:
        source = by_site.get(row.joined_to, row)
        weighed = source.parameter or any(operand.kind != "activation" for operand in source.operands if operand.factor)
        (linear if weighed else quadratic)[row.fqn] += row.flops
    return linear, quadratic


def _part(value: Any, seq: int, cp: int) -> Any:  # tensors of texts; everything else as it is
    if isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[1] == seq:
        return value.narrow(1, 0, seq // cp).contiguous()
    return value
