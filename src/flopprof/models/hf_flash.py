"""FlashAttention without its package: transformers calls it as it would, and operators of the same names stand in.

On meta they give shapes; on the CPU, where no such kernel exists, the same attention unfused and no gradients that
mean anything: both are only counted. Tensors on other devices are left to transformers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from flopprof.errors import UsageError

NOTE = "flash_attn is not installed: attention is counted as its operators would run it"

# https://github.com/Dao-AILab/flash-attention, FlashAttention 2: heads of up to 256, in half precision
_WIDEST = 256
_DTYPES = (torch.float16, torch.bfloat16)

_MASK = "float dropout_p, float softmax_scale, bool causal, int window_size_left, int window_size_right"
_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_GRADIENTS = "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv"


def installed() -> bool:
    """Whether transformers finds the package, and a device for it."""
    utils = importlib.import_module("transformers.utils")
    return bool(utils.is_flash_attn_2_available())


@contextmanager
def standing_in() -> Iterator[None]:
    """While open, transformers builds models for FlashAttention; what they call of it later are the operators here.

    Raises UsageError where transformers arranges these things otherwise.
    """
    modeling: Any = importlib.import_module("transformers.modeling_utils")
    calls: Any = importlib.import_module("transformers.modeling_flash_attention_utils")
    model = modeling.PreTrainedModel
    if not (hasattr(calls, "lazy_import_flash_attention") and hasattr(model, "_flash_attn_import_error")):
        raise UsageError(
            "--attn flash needs the flash_attn package with this release of transformers: install it, or a later one."
        )
    # This one stays: a model asks for its kernels when it runs, which may be at any time later.
    if not isinstance(calls.lazy_import_flash_attention, _Functions):
        calls.lazy_import_flash_attention = _Functions(calls)
    kept = modeling.lazy_import_flash_attention, model._flash_attn_import_error, modeling.is_kernels_available
    modeling.lazy_import_flash_attention = partial(_register, modeling)
    model._flash_attn_import_error = lambda *_, **__: None
    modeling.is_kernels_available = lambda *_, **__: False  # it would fetch kernels
    try:
        yield
    finally:
        modeling.lazy_import_flash_attention, model._flash_attn_import_error, modeling.is_kernels_available = kept


def _register(modeling: Any, implementation: str | None, *_: Any, **__: Any) -> None:
    """Some models bring a kernel from the hub; it goes by that name in transformers' tables, as once it is loaded."""
    masks: Any = importlib.import_module("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    for table in (modeling.ALL_ATTENTION_FUNCTIONS, masks):
        if implementation is not None and implementation not in table:
            table.register(implementation, table["flash_attention_2"])


def complete(model: nn.Module) -> None:
    """Gives modeling files that import transformers' functions for FlashAttention only beside the package those."""
    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        named = {name for cls in classes for name in _names_in(getattr(cls, "forward", None))}
        for home in ("transformers.modeling_flash_attention_utils", "transformers.integrations.flash_attention"):
            for name in ("_flash_attention_forward", "get_target_dtype"):
                if name in named and not hasattr(module, name) and hasattr(importlib.import_module(home), name):
                    setattr(module, name, getattr(importlib.import_module(home), name))


def _names_in(function: Any) -> tuple[str, ...]:
    code = getattr(function, "__code__", None)
    return () if code is None else code.co_names


def require_half(dtype: torch.dtype, target: str) -> None:
    """Raises UsageError for a type that the kernels do not take."""
    if dtype not in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise UsageError(f"--attn flash takes float16 and bfloat16, and {target} is {name}: add --dtype bfloat16.")


class _Functions:
    """transformers' way to the kernels: its own for real devices, the operators here for meta and the CPU."""

    def __init__(self, calls: Any) -> None:
        self._own = calls.lazy_import_flash_attention
        self._pads = calls._pad_input, calls._unpad_input
        processed = calls._lazy_define_process_function(flash_attn_varlen_func)
        self._processed = processed, processed

    def __call__(self, implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        own = partial(self._own, implementation, *args, **kwargs)

        def dense(q: torch.Tensor, *rest: Any, **named: Any) -> Any:
            return (flash_attn_func if _counted_only(q) else own()[0][0])(q, *rest, **named)

        def varlen(q: torch.Tensor, *rest: Any, **named: Any) -> Any:
            return (flash_attn_varlen_func if _counted_only(q) else own()[0][1])(q, *rest, **named)

        return (dense, varlen, None, *self._pads), self._processed


def _counted_only(q: torch.Tensor) -> bool:
    return q.device.type in ("meta", "cpu")


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over (batch, length, heads, d), of as many or fewer key heads: what the package's function returns."""
    _define()
    out: torch.Tensor = _Dense.apply(q, k, v, *_masked(q, dropout_p, softmax_scale, causal, window_size))
    return out


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over (tokens, heads, d), sequences end to end: cu_seqlens are the running sums of their lengths."""
    _define()
    lengths = cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k)
    out: torch.Tensor = _Ragged.apply(q, k, v, lengths, _masked(q, dropout_p, softmax_scale, causal, window_size))
    return out


def _masked(q: torch.Tensor, dropout_p: float, scale: float | None, causal: bool, window: tuple[int, int]) -> Any:
    require_half(q.dtype, "the query")
    if q.shape[-1] > _WIDEST:
        raise ValueError(f"FlashAttention takes heads of at most {_WIDEST} numbers, and these have {q.shape[-1]}.")
    return dropout_p, q.shape[-1] ** -0.5 if scale is None else scale, causal, *window


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, *mask: Any) -> Any:
        out, sums = torch.ops.flash_attn._flash_attn_forward(q, k, v, *mask)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.mask = mask
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, out, sums = ctx.saved_tensors
        found = [torch.empty_like(factor) for factor in (q, k, v)]
        torch.ops.flash_attn._flash_attn_backward(gradients[0], q, k, v, out, sums, *found, *ctx.mask)
        return *found, None, None, None, None, None


class _Ragged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, lengths: Any, mask: Any) -> Any:
        out, sums = torch.ops.flash_attn._flash_attn_varlen_forward(q, k, v, *lengths, *mask)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.lengths, ctx.mask = lengths, mask
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, out, sums = ctx.saved_tensors
        found = [torch.empty_like(factor) for factor in (q, k, v)]
        operator = torch.ops.flash_attn._flash_attn_varlen_backward
        operator(gradients[0], q, k, v, out, sums, *found, *ctx.lengths, *ctx.mask)
        return *found, None, None


# --- the operators --------------------------------------------------------------------------------
@cache
def _define() -> torch.library.Library:
    """The package's operators, by its names; kept, because they live as long as the library object."""
    library = torch.library.Library("flash_attn", "FRAGMENT")
    factors, saved = "Tensor q, Tensor k, Tensor v", "Tensor out, Tensor softmax_lse"
    kernels = {
        f"_flash_attn_forward({factors}, {_MASK}) -> (Tensor, Tensor)": _forward,
        f"_flash_attn_varlen_forward({factors}, {_LENGTHS}, {_MASK}) -> (Tensor, Tensor)": _varlen_forward,
        f"_flash_attn_backward(Tensor dout, {factors}, {saved}, {_GRADIENTS}, {_MASK}) -> Tensor": _backward,
        f"_flash_attn_varlen_backward(Tensor dout, {factors}, {saved}, {_GRADIENTS}, {_LENGTHS}, {_MASK}) -> Tensor": (
            _backward
        ),
    }
    for schema, kernel in kernels.items():
        library.define(schema)
        for key in ("Meta", "CPU"):
            library.impl(schema.partition("(")[0], kernel, key)
    return library


def _forward(q: Any, k: Any, v: Any, dropout_p: float, scale: float, causal: bool, left: int, right: int) -> Any:
    sums = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    if q.is_meta:
        return torch.empty_like(q), sums
    return _attended(q, k, v, scale, causal, left, right), sums


def _varlen_forward(q: Any, k: Any, v: Any, ends: Any, key_ends: Any, most: int, most_keys: int,
                    dropout_p: float, scale: float, causal: bool, left: int, right: int) -> Any:  # fmt: skip
    sums = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    if not q.is_meta:
        steps = zip(_spans(ends), _spans(key_ends), strict=True)
        for (start, end), (key_start, key_end) in steps:
            one = (q[None, start:end], k[None, key_start:key_end], v[None, key_start:key_end])
            out[start:end] = _attended(*one, scale, causal, left, right)[0]
    return out, sums


def _spans(ends: torch.Tensor) -> list[tuple[int, int]]:
    places = ends.tolist()
    return list(pairwise(places))


def _attended(q: Any, k: Any, v: Any, scale: float, causal: bool, left: int, right: int) -> Any:
    """Attention with the diagonal ending in the bottom right corner, seen `left` and `right` of it."""
    length, keys = q.shape[1], k.shape[1]
    ahead = torch.arange(keys)[None, :] - torch.arange(length)[:, None] - (keys - length)
    seen = torch.ones(length, keys, dtype=torch.bool)
    if causal or right >= 0:
        seen &= ahead <= (0 if causal else right)
    if left >= 0:
        seen &= ahead >= -left
    q, k, v = (factor.transpose(1, 2) for factor in (q, k, v))
    found = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    return found.transpose(1, 2).contiguous()


def _backward(gradient: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, dq: Any, dk: Any, dv: Any, *_: Any) -> Any:
    for found in (dq, dk, dv):
        if not found.is_meta:
            found.zero_()
    return torch.empty_like(sums)
