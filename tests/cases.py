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
import cases_transforms

CASES = [
    *cases_products.CASES,
    *cases_convolution.CASES,
    *cases_attention.CASES,
    *cases_recurrent.CASES,
    *cases_quantized.CASES,
    *cases_thirdparty.CASES,
    *cases_transforms.CASES,
]

_PACKAGES = ("flash_attn", "flash_attn_3", "xformers", "xformers_flash", "bitsandbytes", "fbgemm", "tex_ts", "torchao")
_CUDA = "its only kernel is for CUDA"
_REASONS = {
    "miopen": "its kernel is for ROCm",
    "mps": "its kernel is for Apple's MPS",
    "overrideable": "only backends outside torch implement it",
    "symm_mem": "it needs a group of processes",
    "mkldnn_linear_backward_input": "it fails on every layout from Python",
    "_quantized::conv3d": "it has a schema and no kernel",
    "_weight_int4pack_mm": "its meta kernel fails without a fake device",
}


def _why(op: str) -> str:
    namespace = op.partition("::")[0]
    if namespace in _PACKAGES:
        return f"{namespace} is not installed"
    return next((reason for part, reason in _REASONS.items() if part in op), _CUDA)


WAIVED = {op: _why(op) for op in sorted({case.op for case in CASES} - {c.op for c in CASES if c.device != "shapes"})}
"""Operators that no row can run here, and the reason: their formulas are tested with stand-ins."""
