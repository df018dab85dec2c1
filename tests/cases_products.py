"""Cases of matrix products: dense, sparse, scaled, grouped."""

from __future__ import annotations

import torch

from case import Case, on_meta, on_shapes

MASK = torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 0], [4, 5, 0, 6]])  # (3, 4) with 6 non-zeros
BLOCKS = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2))  # (6, 6) with 3 blocks of 2 x 2
INT32 = torch.int32


def int_mm() -> torch.Tensor:
    return torch._int_mm(torch.ones(20, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8))


def scaled_mm() -> torch.Tensor:
    a, b = torch.ones(16, 32).to(torch.float8_e4m3fn), torch.ones(48, 32).to(torch.float8_e4m3fn)
    one = torch.ones(())
    return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)


def scaled_mm_fp4() -> torch.Tensor:
    def packed(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.uint8, device="meta").view(torch.float4_e2m1fn_x2)

    scale = torch.empty(128, 4, dtype=torch.float8_e4m3fn, device="meta").flatten()
    return torch._scaled_mm(packed(128, 32), packed(128, 32).t(), scale, scale, out_dtype=torch.bfloat16)


def scaled_grouped_mm() -> torch.Tensor:
    a = torch.empty(32, 64, dtype=torch.float8_e4m3fn, device="meta")
    b = torch.empty(2, 48, 64, dtype=torch.float8_e4m3fn, device="meta").transpose(1, 2)
    scales = torch.empty(32, device="meta"), torch.empty(2, 48, device="meta")
    offsets = torch.tensor([16, 32], dtype=INT32, device="meta")
    return torch._scaled_grouped_mm(a, b, *scales, offsets, out_dtype=torch.bfloat16)


def scaled_grouped_mm_v2() -> torch.Tensor:
    a = torch.empty(32, 64, dtype=torch.float8_e4m3fn, device="meta")
    b = torch.empty(2, 48, 64, dtype=torch.float8_e4m3fn, device="meta").transpose(1, 2)
    scales = [torch.empty(32, device="meta")], [1], [], [torch.empty(2, 48, device="meta")], [1], []
    ends = torch.empty(2, dtype=INT32, device="meta")
    return torch.ops.aten._scaled_grouped_mm_v2(a, b, *scales, ends, None, torch.bfloat16)


def mkldnn_weights() -> object:
    grad, x, weight = (torch.ones(shape).to_mkldnn() for shape in ((2, 3), (2, 4), (3, 4)))
    return torch.ops.aten.mkldnn_linear_backward_weights(grad, x, weight, True)


def offsets(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=INT32)


def bilinear(*wanted: bool) -> None:
    """(2, 3) x (5, 3, 4) x (2, 4), forward and the wanted gradients."""
    shapes = (2, 3), (2, 4), (5, 3, 4)
    operands = [torch.ones(shape, requires_grad=want) for shape, want in zip(shapes, wanted, strict=True)]
    result = torch.nn.functional.bilinear(*operands)
    if any(wanted):
        result.sum().backward()


def mkldnn_linear(backward: bool) -> None:
    x, weight = torch.ones(2, 4).to_mkldnn().requires_grad_(backward), torch.ones(3, 4, requires_grad=backward)
    result = torch._C._nn.mkldnn_linear(x, weight)
    if backward:
        result.to_dense().sum().backward()


def linear_pointwise() -> None:
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(5, 8, dtype=torch.bfloat16), 2)
    torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def sparse_reduce_backward() -> None:
    sparse, dense = MASK.to_sparse_csr().requires_grad_(), torch.ones(4, 5, requires_grad=True)
    torch.sparse.mm(sparse, dense, "sum").sum().backward()


def transformers_grouped_mm(backward: bool) -> None:
    import transformers.integrations.moe  # registers the operators

    assert transformers.integrations.moe
    x = torch.ones(6, 4, requires_grad=backward)
    weight = torch.ones(2, 4, 5)
    result = torch.ops.transformers.grouped_mm_fallback(x, weight, offsets(2, 6))
    if backward:
        result.sum().backward()


def quantized_matmul() -> torch.Tensor:
    a, b = (torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.quint8) for shape in ((2, 3), (3, 4)))
    return torch.ops.quantized.matmul(a, b, 0.1, 0)


@torch.inference_mode()
def sparse_mm_whole() -> torch.Tensor:
    return torch.sparse.mm(MASK.to_sparse(), torch.ones(4, 5))


