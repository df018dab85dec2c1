"""Quantised checkpoints: a config's quantization_config -> the products that would run, and the bytes it stores.

The packages that quantise are not needed. A product does the same multiply-adds whatever its weight is stored in; what
differs is the number format that is multiplied, and that stored weights do not train. Each method is taken as
transformers 5.23 runs it (its integrations and quantizers folders).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flopprof.errors import InvalidCheckpoint
from flopprof.models.hf_narrow import linear_classes, narrow_experts
from flopprof.models.safetensors_headers import BITS, Stored
from flopprof.units import format_si

_SPECIAL, _REPEATED, _MOST_REPEATS = re.compile(r"[*+?\[|^$\\]"), re.compile(r"[*+?{]"), 3
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WHOLE = {"F64", "F32", "F16", "BF16"}
_WIDEST = 16
_MOST_SKIPPED, _MOST_REGEXES, _LONGEST_PATTERN = 10_000, 200, 200

STORED_BYTES = "flopprof_stored_bytes"  # of a quantised parameter: what its bits and scales take

# What packages store beside a weight, to read it: no elements of the model.
_BESIDE = re.compile(
    r"(scales?|scale_inv|_scale_2|zeros?|zero_point|qzeros|g_idx|absmax|quant_map|quant_state\.\w+|SCB|weight_format|"
    r"weight_shape|global_scale|input_scale|output_scale|activation_scale|perm|codebooks?|alphas?|signs?)$"
)
_PACKED = re.compile(r"(qweight|weight_packed|_blocks|\.blocks|Wq_packed|B_24|qweight_packed)$")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights are stored and multiplied.

    bits      of a stored weight; None where the method does not say
    group     weights that share a scale; None: a row of them. scale_bits: of that scale and its zero point
    packed    is it known how files hold them: then their elements can be compared
    multiplied  the type of both factors, None where the activation's
    compute   the type that activations are cast to before a product with a weight that was dequantised
    skipped   patterns of modules that stay as they are; None: the output embedding does
    linear    are linear layers among what is quantised; experts: are weights of three dimensions, (expert, out, in)
    listed    are experts quantised of the classes that transformers replaces by lists of linear layers
    """

    label: str
    bits: int | None
    group: int | None = None
    scale_bits: int = 16
    packed: bool = False
    multiplied: torch.dtype | None = None
    compute: torch.dtype | None = None
    skipped: tuple[str, ...] | None = None
    linear: bool = True
    experts: bool = False
    listed: bool = False
    note: str = ""


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


# --- reading it -----------------------------------------------------------------------------------
def scheme_of(facts: Mapping[str, Any], where: str) -> Scheme | None:
    """The scheme of a config.json, None where it has none. Raises InvalidCheckpoint, naming the field."""
    found = next((part["quantization_config"] for part in _parts(facts) if part.get("quantization_config")), None)
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise InvalidCheckpoint(f"{where}: quantization_config is a {type(found).__name__}, and not named fields.")
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(method, str):
        raise InvalidCheckpoint(
            f"{where}: quantization_config.quant_method is {str(method)[:40]!r}: it names a method."
        )
    if found.get("dequantize") is True:
        return Scheme(label=f"{method[:40]}, dequantised when loaded", bits=None, linear=False)
    read = _METHODS.get(method)
    scheme = _unknown(method[:40]) if read is None else read(_Facts(found, where))
    skipped = next((found[name] for name in _SKIPPING if found.get(name) is not None), None)
    return scheme if skipped is None else replace(scheme, skipped=_patterns(skipped, where))


_SKIPPING = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers")


