"""Cases of Fourier transforms and triangular systems. What a complex operand multiplies by 4 is the engine's."""

from __future__ import annotations

from case import Case, on_shapes

CASES = [
    Case("aten::_fft_c2c", [(3, 8), [1], 0, True], 72, "3*8*3", dtype="complex64"),
    Case("aten::_fft_c2c", [(4, 16), [0, 1], 0, True], 384, "4*16*(2 + 4)", dtype="complex64"),
    Case("aten::_fft_c2c", [(2, 6), [1], 0, False], 36, "2*6*3", dtype="complex64"),
    Case("aten::_fft_r2c", [(3, 8), [1], 0, True], 144, "4 * (3*8*3 // 2)"),
    Case("aten::_fft_r2c", [(4, 8), [0, 1], 0, True], 352, "4 * (4*8*3 // 2 + 4*5*2)"),
    Case("aten::_fft_c2r", [(3, 5), [1], 0, 8], 36, "3*8*3 // 2", dtype="complex64"),
    on_shapes("prims::fft_c2c", [(3, 8)], 72, "3*8*3", kwargs={"dim": [1], "forward": True}, out=(3, 8)),
    on_shapes("prims::fft_r2c", [(3, 8)], 144, "4 * (3*8*3 // 2)", kwargs={"dim": [1], "onesided": True}, out=(3, 5)),
    on_shapes("prims::fft_c2r", [(3, 5)], 36, "3*8*3 // 2", kwargs={"dim": [1], "last_dim_size": 8}, out=(3, 8)),
    Case(
        "aten::linalg_solve_triangular", [(2, 4, 4), (2, 4, 3)], 72, "2*4*(4 - 1)*3",
        kwargs={"upper": False, "unitriangular": True},
    ),
    Case(
        "aten::linalg_solve_triangular", [(4, 4), (2, 3, 4)], 72, "2*3*4*(4 - 1)",
        kwargs={"upper": True, "left": False},
    ),
    Case("aten::triangular_solve", [(4, 3), (4, 4)], 36, "4*(4 - 1)*3"),
]  # fmt: skip
