"""flex_attention: a higher-order operator that is told its mask, block by block, and is counted by its shapes.

The mask lists the blocks that it lets through whole, and those where a rule decides pair by pair. The rule is
evaluated (outside every mode) while these are few; the operator itself is never looked into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from flopprof.formulas import Cost
from flopprof.formulas.attention import flex_cost

if TYPE_CHECKING:
    from flopprof.counting.runtime import FlopCounter

FORWARD, BACKWARD = "higher_order::flex_attention", "higher_order::flex_attention_backward"
ROUNDED = "Blocks that flex_attention masks in part are counted whole in its causal figure where there are many."

# Pairs that the rule is asked about, over all blocks; and how many at a time.
_MOST_PAIRS = 1 << 25
_AT_ONCE = 1 << 22
# A mask that nobody gave is one block of this side.
_NO_MASK_SIDE = 1 << 30

# Masks outlive calls: a model uses one in every layer. indices -> (what it depends on, pairs, whether exact)
_known: Any = WeakTensorKeyDictionary()

_SHARED = ("block_mask", "scale", "kernel_options", "score_mod_other_buffers", "mask_mod_other_buffers")
_ARGUMENTS = {
    FORWARD: ("query", "key", "value", "score_mod", *_SHARED),
    BACKWARD: (
        *("query", "key", "value", "out", "logsumexp", "grad_out", "grad_logsumexp", "fw_graph", "joint_graph"),
        *_SHARED,
    ),
}


class _Mask(NamedTuple):
    """The blocks of a mask: how many there are in each row, and which; `full` ones let every pair through."""

    number: torch.Tensor
    indices: torch.Tensor
    full_number: torch.Tensor | None
    full_indices: torch.Tensor | None
    sides: tuple[int, int]
    lengths: tuple[int, int]
    rule: Callable[..., Any]
    buffers: tuple[Any, ...]


def cost(counter: FlopCounter, name: str, args: Any, kwargs: Any, node: Any) -> Cost:
    """FLOPs of one call, forward or backward (of what the node's first three edges want)."""
    given = dict(zip(_ARGUMENTS[name], args, strict=False)) | kwargs
    query, key, value = (given[operand].shape for operand in ("query", "key", "value"))
    # As a tuple: lengths, number and indices of partial blocks and of full ones, ..., block sides, rule.
    _queries, _keys, number, indices, full_number, full_indices, *rest = given["block_mask"]
    sides = (int(rest[-3]), int(rest[-2]))
    buffers = given.get("mask_mod_other_buffers", ())
    mask = _Mask(number, indices, full_number, full_indices, sides, (query[-2], key[-2]), rest[-1], buffers)
    pairs, exact = _visible(mask)
    if pairs is not None:
        # One mask may serve all batches and heads.
        pairs *= query[0] * query[1] // (mask.indices.shape[0] * mask.indices.shape[1])
    if not exact:
        counter.assume(ROUNDED)
    if name == FORWARD:
        return flex_cost(query, key, value, pairs)
    edges = node.next_functions[:3] if node is not None else ()
    wanted = tuple(function is not None for function, _index in edges)
    return flex_cost(query, key, value, pairs, backward=True, wanted=wanted if len(wanted) == 3 else (True,) * 3)


def _visible(mask: _Mask) -> tuple[int | None, bool]:
    """(pairs that the mask lets through, exactly); None where there is no mask, or no values in it."""
    indices = mask.indices
    if min(mask.sides) >= _NO_MASK_SIDE or indices.is_meta or isinstance(indices, FakeTensor):
        return None, True
    tensors = (indices, *mask.buffers)
    state = (mask.lengths, getattr(mask.rule, "code", id(mask.rule)), *((id(t), _version(t)) for t in tensors))
    known = _known.get(indices)
    if known is None or known[0] != state:
        with _disable_current_modes(), torch.no_grad():
            known = _known[indices] = (state, *_count(mask))
    _state, pairs, exact = known
    return pairs, exact


def _version(value: Any) -> int | None:
    """How often a tensor was written to, where it keeps count."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def _count(mask: _Mask) -> tuple[int, bool]:
    """(pairs over the mask's own batches and heads, whether the rule was asked about each)."""
    blocks = _listed(mask.number, mask.indices)
    whole = 0
    if mask.full_number is not None and mask.full_indices is not None:
        whole = _area(mask, _listed(mask.full_number, mask.full_indices))
    largest = min(mask.sides[0], mask.lengths[0]) * min(mask.sides[1], mask.lengths[1])
    if len(blocks) * largest > _MOST_PAIRS:
        return whole + _area(mask, blocks), False
    return whole + sum(_passed(mask, chunk) for chunk in blocks.split(max(1, _AT_ONCE // largest))), True


def _listed(number: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(batch, head, query block, key block) of each block listed: the first `number` indices of every row."""
    positions = torch.arange(indices.shape[-1], device=indices.device)
    batch, head, row, position = (positions < number.unsqueeze(-1)).nonzero(as_tuple=True)
    return torch.stack((batch, head, row, indices[batch, head, row, position].long()), dim=1)


def _area(mask: _Mask, blocks: torch.Tensor) -> int:
    """Pairs inside these blocks; the last ones may reach over the end."""
    rows, columns = (
        (length - blocks[:, dim] * side).clamp(0, side)
        for dim, side, length in zip((2, 3), mask.sides, mask.lengths, strict=True)
    )
    return int((rows * columns).sum())


def _passed(mask: _Mask, blocks: torch.Tensor) -> int:
    """Pairs of these blocks that the rule (batch, head, query, key) -> bool lets through."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    queries, keys = (
        blocks[:, dim, None] * side + torch.arange(min(side, length), device=blocks.device)
        for dim, side, length in zip((2, 3), mask.sides, mask.lengths, strict=True)
    )
    exists = (queries < mask.lengths[0])[:, :, None] & (keys < mask.lengths[1])[:, None, :]
    places = (queries.clamp(max=mask.lengths[0] - 1), keys.clamp(max=mask.lengths[1] - 1))
    rule = mask.rule
    for dims in ((None, None, None, 0), (None, None, 0, None), (0, 0, 0, 0)):
        rule = torch.vmap(rule, in_dims=dims + (None,) * len(mask.buffers))
    with TransformGetItemToIndex():  # lets a rule index its buffers by place
        seen = rule(blocks[:, 0], blocks[:, 1], *places, *mask.buffers)
    return int((seen & exists).sum())
