"""config.json -> the configuration and the class that transformers builds; what cannot be right is refused first.

transformers runs through `range(num_hidden_layers)` before anything is built, so sizes are read and bounded here. A
config can also ask for weights, kernels and code to be fetched; here it cannot.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flopprof.errors import InvalidCheckpoint, MissingPackage, UsageError
from flopprof.models.inputs import first_line
from flopprof.models.safetensors_headers import read_small, uncollected

CONFIG = "config.json"
MOST_BYTES = 10_000_000  # labels of 21,000 classes take 1 MB
_MOST_ITEMS = 100_000
_DEEPEST = 32

# What is built or listed one by one, in Python. Every other size is a dimension, which costs nothing on meta.
_LAYERS = re.compile(r"(^|_)(layers?|depths?|blocks?|stages?|levels?|codebooks?|quantizers?|hidden_layers)$")
_EXPERTS = re.compile(r"(^|_)(experts|expert_num)$")
_REPEATED = ((_LAYERS, 2048), (_EXPERTS, 8192), (re.compile(r"^num_labels$"), 50_000))
_MOST_EXPERTS = 65_536  # in all layers: Switch-C, the largest, has 2048 in 15
_SIZES = re.compile(r"(^|_)(size|dim|d_model|d_ff|d_kv|n_embd|n_inner|n_positions|embeddings|channels|heads?|groups)$")
_MOST = 10**9
# Numbers that are no sizes: ids, which layer's output is meant, bases of rotations, lengths that mean "no limit".
_FREE = re.compile(r"(_id|_ids|_index|_idx|_indices|feature_layer|vision_layer|seed|theta|base|max_length|max_depth)$")
# What makes transformers fetch weights, kernels or code while it builds, or choose by what is installed.
_DROPPED = frozenset(
    {"_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
     "_experts_implementation", "experts_implementation", "use_kernels", "_name_or_path", "use_flash_attn",
     "transformers_version", "quantization_config"}
)  # fmt: skip
_DTYPES = {"float32", "float16", "bfloat16", "float64"}

# Of the classes that a config without `architectures` can be built as, the first that its kind has.
_AUTO_CLASSES = (
    "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM",
    "AutoModelForCausalLM", "AutoModelForImageClassification", "AutoModelForVideoClassification",
    "AutoModelForAudioClassification", "AutoModel",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """The class to build, the configuration to build it from, and what was chosen where config.json does not say."""

    cls: Any
    config: Any
    assumptions: tuple[str, ...] = ()


def read_config(file: Path) -> dict[str, Any]:
    """The facts of a config.json, all sizes within reason. Raises InvalidCheckpoint, naming the field."""
    text = read_small(file, MOST_BYTES)
    try:
        with uncollected():
            facts = json.loads(text)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise InvalidCheckpoint(f"{file} is not JSON: {first_line(error)}") from error
    if not isinstance(facts, dict):
        raise InvalidCheckpoint(f"{file} holds a {type(facts).__name__}, and a config is an object of named fields.")
    check_config(facts, str(file))
    return facts


def check_config(facts: Mapping[str, Any], where: str) -> None:
    """Raises InvalidCheckpoint for a size that is negative, absurd or no number, naming the field."""
    layers = experts = 1
    for items, (path, key, value) in enumerate(_walk(facts)):
        if items > _MOST_ITEMS or len(path) > _DEEPEST:
            raise InvalidCheckpoint(f"{where} is nested or filled beyond what any model needs.")
        if isinstance(value, bool) or not isinstance(value, int | float) or _FREE.search(key):
            continue
        limit = next((most for names, most in _REPEATED if names.search(key)), None)
        if value < 0 and (limit is not None or (_SIZES.search(key) and value != -1)):  # -1 can say: as wide as another
            raise InvalidCheckpoint(f"{where}: {'.'.join(path)} is {_number(value)}, and a size is not negative.")
        if limit is None:
            limit = _MOST if isinstance(value, int) else None
        if limit is not None and value > limit:
            raise InvalidCheckpoint(
                f"{where}: {'.'.join(path)} is {_number(value)}; more than {limit:,} are not built."
            )
        if isinstance(value, int):
            layers = max(layers, value) if _LAYERS.search(key) else layers
            experts = max(experts, value) if _EXPERTS.search(key) else experts
    if layers * experts > _MOST_EXPERTS:
        raise InvalidCheckpoint(
            f"{where}: {experts:,} experts in {layers:,} layers; more than {_MOST_EXPERTS:,} in all are not built."
        )


def _number(value: float) -> str:
    if isinstance(value, int) and abs(value) > 10**300:  # more than any float
        return f"{'-' if value < 0 else ''}1e+{len(str(abs(value))) - 1} or more"
    return f"{value:.3g}" if abs(value) > 10**15 else str(value)


def _walk(facts: Any, path: tuple[str, ...] = (), key: str = "") -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """(path, name, value) of everything inside; items of lists go by the list's name, strings and labels are left."""
    yield path, key, facts
    if len(path) > _DEEPEST:
        return
    if isinstance(facts, Mapping):
        for name, value in facts.items():
            if name not in ("id2label", "label2id", "quantization_config"):
                yield from _walk(value, (*path, str(name)), str(name))
    elif isinstance(facts, list):
        for position, value in enumerate(facts):
            yield from _walk(value, (*path, str(position)), key)


