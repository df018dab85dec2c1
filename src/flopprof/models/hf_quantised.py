"""Quantised checkpoints: a scheme and a model -> the products that would run, and the bytes that are stored.

The packages that quantise are not needed. A product does the same multiply-adds whatever its weight is stored in; what
differs is the number format that is multiplied, and that stored weights do not train.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from flopprof.models.hf_narrow import linear_classes, narrow_experts
from flopprof.models.hf_schemes import SPECIAL, Scheme
from flopprof.models.safetensors_headers import BITS, Stored
from flopprof.units import format_si

_REPEATED, _MOST_REPEATS = re.compile(r"[*+?{]"), 3
_WHOLE = {"F64", "F32", "F16", "BF16"}

STORED_BYTES = "flopprof_stored_bytes"  # of a quantised parameter: what its bits and scales take

# What packages store beside a weight, to read it: no elements of the model.
_BESIDE = re.compile(
    r"(scales?|scale_inv|_scale_2|zeros?|zero_point|qzeros|g_idx|absmax|quant_map|quant_state\.\w+|SCB|weight_format|"
    r"weight_shape|global_scale|input_scale|output_scale|activation_scale|perm|codebooks?|alphas?|signs?)$"
)
_PACKED = re.compile(r"(qweight|weight_packed|_blocks|\.blocks|Wq_packed|B_24|qweight_packed)$")


@dataclass(frozen=True)
class Quantised:
    """What a model's quantisation is called, its elements, and the bytes that all the model's weights are stored in.

    n_bytes, by_parameter: by the config, where it tells; of the quantised parameters, with their scales.
    """

    scheme: Scheme
    elements: int
    n_bytes: int | None
    by_parameter: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """`bitsandbytes, 4 bits (nf4): 6.98 G weights quantised; all weights take 4.5 GB`."""
        if not self.elements:
            return self.scheme.label
        size = "" if self.n_bytes is None else f"; all weights take {format_si(self.n_bytes, 'B')}"
        return f"{self.scheme.label}: {format_si(self.elements)} weights quantised{size}"


def quantise(model: nn.Module, scheme: Scheme, stored: Stored | None = None) -> Quantised:
    """The model, its quantised weights frozen and multiplied as they would be; what that came to.

    stored: what the checkpoint's files hold: a layer whose weight they hold whole is not quantised.
    """
    chosen = _chosen(model, scheme, stored)
    if scheme.linear:
        for _name, module in _linears(model):
            if id(module.weight) in chosen:
                module.__class__ = linear_classes()[type(module)]
                module.multiplied, module.compute = scheme.multiplied, scheme.compute
                module.requires_grad_(False)
    if scheme.multiplied is not None and scheme.experts and any(p.dim() == 3 for _name, p in chosen.values()):
        narrow_experts(model, scheme.multiplied)
    by_parameter = {name: _bytes(parameter, scheme) for name, parameter in chosen.values() if scheme.bits}
    for name, parameter in chosen.values():
        parameter.requires_grad_(False)
        if name in by_parameter:
            setattr(parameter, STORED_BYTES, by_parameter[name])
    whole = {id(t): t for t in model.state_dict(keep_vars=True).values() if id(t) not in chosen}
    others = sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
    return Quantised(
        scheme=scheme,
        elements=sum(parameter.numel() for _name, parameter in chosen.values()),
        n_bytes=others + sum(by_parameter.values()) if scheme.bits else None,
        by_parameter=by_parameter,
        notes=tuple(_left_whole(model, scheme, chosen)),
    )


def _experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(module's name, module, weight's name, weight) of the experts whose weights lie together."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items() if hasattr(module, "num_experts") else ():
            if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point():
                yield name, module, key, parameter


def _left_whole(model: nn.Module, scheme: Scheme, chosen: Collection[int]) -> Iterator[str]:
    """What to say of experts that the method does not quantise in transformers, whatever its other users do."""
    if scheme.multiplied is not None and not scheme.experts and any(id(p) in chosen for *_rest, p in _experts(model)):
        yield f"{scheme.label}: experts are counted in the activations' type"
    left = [parameter.numel() for *_rest, parameter in _experts(model) if id(parameter) not in chosen]
    if scheme.bits and scheme.linear and left:
        yield (
            f"{scheme.label}: linear layers alone are packed, and {format_si(sum(left))} weights of experts that lie "
            "together are taken to be stored whole, as transformers holds them"
        )


def _linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    kinds = linear_classes()
    return ((name, module) for name, module in model.named_modules() if type(module) in kinds)


def _chosen(model: Any, scheme: Scheme, stored: Stored | None) -> dict[int, tuple[str, nn.Parameter]]:
    """The names and weights that are stored quantised, by identity; an embedding's stays whole, also where tied."""
    skipped = tuple(_heads(model)) if scheme.skipped is None else scheme.skipped
    left = _LeftOut(skipped)
    kept = _LeftOut((*skipped, *(getattr(model, "_keep_in_fp32_modules", None) or ())))
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    if scheme.linear:
        for name, module in _linears(model):
            whole = stored.tensors.get(f"{name}.weight") if stored is not None else None
            if id(module.weight) not in embedded and name not in kept and not (whole and whole.dtype in _WHOLE):
                found[id(module.weight)] = f"{name}.weight", module.weight
    if scheme.experts or scheme.listed:
        base: Any = importlib.import_module("transformers.quantizers.base")
        replaced = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
        for name, module, key, parameter in _experts(model):
            if (scheme.experts or type(module).__name__ in replaced) and name not in left:
                found[id(parameter)] = f"{name}.{key}", parameter
    return found


def _heads(model: Any) -> Iterator[str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return (name for name, module in model.named_modules() if module is head)


class _LeftOut:
    """transformers' rule: a pattern leaves out a module from its start to a dot, as a regex, or as a suffix.

    A pattern that a regex engine could spend long on is taken as plain text: configs are not to be trusted.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        spelled = [pattern.removeprefix("re:") for pattern in patterns]
        self._plain = frozenset(spelled)
        self._suffixes = tuple(self._plain - {""})
        self._regexes = []
        for pattern in spelled:
            if SPECIAL.search(pattern) and len(_REPEATED.findall(pattern)) <= _MOST_REPEATS and ")" not in pattern:
                with suppress(re.error):  # plain text, then
                    self._regexes.append(re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"))

    def __contains__(self, name: str) -> bool:
        if name.endswith(self._suffixes):
            return True
        parts = name.split(".")
        if any(".".join(parts[: end + 1]) in self._plain for end in range(len(parts))):
            return True
        return any(regex.match(name) for regex in self._regexes)


def _bytes(parameter: nn.Parameter, scheme: Scheme) -> int:
    """By its bits, and a scale for each group, or row."""
    assert scheme.bits is not None
    groups = -(-parameter.numel() // (scheme.group or parameter.shape[-1]))
    return -(-(parameter.numel() * scheme.bits + groups * scheme.scale_bits) // 8)


def elements_stored(stored: Stored, scheme: Scheme, names: Collection[str]) -> int | None:
    """Elements of the model that a quantised checkpoint stores, by how it packs them; None where that is not known.

    names: of the model's own tensors.
    """
    if not scheme.packed or scheme.bits is None:
        return None
    total = 0
    for name, tensor in stored.tensors.items():
        width = BITS[tensor.dtype]
        bytewise = tensor.dtype[0] in "IU" and width in (8, 32) and width > scheme.bits
        if bytewise and (_PACKED.search(name) or (name in names and name.endswith("weight"))):
            total += tensor.elements * width // scheme.bits
        elif name in names or not _BESIDE.search(name):
            total += tensor.elements
    return total