@torch.inference_mode()
def sparse_linear_whole() -> torch.Tensor:
    return torch.nn.functional.linear(torch.ones(7, 2, 4), MASK.to_sparse())


@torch.inference_mode()
def sparse_matmul_whole() -> torch.Tensor:
    return torch.matmul(MASK.to_sparse(), torch.ones(4, 5))


@torch.inference_mode()
def smm_whole() -> torch.Tensor:
    return torch.smm(MASK.to_sparse(), torch.ones(4, 5))


DENSE = [
    Case("aten::mm", [(4, 5), (5, 6)], 240, "2*4*5*6"),
    Case("aten::mm", [(4, 1), (1, 6)], 48, "2*4*1*6"),
    Case("aten::mm", [(0, 5), (5, 6)], 0, "2*0*5*6"),
    Case("aten::mm", lambda: torch.mm(torch.ones(4, 5), torch.ones(5, 6), out=torch.empty(4, 6)), 240, "2*4*5*6"),
    Case("aten::addmm", [(6,), (4, 5), (5, 6)], 240, "2*4*5*6"),
    Case("aten::addmm", lambda: torch.ones(4, 6).addmm_(torch.ones(4, 5), torch.ones(5, 6)), 240, "2*4*5*6"),
    Case("aten::_addmm_activation", [(6,), (4, 5), (5, 6)], 240, "2*4*5*6", kwargs={"use_gelu": True}),
    Case("aten::bmm", [(3, 4, 5), (3, 5, 6)], 720, "2*3*4*5*6"),
    Case("aten::baddbmm", [(3, 4, 6), (3, 4, 5), (3, 5, 6)], 720, "2*3*4*5*6"),
    Case("aten::addbmm", [(4, 6), (3, 4, 5), (3, 5, 6)], 720, "2*3*4*5*6"),
    Case("aten::mv", [(4, 5), (5,)], 40, "2*4*5"),
    Case("aten::addmv", [(4,), (4, 5), (5,)], 40, "2*4*5"),
    Case("aten::dot", [(7,), (7,)], 14, "2*7"),
    Case("aten::vdot", [(7,), (7,)], 14, "2*7"),
    Case("aten::matmul", [(5,), (5,)], 10, "2*5"),
    Case("aten::matmul", [(4, 5), (5,)], 40, "2*4*5"),
    Case("aten::matmul", [(5,), (5, 6)], 60, "2*5*6"),
    Case("aten::matmul", [(5,), (3, 5, 6)], 180, "2*3*5*6"),
    Case("aten::matmul", [(2, 1, 4, 5), (3, 5, 6)], 1440, "2*2*3*4*5*6"),
    Case("aten::linalg_matmul", [(2, 4, 5), (5, 6)], 480, "2*2*4*5*6"),
    Case("aten::linear", [(2, 3, 4), (5, 4), (5,)], 240, "2*2*3*4*5"),
    Case("aten::linear", [(4,), (5, 4)], 40, "2*4*5"),
    Case("aten::linear", [(2, 4), (4,)], 16, "2*2*4"),
    Case("aten::_foreach_mm", [[(2, 3), (4, 3)], [(3, 2), (3, 5)]], 144, "2*2*3*2 + 2*4*3*5"),
    Case("aten::_euclidean_dist", [(2, 7, 3), (2, 6, 3)], 840, "2*2*7*6*(3 + 2)"),
    Case("aten::_euclidean_dist", lambda: torch.cdist(torch.ones(30, 3), torch.ones(6, 3)), 1800, "2*30*6*(3 + 2)"),
    Case("aten::_trilinear", lambda: bilinear(False, False, False), 320, "2*2*5*3*4 + 2*2*5*4"),
    Case("aten::_trilinear", lambda: bilinear(True, True, True), 1040, "2*2*5*3*4 + 2*2*5*4 + 3*2*2*5*3*4"),
    Case("aten::_trilinear", lambda: bilinear(False, False, True), 560, "2*2*5*3*4 + 2*2*5*4 + 2*2*5*3*4"),
    Case("aten::_int_mm", int_mm, 5120, "2*20*16*8"),
    Case("quantized::matmul", quantized_matmul, 48, "2*2*3*4"),
    Case("aten::_scaled_mm", scaled_mm, 49152, "2*16*32*48"),
    Case("aten::_scaled_mm", scaled_mm_fp4, 2097152, "2*128*64*128"),
    on_meta(
        "aten::_scaled_mm_v2",
        [(16, 32), (32, 48), [()], [0], [0], [()], [0], [0], None, torch.bfloat16],
        49152,
        "2*16*32*48",
        dtype="float8_e4m3fn",
    ),
    Case("aten::_grouped_mm", [(6, 16), (2, 16, 8), offsets(2, 6)], 1536, "2*6*16*8", dtype="bfloat16"),
    Case("aten::_grouped_mm", [(2, 4, 16), (16, 24), offsets(8, 24)], 3072, "2*4*16*24", dtype="bfloat16"),
    Case("aten::_grouped_mm", [(8, 24), (24, 16), offsets(8, 24)], 6144, "2*8*24*16", dtype="bfloat16"),
    Case("aten::_grouped_mm", [(2, 8, 16), (2, 16, 24)], 12288, "2*2*8*16*24", dtype="bfloat16"),
    Case("aten::_scaled_grouped_mm", scaled_grouped_mm, 196608, "2*32*64*48"),
    Case("transformers::grouped_mm_fallback", lambda: transformers_grouped_mm(False), 240, "2*6*4*5"),
    Case("transformers::grouped_mm_fallback_backward", lambda: transformers_grouped_mm(True), 240, "2*6*4*5"),
    on_meta("aten::linear_backward", [(2, 4), (2, 3), (3, 4), [True, True, True]], 96, "2*2*3*4 + 2*2*3*4"),
    on_meta("aten::linear_backward", [(2, 4), (2, 3), (3, 4), [False, True, True]], 48, "2*2*3*4"),
    Case("aten::mkldnn_linear", lambda: mkldnn_linear(False), 48, "2*2*4*3"),
    Case("aten::mkldnn_linear_backward", lambda: mkldnn_linear(True), 96, "2*2*4*3 + 2*2*4*3"),
    Case("mkldnn::_linear_pointwise", linear_pointwise, 160, "2*2*8*5"),
]


