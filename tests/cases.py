"""The case table of every counted operator, and why some cannot run here.

Adding an operator: one decorated formula in src/flopprof/formulas, one row in a table below.
"""

from __future__ import annotations

import cases_attention
import cases_convolution
import cases_products
import cases_quantized
import cases_recurrent
import cases_thirdparty

CASES = [
    *cases_products.CASES,
    *cases_convolution.CASES,
    *cases_attention.CASES,
    *cases_recurrent.CASES,
    *cases_quantized.CASES,
    *cases_thirdparty.CASES,
]

_PACKAGES = ("flash_attn", "flash_attn_3", "xformers", "xformers_flash", "bitsandbytes", "fbgemm", "tex_ts", "torchao")
_CUDA = "its kernel is for CUDA, and it has no meta kernel"
_ROCM = "its kernel is for ROCm"
_MPS = "its kernel is for Apple's MPS"
_PACK = "its weight is packed by a kernel that this CPU or this build lacks"


def _why(op: str) -> str:
    namespace, _, name = op.partition("::")
    if namespace in _PACKAGES:
        return f"{namespace} is not installed"
    reasons = {"miopen": _ROCM, "mps": _MPS, "overrideable": "only backends outside torch implement it"}
    for part, reason in reasons.items():
        if part in name:
            return reason
    return _PACK if namespace in ("quantized", "_quantized", "onednn", "mkl") or "quantized" in name else _CUDA


WAIVED = {op: _why(op) for op in sorted({case.op for case in CASES} - {c.op for c in CASES if c.device != "shapes"})}
"""Operators that no row can run here, and the reason: their formulas are tested with stand-ins."""
