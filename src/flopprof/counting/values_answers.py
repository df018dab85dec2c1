"""Questions about values, answered from what meta tensors carry: numbers, shapes that depend on values, copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from flopprof.counting.values_plans import Plan, tensors_in
from flopprof.counting.values_store import Fact, aside, fits
from flopprof.errors import ValuesUnknown

if TYPE_CHECKING:
    from flopprof.counting.values import Values

_aten = torch.ops.aten
_SELECTIONS = frozenset({_aten.index.Tensor, _aten.masked_select.default})
# Asked by torch's own encoder before it packs what is padded, which it does not on meta: another branch.
_OF_DEVICES = frozenset({"aten::_nested_tensor_from_mask_left_aligned"})
_MASKS = (torch.bool, torch.uint8)
_MOST_REPEATS = 1 << 25
_MOST_IN_PARTS = 1 << 20  # elements of what is known in parts


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operator.

    lowered  (args, kwargs) of the same call on the CPU; None where some operand is not known
    said     the guesses that the operands rest on
    labels   the result is labels, if the operands are known
    """

    plan: Plan
    func: Any
    args: Any
    kwargs: Any
    lowered: tuple[Any, Any] | None
    said: frozenset[str]
    labels: bool


def read(values: Values, call: Call) -> Any:
    """A copy from meta to a real device: real values."""
    if call.lowered is None or any(
        fact is not None and fact.labels for fact in map(values.fact, tensors_in(call.args))
    ):
        raise unknown(values, call.plan)
    values.say(call.said)
    args, kwargs = call.lowered
    if call.plan.base == "aten::copy":
        return call.func(call.args[0], *args[1:], **kwargs)
    return call.func(*args, **{**kwargs, "device": call.kwargs["device"]})


def answer(values: Values, call: Call) -> Any:
    """The result of an operator whose result is a number, or has a shape that depends on values."""
    if call.func in _SELECTIONS:
        return _select(values, call)
    if call.plan.base in _OF_DEVICES:
        raise unknown(values, call.plan)
    if call.lowered is not None and not call.plan.writes and not _is_huge(call):
        values.say(call.said)
        return forge(values, call)
    try:
        return call.func(*call.args, **call.kwargs)
    except RuntimeError as error:
        raise unknown(values, call.plan) from error


def forge(values: Values, call: Call) -> Any:
    """What the operator gives on the CPU, its tensors put on meta with their values."""
    assert call.lowered is not None
    args, kwargs = call.lowered

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_nested or leaf.layout is not torch.strided:
            raise unknown(values, call.plan)
        empty = _aten.empty_strided.default(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")
        if fits(empty, floats=values.floats()):
            values.store.bind(empty, leaf, call.said, call.labels)
        return empty

    with aside():
        return tree_map(put, call.func(*args, **kwargs))


def joined(values: Values, args: Any, out: Any) -> None:
    """Of tensors joined end to end, not all of them known, the parts that are stay known."""
    dim = args[1] if len(args) > 1 else 0
    if out.numel() > _MOST_IN_PARTS or not out.is_contiguous() or not fits(out, floats=values.floats()):
        return
    said: set[str] = set()
    parts, start = [], 0
    with aside():
        for tensor in args[0]:
            if tensor.dim() != out.dim():  # nothing at all, whatever its shape
                continue
            fact = values.fact(tensor) if tensor.numel() else None
            value = values.store.shadow(tensor, fact) if fact is not None and not fact.labels else None
            if fact is not None and value is not None:
                parts.append((start, value))
                said |= fact.guesses
            start += tensor.shape[dim]
        if parts and values.store.get(out) is None:
            values.store.bind_parts(out, dim, parts, frozenset(said))


def gathered(values: Values, plan: Plan, args: Any, kwargs: Any, error: RuntimeError) -> Any:
    """(args, kwargs), all on meta where some were real: a model that makes tensors on the CPU runs there.

    Raises `error` where that is not what it complains of, or a real tensor would be written to.
    """
    if "device" not in str(error) or any(not tensor.is_meta for tensor in plan.written(args, kwargs)):
        raise error

    def move(leaf: torch.Tensor) -> torch.Tensor:
        if leaf.device.type != "cpu":
            return leaf
        with aside():
            empty = _aten.empty_strided.default
            made: torch.Tensor = empty(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")
            if values.fits(made):
                values.store.bind(made, leaf, frozenset(), labels=False)
        return made

    return tree_map_only(torch.Tensor, move, (args, kwargs))


def _is_huge(call: Call) -> bool:
    if call.plan.base != "aten::repeat_interleave":
        return False
    assert call.lowered is not None
    with aside():
        return int(call.lowered[0][0].sum()) > _MOST_REPEATS


def _select(values: Values, call: Call) -> Any:
    """x[mask], masked_select: how many are selected is read from the mask, also where x is not known."""
    if call.plan.base == "aten::masked_select":
        shape = torch.broadcast_shapes(call.args[0].shape, call.args[1].shape)
        source: Any = _aten.expand.default(call.args[0], shape)
        indices = [_aten.expand.default(call.args[1], shape)]
    else:
        source, indices = call.args
    found: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype in _MASKS:
            fact = values.fact(index)
            if index.is_meta and fact is None:
                raise unknown(values, call.plan)
            if fact is not None:
                values.say(fact.guesses)
            at = len(found)
            if index.shape != source.shape[at : at + index.dim()]:  # which indices on meta do not show
                raise IndexError(
                    f"The shape of the mask {list(index.shape)} does not match the shape of the indexed tensor "
                    f"{list(source.shape)} at dimension {at}"
                )
            found += _places(values, index, fact)
        else:
            found.append(index)
    out = _aten.index.Tensor(source, found)
    values.compute(call, out)
    return out


def _places(values: Values, mask: torch.Tensor, fact: Fact | None) -> list[torch.Tensor]:
    """Where a mask is True: an index tensor on meta for each of its dimensions."""
    with aside():
        value = mask if fact is None else values.store.shadow(mask, fact)
        assert value is not None
        columns = []
        for places in _aten.unbind.int(_aten.nonzero.default(value), 1):
            index = _aten.empty.memory_format(places.shape, dtype=torch.int64, device="meta")
            values.store.bind(index, places, fact.guesses if fact is not None else frozenset(), labels=False)
            columns.append(index)
        return columns


def higher(values: Values, call: Call) -> Any:
    """A control-flow operator: no mode may be active around it, but its branches are followed."""

    def inside(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor | type) or not callable(leaf):
            return leaf

        def followed(*args: Any, **kwargs: Any) -> Any:
            with values:
                return leaf(*args, **kwargs)

        return followed

    args = call.args
    if call.plan.base == "higher_order::cond" and isinstance(args[0], torch.Tensor) and args[0].is_meta:
        fact = values.fact(args[0])
        if fact is None:
            raise unknown(values, call.plan)
        values.say(fact.guesses)
        with aside():
            args = (values.store.shadow(args[0], fact), *args[1:])
    if "mutation" in call.plan.base or "functionalized" in call.plan.base:
        for leaf in tree_leaves((args, call.kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                values.store.forget(leaf)
    args, kwargs = tree_map(inside, (args, call.kwargs))
    return call.func(*args, **kwargs)


def unknown(values: Values, plan: Plan) -> ValuesUnknown:
    """The error for a question that has no answer, noted."""
    error = ValuesUnknown(
        f"{plan.base} asks for values that the meta device does not have, and that nothing honest can be guessed for: "
        "give the inputs that decide them on the CPU (small integers keep their values on meta), or count on the CPU."
    )
    values.refused.append(error)
    return error