SPARSE = [
    Case("aten::mm", lambda: MASK.to_sparse() @ torch.ones(4, 5), 60, "2*6*5"),
    Case("aten::mm", lambda: MASK.to_sparse_csr() @ torch.ones(4, 5), 60, "2*6*5"),
    Case("aten::mm", lambda: MASK.to_sparse_csc() @ torch.ones(4, 5), 60, "2*6*5"),
    Case("aten::mm", lambda: BLOCKS.to_sparse_bsr((2, 2)) @ torch.ones(6, 5), 120, "2*3*2*2*5"),
    Case("aten::mm", lambda: torch.ones(2, 3) @ MASK.to_sparse_csr(), 24, "2*2*6"),
    # Columns of the left hold 2, 1, 2, 1 elements; the rows of its transpose the same: pairs that meet.
    Case("aten::mm", lambda: MASK.to_sparse() @ MASK.t().to_sparse(), 20, "2*(2*2 + 1*1 + 2*2 + 1*1)"),
    Case("aten::mm", lambda: MASK.to_sparse_csr() @ MASK.t().to_sparse_csr(), 20, "2*(2*2 + 1*1 + 2*2 + 1*1)"),
    Case("aten::mm", lambda: MASK.to_sparse_csc() @ MASK.t().to_sparse_csc(), 20, "2*(2*2 + 1*1 + 2*2 + 1*1)"),
    Case("aten::mv", lambda: MASK.to_sparse() @ torch.ones(4), 12, "2*6"),
    Case("aten::bmm", lambda: torch.stack([MASK, MASK]).to_sparse().bmm(torch.ones(2, 4, 5)), 120, "2*(6 + 6)*5"),
    Case("aten::addmm", lambda: torch.addmm(torch.ones(3, 5), MASK.to_sparse(), torch.ones(4, 5)), 60, "2*6*5"),
    Case("aten::_sparse_addmm", lambda: torch.sparse.mm(MASK.to_sparse(), torch.ones(4, 5)), 60, "2*6*5"),
    Case("aten::_sparse_mm", sparse_mm_whole, 60, "2*6*5"),
    Case(
        "aten::_sparse_sparse_matmul",
        lambda: torch.sparse.mm(MASK.to_sparse(), MASK.t().to_sparse()),
        20,
        "2*(2*2 + 1*1 + 2*2 + 1*1)",
    ),
    Case("aten::linear", sparse_linear_whole, 168, "2*7*2*6"),
    Case("aten::matmul", sparse_matmul_whole, 60, "2*6*5"),
    Case("aten::smm", smm_whole, 60, "2*6*5"),
    Case(
        "aten::sspaddmm",
        lambda: torch.sspaddmm(torch.zeros(3, 5).to_sparse(), MASK.to_sparse(), torch.ones(4, 5)),
        60,
        "2*6*5",
    ),
    Case("aten::hspmm", lambda: torch.hspmm(MASK.to_sparse(), torch.ones(4, 5)), 60, "2*6*5"),
    Case(
        "aten::_sparse_mm_reduce_impl",
        lambda: torch.sparse.mm(MASK.to_sparse_csr(), torch.ones(4, 5), "sum"),
        60,
        "2*6*5",
    ),
    Case("aten::_sparse_mm_reduce_impl_backward", sparse_reduce_backward, 120, "2*6*5 + 2*6*5"),
    Case(
        "aten::sparse_sampled_addmm",
        lambda: torch.sparse.sampled_addmm(MASK.to_sparse_csr(), torch.ones(3, 7), torch.ones(7, 4)),
        84,
        "2*6*7",
    ),
    on_meta(
        "aten::_sparse_semi_structured_mm",
        [(32, 32), torch.empty(32, 4, dtype=torch.int16, device="meta"), (64, 48)],
        98304,
        "2*32*(64//2)*48",
        dtype="bfloat16",
    ),
    on_meta(
        "aten::_sparse_semi_structured_addmm",
        [(32,), (32, 32), torch.empty(32, 4, dtype=torch.int16, device="meta"), (64, 48)],
        98304,
        "2*32*(64//2)*48",
        dtype="bfloat16",
    ),
    on_meta(
        "aten::_sparse_semi_structured_linear",
        [(16, 64), (32, 32), torch.empty(32, 4, dtype=torch.int16, device="meta")],
        32768,
        "2*16*32*(64//2)",
        dtype="bfloat16",
    ),
]


