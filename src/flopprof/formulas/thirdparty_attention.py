"""Attention operators of packages that are never imported here, known by name and by the schemas they register."""

from __future__ import annotations

from typing import Any

from flopprof.formulas.attention import count_pairs, edges, forward_cost
from flopprof.formulas.operand import Tensor, Wanted
from flopprof.formulas.ragged import (
    efficient_backward,
    efficient_forward,
    flash_backward,
    flash_forward,
    flash_window,
    sequences_of,
)
from flopprof.formulas.registry import Cost, formula


# --- flash_attn 2 and 3 --------------------------------------------------------------------------------------------
@formula("flash_attn::_flash_attn_forward", operands=(0, 1, 2))
def flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    *_: Any,
    out: Any,
    **__: Any,
) -> Cost:
    """(b, s, h, d): 2 b h s t (d + dv)."""
    return flash_forward(q, k, v, sequences_of(q, k), flash_window(causal, window_size_left, window_size_right))


@formula("flash_attn::_flash_attn_varlen_forward", operands=(0, 1, 2))
def flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    return_softmax: bool = False,
    block_table: Any = None,
    leftpad_k: Any = None,
    seqused_k: Any = None,
    *_: Any,
    out: Any,
    **__: Any,
) -> Cost:
    """(tokens, h, d) with running sums: 2 h s t (d + dv) per sequence."""
    sequences = sequences_of(q, k, cu_seqlens_q, cu_seqlens_k, used_k=seqused_k)
    return flash_forward(q, k, v, sequences, flash_window(causal, window_size_left, window_size_right))


@formula("flash_attn::_flash_attn_backward", operands=(0, 1, 2, 3), wanted=True)
def flash_attn_backward(
    dout: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Any,
    softmax_lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    *_: Any,
    out: Any,
    wanted: Wanted = None,
    **__: Any,
) -> Cost:
    """dQ, dK, dV as wanted: all three 4 b h s t (d + dv)."""
    window = flash_window(causal, window_size_left, window_size_right)
    return flash_backward(q, k, v, sequences_of(q, k), window, edges(wanted))


@formula("flash_attn::_flash_attn_varlen_backward", operands=(0, 1, 2, 3), wanted=True)
def flash_attn_varlen_backward(
    dout: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Any,
    softmax_lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    *_: Any,
    out: Any,
    wanted: Wanted = None,
    **__: Any,
) -> Cost:
    """dQ, dK, dV as wanted: all three 4 h s t (d + dv) per sequence."""
    window = flash_window(causal, window_size_left, window_size_right)
    return flash_backward(q, k, v, sequences_of(q, k, cu_seqlens_q, cu_seqlens_k), window, edges(wanted))


@formula("flash_attn_3::fwd", "flash_attn_3::_flash_attn_forward", operands=(0, 1, 2))
def flash_attn_3_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, out: Any, **kwargs: Any) -> Cost:
    """(b, s, h, d), or (tokens, h, d) with running sums: 2 h s t (d + dv) per sequence."""
    names = (
        "k_new",
        "v_new",
        "qv",
        "out_",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "cu_seqlens_k_new",
        "seqused_q",
        "seqused_k",
    )
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # After those nine come max_seqlen q and k, eight tables, three scales and softmax_scale: then the mask.
    mask = ("causal", "window_size_left", "window_size_right")
    given.update(zip(mask, args[21:24], strict=False))
    sequences = sequences_of(
        q,
        k,
        given.get("cu_seqlens_q"),
        given.get("cu_seqlens_k"),
        given.get("seqused_q"),
        given.get("seqused_k"),
    )
    return flash_forward(q, k, v, sequences, _mask(given))


def _mask(given: dict[str, Any]) -> Any:
    causal = given.get("causal", given.get("is_causal", False))
    return flash_window(causal, given.get("window_size_left", -1), given.get("window_size_right", -1))


def _flash_attn_3_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    args: tuple[Any, ...],
    names: tuple[str, ...],
    kwargs: dict[str, Any],
    wanted: Wanted,
) -> Cost:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    cum = given.get("cu_seqlens_q"), given.get("cu_seqlens_k")
    sequences = sequences_of(q, k, *cum, given.get("seqused_q"), given.get("seqused_k"))
    return flash_backward(q, k, v, sequences, _mask(given), edges(wanted))


