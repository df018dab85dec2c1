"""Cases of operators of other packages: stand-ins with the arguments that those packages pass."""

from __future__ import annotations

import torch

from case import on_shapes

DENSE = [(2, 4, 3, 8)] * 3  # b 2, s 4, h 3, d 8: 96 pairs, 60 causal
PACKED = [(8, 2, 16)] * 3
RAGGED = torch.tensor([0, 3, 8], dtype=torch.int32)  # 2*(9 + 25) = 68 pairs over 2 heads, 42 causal
CUTLASS = "xformers::efficient_attention_forward_cutlass"
NONE3 = [None] * 3

FLASH = [
    on_shapes(
        "flash_attn::_flash_attn_forward",
        [*DENSE, 0.0, 1.0, True, -1, -1, 0.0, None, False],
        3072,
        "2*(2*3*4*4)*(8 + 8)",
        causal=2 * 60 * 16,
    ),
    on_shapes(
        "flash_attn::_flash_attn_forward",
        [*DENSE, 0.0, 1.0, False, -1, -1, 0.0, None, False],
        3072,
        "2*(2*3*4*4)*(8 + 8)",
    ),
    on_shapes(
        "flash_attn::_flash_attn_forward",
        [*DENSE, 0.0, 1.0, False, 1, 1, 0.0, None, False],
        3072,
        "2*(2*3*4*4)*(8 + 8)",
        causal=2 * 6 * (2 + 3 + 3 + 2) * 16,
    ),
    # Two query heads share a key head; the last of 6 keys is seen by the last of 4 queries.
    on_shapes(
        "flash_attn::_flash_attn_forward",
        [(2, 4, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8), 0.0, 1.0, True, -1, -1, 0.0, None, False],
        6144,
        "2*(2*4*4*6)*(8 + 8)",
        causal=2 * 8 * (3 + 4 + 5 + 6) * 16,
    ),
    on_shapes(
        "flash_attn::_flash_attn_varlen_forward",
        [*PACKED, RAGGED, RAGGED, 5, 5, 0.0, 1.0, True],
        4352,
        "2 * 2*(3*3 + 5*5)*(16 + 16)",
        causal=2 * 42 * 32,
    ),
    on_shapes(
        "flash_attn::_flash_attn_backward",
        [DENSE[0], *DENSE, DENSE[0], (2, 3, 4), *DENSE, 0.0, 1.0, True, -1, -1, 0.0, None, False],
        6144,
        "2 * 2*(2*3*4*4)*(8 + 8)",
        causal=2 * 2 * 60 * 16,
        recompute=2 * 96 * 8,
    ),
    on_shapes(
        "flash_attn::_flash_attn_varlen_backward",
        [PACKED[0], *PACKED, PACKED[0], (2, 8), *PACKED, RAGGED, RAGGED, 5, 5, 0.0, 1.0, True, -1, -1, 0.0],
        4352,
        "2*(2*(3*3 + 5*5))*16 + 2*(2*(3*3 + 5*5))*16",
        causal=2 * 42 * 32,
        recompute=2 * 68 * 16,
        wanted=(True, False, False),
    ),
    *(
        on_shapes(
            name,
            [*PACKED, *NONE3, None, RAGGED, RAGGED],
            4352,
            "2 * 2*(3*3 + 5*5)*(16 + 16)",
            kwargs={key: True},
            causal=2 * 42 * 32,
        )
        for name, key in (("flash_attn_3::fwd", "is_causal"), ("flash_attn_3::_flash_attn_forward", "causal"))
    ),
    on_shapes(
        "flash_attn_3::fwd",
        [*DENSE, *[None] * 9, 4, 4, *[None] * 10, True, -1, -1, 0],
        3072,
        "2*(2*3*4*4)*(8 + 8)",
        causal=2 * 60 * 16,
    ),
    on_shapes(
        "flash_attn_3::bwd",
        [PACKED[0], *PACKED, PACKED[0], (2, 8), *PACKED, RAGGED, RAGGED, None, None, 5, 5, 1.0, True, -1, -1],
        8704,
        "2 * 2 * 2*(3*3 + 5*5)*(16 + 16)",
        causal=2 * 2 * 42 * 32,
        recompute=2 * 68 * 16,
    ),
    on_shapes(
        "flash_attn_3::_flash_attn_backward",
        [PACKED[0], *PACKED, PACKED[0], (2, 8), RAGGED, RAGGED, None, None, 5, 5, *PACKED, 1.0, True, -1, -1],
        8704,
        "2 * 2 * 2*(3*3 + 5*5)*(16 + 16)",
        causal=2 * 2 * 42 * 32,
        recompute=2 * 68 * 16,
    ),
]

