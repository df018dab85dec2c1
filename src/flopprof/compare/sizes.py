"""What a model takes on disk in several dtypes, and how many of its weights are zero.

stored     every parameter and persistent buffer in its own dtype, tied ones once; of a checkpoint, what its files hold
float32    floating tensors at 4 bytes an element, the others as stored; bfloat16 at 2 bytes
int8       weights of two dimensions and more that the forward multiplies: 1 byte an element and one 16-bit scale a row
           (first dimension); other floating tensors (norms, biases, embeddings that are only looked up) in 16 bit
int4       the same weights: half a byte an element and one 16-bit scale per group of 128 in a row
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from flopprof.compare.comparison import Density
from flopprof.compare.memory import parts
from flopprof.counting.attribution import unwrap, walk
from flopprof.models import Workload
from flopprof.profile import OperatorRow, Profile

_GROUP = 128
_SCALE_BYTES = 2
_QUANTISED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)


def sizes(workload: Workload, profile: Profile) -> dict[str, int]:
    """Bytes on disk by name: stored, float32, bfloat16, int8, int4, as the module's head says."""
    model = unwrap(workload.model)
    names = _multiplied(profile)
    quantisable = {id(tensor) for name, tensor in _parameters(model) if name in names and tensor.dim() > 1}
    found = dict.fromkeys(("stored", "float32", "bfloat16", "int8", "int4"), 0)
    for tensor in _stored(model):
        elements, own = tensor.numel(), sum(part.numel() * part.element_size() for part in parts(tensor))
        packed = tensor.dtype in _QUANTISED
        floating = packed or tensor.is_floating_point()
        rows = tensor.shape[0] if tensor.dim() > 1 else 0
        found["stored"] += own
        found["float32"] += 4 * elements if floating else own
        found["bfloat16"] += 2 * elements if floating else own
        if rows and (packed or id(tensor) in quantisable):
            length = elements // rows
            found["int8"] += elements + _SCALE_BYTES * rows
            found["int4"] += (elements + 1) // 2 + _SCALE_BYTES * rows * -(-length // _GROUP)
        else:
            found["int8"] += 2 * elements if floating else own
            found["int4"] += 2 * elements if floating else own
    if workload.checkpoint is not None:
        found["stored"] = workload.checkpoint.n_bytes
    return found


def density(model: nn.Module, profile: Profile) -> tuple[Density, int] | None:
    """Non-zero elements of the weights that the forward multiplies, and its FLOPs if the zeros were skipped.

    Masks of torch.nn.utils.prune and parametrizations are applied. Each element of a weight takes part in as many
    multiply-adds as any other, so that a share of zeros is that share of the products. None where there are no values,
    as on meta, or no weights that are parameters.
    """
    model = unwrap(model)
    rows = [row for row in profile.operators if row.phase == "forward"]
    names = _multiplied(profile)
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in _effective(model).items():
        if name in names:
            if tensor.is_meta:
                return None
            found[name] = (int(torch.count_nonzero(tensor.detach())), tensor.numel())
    if not found:
        return None
    nonzero, elements = (sum(column) for column in zip(*found.values(), strict=True))
    sparse = sum(_skipping_zeros(row, found) for row in rows)
    return Density(nonzero=nonzero, elements=elements), sparse


def masked(model: nn.Module) -> bool:
    """Whether some weight has a mask of torch.nn.utils.prune over it."""
    return any(
        key.endswith("_orig") and f"{key.removesuffix('_orig')}_mask" in module._buffers
        for module in model.modules()
        for key in module._parameters
    )


def _skipping_zeros(row: OperatorRow, found: dict[str, tuple[int, int]]) -> int:
    counts = [found[name] for name in _factors(row) if name in found]
    nonzero, elements = (sum(column) for column in zip(*counts, strict=True)) if counts else (1, 1)
    return row.flops * nonzero // elements if elements else row.flops


def _factors(row: OperatorRow) -> list[str]:
    """The parameters that a row multiplies: `a + b` where one operand is computed from two."""
    operands = (operand for operand in row.operands if operand.factor and operand.kind == "parameter")
    return [name for operand in operands for name in operand.name.split(" + ")]


def _multiplied(profile: Profile) -> set[str]:
    return {name for row in profile.operators if row.phase == "forward" for name in _factors(row)}


def _parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for fqn, module in walk(model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{fqn}.{key}" if fqn else key, parameter


def _effective(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter by name, with its mask, or as the parametrization of one tensor makes it."""
    found = dict(_parameters(model))
    for fqn, module in walk(model):
        prefix = f"{fqn}." if fqn else ""
        for key, parameter in module._parameters.items():
            mask = module._buffers.get(f"{key.removesuffix('_orig')}_mask") if key.endswith("_orig") else None
            if parameter is not None and mask is not None:
                found[f"{prefix}{key}"] = parameter.detach() * mask
        made = getattr(module, "parametrizations", None)
        for key, listed in made.items() if isinstance(made, nn.ModuleDict) else ():
            if hasattr(listed, "original"):
                found[f"{prefix}parametrizations.{key}.original"] = getattr(module, key).detach()
    return found


def _stored(model: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors of state_dict(), each once however often it is registered or tied."""
    seen: set[object] = set()
    for tensor in tree_leaves(model.state_dict(keep_vars=True)):
        if isinstance(tensor, torch.Tensor) and _identity(tensor) not in seen:
            seen.add(_identity(tensor))
            yield tensor


def _identity(tensor: torch.Tensor) -> object:
    try:
        return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)
    except (RuntimeError, NotImplementedError):  # made of other tensors
        return id(tensor)
