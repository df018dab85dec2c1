"""Which gradients a forward operator wants, what they cost, and what its backward operators computed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import msgspec

from flopprof.profile import Operand, OperatorRow, Profile

# FLOPs in the profile's attention convention, over every pair, over the visible pairs.
Amount = tuple[int, int, int]
_NONE: Amount = (0, 0, 0)

# One layer of a recurrence, in one direction: x, w_ih, w_hh, two biases, hx, cx.
_LAYERS = frozenset({"aten::mkldnn_rnn_layer"})
_HX, _CX = 5, 6
# Distances by one product of widened factors, whose gradients are products of the plain ones, and always both.
_NOT_TWICE = frozenset({"aten::_euclidean_dist"})


class Joint(msgspec.Struct, frozen=True, kw_only=True):
    """A forward row (or the rows inside one autograd node), and the backward rows that differentiate it.

    forward    FLOPs in the profile's attention convention, full, and causal; so are the others
    wanted     of the gradients that autograd wants; computed: of those that ran
    missing    of the gradients that nobody wants, by reason; wanted + missing = 2 x forward, and
               computed = wanted where one backward reached everything
    """

    sites: tuple[str, ...]
    name: str
    op: str
    calls: int
    forward: Amount
    wanted: Amount
    computed: Amount
    missing: dict[str, Amount]


def joints(profile: Profile) -> tuple[Joint, ...]:
    """Every forward row of a profile, with what its backward computed.

    A checkpointed operator that runs without a graph has its graph, and its wishes, in its replay.
    """
    computed: dict[str, Amount] = defaultdict(lambda: _NONE)
    for row in profile.operators:
        if row.phase == "backward" and row.joined_to:
            computed[row.joined_to] = _sum((computed[row.joined_to], _amount(row)))
    trainable = {parameter.name: parameter.trainable for parameter in profile.parameters}
    replays: dict[tuple[object, ...], list[OperatorRow]] = defaultdict(list)
    for row in profile.operators:
        if row.phase == "recompute" and row.site and not row.joined_to:
            replays[_likeness(row)].append(row)
    groups: dict[tuple[object, ...], list[OperatorRow]] = defaultdict(list)
    for number, row in enumerate(profile.operators):
        if row.phase == "forward":
            likeness = None if any(row.gradients_wanted) else _likeness(row)
            # Rows that a replay does not tell apart (of two lines, say) share what is joined to their replays.
            shared = likeness if likeness in replays else None
            groups[shared or (row.site or f"{row.fqn}:{number}",)].append(row)
    return tuple(_joint(rows, replays.get(key, []), computed, trainable) for key, rows in groups.items())


def _joint(
    rows: list[OperatorRow], replays: list[OperatorRow], computed: dict[str, Amount], trainable: dict[str, bool]
) -> Joint:
    sites = [row.site for row in (*rows, *replays)]
    calls = sum(row.calls for row in rows)
    # A checkpoint within one is replayed twice, and differentiated once.
    parts = _first(replays, calls)
    done = sum(part.calls for part in parts)
    parts += _first(rows, calls - done)
    total = _sum(computed.get(each, _NONE) for each in dict.fromkeys(sites))
    missing: dict[str, Amount] = {}
    wanted = _sum(_wishes(part, trainable, missing) for part in parts if _splits(part))
    whole = [part for part in parts if not _splits(part)]
    if whole:
        # What its gradients cost is not told by its shapes: what its backward computed is taken for what was wanted.
        twice, found = _sum(_times(_amount(part), 2) for part in whole), _less(total, wanted)
        reason = _reason_of_whole(whole, any(found))
        missing[reason] = _sum((missing.get(reason, _NONE), _less(twice, found)))
        wanted = _sum((wanted, found))
    return Joint(
        sites=tuple(dict.fromkeys(sites)),
        name=rows[0].parameter or rows[0].fqn,
        op=rows[0].op,
        calls=calls,
        forward=_sum(_amount(row) for row in rows),
        wanted=wanted,
        computed=total,
        missing={reason: amount for reason, amount in missing.items() if any(amount)},
    )


def _wishes(row: OperatorRow, trainable: dict[str, bool], missing: dict[str, Amount]) -> Amount:
    """FLOPs of the gradients wanted; those of the others are added to `missing`, by reason."""
    wanted, recorded = _NONE, any(row.gradients_wanted)
    for operand, wish, cost in _gradients(row):
        if wish:
            wanted = _sum((wanted, cost))
        else:
            reason = _reason(row, operand, recorded, trainable)
            missing[reason] = _sum((missing.get(reason, _NONE), cost))
    return wanted


def _splits(row: OperatorRow) -> bool:
    """Do its shapes tell what each gradient costs? Of one product, of attention and of one recurrent layer."""
    factors = sum(operand.factor for operand in row.operands)
    if factors == 3 or row.op in _LAYERS:
        return "attention" in row.op or "attn" in row.op or (row.op in _LAYERS and len(row.operands) > _CX)
    return factors == 2 and row.op not in _NOT_TWICE


def _reason_of_whole(rows: list[OperatorRow], computed: bool) -> str:
    if not any(any(row.gradients_wanted) for row in rows):
        return "no_graph"
    if not computed:
        return "unreached"
    weights = [o for row in rows for o in row.operands if o.factor and o.kind == "parameter" and len(o.shape) > 1]
    return "no_input_gradient" if len(weights) > 1 else "not_bilinear"


def _reason(row: OperatorRow, operand: Operand, recorded: bool, trainable: dict[str, bool]) -> str:
    factors = [factor for factor in row.operands if factor.factor]
    stored = [factor for factor in factors if factor.kind != "activation"]
    frozen = [o for o in stored if o.kind == "buffer" or not any(trainable.get(n, True) for n in o.name.split(" + "))]
    if not recorded and not frozen:
        return "no_graph"
    if operand.kind != "activation":
        return "frozen_weights"
    return "no_input_gradient" if stored else "frozen_activations"


def _gradients(row: OperatorRow) -> Iterable[tuple[Operand, bool, Amount]]:
    """Of each factor: whether its gradient is wanted, and what that costs; in sum 2 x forward."""
    if row.op in _LAYERS:
        return tuple(_of_layer(row))
    factors, whole = [operand for operand in row.operands if operand.factor], _amount(row)
    if len(factors) == 2:
        return tuple((factor, factor.requires_grad, whole) for factor in factors)
    # Attention is two products: QK^T over the width of a key, PV over that of a value. The gradient of P is wanted
    # where that of Q or K is.
    query, key, value = factors
    deep = key.shape[-1] + value.shape[-1]
    scores = (whole[0] * key.shape[-1] // deep, whole[1] * key.shape[-1] // deep, whole[2] * key.shape[-1] // deep)
    mixed = _less(whole, scores)
    return (
        (query, query.requires_grad, scores),
        (key, key.requires_grad, scores),
        (key, query.requires_grad or key.requires_grad, mixed),
        (value, value.requires_grad, mixed),
    )


def _of_layer(row: OperatorRow) -> Iterator[tuple[Operand, bool, Amount]]:
    """The first step's state is hx; a gradient of the later ones is wanted wherever one of anything before them is."""
    x, w_ih, w_hh = row.operands[:3]
    first = math.prod(row.operands[_HX].shape[:-1])
    rows = max(math.prod(x.shape[:-1]), 1)
    each = math.prod(w_ih.shape) + math.prod(w_hh.shape)

    def share(weight: Operand, of: int) -> Amount:
        flops, full, causal = (amount * math.prod(weight.shape) * of // (each * rows) for amount in _amount(row))
        return flops, full, causal

    yield w_ih, w_ih.requires_grad, share(w_ih, rows)
    yield x, x.requires_grad, share(w_ih, rows)
    yield w_hh, w_hh.requires_grad, share(w_hh, rows)
    yield row.operands[_HX], row.operands[_HX].requires_grad, share(w_hh, first)
    yield x, any(row.gradients_wanted), share(w_hh, rows - first)


def _first(rows: Iterable[OperatorRow], calls: int) -> list[OperatorRow]:
    """The rows of so many calls, the first ones first."""
    found = []
    for row in rows:
        taken = min(calls, row.calls)
        if taken:
            found.append(_calls(row, taken))
            calls -= taken
    return found


def _calls(row: OperatorRow, calls: int) -> OperatorRow:
    """The same row of fewer calls."""
    return msgspec.structs.replace(
        row,
        calls=calls,
        flops=row.flops * calls // row.calls,
        flops_full=row.flops_full * calls // row.calls,
        flops_causal=row.flops_causal * calls // row.calls,
    )


def _amount(row: OperatorRow) -> Amount:
    return row.flops, row.flops_full, row.flops_causal


def _sum(amounts: Iterable[Amount]) -> Amount:
    a = b = c = 0
    for one, two, three in amounts:
        a, b, c = a + one, b + two, c + three
    return a, b, c


def _less(one: Amount, other: Amount) -> Amount:
    return one[0] - other[0], one[1] - other[1], one[2] - other[2]


def _times(amount: Amount, factor: int) -> Amount:
    return amount[0] * factor, amount[1] * factor, amount[2] * factor


def _likeness(row: OperatorRow) -> tuple[object, ...]:
    return row.op, row.fqn, row.parameter, row.shapes, row.flops // max(row.calls, 1)
