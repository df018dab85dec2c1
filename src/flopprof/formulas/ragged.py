"""Attention over (batch, length, heads, d) and over sequences laid end to end: flash, efficient, cuDNN.

Ragged batches count by their real lengths, sequence by sequence. Where keys have fewer heads than queries, every
query head counts.
"""

from __future__ import annotations

from typing import Any

from flopprof.formulas.attention import (
    Window,
    backward_cost,
    count_pairs,
    edges,
    forward_cost,
    lengths,
    spans,
)
from flopprof.formulas.operand import Tensor, Wanted
from flopprof.formulas.registry import Cost, formula, product


def flash_window(causal: Any, left: int | None, right: int | None) -> Window | None:
    """The keys seen left and right of the diagonal; None or -1 does not bound; causal sees none to the right."""
    left = None if left is None or left < 0 else left
    right = 0 if causal else None if right is None or right < 0 else right
    return None if left is None and right is None else (left, right)


def sequences_of(
    q: Tensor,
    k: Tensor,
    cum_q: Any = None,
    cum_k: Any = None,
    used_q: Any = None,
    used_k: Any = None,
    length_dim: int = 1,
) -> list[tuple[int, int]]:
    """(queries, keys) of each sequence: from running sums, from the lengths in use, or from the shapes."""
    if cum_q is None and used_q is None:
        queries = [q.shape[length_dim]] * q.shape[0]
    else:
        queries = lengths(used_q) if used_q is not None else spans(cum_q)
    if used_k is not None:
        keys = lengths(used_k)
    elif cum_k is not None:
        keys = spans(cum_k)
    else:
        keys = [k.shape[length_dim]] * len(queries)
    return list(zip(queries, keys, strict=True))


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: list[tuple[int, int]],
    window: Window | None,
) -> Cost:
    """2 h (d + dv) for every pair of every sequence; the diagonal ends in the bottom right corner."""
    full, seen = count_pairs(sequences, q.shape[-2], window, bottom_right=True)
    return forward_cost(full, seen, q.shape[-1], v.shape[-1])


def flash_backward(
    q: Tensor, k: Tensor, v: Tensor, sequences: list[tuple[int, int]], window: Window | None, wanted: Any
) -> Cost:
    """The wanted ones of dQ, dK, dV; all three are twice the forward."""
    full, seen = count_pairs(sequences, q.shape[-2], window, bottom_right=True)
    return backward_cost(full, seen, q.shape[-1], v.shape[-1], wanted)


@formula("aten::_flash_attention_forward", operands=(0, 1, 2))
def flash_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *_: Any,
    out: Any,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Any = None,
    **__: Any,
) -> Cost:
    """(b, s, h, d), or (tokens, h, d) with running sums: 2 h s t (d + dv) per sequence."""
    window = flash_window(is_causal, window_size_left, window_size_right)
    return flash_forward(q, k, v, sequences_of(q, k, cum_seq_q, cum_seq_k, used_k=seqused_k), window)


@formula("aten::_flash_attention_forward_no_dropout_inplace", operands=(1, 2, 3))
def flash_attention_forward_inplace(
    result: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, out: Any, **kwargs: Any
) -> Cost:
    """As _flash_attention_forward, the result given first."""
    return flash_attention_forward(q, k, v, *args, out=out, **kwargs)


@formula("aten::_flash_attention_backward", operands=(0, 1, 2, 3), wanted=True)
def flash_attention_backward(
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
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    wanted: Wanted = None,
    **__: Any,
) -> Cost:
    """dQ, dK, dV as wanted: all three 4 h s t (d + dv) per sequence."""
    window = flash_window(is_causal, window_size_left, window_size_right)
    return flash_backward(q, k, v, sequences_of(q, k, cum_seq_q, cum_seq_k), window, edges(wanted))


# --- efficient attention: (batch, length, heads, d); running sums need batch 1 ------------------------------------
def efficient_window(mask_type: int, size: int | None) -> tuple[Window | None, bool]:
    """(window, bottom_right) of custom_mask_type 0 none, 1 causal from the top left, 2 from the bottom right.

    A window size is how many keys each query sees, its own included.
    """
    left = size - 1 if size else None
    if not mask_type:
        return (None if left is None else (left, left), False)
    return ((left, 0), mask_type == 2)


