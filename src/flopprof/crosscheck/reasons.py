"""Known reasons for which another counter differs: each predicts by how much, and is given only where it does.

A reason is tried on the rows of one operator in one module and pass; it holds where its prediction is the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from flopprof.profile import OperatorRow

FLOP_COUNTER_MODE = "FlopCounterMode"
FVCORE = "fvcore"


class Reason(NamedTuple):
    """Why, and where it is a matter of whole multiples of what flopprof counts, which."""

    sentence: str = ""
    multiples: frozenset[int] = frozenset()


class Prediction(NamedTuple):
    """How many FLOPs more the counter gives, and the multiples of ours that make them."""

    flops: int
    multiples: frozenset[int] = frozenset()


class Known(NamedTuple):
    """predict: from our rows, what the counter gives more; None where the reason does not apply."""

    counter: str
    operators: frozenset[str]  # of ours; none: any
    predict: Callable[[Sequence[OperatorRow]], Prediction | None]
    sentence: str


def find(counter: str, rows: Sequence[OperatorRow], difference: int) -> Reason:
    """The reason whose prediction is this difference, exactly; an empty one where there is none."""
    for known in KNOWN:
        if known.counter != counter or (known.operators and not known.operators.issuperset(row.op for row in rows)):
            continue
        try:
            predicted = known.predict(rows)
        except (ValueError, IndexError, ZeroDivisionError):  # shapes of another kind than the reason is about
            continue
        if predicted is not None and predicted.flops == difference:
            return Reason(known.sentence, predicted.multiples)
    return Reason()


def _ungrouped(rows: Sequence[OperatorRow]) -> Prediction | None:
    """The weight gradient of each grouped convolution, as often as it has groups."""
    extra, multiples = 0, set()
    for row in rows:
        (_, out_channels, *_), (_, in_channels, *_), weight = row.shapes[:3]
        gradients = [shape for shape in row.outputs if shape in (weight, row.shapes[1])]
        # weight is (out, in / groups, ...), of a transposed convolution (in, out / groups, ...)
        groups = in_channels // weight[1] if weight[0] == out_channels else out_channels // weight[1]
        if weight in gradients and groups > 1:
            extra += (groups - 1) * row.flops // len(gradients)
            multiples.add(groups)
    return Prediction(extra, frozenset(multiples))


def _unasked_gradients(rows: Sequence[OperatorRow]) -> Prediction | None:
    """All five products of an attention backward, whichever gradients are wanted."""
    full = 0
    for row in rows:
        if row.phase == "recompute":  # the same calls, already in the row of the backward
            continue
        _, (batch, heads, queries, width), (_, _, keys, _), (_, _, _, value_width) = row.shapes[:4]
        full += row.calls * 2 * batch * heads * queries * keys * (3 * width + 2 * value_width)
    return Prediction(full - sum(row.flops for row in rows))


def _real(rows: Sequence[OperatorRow]) -> Prediction | None:
    """A complex multiply-add as one real one."""
    if not all(row.dtype.startswith("complex") for row in rows):
        return None
    return Prediction(-sum(row.flops - row.flops // 4 for row in rows))


KNOWN = (
    Known(
        FLOP_COUNTER_MODE,
        frozenset({"aten::convolution_backward"}),
        _ungrouped,
        "takes the weight gradient of a grouped convolution for that of an ungrouped one",
    ),
    Known(
        FLOP_COUNTER_MODE,
        frozenset(
            f"aten::_scaled_dot_product_{kind}_backward"
            for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
        ),
        _unasked_gradients,
        "counts the gradients of query, key and value also where they are not asked for",
    ),
    Known(FLOP_COUNTER_MODE, frozenset(), _real, "counts a complex multiply-add as a real one"),
    Known(FVCORE, frozenset(), _real, "counts a complex multiply-add as a real one"),
)
