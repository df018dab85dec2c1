"""Low-rank adapters (Hu 2021, arXiv 2106.09685), put into a model by peft: what `--lora` asks for."""

from __future__ import annotations

import difflib
import importlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from flopprof.errors import MissingPackage, UsageError
from flopprof.models.inputs import first_line

_EVERY = "all-linear"
_KEYS = ("r", "targets", "alpha", "dropout", "modules_to_save")
_NEAR = 4


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of rank r on the modules whose name ends in one of `targets`; () is every linear layer but the head.

    alpha: the adapters are scaled by alpha / r. modules_to_save: whole modules that train beside the adapters.
    """

    r: int
    targets: tuple[str, ...]
    alpha: float | None = None
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()


def parse_lora(text: str) -> Lora:
    """The adapters that `r=16,targets=q_proj,v_proj,alpha=32` describes. Raises UsageError."""
    found: dict[str, list[str]] = {}
    values: list[str] | None = None
    for part in text.split(","):
        key, sign, value = part.partition("=")
        if sign:
            key = key.strip()
            if key not in _KEYS:
                raise UsageError(
                    f"--lora has no {key!r}: it takes {', '.join(_KEYS)}, as in r=16,targets=q_proj,v_proj."
                )
            if key in found:
                raise UsageError(f"--lora gives {key} twice: list its values after one {key}=.")
            values = found[key] = []
        elif values is None:
            raise UsageError(f"cannot read --lora {text!r}: write it as r=16,targets=q_proj,v_proj.")
        values.append((value if sign else part).strip())
    if "r" not in found or "targets" not in found:
        raise UsageError(f"--lora {text!r} lacks {'r' if 'r' not in found else 'targets'}: r=16,targets=q_proj,v_proj.")
    for key in ("targets", "modules_to_save"):
        if not all(found.get(key, ["a"])):
            raise UsageError(f"--lora: {key} holds an empty name: write {key}=NAME,NAME.")
    rank, dropout = _number(found, "r"), _number(found, "dropout", 0.0)
    if rank != int(rank) or rank < 1:
        raise UsageError(f"--lora: the rank is a positive whole number, got r={found['r'][0]}.")
    if not 0 <= dropout < 1:
        raise UsageError(f"--lora: dropout is at least 0 and below 1, got {found['dropout'][0]}.")
    targets = tuple(found["targets"])
    if _EVERY in targets and len(targets) > 1:
        raise UsageError(f"--lora: targets={_EVERY} already holds every linear layer: name no others.")
    return Lora(
        r=int(rank),
        targets=() if targets == (_EVERY,) else targets,
        alpha=_number(found, "alpha") if "alpha" in found else None,
        dropout=dropout,
        modules_to_save=tuple(found.get("modules_to_save", ())),
    )


def _number(found: dict[str, list[str]], key: str, default: float | None = None) -> float:
    if key not in found and default is not None:
        return default
    try:
        (text,) = found[key]
        value = float(text)
    except ValueError as error:
        raise UsageError(f"--lora: {key} is one number, got {','.join(found[key])!r}.") from error
    if not math.isfinite(value):
        raise UsageError(f"--lora: {key} is a finite number, got {text}.")
    return value


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Adapters in the model itself, whose names stay; all but them and modules_to_save is frozen.

    Raises MissingPackage without peft, UsageError where a target is no module of the model or none that peft adapts.
    """
    peft = _peft()
    for key in ("targets", "modules_to_save"):
        for wanted in getattr(lora, key):
            _require(model, wanted, key)
    settings: dict[str, Any] = {} if lora.alpha is None else {"lora_alpha": lora.alpha}
    config = peft.LoraConfig(
        r=lora.r,
        target_modules=list(lora.targets) or _EVERY,
        lora_dropout=lora.dropout,
        modules_to_save=list(lora.modules_to_save) or None,
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about saving and merging, which nobody does here
        try:
            peft.inject_adapter_in_model(config, model)
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"--lora: peft cannot adapt {type(model).__name__}: {first_line(error)}") from error


def _require(model: nn.Module, wanted: str, key: str) -> None:
    names = [name for name, _ in model.named_modules() if name]
    if any(name == wanted or name.endswith(f".{wanted}") for name in names):
        return
    known = list(dict.fromkeys(part for name in names for part in (name.rpartition(".")[2], name)))
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    near = difflib.get_close_matches(wanted, known, n=_NEAR, cutoff=0.5) or sorted(linear - {""})[:_NEAR]
    raise UsageError(
        f"--lora: {type(model).__name__} has no module called {wanted!r}, in {key}: "
        f"{'there are ' + ', '.join(near) if near else 'it has no linear layer'}."
    )


def _peft() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("peft")
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise MissingPackage("--lora needs peft: pip install 'flopprof[lora]'") from error
