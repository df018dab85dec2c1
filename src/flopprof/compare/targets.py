"""From what was typed to single models: globs, and the inputs to look at them on."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from flopprof.compare.models import Job
from flopprof.errors import UnknownTarget, UsageError
from flopprof.models import catalogue, timm, vision
from flopprof.profile import Attention

_SIGNS = "*?["
_AT: Mapping[str, type] = {
    "batch": int,
    "seq": int,
    "image_size": int,
    "audio_seconds": float,
    "images": int,
    "dtype": str,
}


def is_glob(target: str) -> bool:
    """Whether the target stands for several models: `timm:convnext*`, `resnet*`; never a path."""
    return any(sign in target for sign in _SIGNS) and "/" not in target and ".py" not in target


def expand(target: str) -> list[str]:
    """The targets that a glob matches, in the order of their collection; any other target is itself.

    `torchvision:*`, `timm:convnext*` (with a dot: weight tags too), `catalogue:llama*`; without a prefix torchvision's
    names and the catalogue's. Raises UnknownTarget where nothing matches.
    """
    if not is_glob(target):
        return [target]
    kind, colon, pattern = target.lower().partition(":")
    if not colon:
        found = [*_matching(vision.names(), kind), *_matching(catalogue.entries(), kind)]
    elif kind == "torchvision":
        found = _matching(vision.names(), pattern)
    elif kind == "catalogue":
        found = _matching(catalogue.entries(), pattern)
    elif kind == "timm":
        found = [f"timm:{name}" for name in _matching(timm.names(tagged="." in pattern), pattern)]
    else:
        raise UnknownTarget(f"{target!r}: globs are of torchvision:, timm: or catalogue: names.")
    if not found:
        raise UnknownTarget(f"no model matches {target!r}: `flopprof models` and torchvision or timm list them.")
    return found


def _matching(names: Any, pattern: str) -> list[str]:
    return [name for name in names if fnmatch.fnmatchcase(name.lower(), pattern)]


def parse_at(text: str) -> dict[str, Any]:
    """Options of `load` that `batch=8,image_size=288` or `input=1x3x288x288` gives. Raises UsageError.

    Several inputs: `input=1x8,input=1x8:int64`.
    """
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        key = key.replace("-", "_")
        if not sign or not value or (key != "input" and key not in _AT):
            raise UsageError(
                f"cannot read --at {text!r}: write input=1x3x288x288, or some of {', '.join(_AT)}, "
                "as in batch=8,image_size=288."
            )
        if key == "input":
            found["inputs"] = [*found.get("inputs", ()), value]
            continue
        if key in found:
            raise UsageError(f"--at {text!r} gives {key} twice: repeat --at for several rows.")
        try:
            found[key] = _AT[key](value)
        except ValueError as error:
            raise UsageError(f"--at {text!r}: {key} is a number, got {value!r}.") from error
    return found


def jobs_of(
    target: str, options: Mapping[str, Any], at: Sequence[str] = (), *, name: str = "", attention: Attention = "full"
) -> list[Job]:
    """A job for each model that the target stands for and each `at`, which is named after both."""
    places = [(text, parse_at(text)) for text in at] or [("", {})]
    found = []
    for single in expand(target):
        shown = name or single
        for text, place in places:
            chosen = {**options, **place}
            if "inputs" in place:
                chosen |= {"batch": 1, "image_size": None}
            if "image_size" in place or "batch" in place:
                chosen["inputs"] = place.get("inputs", ())
            found.append(
                Job(
                    name=f"{shown} @ {text}" if len(places) > 1 else shown,
                    target=single,
                    options=chosen,
                    attention=attention,
                )
            )
    return found
