"""Cases of attention: query-key pairs of every query head, times what each pair costs.

Where a mask is named, `causal` counts its pairs one by one: query i sees min(i + 1, t) keys from the top left corner.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from case import Case, on_meta, on_shapes

QKV = [(2, 3, 4, 8)] * 3  # b 2, h 3, s 4, d 8: 2*3*4*4 = 96 pairs, 2*3*(1+2+3+4) = 60 of them causal
LSE = (2, 3, 4)
SEED = [(2,), (2,)]
RAGGED = torch.tensor([0, 3, 8], dtype=torch.int32)  # sequences of 3 and 5
RAGGED_K = torch.tensor([0, 4, 6], dtype=torch.int32)  # of 4 and 2
PACKED = [(8, 2, 16)] * 3
USED = torch.tensor([6, 7], dtype=torch.int32)


def cpu_attention(backward: str = "", heads: int = 3, **options: Any) -> None:
    shapes = {"q": (2, 3, 4, 8), "k": (2, heads, 4, 8), "v": (2, heads, 4, 8)}
    operands = [torch.ones(shape, requires_grad=name in backward) for name, shape in shapes.items()]
    result = F.scaled_dot_product_attention(*operands, **options)
    if backward:
        result.sum().backward()


CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"
SDPA = "aten::scaled_dot_product_attention"

DENSE = [
    Case(SDPA, QKV, 3072, "2*(2*3*4*4)*(8 + 8)"),
    Case(SDPA, QKV, 3072, "2*(2*3*4*4)*(8 + 8)", kwargs={"is_causal": True}, causal=2 * 60 * 16),
    Case(SDPA, [(2, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 5)], 3744, "2*(2*3*4*6)*(8 + 5)"),
    Case(
        SDPA,
        [(2, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 5)],
        3744,
        "2*(2*3*4*6)*(8 + 5)",
        kwargs={"is_causal": True},
        causal=2 * 6 * (1 + 2 + 3 + 4) * 13,
    ),
    Case(
        SDPA,
        [(2, 3, 6, 8), (2, 3, 4, 8), (2, 3, 4, 8)],
        4608,
        "2*(2*3*6*4)*(8 + 8)",
        kwargs={"is_causal": True},
        causal=2 * 6 * (1 + 2 + 3 + 4 + 4 + 4) * 16,
    ),
    Case(SDPA, [(2, 6, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8)], 6144, "2*(2*6*4*4)*(8 + 8)", kwargs={"enable_gqa": True}),
    Case(SDPA, [(4, 8), (4, 8), (4, 8)], 512, "2*(4*4)*(8 + 8)"),
    Case(SDPA, [(2, 1, 4, 8), (1, 3, 4, 8), (2, 3, 4, 8)], 3072, "2*(2*3*4*4)*(8 + 8)"),
    Case(SDPA, [(1, 1, 4, 8), (1, 1, 4, 8), (2, 3, 4, 8)], 1792, "2*(4*4)*8 + 2*(2*3*4*4)*8"),
    Case(
        "aten::_scaled_dot_product_attention_math",
        QKV,
        3072,
        "2*(2*3*4*4)*(8 + 8)",
        kwargs={"is_causal": True},
        causal=2 * 60 * 16,
    ),
    on_meta("aten::_scaled_dot_product_attention_math_for_mps", QKV, 3072, "2*(2*3*4*4)*(8 + 8)"),
    Case(CPU, cpu_attention, 3072, "2*(2*3*4*4)*(8 + 8)"),
    Case(CPU, lambda: cpu_attention(is_causal=True), 3072, "2*(2*3*4*4)*(8 + 8)", causal=2 * 60 * 16),
    Case(CPU, lambda: cpu_attention(heads=1, enable_gqa=True), 3072, "2*(2*3*4*4)*(8 + 8)"),
    Case(f"{CPU}_backward", lambda: cpu_attention("qkv"), 6144, "2 * 2*(2*3*4*4)*(8 + 8)", recompute=2 * 96 * 8),
    Case(
        f"{CPU}_backward",
        lambda: cpu_attention("qkv", is_causal=True),
        6144,
        "2 * 2*(2*3*4*4)*(8 + 8)",
        recompute=2 * 96 * 8,
        causal=2 * 2 * 60 * 16,
    ),
    Case(f"{CPU}_backward", lambda: cpu_attention("v"), 1536, "2*(2*3*4*4)*8", recompute=2 * 96 * 8),
    Case(f"{CPU}_backward", lambda: cpu_attention("q"), 3072, "2*(2*3*4*4)*(8 + 8)", recompute=2 * 96 * 8),
    Case(f"{CPU}_backward", lambda: cpu_attention("qk"), 4608, "2*(2*3*4*4)*(8 + 8 + 8)", recompute=2 * 96 * 8),
    Case(
        f"{CPU}_backward",
        lambda: cpu_attention("qkv", heads=1, enable_gqa=True),
        6144,
        "2 * 2*(2*3*4*4)*(8 + 8)",
        recompute=2 * 96 * 8,
    ),
    on_meta(
        "aten::_scaled_dot_product_flash_attention", [*QKV, 0.0, True], 3072, "2*(2*3*4*4)*(8 + 8)", causal=2 * 60 * 16
    ),
    on_meta("aten::_scaled_dot_product_flash_attention", QKV, 3072, "2*(2*3*4*4)*(8 + 8)"),
    on_shapes(
        "aten::_scaled_dot_product_flash_attention",
        [*QKV, (1,), (1,), (1,), 0.0, True],
        3072,
        "2*(2*3*4*4)*(8 + 8)",
        causal=2 * 60 * 16,
        out=[(2, 3, 4, 8)],
    ),
    on_meta(
        "aten::_scaled_dot_product_efficient_attention",
        [*QKV, None, True, 0.0, True],
        3072,
        "2*(2*3*4*4)*(8 + 8)",
        causal=2 * 60 * 16,
    ),
    on_meta(
        "aten::_scaled_dot_product_cudnn_attention",
        [*QKV, None, True, 0.0, True],
        3072,
        "2*(2*3*4*4)*(8 + 8)",
        causal=2 * 60 * 16,
    ),
    on_meta(
        "aten::_scaled_dot_product_fused_attention_overrideable",
        [*QKV, None, 0.0, True],
        3072,
        "2*(2*3*4*4)*(8 + 8)",
        causal=2 * 60 * 16,
    ),
    on_meta(
        "aten::_scaled_dot_product_flash_attention_backward",
        [QKV[0], *QKV, QKV[0], LSE, None, None, 4, 4, 0.0, True, *SEED],
        6144,
        "2 * 2*(2*3*4*4)*(8 + 8)",
        causal=2 * 2 * 60 * 16,
        recompute=2 * 96 * 8,
    ),
    on_meta(
        "aten::_scaled_dot_product_efficient_attention_backward",
        [QKV[0], *QKV, (2, 3, 4, 4), QKV[0], LSE, *SEED, 0.0, [True, True, True, False]],
        6144,
        "2 * 2*(2*3*4*4)*(8 + 8)",
        recompute=2 * 96 * 8,
    ),
    on_meta(
        "aten::_scaled_dot_product_efficient_attention_backward",
        [QKV[0], *QKV, (2, 3, 4, 4), QKV[0], LSE, *SEED, 0.0, [False, False, False, True]],
        1536,
        "2*(2*3*4*4)*8",
        recompute=2 * 96 * 8,
    ),
    on_meta(
        "aten::_scaled_dot_product_cudnn_attention_backward",
        [QKV[0], *QKV, QKV[0], LSE, *SEED, None, None, None, 4, 4, 0.0, True],
        6144,
        "2 * 2*(2*3*4*4)*(8 + 8)",
        causal=2 * 2 * 60 * 16,
        recompute=2 * 96 * 8,
    ),
    on_meta(
        "aten::_scaled_dot_product_fused_attention_overrideable_backward",
        [QKV[0], *QKV, (2, 3, 4, 4), [True, True, True, False], QKV[0], LSE, None, None, 4, 4, 0.0, True, *SEED],
        6144,
        "2 * 2*(2*3*4*4)*(8 + 8)",
        causal=2 * 2 * 60 * 16,
        recompute=2 * 96 * 8,
    ),
    on_shapes("aten::_triton_scaled_dot_attention", QKV, 3072, "2*(2*3*4*4)*(8 + 8)", out=QKV[0]),
    on_shapes(
        "aten::_triton_multi_head_attention",
        [(2, 4, 24), (2, 6, 24), (2, 6, 24), 24, 3],
        50688,
        "2*2*4*24*24 + 2 * 2*2*6*24*24 + 2*(2*3*4*6)*(8 + 8) + 2*2*4*24*24",
        out=(2, 4, 24),
    ),
]

# Sequences of 3 and 5 tokens: 2*(9 + 25) = 68 pairs over 2 heads, 2*(6 + 15) = 42 causal.
RAGGED_CASES = [
    on_meta(
        "aten::_flash_attention_forward",
        [*[(1, 8, 2, 16)] * 3, None, None, 8, 8, 0.0, True, False],
        8192,
        "2*(2*8*8)*(16 + 16)",
        causal=2 * 2 * 36 * 32,
    ),
    on_meta(
        "aten::_flash_attention_forward",
        [*PACKED, RAGGED, RAGGED, 5, 5, 0.0, True, False],
        4352,
        "2 * 2*(3*3 + 5*5)*(16 + 16)",
        causal=2 * 42 * 32,
    ),
    # The diagonal ends in the bottom right corner: 3 queries of 4 keys see 2, 3, 4; 5 queries of 2 keys 0, 0, 0, 1, 2.
    on_meta(
        "aten::_flash_attention_forward",
        [(8, 2, 16), (6, 2, 16), (6, 2, 16), RAGGED, RAGGED_K, 5, 4, 0.0, True, False],
        2816,
        "2 * 2*(3*4 + 5*2)*(16 + 16)",
        causal=2 * 2 * ((2 + 3 + 4) + (1 + 2)) * 32,
    ),
    # Each query sees itself and one key to the left: 1 + 2 + 2 and 1 + 2 + 2 + 2 + 2.
    on_meta(
        "aten::_flash_attention_forward",
        [*PACKED, RAGGED, RAGGED, 5, 5, 0.0, True, False],
        4352,
        "2 * 2*(3*3 + 5*5)*(16 + 16)",
        kwargs={"window_size_left": 1, "window_size_right": 0},
        causal=2 * 2 * (5 + 9) * 32,
    ),
    # One query a sequence against 6 and 7 keys in use of a cache of 10.
    on_shapes(
        "aten::_flash_attention_forward",
        [(2, 1, 4, 16), (2, 10, 2, 16), (2, 10, 2, 16), None, None, 1, 10, 0.0, True, False],
        3328,
        "2 * 4*(1*6 + 1*7)*(16 + 16)",
        kwargs={"seqused_k": USED},
        causal=2 * 4 * 13 * 32,
        out=[(2, 1, 4, 16)],
    ),
    on_meta(
        "aten::_flash_attention_forward_no_dropout_inplace",
        [PACKED[0], *PACKED, RAGGED, RAGGED, 5, 5, 0.0, True, False],
        4352,
        "2 * 2*(3*3 + 5*5)*(16 + 16)",
        causal=2 * 42 * 32,
    ),
    on_meta(
        "aten::_flash_attention_backward",
        [PACKED[0], *PACKED, PACKED[0], (2, 8), RAGGED, RAGGED, 5, 5, 0.0, True, *SEED],
        8704,
        "2 * 2 * 2*(3*3 + 5*5)*(16 + 16)",
        causal=2 * 2 * 42 * 32,
        recompute=2 * 68 * 16,
    ),
    on_meta(
        "aten::_efficient_attention_forward",
        [*[(1, 8, 2, 16)] * 3, None, None, None, 8, 8, 0.0, 0],
        8192,
        "2*(2*8*8)*(16 + 16)",
    ),
    on_meta(
        "aten::_efficient_attention_forward",
        [*[(1, 8, 2, 16)] * 3, None, RAGGED, RAGGED, 5, 5, 0.0, 1],
        4352,
        "2 * 2*(3*3 + 5*5)*(16 + 16)",
        causal=2 * 42 * 32,
    ),
    on_meta(
        "aten::_efficient_attention_forward",
        [(1, 8, 2, 16), (1, 6, 2, 16), (1, 6, 2, 16), None, RAGGED, RAGGED_K, 5, 4, 0.0, 1],
        2816,
        "2 * 2*(3*4 + 5*2)*(16 + 16)",
        causal=2 * 2 * ((1 + 2 + 3) + (1 + 2 + 2 + 2 + 2)) * 32,
    ),
    on_meta(
        "aten::_efficient_attention_forward",
        [(1, 8, 2, 16), (1, 6, 2, 16), (1, 6, 2, 16), None, RAGGED, RAGGED_K, 5, 4, 0.0, 2],
        2816,
        "2 * 2*(3*4 + 5*2)*(16 + 16)",
        causal=2 * 2 * ((2 + 3 + 4) + (1 + 2)) * 32,
    ),
    on_meta(
        "aten::_efficient_attention_forward",
        [*[(1, 8, 2, 16)] * 3, None, RAGGED, RAGGED, 5, 5, 0.0, 1],
        4352,
        "2 * 2*(3*3 + 5*5)*(16 + 16)",
        kwargs={"window_size": 2},
        causal=2 * 2 * (5 + 9) * 32,
    ),
    on_meta(
        "aten::_efficient_attention_backward",
        [*[(1, 8, 2, 16)] * 4, None, (1, 8, 2, 16), None, None, 8, 8, (1, 2, 8), 0.0, *SEED, 1, False],
        16384,
        "2 * 2*(2*8*8)*(16 + 16)",
        causal=2 * 2 * 2 * 36 * 32,
        recompute=2 * 128 * 16,
    ),
    on_shapes(
        "aten::_cudnn_attention_forward",
        [*QKV, None, None, None, 4, 4, True, 0.0, True],
        3072,
        "2*(2*3*4*4)*(8 + 8)",
        causal=2 * 60 * 16,
        out=[QKV[0]],
    ),
    on_shapes(
        "aten::_cudnn_attention_forward",
        [*PACKED, None, RAGGED, RAGGED, 5, 5, True, 0.0, True],
        4352,
        "2 * 2*(3*3 + 5*5)*(16 + 16)",
        causal=2 * 42 * 32,
        out=[PACKED[0]],
    ),
    on_shapes(
        "aten::_cudnn_attention_forward_no_dropout_inplace",
        [PACKED[0], *PACKED, RAGGED, RAGGED, 5, 5],
        4352,
        "2 * 2*(3*3 + 5*5)*(16 + 16)",
        out=(2, 8),
    ),
    on_shapes(
        "aten::_cudnn_attention_backward",
        [PACKED[0], *PACKED, PACKED[0], (2, 8), *SEED, None, RAGGED, RAGGED, 5, 5, 0.0, False],
        8704,
        "2 * 2 * 2*(3*3 + 5*5)*(16 + 16)",
        recompute=2 * 68 * 16,
    ),
]

CASES = [*DENSE, *RAGGED_CASES]
