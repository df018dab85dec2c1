"""Input tensors: read `2x8` or `1x128:int64`, make them, and say what they are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flopprof.errors import FlopprofError, UsageError

INPUT_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
}
MODEL_DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST = 2**63 - 1  # a size, or bytes, of a tensor


class TooLarge(UsageError):
    """Sizes that no tensor has."""


_SEED = 0


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype of one input; dtype None is the model's floating type."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


def parse_input(text: str) -> InputSpec:
    """The input that `2x8`, `1x128:int64` or `scalar:float32` describes. Raises UsageError."""
    sizes, colon, dtype = text.strip().lower().partition(":")
    if colon and dtype not in INPUT_DTYPES:
        raise UsageError(f"input {text!r} has the unknown dtype {dtype!r}: use one of {', '.join(INPUT_DTYPES)}.")
    if sizes != "scalar" and not re.fullmatch(r"[0-9]+(x[0-9]+)*", sizes):
        raise UsageError(
            f"cannot read input {text!r}: write sizes joined by x and an optional dtype, as in "
            "1x3x224x224, 1x128:int64 or scalar:float32."
        )
    shape = () if sizes == "scalar" else tuple(int(size) for size in sizes.split("x"))
    return InputSpec(shape, INPUT_DTYPES[dtype] if colon else None)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The floating type that the model and its floating inputs are cast to; None keeps what they have."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in MODEL_DTYPES:
        raise UsageError(f"dtype {name!r} is not one that a model can be cast to: use {', '.join(MODEL_DTYPES)}.")
    return INPUT_DTYPES[name]


def make_input(spec: InputSpec, device: str, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of that shape: normal where floating, zeros where not, without values on meta.

    The values come from a generator of their own, so that no global random state moves. Raises UsageError for what no
    tensor can be, FlopprofError for what does not fit in memory.
    """
    kind = spec.dtype or dtype or torch.get_default_dtype()
    described = f"an input of {'x'.join(map(str, spec.shape))} {str(kind).removeprefix('torch.')}"
    if max(math.prod(spec.shape) * kind.itemsize, *spec.shape, 0) > LARGEST:
        raise TooLarge(f"{described} is larger than any tensor: give smaller sizes.")
    try:
        return _made(spec, device, kind)
    except (RuntimeError, MemoryError) as error:
        raise FlopprofError(
            f"{described} cannot be made on {device}: {first_line(error)} Give smaller sizes, or --device meta."
        ) from error


def _made(spec: InputSpec, device: str, kind: torch.dtype) -> torch.Tensor:
    if device == "meta":
        return torch.empty(spec.shape, dtype=kind, device="meta")
    if not (kind.is_floating_point or kind.is_complex):
        return torch.zeros(spec.shape, dtype=kind, device=device)
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(spec.shape, generator=generator, dtype=kind).to(device)


def place(value: Any, device: str | None, dtype: torch.dtype | None) -> Any:
    """`value` with every tensor in it on `device` and, where floating, in `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: place(item, device, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(place(item, device, dtype) for item in value)
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor inside nested lists, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def samples_in(batch: torch.Tensor | list[torch.Tensor]) -> int | None:
    """How many samples a vision model's first input holds: its first size, or the images of a list."""
    if isinstance(batch, list):
        return len(batch)
    return batch.shape[0] if batch.dim() else None


def tokens_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many tokens (batch, length) of ids hold: the decoder's where there are such, else the first; None: no ids."""
    ids = kwargs.get("decoder_input_ids")
    first = ids if isinstance(ids, torch.Tensor) else next(iter(tensors_in([*args, *kwargs.values()])), None)
    if first is None or first.dim() != 2 or first.is_floating_point() or first.dtype == torch.bool:
        return None
    return first.numel()


def describe_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Shapes and dtypes of the inputs: `1x3x224x224 float32, mask=1x128 bool`."""
    parts = [_describe(tensor) for argument in args for tensor in tensors_in(argument)]
    parts += [f"{name}={_describe(tensor)}" for name, value in kwargs.items() for tensor in tensors_in(value)]
    return ", ".join(parts) or "none"


def _describe(tensor: torch.Tensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, ending in a full stop."""
    lines = str(error).strip().splitlines()
    line = lines[0].rstrip() if lines else "no message"
    return line if line.endswith((".", "!", "?")) else f"{line}."
