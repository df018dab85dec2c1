"""Inputs of a transformers model, made from its configuration and from what its `forward` takes.

What is made of ids has values (on the CPU, whatever the model's device is meta), because models look for special
tokens in them; what is made of pixels and sound has none. How many image placeholders a text holds is asked of the
model's own image encoder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from flopprof.errors import UsageError
from flopprof.models.hf_maker import (
    RATE,
    Inputs,
    Maker,
    channels,
    ids,
    length_of,
    seconds_of,
    side,
    sides,
    spectrogram,
    token,
)
from flopprof.models.hf_placeholders import mixed
from flopprof.models.request import Request

_FRAMES = 16
_SEEN_OR_HEARD = re.compile(r"(^|_)(pixel_values|image_patches|flattened_patches|input_features|input_values)(_|$)")


def make_inputs(model: nn.Module, request: Request, device: str) -> Inputs:
    """The inputs that one call of a transformers model takes. Raises UsageError where a size does not fit."""
    maker = Maker(model, request, device)
    main = maker.model.main_input_name
    main = main[0] if isinstance(main, list) else main
    if main not in maker.taken:  # composed models name theirs loosely
        main = next((name for name in _MAKERS if name in maker.taken), main)
    found = mixed(maker)
    if found is None and main in _MAKERS:
        found = _MAKERS[main](maker)
    if found is None:
        raise UsageError(f"no input is known for {type(model).__name__}, which takes {main!r}: give --input SHAPE.")
    kwargs = dict(found.kwargs)
    if "use_cache" in maker.taken:  # a cache multiplies nothing, and is made of many objects
        kwargs["use_cache"] = False
    left = [name for name in maker.taken if _SEEN_OR_HEARD.search(name) and name not in kwargs]
    alone = "input_ids" in kwargs and not any(_SEEN_OR_HEARD.search(name) for name in kwargs)
    note = (f"only text was given: the model also takes {', '.join(left)}",) if left and alone else ()
    return Inputs(kwargs, found.tokens, found.samples, (*found.assumptions, *(note if not found.assumptions else ())))


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
        kwargs.update(_picture(maker))
    return Inputs(kwargs, None if dual else batch * length, batch)


def _decoder(maker: Maker, length: int) -> dict[str, Any]:
    if "decoder_input_ids" not in maker.taken:
        return {}
    return {"decoder_input_ids": ids(maker, maker.request.batch, length)}


# --- pictures -----------------------------------------------------------------------------------
def _vision(maker: Maker) -> Inputs:
    batch = maker.request.batch
    kwargs = _picture(maker)
    if "input_ids" in maker.taken:  # CLIP and its kin, and captioners
        length = length_of(maker)
        kwargs["input_ids"] = ids(maker, batch, length)
        return Inputs(kwargs, None, batch)
    if "decoder_input_ids" in maker.taken:
        length = length_of(maker)
        return Inputs({**kwargs, **_decoder(maker, length)}, batch * length, batch)
    return Inputs(kwargs, None, batch)


def _picture(maker: Maker) -> dict[str, Any]:
    if "spatial_shapes" in maker.taken and isinstance(getattr(maker.vision, "patch_size", None), int):
        return _flattened(maker)
    kwargs: dict[str, Any] = {"pixel_values": _pixels(maker)}
    native = side(maker.vision)
    if maker.request.image_size not in (None, native) and "interpolate_pos_encoding" in maker.taken:
        kwargs["interpolate_pos_encoding"] = True
    return kwargs


def _flattened(maker: Maker) -> dict[str, Any]:
    """Pictures of any shape: their patches, one row each, which of them are real, and (rows, columns)."""
    batch, patch = maker.request.batch, int(maker.vision.patch_size)
    rows, columns = (max(1, pixels // patch) for pixels in sides(maker))
    kwargs: dict[str, Any] = {
        "pixel_values": maker.floats(batch, rows * columns, channels(maker.vision) * patch * patch),
        "spatial_shapes": maker.whole(torch.tensor([[rows, columns]] * batch)),
    }
    if "pixel_attention_mask" in maker.taken:
        kwargs["pixel_attention_mask"] = maker.whole(torch.ones(batch, rows * columns, dtype=torch.int64))
    return kwargs


def _pixels(maker: Maker, count: int | None = None) -> torch.Tensor:
    """(batch, channels, height, width), with frames after batch where the config counts frames."""
    height, width = sides(maker)
    frames = getattr(maker.vision, "num_frames", None) if count is None else None
    lead = (maker.request.batch, frames) if isinstance(frames, int) else (count or maker.request.batch,)
    return maker.floats(*lead, channels(maker.vision), height, width)


def _clip(maker: Maker) -> Inputs:
    vision = maker.vision
    frames = next((n for n in (getattr(vision, k, None) for k in ("frames_per_clip", "num_frames")) if n), _FRAMES)
    height, width = sides(maker)
    shape = (maker.request.batch, int(frames), channels(vision), height, width)
    return Inputs({"pixel_values_videos": maker.floats(*shape)}, None, maker.request.batch)


# --- sound --------------------------------------------------------------------------------------
def _wave(maker: Maker) -> Inputs:
    """`input_values`: sound itself, or a spectrogram where the config counts mel bins and a length."""
    batch, config = maker.request.batch, maker.config
    bins, longest = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if isinstance(bins, int) and isinstance(longest, int):
        wave = maker.floats(batch, longest, bins)
    else:
        samples = round(seconds_of(maker) * int(getattr(config, "sampling_rate", None) or RATE))
        channels = getattr(config, "audio_channels", None)
        wave = maker.floats(*((batch, channels) if isinstance(channels, int) else (batch,)), samples)
    return _heard(maker, "input_values", wave)


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
    "pixel_values_videos": _clip,
    "input_values": _wave,
    "input_features": _features,
}