KERNELS = [
    on_meta("mkl::_mkl_linear", [(2, 8), (5, 8), (5, 8), None, 2], 160, "2*2*8*5"),
    Case("aten::mkldnn_linear_backward_weights", mkldnn_weights, 48, "2*2*3*4"),
    Case("inductor::_mm_plus_mm", [(2, 3), (3, 4), (2, 5), (5, 4), (2, 4)], 128, "2*2*3*4 + 2*2*5*4"),
    Case("aten::_scaled_grouped_mm_v2", scaled_grouped_mm_v2, 196608, "2*32*64*48"),
    on_meta("aten::_cslt_sparse_mm", [(32, 36), (64, 48)], 98304, "2*32*(64//2)*48", dtype="bfloat16"),
]

STAND_INS = [
    on_shapes("aten::mkldnn_linear_backward_input", [[2, 4], (2, 3), (3, 4)], 48, "2*2*3*4", out=(2, 4)),
    on_meta(
        "aten::_scaled_addmm",
        [torch.empty(16, 48, dtype=torch.bfloat16, device="meta"), (16, 32), (32, 48), [()], [0], [0], [()], [0], [0]],
        49152,
        "2*16*32*48",
        dtype="float8_e4m3fn",
    ),
    on_shapes(
        "symm_mem::fused_all_gather_matmul",
        [(2, 3), [(3, 4), (3, 5)], 0, "group"],
        432,
        "2*8*3*4 + 2*8*3*5",
        out=[(8, 3), [(8, 4), (8, 5)]],
    ),
    on_shapes(
        "symm_mem::fused_all_gather_scaled_matmul",
        [(2, 3), [(3, 4)], (), [()], 0, "group"],
        192,
        "2*8*3*4",
        out=[(8, 3), [(8, 4)]],
    ),
    on_shapes("symm_mem::fused_matmul_reduce_scatter", [(8, 3), (3, 4), "sum", 0, "group"], 192, "2*8*3*4", out=(2, 4)),
    on_shapes(
        "symm_mem::fused_scaled_matmul_reduce_scatter",
        [(8, 3), (3, 4), (), (), "sum", 0, 0, "group"],
        192,
        "2*8*3*4",
        out=(2, 4),
    ),
]

CASES = [*DENSE, *SPARSE, *KERNELS, *STAND_INS]
