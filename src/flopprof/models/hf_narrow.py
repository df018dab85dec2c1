"""Products of quantised layers: dequantised weights, or both factors in 8 bits, by operators that stand in.

What multiplies 8-bit factors on a device are kernels of other packages (bitsandbytes, DeepGEMM, Triton, torchao). Here
`flopprof::quantised_linear` and `flopprof::quantised_grouped_mm` do the same multiply-adds on factors of the same type.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_EXPERTS = "flopprof_narrow"


class Narrow(torch.autograd.Function):
    """(..., k) times (n, k), both cast to a narrow type; the gradient of the input by the dequantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, dtype: torch.dtype) -> Any:
        """(..., n) in the input's type."""
        _define()
        ctx.save_for_backward(weight)
        return torch.ops.flopprof.quantised_linear((x * 1.0).to(dtype), weight, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of the input alone."""
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        return gradient @ _dequantised(weight, gradient.dtype), None, None


class NarrowGrouped(torch.autograd.Function):
    """Rows times the (k, n) of their expert, both narrow; rows end at `offs`."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, offs: Any, dtype: torch.dtype) -> Any:
        """(rows, n) in the input's type."""
        _define()
        ctx.save_for_backward(weight, offs)
        return torch.ops.flopprof.quantised_grouped_mm((x * 1.0).to(dtype), weight, offs, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of the rows alone."""
        (weight, offs), (gradient,) = ctx.saved_tensors, gradients
        moe: Any = importlib.import_module("transformers.integrations.moe")
        wide = _dequantised(weight, gradient.dtype).transpose(-2, -1)
        return moe._grouped_mm(gradient.contiguous(), wide, offs), None, None, None


def _dequantised(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Every element times its scale."""
    return weight.to(dtype) * 1.0


def _product(x: torch.Tensor, weight: torch.Tensor, bias: Any, multiplied: Any, compute: Any) -> torch.Tensor:
    if multiplied is not None:
        out: torch.Tensor = Narrow.apply(x, weight, multiplied)
        return out if bias is None else out + bias
    dtype = x.dtype if compute is None else compute
    wide = _dequantised(weight, dtype)
    return functional.linear(x.to(dtype), wide, None if bias is None else bias.to(dtype)).to(x.dtype)


class QuantisedLinear(nn.Linear):
    """A linear layer with a frozen weight of few bits."""

    multiplied: torch.dtype | None
    compute: torch.dtype | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return _product(x, self.weight, self.bias, self.multiplied, self.compute)


@cache
def linear_classes() -> dict[type, type]:
    """The classes whose weights are quantised, and what each becomes."""
    conv1d: Any = importlib.import_module("transformers.pytorch_utils").Conv1D

    class QuantisedConv1D(conv1d):  # type: ignore[misc]  # GPT-2's linear layer, its weight the other way round
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _product(x, self.weight.t(), self.bias, self.multiplied, self.compute)

    return {nn.Linear: QuantisedLinear, conv1d: QuantisedConv1D}


def narrow_experts(model: Any, dtype: torch.dtype) -> None:
    """The model's experts multiply in a narrow type: transformers finds what they run under a name of its config."""
    moe: Any = importlib.import_module("transformers.integrations.moe")
    name = f"{_EXPERTS}_{str(dtype).removeprefix('torch.')}"

    def run(experts: Any, *args: Any) -> Any:
        own = moe._grouped_mm
        moe._grouped_mm = lambda x, weight, offs: NarrowGrouped.apply(x, weight, offs, dtype)
        try:
            return moe.grouped_mm_experts_forward(experts, *args)
        finally:
            moe._grouped_mm = own

    moe.ALL_EXPERTS_FUNCTIONS.register(name, run)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == "grouped_mm":
            config._experts_implementation = name


@cache
def _define() -> torch.library.Library:
    """The operators; kept, because they live as long as the library object."""
    library = torch.library.Library("flopprof", "FRAGMENT")
    library.define("quantised_linear(Tensor x, Tensor weight, ScalarType out_dtype) -> Tensor")
    library.define("quantised_grouped_mm(Tensor x, Tensor weight, Tensor offs, ScalarType out_dtype) -> Tensor")
    library.impl("quantised_linear", _linear, "CompositeExplicitAutograd")
    library.impl("quantised_grouped_mm", _grouped, "CompositeExplicitAutograd")
    return library


def _linear(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    if x.is_meta:
        return torch.empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype, device="meta")
    return x.to(out_dtype) @ weight.to(out_dtype).t()


def _grouped(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape[0], weight.shape[-1], dtype=out_dtype, device=x.device)
    if not x.is_meta:
        start = 0
        for expert, end in enumerate(offs.tolist()):
            out[start:end] = x[start:end].to(out_dtype) @ weight[expert].to(out_dtype)
            start = end
    return out
