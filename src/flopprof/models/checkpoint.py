"""What a checkpoint stores beside what its model has: dtypes, bytes, quantisation, and whether the numbers agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from flopprof.models.hf_quantised import elements_stored
from flopprof.models.hf_schemes import Scheme
from flopprof.models.safetensors_headers import BITS, Stored
from flopprof.units import format_si

_NAMED = 3


@dataclass(frozen=True)
class Checkpoint:
    """Stored elements and bytes, the elements that the model has, how it is quantised, and what does not fit.

    model_elements: parameters, each once, and persistent buffers. mismatch: one sentence, None where all agrees or
    where quantised storage cannot be compared.
    """

    by_dtype: Mapping[str, int]
    elements: int
    n_bytes: int
    files: int
    model_elements: int
    quantisation: str | None
    mismatch: str | None

    def describe(self) -> str:
        """`6.738 G elements, 13.48 GB in 2 files: BF16`."""
        kinds = ", ".join(
            dtype if len(self.by_dtype) == 1 else f"{dtype} {format_si(elements)}"
            for dtype, elements in self.by_dtype.items()
        )
        files = "1 file" if self.files == 1 else f"{self.files} files"
        how = f", quantised ({self.quantisation})" if self.quantisation else ""
        return f"{self.elements:,} elements, {format_si(self.n_bytes, 'B')} in {files}: {kinds}{how}"


def compare(stored: Stored, model: nn.Module, scheme: Scheme | None) -> Checkpoint:
    """The checkpoint's facts, its elements counted against the model's."""
    shared: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        shared.setdefault(id(tensor), []).append(name)
        sizes[id(tensor)] = tensor.numel()
    wanted = sum(sizes.values())
    # Tied weights are stored once, or under each of their names.
    doubled = sum(
        sizes[key] * (max(1, sum(name in stored.tensors for name in names)) - 1) for key, names in shared.items()
    )
    copies = sum(sizes[key] * (len(names) - 1) for key, names in shared.items())
    names = [name for group in shared.values() for name in group]
    quantised = scheme.label if scheme is not None else _narrow(stored)
    if scheme is not None:
        elements = elements_stored(stored, scheme, set(names))
    else:
        elements = None if quantised else stored.elements
    excess = 0 if elements is None else elements - wanted
    agrees = excess == doubled if doubled else excess in (0, copies)
    return Checkpoint(
        by_dtype=stored.by_dtype(),
        elements=stored.elements,
        n_bytes=stored.n_bytes,
        files=stored.files,
        model_elements=wanted,
        quantisation=quantised,
        mismatch=None if agrees or elements is None else _mismatch(stored, elements, names, wanted),
    )


def _mismatch(stored: Stored, elements: int, names: list[str], wanted: int) -> str:
    difference = elements - wanted
    sentence = (
        f"the checkpoint stores {elements:,} elements and the model built from its config has {wanted:,}: "
        f"{abs(difference):,} {'more' if difference > 0 else 'fewer'} are stored"
    )
    known = set(names)
    odd = [name for name in stored.tensors if name not in known] if difference > 0 else []
    odd = odd or [name for name in names if name not in stored.tensors]
    if odd and len(odd) < len(known):  # where nearly every name differs, the names say nothing
        more = f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
        sentence += f" (only on one side: {', '.join(name[:80] for name in odd[:_NAMED])}{more})"
    return sentence


def _narrow(stored: Stored) -> str | None:
    """The narrow dtypes in which most is stored; None: stored as it is computed."""
    narrow = [dtype for dtype, elements in stored.by_dtype().items() if BITS[dtype] <= 8 and dtype != "BOOL"]
    packed = sum(stored.by_dtype()[dtype] for dtype in narrow)
    return ", ".join(narrow) if 2 * packed > stored.elements else None