_RAGGED = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k")
_GRADS = ("dq", "dk", "dv")
_FLAGS = ("softmax_scale", "is_causal", "window_size_left", "window_size_right")


@formula("flash_attn_3::bwd", operands=(0, 1, 2, 3), wanted=True)
def flash_attn_3_bwd(
    dout: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Any,
    lse: Any,
    *args: Any,
    out: Any,
    wanted: Wanted = None,
    **kwargs: Any,
) -> Cost:
    """dQ, dK, dV as wanted; the gradients' buffers come before the lengths."""
    return _flash_attn_3_backward(q, k, v, args, (*_GRADS, *_RAGGED, *_FLAGS), kwargs, wanted)


@formula("flash_attn_3::_flash_attn_backward", operands=(0, 1, 2, 3), wanted=True)
def flash_attn_3_backward(
    dout: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Any,
    lse: Any,
    *args: Any,
    out: Any,
    wanted: Wanted = None,
    **kwargs: Any,
) -> Cost:
    """dQ, dK, dV as wanted; the lengths come before the gradients' buffers."""
    return _flash_attn_3_backward(q, k, v, args, (*_RAGGED, *_GRADS, *_FLAGS), kwargs, wanted)


# --- xformers ------------------------------------------------------------------------------------------------------
@formula("xformers_flash::flash_fwd", operands=(0, 1, 2))
def xformers_flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    seqused_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p: float,
    softmax_scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    *_: Any,
    out: Any,
    **__: Any,
) -> Cost:
    """(b, s, h, d), or (tokens, h, d) with running sums: 2 h s t (d + dv) per sequence."""
    sequences = sequences_of(q, k, cu_seqlens_q, cu_seqlens_k, used_k=seqused_k)
    return flash_forward(q, k, v, sequences, flash_window(is_causal, window_left, window_right))


@formula("xformers_flash::flash_bwd", operands=(1, 2, 3, 4), wanted=True)
def xformers_flash_backward(
    grads_share_storage: bool,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p: float,
    softmax_scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    *_: Any,
    out: Any,
    wanted: Wanted = None,
    **__: Any,
) -> Cost:
    """dQ, dK, dV as wanted: all three 4 h s t (d + dv) per sequence."""
    window = flash_window(is_causal, window_left, window_right)
    return flash_backward(q, k, v, sequences_of(q, k, cu_seqlens_q, cu_seqlens_k), window, edges(wanted))


@formula(
    "xformers::efficient_attention_forward_cutlass", "xformers::efficient_attention_forward_ck", operands=(0, 1, 2)
)
def xformers_efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, seqstart_q: Any, seqstart_k: Any, *args: Any, out: Any, **kwargs: Any
) -> Cost:
    """(b, s, h, d): 2 h s t (d + dv) per sequence. custom_mask_type is the tenth argument in every release."""
    mask_type = args[3] if len(args) > 3 else kwargs["custom_mask_type"]
    seqlen_k = args[5] if len(args) > 5 else kwargs.get("seqlen_k")
    window_size = args[6] if len(args) > 6 else kwargs.get("window_size")
    return efficient_forward(q, k, v, (seqstart_q, seqstart_k, seqlen_k), mask_type, window_size)


@formula(
    "xformers::efficient_attention_backward_cutlass",
    "xformers::efficient_attention_backward_ck",
    operands=(0, 1, 2, 3),
    wanted=True,
)
def xformers_efficient_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    seqstart_q: Any,
    seqstart_k: Any,
    *args: Any,
    out: Any,
    wanted: Wanted = None,
    **kwargs: Any,
) -> Cost:
    """dQ, dK, dV as wanted; custom_mask_type is the fifteenth argument in every release."""
    mask_type = args[7] if len(args) > 7 else kwargs["custom_mask_type"]
    window_size = args[10] if len(args) > 10 else kwargs.get("window_size")
    return efficient_backward(q, k, v, (seqstart_q, seqstart_k), mask_type, window_size, edges(wanted))


@formula("xformers::efficient_attention_forward_small_k", operands=(0, 1, 2))
def xformers_small_k(q: Tensor, k: Tensor, v: Tensor, *_: Any, out: Any, **__: Any) -> Cost:
    """(b * h, s, d): 2 b h s t (d + dv)."""
    full, seen = count_pairs([(q.shape[1], k.shape[1])], q.shape[0], None)
    return forward_cost(full, seen, q.shape[-1], v.shape[-1])