# --- from the facts to a class ------------------------------------------------------------------
def architecture(facts: Mapping[str, Any], where: str) -> Architecture:
    """The class that the config names, or that its kind is usually built as, from transformers itself.

    Raises InvalidCheckpoint, MissingPackage, or UsageError for a model whose code is not in transformers.
    """
    transformers = load_transformers()
    kind = facts.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise InvalidCheckpoint(f"{where} has no model_type: it is not the config of a transformers model.")
    if kind not in transformers.CONFIG_MAPPING:
        own = "it brings code of its own: pass --trust-remote-code to run it" if "auto_map" in facts else "update it"
        raise UsageError(
            f"{where} is of the type {kind[:60]!r}, which transformers {transformers.__version__} lacks: {own}."
        )
    config = configuration(transformers.CONFIG_MAPPING[kind], facts, where)
    name = _named_class(facts, where)
    if name is None:
        cls, found = _usual_class(config)
        return Architecture(
            cls, _config_for(cls, config), (f"the config names no class: {cls.__name__}, from {found}, was counted",)
        )
    cls = _class(name)
    if cls is not None and _fits(cls, _config_for(cls, config)):
        return Architecture(cls, _config_for(cls, config))
    cls, found = _usual_class(config, name)
    note = f"transformers has no {name} for {kind}: {cls.__name__}, from {found}, was counted"
    return Architecture(cls, _config_for(cls, config), (note,))


def configuration(cls: Any, facts: Mapping[str, Any], where: str) -> Any:
    """The configuration object; what in it would fetch weights, kernels or code is left out."""
    dtype = facts.get("dtype", facts.get("torch_dtype"))
    if dtype not in (None, "auto") and str(dtype).removeprefix("torch.") not in _DTYPES:
        raise InvalidCheckpoint(f"{where}: dtype is {str(dtype)[:40]!r}: use one of {', '.join(sorted(_DTYPES))}.")
    kept = _without(facts)
    if dtype == "auto":
        kept = {key: value for key, value in kept.items() if key not in ("dtype", "torch_dtype")}
    try:
        spell = getattr(cls, "_decode_special_floats", None)  # infinities, which JSON has no word for
        return cls.from_dict(kept if spell is None else spell(kept))
    except Exception as error:  # each field has checks of its own, each with its own exception
        raise InvalidCheckpoint(
            f"{where} is refused by {cls.__name__}: {type(error).__name__}: {reason(error)}"
        ) from error


def _without(facts: Any) -> Any:
    if isinstance(facts, Mapping):
        kept = {key: _without(value) for key, value in facts.items() if key not in _DROPPED}
        if kept.get("use_pretrained_backbone"):
            kept["use_pretrained_backbone"] = False
        return kept
    return [_without(item) for item in facts] if isinstance(facts, list) else facts


def _named_class(facts: Mapping[str, Any], where: str) -> str | None:
    names = facts.get("architectures")
    if names is None or names == []:
        return None
    if not isinstance(names, list) or not isinstance(names[0], str) or not names[0].isidentifier():
        raise InvalidCheckpoint(f"{where}: architectures is {str(names)[:60]!r}, and holds names of classes.")
    return names[0]


def _class(name: str) -> Any:
    """transformers' model class of that name, None where it has none. Raises MissingPackage."""
    transformers = load_transformers()
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    backends = getattr(found, "_backends", None)  # a placeholder for what an absent package would give
    if isinstance(found, type) and isinstance(backends, list):
        raise MissingPackage(f"{name} needs {' and '.join(backends)}: pip install {' '.join(backends)}")
    return None


def _fits(cls: Any, config: Any) -> bool:
    wanted = getattr(cls, "config_class", None)
    return isinstance(wanted, type) and isinstance(config, wanted)


def _config_for(cls: Any, config: Any) -> Any:
    """The config, or the part of it about text where the class reads only that, as Auto classes do."""
    if _fits(cls, config) or not hasattr(config, "get_text_config"):
        return config
    try:
        text = config.get_text_config()
    except ValueError:  # it has several
        return config
    return text if _fits(cls, text) else config


def _usual_class(config: Any, name: str = "") -> tuple[Any, str]:
    """(class, the Auto class that maps to it): the one whose task ends `name`, else the first that this kind has."""
    transformers = load_transformers()
    task = re.search(r"(For[A-Za-z0-9]+|LMHeadModel|Model)$", name)
    wanted = {"ForConditionalGeneration": "ForSeq2SeqLM", "LMHeadModel": "ForCausalLM", "Model": ""}
    asked = (f"AutoModel{wanted.get(task.group(), task.group())}",) if task else ()
    for auto in (*asked, *_AUTO_CLASSES):
        mapping = getattr(getattr(transformers, auto, None), "_model_mapping", {})
        if type(config) in mapping:
            found = mapping[type(config)]
            return (found[0] if isinstance(found, Sequence) else found), auto
    raise UsageError(f"transformers builds no model of the kind {config.model_type!r} on its own.")


def load_transformers() -> Any:
    """The package. Raises MissingPackage."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingPackage("Hugging Face models need transformers: pip install 'flopprof[hf]'") from error


def reason(error: BaseException) -> str:
    """What an exception says, in one line: of a validation, the part that names the fault."""
    return first_line(ValueError(" ".join(str(error).split())[:300]))


def dtype_of(config: Any) -> torch.dtype | None:
    """The type in which the config's model is built; None where it says none."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else None
