"""Attention: Q K^T costs 2 d and P V costs 2 dv for every query-key pair of every query head.

Backward: dV and dP = dO V^T cost 2 dv a pair, dQ and dK 2 d, so all three gradients are exactly twice the forward.
A fused backward computes Q K^T once more: that is `recompute`. Masks change only the `causal` figure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flopprof.formulas.operand import Tensor, Wanted
from flopprof.formulas.registry import Cost, LengthsUnknown, formula, product

ALL = (True, True, True)
# What may know the elements of a tensor on the meta device: each gives them, or None.
READERS: list[Callable[[Any], list[int] | None]] = []
LENGTHS_ON_META = "the sequence lengths are on the meta device"


def visible_pairs(queries: int, keys: int, first: int | None = None, last: int | None = None) -> int:
    """Pairs (i, j) of a query i and a key j with i + first <= j <= i + last; None does not bound."""
    upper = keys * queries if last is None else _clamped_sum(queries, keys, last + 1)
    lower = 0 if first is None else _clamped_sum(queries, keys, first)
    return upper - lower


def _clamped_sum(queries: int, keys: int, shift: int) -> int:
    """Sum over i < queries of i + shift, clamped into [0, keys]."""

    def below(bound: int) -> int:
        rising = min(max(bound, 0), keys)
        return rising * (rising - 1) // 2 + (max(bound, 0) - rising) * keys

    return below(queries + shift) - below(shift)


def lengths(tensor: Any) -> list[int]:
    """The values of a small integer tensor. Raises LengthsUnknown where it has none (meta, fake)."""
    if str(tensor.device) == "meta":
        for read in READERS:
            if (carried := read(tensor)) is not None:
                return carried
        raise LengthsUnknown(LENGTHS_ON_META)
    try:
        return [int(value) for value in tensor.tolist()]
    except Exception as error:
        # A fake tensor raises one of several errors of its own; all mean that it carries no values.
        raise LengthsUnknown(f"the sequence lengths cannot be read: {type(error).__name__}") from error


def spans(cumulative: Any) -> list[int]:
    """Lengths from their running sum [0, a, a + b, ...]."""
    bounds = lengths(cumulative)
    return [after - before for before, after in itertools.pairwise(bounds)]


Window = tuple[int | None, int | None]


def count_pairs(
    sequences: Iterable[tuple[int, int]], heads: int, window: Window | None, bottom_right: bool = False
) -> tuple[int, int | None]:
    """(all pairs, pairs inside the window) over (queries, keys) sequences and heads; no window: (all, None).

    A window is how many keys to the left and to the right of the diagonal are seen (None: all). The diagonal
    starts in the top left corner, or ends in the bottom right one.
    """
    full = seen = 0
    for queries, keys in sequences:
        full += queries * keys
        if window is not None:
            left, right = window
            shift = keys - queries if bottom_right else 0
            first = None if left is None else shift - left
            seen += visible_pairs(queries, keys, first, None if right is None else shift + right)
    return heads * full, None if window is None else heads * seen


def forward_cost(full: int, seen: int | None, d: int, dv: int) -> Cost:
    """Q K^T and P V over `full` pairs; the causal figure over `seen`."""
    per_pair = 2 * (d + dv)
    causal = None if seen is None else seen * per_pair
    return Cost(full * per_pair, causal=causal, mask_known=seen is not None)


def backward_cost(full: int, seen: int | None, d: int, dv: int, wanted: Any = ALL, bias: bool = False) -> Cost:
    """The wanted ones of dQ, dK, dV (and of the bias), with one more Q K^T as recompute."""
    for_q, for_k, for_v = map(bool, wanted)
    scores = for_q or for_k or bias
    per_pair = 2 * ((for_v + scores) * dv + (for_q + for_k) * d)
    again = 2 * d if per_pair else 0
    return Cost(
        full * per_pair,
        causal=None if seen is None else seen * per_pair,
        recompute=full * again,
        recompute_causal=None if seen is None else seen * again,
        mask_known=seen is not None,
    )


def edges(wanted: Wanted) -> tuple[bool, ...]:
    """Which of query, key, value need a gradient: the first three edges of the node, or all."""
    return wanted[:3] if wanted and len(wanted) >= 3 else ALL


# --- (batch, heads, length, d): the aten scaled dot product operators ----------------------------------------------
def _causal(is_causal: Any) -> Window | None:
    return (None, 0) if is_causal else None


def _dense_pairs(q: Tensor, k: Tensor, is_causal: Any) -> tuple[int, int | None]:
    """Pairs of (..., heads, length, d) operands; every query head counts, also where keys have fewer heads."""
    return count_pairs([(q.shape[-2], k.shape[-2])], product(q.shape[:-2]), _causal(is_causal))


@formula("aten::scaled_dot_product_attention", operands=(0, 1, 2))
def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    out: Any,
    enable_gqa: bool = False,
    **_: Any,
) -> Cost:
    """(..., s, d) queries, (..., t, d) keys, (..., t, dv) values, batches broadcast: 2 s t (d + dv) per head."""
    *_lead, s, d = q.shape
    t, dv = v.shape[-2:]
    window = _causal(is_causal)
    key_lead = (*k.shape[:-3], q.shape[-3]) if enable_gqa and len(k.shape) > 2 else k.shape[:-2]
    scores, scores_seen = count_pairs([(s, t)], product(broadcast(q.shape[:-2], key_lead)), window)
    values, values_seen = count_pairs([(s, t)], product(out.shape[:-2]), window)
    causal = None if scores_seen is None or values_seen is None else 2 * (scores_seen * d + values_seen * dv)
    return Cost(2 * (scores * d + values * dv), causal=causal, mask_known=window is not None)


def broadcast(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """The shape that two shapes broadcast to."""
    rank = max(len(a), len(b))
    left, right = [1] * (rank - len(a)) + list(a), [1] * (rank - len(b)) + list(b)
    return [n if m == 1 else m for m, n in zip(left, right, strict=True)]


@formula(
    "aten::_scaled_dot_product_attention_math", "aten::_scaled_dot_product_attention_math_for_mps", operands=(0, 1, 2)
)
def sdpa_math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    dropout_mask: Any = None,
    *,
    out: Any,
    enable_gqa: bool = False,
    **_: Any,
) -> Cost:
    """As scaled_dot_product_attention; the attention matrix is returned too."""
    return sdpa(q, k, v, is_causal=is_causal, out=out[0], enable_gqa=enable_gqa)


@formula("aten::_scaled_dot_product_flash_attention", operands=(0, 1, 2))
def sdpa_flash(q: Tensor, k: Tensor, v: Tensor, *args: Any, out: Any, is_causal: bool = False, **_: Any) -> Cost:
    """2 b h s t (d + dv); the quantized overload has three scales before (dropout_p, is_causal)."""
    quantized = bool(args) and (args[0] is None or hasattr(args[0], "shape"))
    flags = args[3:] if quantized else args
    full, seen = _dense_pairs(q, k, flags[1] if len(flags) > 1 else is_causal)
    return forward_cost(full, seen, q.shape[-1], v.shape[-1])


@formula("aten::_scaled_dot_product_flash_attention_for_cpu", operands=(0, 1, 2))
def sdpa_flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *, out: Any, **_: Any
) -> Cost:
    """2 b h s t (d + dv)."""
    full, seen = _dense_pairs(q, k, is_causal)
    return forward_cost(full, seen, q.shape[-1], v.shape[-1])


@formula(
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention", operands=(0, 1, 2)
)
def sdpa_efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Any,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *_: Any,
    out: Any,
    **__: Any,
) -> Cost:
    """2 b h s t (d + dv)."""
    full, seen = _dense_pairs(q, k, is_causal)
    return forward_cost(full, seen, q.shape[-1], v.shape[-1])


@formula("aten::_scaled_dot_product_fused_attention_overrideable", operands=(0, 1, 2))
def sdpa_overrideable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *_: Any,
    out: Any,
    **__: Any,
) -> Cost:
    """2 b h s t (d + dv)."""
    full, seen = _dense_pairs(q, k, is_causal)
    return forward_cost(full, seen, q.shape[-1], v.shape[-1])


def _dense_backward(q: Tensor, k: Tensor, v: Tensor, is_causal: Any, wanted: Any, bias: bool = False) -> Cost:
    full, seen = _dense_pairs(q, k, is_causal)
    return backward_cost(full, seen, q.shape[-1], v.shape[-1], wanted, bias)


@formula("aten::_scaled_dot_product_flash_attention_backward", operands=(0, 1, 2, 3), wanted=True)
def sdpa_flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Any,
    logsumexp: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *_: Any,
    out: Any,
    wanted: Wanted = None,
    **__: Any,
) -> Cost:
    """dQ, dK, dV as wanted: all three 4 b h s t (d + dv)."""
    return _dense_backward(q, k, v, is_causal, edges(wanted))


@formula("aten::_scaled_dot_product_flash_attention_for_cpu_backward", operands=(0, 1, 2, 3), wanted=True)
def sdpa_flash_cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Any,
    logsumexp: Any,
    dropout_p: float,
    is_causal: bool,
    *,
    out: Any,
    wanted: Wanted = None,
    **_: Any,
) -> Cost:
    """dQ, dK, dV as wanted: all three 4 b h s t (d + dv)."""
    return _dense_backward(q, k, v, is_causal, edges(wanted))


@formula("aten::_scaled_dot_product_efficient_attention_backward", operands=(0, 1, 2, 3))
def sdpa_efficient_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Any,
    output: Any,
    logsumexp: Any,
    philox_seed: Any,
    philox_offset: Any,
    dropout_p: float,
    grad_input_mask: Any,
    is_causal: bool = False,
    *,
    out: Any,
    **_: Any,
) -> Cost:
    """dQ, dK, dV as the mask says: all three 4 b h s t (d + dv); the bias gradient needs only dP."""
    return _dense_backward(q, k, v, is_causal, grad_input_mask[:3], bool(grad_input_mask[3]))


@formula("aten::_scaled_dot_product_cudnn_attention_backward", operands=(0, 1, 2, 3), wanted=True)
def sdpa_cudnn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *args: Any,
    out: Any,
    wanted: Wanted = None,
    is_causal: bool = False,
    **_: Any,
) -> Cost:
    """dQ, dK, dV as wanted; is_causal is the last positional argument, after cum_seq and max of both and dropout."""
    return _dense_backward(q, k, v, args[10] if len(args) > 10 else is_causal, edges(wanted))


@formula("aten::_scaled_dot_product_fused_attention_overrideable_backward", operands=(0, 1, 2, 3))
def sdpa_overrideable_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Any,
    grad_input_mask: Any,
    *args: Any,
    out: Any,
    **kwargs: Any,
) -> Cost:
    """dQ, dK, dV as the mask says; is_causal follows (out, logsumexp, cum_seq q k, max q k, dropout_p)."""
    is_causal = args[7] if len(args) > 7 else kwargs.get("is_causal", False)
    return _dense_backward(q, k, v, is_causal, grad_input_mask[:3], bool(grad_input_mask[3]))


@formula("aten::_triton_scaled_dot_attention", operands=(0, 1, 2))
def triton_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, *, out: Any) -> Cost:
    """2 b h s t (d + dv)."""
    full, seen = _dense_pairs(q, k, False)
    return forward_cost(full, seen, q.shape[-1], v.shape[-1])


@formula("aten::_triton_multi_head_attention", operands=(0, 1, 2, 5, 7))
def triton_multi_head_attention(
    q: Tensor, k: Tensor, v: Tensor, embed_dim: int, num_head: int, *_: Any, out: Any
) -> int:
    """(b, s, e) queries, (b, t, e) keys: four projections 2 e e a token, attention 4 b s t e over all heads."""
    batch, s, e = q.shape
    t = k.shape[1]
    return 2 * batch * (2 * s + 2 * t) * e * e + 4 * batch * s * t * e


def flex_cost(
    q_shape: Any,
    k_shape: Any,
    v_shape: Any,
    unmasked_pairs: int | None = None,
    *,
    backward: bool = False,
    wanted: Any = ALL,
) -> Cost:
    """flex_attention over (batch, heads, length, d): 2 b h s t (d + dv), or the wanted gradients of it.

    unmasked_pairs: the pairs that the block mask lets through, over all batches and query heads; None: not known.
    """
    *lead, s, d = q_shape
    full = product(lead) * s * k_shape[-2]
    cost = backward_cost(full, unmasked_pairs, d, v_shape[-1], wanted) if backward else None
    return cost or forward_cost(full, unmasked_pairs, d, v_shape[-1])
