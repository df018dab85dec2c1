"""Inputs of a transformers model, made from its configuration and from what its `forward` takes.

What is made of ids has values (on the CPU, whatever the model's device is meta), because models look for special
tokens in them; what is made of pixels and sound has none. How many image placeholders a text holds is asked of the
model's own image encoder. Where config and documentation leave a layout open, the model is asked: the first that it
runs on is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flopprof.errors import FlopprofError, UsageError
from flopprof.models.hf_documented import Unsaid, documented, made, required
from flopprof.models.hf_maker import Inputs, Maker, ids, length_of, token
from flopprof.models.hf_pictures import GRIDS, clip, patches, picture, pictures, sized
from flopprof.models.hf_placeholders import mixed
from flopprof.models.hf_sound import spectrogram, spectrograms, wave, waves
from flopprof.models.hf_trial import runs
from flopprof.models.request import Request

_SEEN_OR_HEARD = re.compile(r"(^|_)(pixel_values|image_patches|flattened_patches|input_features|input_values)(_|$)")
_MOST_TRIED = 40


def make_inputs(model: nn.Module, request: Request, device: str) -> Inputs:
    """The inputs that one call of a transformers model takes. Raises UsageError where a size does not fit."""
    maker = Maker(model, request, device)
    found = mixed(maker) or _first_that_runs(maker)
    kwargs = dict(found.kwargs)
    if "use_cache" in maker.taken:  # a cache multiplies nothing, and is made of many objects
        kwargs["use_cache"] = False
    left = [name for name in maker.taken if _SEEN_OR_HEARD.search(name) and name not in kwargs]
    alone = "input_ids" in kwargs and not any(_SEEN_OR_HEARD.search(name) for name in kwargs)
    note = (f"only text was given: the model also takes {', '.join(left)}",) if left and alone else ()
    return Inputs(kwargs, found.tokens, found.samples, (*found.assumptions, *(note if not found.assumptions else ())))


def _first_that_runs(maker: Maker) -> Inputs:
    candidates = _candidates(maker)
    first = next(candidates, None)
    if first is None:
        raise UsageError(
            f"no input is known for {type(maker.model).__name__}, which takes {maker.model.main_input_name!r}: "
            "give --input SHAPE."
        )
    if set(first.kwargs) <= {"input_ids", "decoder_input_ids"} and _usual(maker):
        return first
    for number, candidate in enumerate((first, *candidates)):
        if runs(maker, candidate.kwargs):
            return candidate
        if number == _MOST_TRIED:
            break
    return first


def _usual(maker: Maker) -> bool:
    """Are ids of text documented as (batch, length), and nothing else as needed?"""
    said = documented(maker.model.forward)
    sizes = [len(item.sizes) for name, item in said.items() if name in ("input_ids", "decoder_input_ids")]
    return all(size == 2 for size in sizes) and not _also_needed(maker, {"input_ids"})


def _also_needed(maker: Maker, given: Any) -> list[str]:
    """Documented as no option, though `forward` has a default."""
    said = documented(maker.model.forward)
    return [name for name, item in said.items() if not item.optional and name in maker.taken and name not in given]


def _candidates(maker: Maker) -> Iterator[Inputs]:
    """Inputs that the model may take, the likeliest first."""
    main = maker.model.main_input_name
    main = main[0] if isinstance(main, list) else main
    if main not in maker.taken:  # composed models name theirs loosely
        main = next((name for name in _MAKERS if name in maker.taken), main)
    problem: FlopprofError | None = None
    base = Inputs({}, None, maker.request.batch)
    if main in _MAKERS and main in maker.taken:
        try:
            base = _MAKERS[main](maker)
        except FlopprofError as error:
            if maker.request.seq is not None or maker.request.audio_seconds is not None:  # what was asked for is wrong
                raise
            problem = error
    needed = required(maker.model.forward)
    others = [name for name in _PARTS if name in maker.taken]
    any_made = False
    seen: list[set[str]] = []
    for also in ([], _also_needed(maker, base.kwargs), others):
        names = list(dict.fromkeys([*([main] if main in _PARTS and main in maker.taken else []), *needed, *also]))
        found = _completed(maker, base, names)
        if found is None or set(found.kwargs) in seen or not found.kwargs:
            continue
        seen.append(set(found.kwargs))
        any_made = True
        yield found
        yield from _varied(maker, found)
    if not any_made and problem is not None:
        raise problem


def _completed(maker: Maker, base: Inputs, names: list[str]) -> Inputs | None:
    """With inputs of these names too; None where one is not known."""
    kwargs, notes = dict(base.kwargs), list(base.assumptions)
    said = documented(maker.model.forward)
    for name in names:
        if name in kwargs:
            continue
        try:
            if name in _PARTS:
                kwargs.update(_PARTS[name](maker))
            elif name == "hidden_states" and any(grid in maker.taken for grid in GRIDS):
                kwargs.update(next(patches(maker, maker.request.batch, name)))
            elif name in GRIDS or name == "merge_sizes":
                kwargs.update({**next(patches(maker, maker.request.batch, "pixel_values")), **kwargs})
            else:
                kwargs[name] = made(maker, name, said.get(name), notes)
        except (Unsaid, FlopprofError):
            return None
    return replace(base, kwargs=kwargs, assumptions=tuple(notes))


def _varied(maker: Maker, found: Inputs) -> Iterator[Inputs]:
    """The same with one of its inputs in another layout."""
    for name in found.kwargs:
        if name == "hidden_states" and any(grid in maker.taken for grid in GRIDS):
            layouts: Iterator[dict[str, Any]] = patches(maker, maker.request.batch, name)
        elif name in _LAYOUTS:
            layouts = _LAYOUTS[name](maker)
        elif name in documented(maker.model.forward):
            layouts = iter([{name: made(maker, name, documented(maker.model.forward)[name], [])}])
        else:
            continue
        for layout in layouts:
            kwargs = {**found.kwargs, **layout}
            for mask in [name for name in kwargs if name.endswith("_mask") and name not in layout]:
                frames = layout.get("frames")
                if isinstance(frames, int):
                    kwargs[mask] = maker.whole(torch.ones(maker.request.batch, frames, dtype=torch.int64))
            kwargs.pop("frames", None)
            yield replace(found, kwargs=kwargs)


# --- text ---------------------------------------------------------------------------------------
def _text(maker: Maker) -> Inputs:
    batch, length = maker.request.batch, length_of(maker)
    kwargs: dict[str, Any] = {"input_ids": ids(maker, batch, length)}
    both = bool(getattr(maker.config, "is_encoder_decoder", False))
    if both:
        eos = token(maker.config, "eos_token_id")
        if eos is not None and eos < (token(maker.text, "vocab_size") or 0) and not kwargs["input_ids"].is_meta:
            kwargs["input_ids"][:, -1] = eos  # classifiers read their answer where the text ends
        kwargs.update(_decoder(maker, length))
    if "bbox" in maker.taken:
        kwargs["bbox"] = maker.whole(torch.zeros(batch, length, 4, dtype=torch.int64))
    dual = "pixel_values" in maker.taken and not both
    if "pixel_values" in maker.taken:
        kwargs.update(picture(maker))
    return Inputs(kwargs, None if dual else batch * length, batch)


def _decoder(maker: Maker, length: int) -> dict[str, Any]:
    if "decoder_input_ids" not in maker.taken:
        return {}
    return {"decoder_input_ids": ids(maker, maker.request.batch, length)}


# --- pictures -----------------------------------------------------------------------------------
def _vision(maker: Maker) -> Inputs:
    batch = maker.request.batch
    kwargs = picture(maker)
    if "input_ids" in maker.taken:  # CLIP and its kin, and captioners
        length = length_of(maker)
        kwargs["input_ids"] = ids(maker, batch, length)
        return Inputs(kwargs, None, batch)
    if "decoder_input_ids" in maker.taken:
        length = length_of(maker)
        return Inputs({**kwargs, **_decoder(maker, length)}, batch * length, batch)
    return Inputs(kwargs, None, batch)


# --- sound --------------------------------------------------------------------------------------
def _wave(maker: Maker) -> Inputs:
    return _heard(maker, "input_values", wave(maker))


def _features(maker: Maker) -> Inputs:
    return _heard(maker, "input_features", spectrogram(maker)[0])


def _heard(maker: Maker, name: str, sound: torch.Tensor) -> Inputs:
    batch = maker.request.batch
    kwargs: dict[str, Any] = {name: sound}
    if "decoder_input_ids" in maker.taken:
        length = length_of(maker)
        return Inputs({**kwargs, **_decoder(maker, length)}, batch * length, batch)
    if "input_ids" in maker.taken and name != "input_ids":
        kwargs["input_ids"] = ids(maker, batch, length_of(maker))
    return Inputs(kwargs, None, batch)


_MAKERS: Mapping[str, Callable[[Maker], Inputs]] = {
    "input_ids": _text,
    "pixel_values": _vision,
    "pixel_values_videos": lambda maker: Inputs({"pixel_values_videos": clip(maker)}, None, maker.request.batch),
    "input_values": _wave,
    "input_features": _features,
}
_PARTS: Mapping[str, Callable[[Maker], dict[str, Any]]] = {
    "input_ids": lambda maker: {"input_ids": ids(maker, maker.request.batch, length_of(maker))},
    "pixel_values": picture,
    "pixel_values_videos": lambda maker: {"pixel_values_videos": clip(maker)},
    "input_values": lambda maker: {"input_values": wave(maker)},
    "input_features": lambda maker: {"input_features": spectrogram(maker)[0]},
}
_LAYOUTS: Mapping[str, Callable[[Maker], Iterator[dict[str, Any]]]] = {
    "pixel_values": pictures,
    "pixel_values_videos": lambda maker: ({"pixel_values_videos": clip(other)} for other in sized(maker)),
    "input_values": lambda maker: ({"input_values": sound} for sound in waves(maker)),
    "input_features": lambda maker: (
        {"input_features": sound, "frames": frames} for sound, frames in spectrograms(maker)
    ),
}