def _parts(facts: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield facts
    yield from (value for value in facts.values() if isinstance(value, Mapping))


def _patterns(skipped: Any, where: str) -> tuple[str, ...]:
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise InvalidCheckpoint(f"{where}: quantization_config names the modules to leave out by no list of names.")
    if sum(_SPECIAL.search(name) is not None for name in skipped) > _MOST_REGEXES:
        raise InvalidCheckpoint(f"{where}: quantization_config leaves modules out by more patterns than are read.")
    if len(skipped) > _MOST_SKIPPED or any(len(name) > _LONGEST_PATTERN for name in skipped):
        raise InvalidCheckpoint(f"{where}: quantization_config leaves out more modules than any model has.")
    return tuple(skipped)


@dataclass(frozen=True)
class _Facts:
    found: Mapping[str, Any]
    where: str

    def number(self, name: str, default: int, most: int = _WIDEST) -> int:
        """A whole number from 1; -1 and null mean the default."""
        value = self.found.get(name, default)
        if value in (None, -1):
            return default
        if type(value) is not int or not 1 <= value <= most:
            raise InvalidCheckpoint(
                f"{self.where}: quantization_config.{name} is {str(value)[:40]!r}: a whole number of 1 to {most}."
            )
        return value

    def group(self, default: int) -> int | None:
        """group_size; -1 is a row."""
        return None if self.found.get("group_size") == -1 else self.number("group_size", default, 1 << 20)


def _bitsandbytes(facts: _Facts) -> Scheme:
    """load_in_4bit: dequantised, then multiplied in the compute type. 8 bits: both factors as int8 (LLM.int8())."""
    if facts.found.get("load_in_4bit") or facts.found.get("_load_in_4bit"):
        name = str(facts.found.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
        kind = str(facts.found.get("bnb_4bit_quant_type", "fp4"))[:10]
        twice = facts.found.get("bnb_4bit_use_double_quant") is True
        return Scheme(
            label=f"bitsandbytes, 4 bits ({kind})", bits=4, group=64, scale_bits=8 if twice else 32,
            packed=True, compute=_DTYPES.get(name), listed=True,
            note=f"each weight is dequantised, and multiplied in {name}",
        )  # fmt: skip
    return Scheme(
        label="bitsandbytes, 8 bits", bits=8, scale_bits=32, packed=True, multiplied=torch.int8, listed=True,
        note="both factors are multiplied as int8, no column of the activations being an outlier",
    )  # fmt: skip


def _grouped(label: str, group: int, *, packed: bool = True) -> Any:
    """Weights alone, with a scale and a zero point a group."""

    def read(facts: _Facts) -> Scheme:
        bits = facts.number("bits" if "bits" in facts.found else "w_bit", 4)
        return Scheme(
            label=f"{label}, {bits} bits", bits=bits, group=facts.group(group), scale_bits=16 + bits,
            packed=packed, note=_DEQUANTISED,
        )  # fmt: skip

    return read


_DEQUANTISED = "weights are dequantised, and multiplied in the activations' type"


def _weights_only(label: str, bits: int) -> Any:
    def read(facts: _Facts) -> Scheme:
        found = re.search(r"(\d+)", str(facts.found.get("weights", facts.found.get("weight_bits", bits)))[:20])
        width = bits if found is None or not 1 <= int(found[1]) <= _WIDEST else int(found[1])
        return Scheme(label=f"{label}, {width} bits", bits=width, note=_DEQUANTISED)

    return read


def _float8(label: str, *, experts: bool = True) -> Any:
    """Both factors in 8 bits, also those of experts (all, or the listed ones); a scale for each block."""

    def read(facts: _Facts) -> Scheme:
        block = facts.found.get("weight_block_size")
        sizes = isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 1 << 20 for n in block)
        return Scheme(
            label=f"{label}, 8 bits", bits=8, group=block[0] * block[1] if sizes and block else None, scale_bits=32,
            packed=True, multiplied=torch.float8_e4m3fn, experts=experts, listed=True,
            note="both factors are multiplied as float8_e4m3fn; gradients of inputs by the dequantised weight",
        )  # fmt: skip

    return read


def _mxfp4(facts: _Facts) -> Scheme:
    """Experts alone: 32 weights of 4 bits share a scale of 8."""
    return Scheme(
        label="mxfp4, 4 bits", bits=4, group=32, scale_bits=8, packed=True, linear=False, experts=True,
        note="experts' weights are multiplied in the activations' type",
    )  # fmt: skip


def _compressed(facts: _Facts) -> Scheme:
    """compressed-tensors: decompressed at the first forward, whatever its serving kernels would multiply."""
    groups = facts.found.get("config_groups")
    weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)] if isinstance(
        groups, Mapping) else []  # fmt: skip
    found = [each for each in weights if isinstance(each, Mapping)]
    widths = {_Facts(each, facts.where).number("num_bits", 8) for each in found}
    sizes = {_Facts(each, facts.where).group(1 << 20) for each in found if each.get("group_size") is not None}
    bits = widths.pop() if len(widths) == 1 else None
    return Scheme(
        label="compressed-tensors" + (f", {bits} bits" if bits else ""), bits=bits,
        group=sizes.pop() if len(sizes) == 1 else None, packed=True, listed=True,
        note="weights are decompressed, and multiplied in the activations' type (serving kernels may use 8 bits)",
    )  # fmt: skip


_AO = re.compile(r"(?:(u?int|float)(\d)dynamicactivation)?(u?int|float)(\d)weight")


def _torchao(facts: _Facts) -> Scheme:
    """The type's name tells: Int8DynamicActivationInt8WeightConfig, int4_weight_only."""
    kind = facts.found.get("quant_type")
    for name in ("default", "_type"):
        kind = kind.get(name) if isinstance(kind, Mapping) else kind
    found = _AO.search(str(kind)[:80].lower().replace("_", ""))
    if found is None:
        return _unknown(f"torchao {str(kind)[:40]}")
    bits = int(found[4])
    narrow = {"int": torch.int8, "float": torch.float8_e4m3fn}.get(found[1] or "")
    what = str(narrow).removeprefix("torch.")
    return Scheme(
        label=f"torchao, {bits} bits", bits=bits, multiplied=narrow,
        note=_DEQUANTISED if narrow is None else f"both factors are multiplied as {what}",
    )  # fmt: skip


def _unknown(method: str) -> Scheme:
    return Scheme(
        label=method, bits=None,
        note="this method is not known: its products are counted in the activations' type, and its bytes are not",
    )  # fmt: skip


_METHODS: dict[str, Any] = {
    "bitsandbytes": _bitsandbytes, "bitsandbytes_4bit": _bitsandbytes, "bitsandbytes_8bit": _bitsandbytes,
    "gptq": _grouped("gptq", 128), "awq": _grouped("awq", 128), "auto-round": _grouped("auto-round", 128),
    "hqq": _weights_only("hqq", 4), "quanto": _weights_only("quanto", 8), "eetq": _weights_only("eetq", 8),
    "bitnet": _weights_only("bitnet", 2), "higgs": _grouped("higgs", 256, packed=False),
    "fp8": _float8("fp8"), "mxfp8": _float8("mxfp8"), "fbgemm_fp8": _float8("fbgemm_fp8", experts=False),
    "mxfp4": _mxfp4, "compressed-tensors": _compressed, "torchao": _torchao,
}  # fmt: skip


# --- putting it into a model ----------------------------------------------------------------------
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
            if _SPECIAL.search(pattern) and len(_REPEATED.findall(pattern)) <= _MOST_REPEATS and ")" not in pattern:
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


# --- what its files hold --------------------------------------------------------------------------
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