@formula("aten::_efficient_attention_forward", operands=(0, 1, 2))
def efficient_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    custom_mask_type: int,
    *_: Any,
    out: Any,
    seqlen_k: Any = None,
    window_size: int | None = None,
    **__: Any,
) -> Cost:
    """(b, s, h, d), or all sequences in one batch row: 2 h s t (d + dv) per sequence."""
    return efficient_forward(q, k, v, (cu_seqlens_q, cu_seqlens_k, seqlen_k), custom_mask_type, window_size)


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, ragged: Any, mask_type: int, window_size: int | None) -> Cost:
    """2 heads (d + dv) for every pair; ragged = (running sum of queries, of keys, lengths of keys)."""
    cum_q, cum_k, used_k = ragged
    window, bottom_right = efficient_window(mask_type, window_size)
    sequences = sequences_of(q, k, cum_q, cum_k, used_k=used_k)
    full, seen = count_pairs(sequences, product(q.shape[2:-1]), window, bottom_right)
    return forward_cost(full, seen, q.shape[-1], v.shape[-1])


@formula("aten::_efficient_attention_backward", operands=(0, 1, 2, 3), wanted=True)
def efficient_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    output: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    logsumexp: Any,
    dropout_p: float,
    philox_seed: Any,
    philox_offset: Any,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    out: Any,
    window_size: int | None = None,
    wanted: Wanted = None,
    **_: Any,
) -> Cost:
    """dQ, dK, dV as wanted: all three 4 h s t (d + dv) per sequence."""
    ragged = (cu_seqlens_q, cu_seqlens_k)
    return efficient_backward(q, k, v, ragged, custom_mask_type, window_size, edges(wanted), bool(bias_requires_grad))


def efficient_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ragged: Any,
    mask_type: int,
    window_size: int | None,
    wanted: Any,
    bias: bool = False,
) -> Cost:
    """The wanted ones of dQ, dK, dV and the bias; ragged = (running sum of queries, of keys)."""
    window, bottom_right = efficient_window(mask_type, window_size)
    full, seen = count_pairs(sequences_of(q, k, *ragged), product(q.shape[2:-1]), window, bottom_right)
    return backward_cost(full, seen, q.shape[-1], v.shape[-1], wanted, bias)


# --- cuDNN: (batch, heads, length, d), or (tokens, heads, d) with running sums -------------------------------------
def _cudnn_pairs(
    q: Tensor, k: Tensor, cum_seq_q: Any, cum_seq_k: Any, used_k: Any, is_causal: Any
) -> tuple[int, int | None]:
    heads = q.shape[-2] if len(q.shape) == 3 else q.shape[1]
    if len(q.shape) == 4:
        cum_seq_q = cum_seq_k = None
    sequences = sequences_of(q, k, cum_seq_q, cum_seq_k, used_k=used_k, length_dim=2)
    return count_pairs(sequences, heads, (None, 0) if is_causal else None)


@formula("aten::_cudnn_attention_forward", operands=(0, 1, 2))
def cudnn_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *_: Any,
    out: Any,
    seqused_k: Any = None,
    **__: Any,
) -> Cost:
    """2 h s t (d + dv) per sequence."""
    full, seen = _cudnn_pairs(q, k, cum_seq_q, cum_seq_k, seqused_k, is_causal)
    return forward_cost(full, seen, q.shape[-1], v.shape[-1])


@formula("aten::_cudnn_attention_forward_no_dropout_inplace", operands=(1, 2, 3))
def cudnn_attention_forward_inplace(
    result: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    *,
    out: Any,
    seqused_k: Any = None,
    **_: Any,
) -> Cost:
    """As _cudnn_attention_forward, the result given first."""
    full, seen = _cudnn_pairs(q, k, cum_seq_q, cum_seq_k, seqused_k, is_causal)
    return forward_cost(full, seen, q.shape[-1], v.shape[-1])


@formula("aten::_cudnn_attention_backward", operands=(0, 1, 2, 3), wanted=True)
def cudnn_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Any,
    logsumexp: Any,
    philox_seed: Any,
    philox_offset: Any,
    attn_bias: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    out: Any,
    wanted: Wanted = None,
    **_: Any,
) -> Cost:
    """dQ, dK, dV as wanted: all three 4 h s t (d + dv) per sequence."""
    full, seen = _cudnn_pairs(q, k, cum_seq_q, cum_seq_k, None, is_causal)
    return backward_cost(full, seen, q.shape[-1], v.shape[-1], edges(wanted))