XFORMERS = [
    on_shapes(
        "xformers_flash::flash_fwd",
        [*PACKED, RAGGED, RAGGED, None, 5, 5, 0.0, 1.0, True, -1, -1, False, None],
        4352,
        "2 * 2*(3*3 + 5*5)*(16 + 16)",
        causal=2 * 42 * 32,
    ),
    on_shapes(
        "xformers_flash::flash_bwd",
        [False, PACKED[0], *PACKED, PACKED[0], (2, 8), RAGGED, RAGGED, 5, 5, 0.0, 1.0, True, -1, -1, (2,)],
        8704,
        "2 * 2 * 2*(3*3 + 5*5)*(16 + 16)",
        causal=2 * 2 * 42 * 32,
        recompute=2 * 68 * 16,
    ),
    *(
        on_shapes(
            name,
            [*DENSE, None, None, None, None, 0.0, True, 1, 1.0, None, None],
            3072,
            "2*(2*3*4*4)*(8 + 8)",
            causal=2 * 60 * 16,
        )
        for name in (CUTLASS, "xformers::efficient_attention_forward_ck")
    ),
    on_shapes(
        CUTLASS,
        [*DENSE, None, None, None, 4, 4, 0.0, 0],
        3072,
        "2*(2*3*4*4)*(8 + 8)",
        kwargs={"scale": None, "seqlen_k": None, "window_size": None},
    ),
    on_shapes(CUTLASS, [*[(2, 4, 3, 2, 8)] * 3, None, None, None, 4, 4, 0.0, 0], 6144, "2*(2*3*2*4*4)*(8 + 8)"),
    on_shapes(
        "xformers::efficient_attention_backward_cutlass",
        [DENSE[0], *DENSE, None, None, None, 4, 4, (2, 3, 4), DENSE[0], 0.0, 1, 1, 1, 1.0, -1, None],
        6144,
        "2 * 2*(2*3*4*4)*(8 + 8)",
        causal=2 * 2 * 60 * 16,
        recompute=2 * 96 * 8,
    ),
    on_shapes(
        "xformers::efficient_attention_backward_ck",
        [DENSE[0], *DENSE, None, None, None, 4, None, (2, 3, 4), DENSE[0], 0.0, 1, 1, 0, 1.0],
        6144,
        "2 * 2*(2*3*4*4)*(8 + 8)",
        recompute=2 * 96 * 8,
    ),
    on_shapes(
        "xformers::efficient_attention_forward_small_k", [*[(6, 4, 8)] * 3, False, None, 0.0], 3072, "2*(6*4*4)*(8 + 8)"
    ),
    on_shapes("xformers::_sparse24_gemm", [(32, 32), (64, 48), (1,)], 98304, "2*32*(64//2)*48"),
]

PRODUCTS = [
    *(
        on_shapes(name, [(2, 3, 8), (5, 8), (1,), (1,)], 480, "2*2*3*8*5")
        for name in (
            "bitsandbytes::int8_linear_matmul",
            "bitsandbytes::int8_scaled_mm",
            "fbgemm::f8f8bf16",
            "fbgemm::f8f8bf16_rowwise",
            "fbgemm::f8f8bf16_tensorwise",
            "fbgemm::f8f8bf16_blockwise",
            "fbgemm::i8i8bf16",
        )
    ),
    on_shapes("bitsandbytes::int8_mixed_scaled_mm", [(6, 8), (6, 8), (5, 8), (6,), (5,), (2,)], 600, "2*6*5*(8 + 2)"),
    on_shapes("bitsandbytes::gemv_4bit", [(1, 8), (20, 1), [5, 8], (1,), (16,), 64], 80, "2*8*5"),
    on_shapes("bitsandbytes::gemm_4bit", [(3, 8), (20, 1), [5, 8], (1,), 64, "nf4"], 240, "2*3*8*5"),
    on_shapes("tex_ts::te_gemm_ts", [(5, 8), (1,), -1, 0, 1, (6, 8), (1,), -1, 0, 0, (6, 5)], 480, "2*6*8*5"),
    on_shapes("tex_ts::te_gemm_ts", [(8, 5), (1,), -1, 0, 0, (8, 6), (1,), -1, 0, 1, (6, 5)], 480, "2*6*8*5"),
    *(
        on_shapes(f"torchao::{name}", [(6, 8), (8, 5), (6,), (5,)], 480, "2*6*8*5", out=(6, 5))
        for name in ("int_matmul", "int_scaled_matmul", "mx_fp8_bf16", "swizzle_mm", "swizzle_scaled_mm")
    ),
    on_shapes("torchao::mx_fp4_bf16", [(6, 4), (4, 5), (6,), (5,)], 480, "2*6*8*5", out=(6, 5)),
    on_shapes("torchao::rowwise_scaled_linear_cutlass_s8s4", [(6, 8), (6,), (5, 4), (5,)], 480, "2*6*8*5", out=(6, 5)),
    on_shapes("torchao::rowwise_scaled_linear_cutlass_s4s4", [(6, 4), (6,), (5, 4), (5,)], 480, "2*6*8*5", out=(6, 5)),
    on_shapes("torchao::blockwise_fp8_gemm", [(6, 8), (6,), (5, 8), (5,)], 480, "2*6*8*5", out=(6, 5)),
    on_shapes(
        "torchao::rowwise_scaled_linear_sparse_cutlass_f8f8",
        [(6, 8), (6,), (5, 4), (1,), (5,)],
        240,
        "2*6*(8//2)*5",
        out=(6, 5),
    ),
    on_shapes("torchao::quant_llm_linear", [3, 2, (6, 8), (5, 6), (5,), 1], 480, "2*6*8*5", out=(6, 5)),
    on_shapes("torchao::marlin_qqq_gemm", [(6, 8), (1,)], 480, "2*6*8*5", out=(6, 5)),
    on_shapes("torchao::marlin_24_gemm", [(6, 8), (1,)], 240, "2*6*(8//2)*5", out=(6, 5)),
    *(
        on_shapes(f"torchao::_linear_8bit_act_{bits}bit_weight", [(6, 8), (1,), 32, 5, 8], 480, "2*6*8*5", out=(6, 5))
        for bits in range(1, 9)
    ),
    on_shapes(
        "torchao::fbgemm_mxfp8_grouped_mm_2d_3d", [(6, 8), (6,), (2, 8, 5), (2, 5), (2,)], 480, "2*6*8*5", out=(6, 5)
    ),
    on_shapes(
        "torchao::qscaled_dot_product",
        [*[(2, 3, 4, 8)] * 3, None, 0.0, True],
        3072,
        "2*(2*3*4*4)*(8 + 8)",
        causal=2 * 60 * 16,
        out=(2, 3, 4, 8),
    ),
]

CASES = [*FLASH, *XFORMERS, *PRODUCTS]
