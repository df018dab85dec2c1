"""What a config's quantization_config says of how weights are stored and multiplied.

Each method is taken as transformers 5.23 runs it (its integrations and quantizers folders).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from flopprof.errors import InvalidCheckpoint

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WIDEST = 16
_MOST_SKIPPED, _MOST_REGEXES, _LONGEST_PATTERN = 10_000, 200, 200
SPECIAL = re.compile(r"[*+?\[|^$\\]")  # in a pattern that is no plain text


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
    if sum(SPECIAL.search(name) is not None for name in skipped) > _MOST_REGEXES:
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
