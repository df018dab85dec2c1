"""Inputs of a transformers model, made from its configuration and from what its `forward` takes.

What is made of ids has values (on the CPU, whatever the model's device is meta), because models look for special
tokens in them; what is made of pixels and sound has none. How many image placeholders a text holds is asked of the
model's own image encoder.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flopprof.counting.values import carried
from flopprof.errors import ModelFailed, UsageError
from flopprof.models.inputs import InputSpec, first_line, make_input
from flopprof.models.request import Request

_TOKENS = 512  # where neither --seq nor the model's positions say less
_SECONDS = 10.0
_SIDE = 224
_FRAMES = 16
_RATE = 16_000  # samples a second, of every speech model
_MEL_RATE = 100  # frames a second of a mel spectrogram with steps of 10 ms
_MOST_IDS = 1 << 22  # beyond, ids have no values
_VISION = (
    "vision_config",
    "vision_tower_config",
    "visual_config",
    "backbone_config",
    "image_encoder_config",
    "encoder",
)
_TEXT = ("text_config", "thinker_config", "llm_config", "decoder", "language_config")
_POSITIONS = re.compile(r"(^|[._])(wpe|pos|positions?|position_embeddings?|embed_positions?|pos_embeddings?)$")
_OTHER_TOWER = re.compile(r"vision|visual|image|audio|speech|qformer|patch")
_SPECIAL = re.compile(r"(token|start|end|bos|eos|pad|cls|sep|mask|image|video|audio)_(token_)?(id|ids|index|indices)$")


@dataclass(frozen=True)
class Inputs:
    """Keyword arguments of `forward`, the tokens and samples in them, and what was chosen in making them."""

    kwargs: Mapping[str, Any]
    tokens: int | None
    samples: int
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Maker:
    """The model, what was asked for, and where the tensors go."""

    model: Any
    request: Request
    device: str

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def text(self) -> Any:
        return _part(self.config, _TEXT)

    @property
    def vision(self) -> Any:
        return _part(self.config, _VISION)

    @property
    def taken(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.model.forward).parameters

    def floats(self, *shape: int) -> torch.Tensor:
        """Pixels or sound, in the model's own type."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        return make_input(InputSpec(shape, dtype), self.device, None)

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """Ids and sizes: on meta they stay on the CPU, where the count reads them."""
        return values if self.device == "meta" else values.to(self.device)


def make_inputs(model: nn.Module, request: Request, device: str) -> Inputs:
    """The inputs that one call of a transformers model takes. Raises UsageError where a size does not fit."""
    maker = _Maker(model, request, device)
    main = maker.model.main_input_name
    main = main[0] if isinstance(main, list) else main
    if main not in maker.taken:  # composed models name theirs loosely
        main = next((name for name in _MAKERS if name in maker.taken), main)
    if _placeholder(maker.config) is not None and "pixel_values" in maker.taken:
        found = _image_text(maker)
    elif main in _MAKERS:
        found = _MAKERS[main](maker)
    else:
        raise UsageError(f"no input is known for {type(model).__name__}, which takes {main!r}: give --input SHAPE.")
    kwargs = dict(found.kwargs)
    if "use_cache" in maker.taken:  # a cache multiplies nothing, and is made of many objects
        kwargs["use_cache"] = False
    return Inputs(kwargs, found.tokens, found.samples, found.assumptions)


# --- text ---------------------------------------------------------------------------------------
def _text(maker: _Maker) -> Inputs:
    batch, length = maker.request.batch, _length(maker)
    kwargs: dict[str, Any] = {"input_ids": _ids(maker, batch, length)}
    both = bool(getattr(maker.config, "is_encoder_decoder", False))
    if both:
        eos = getattr(maker.config, "eos_token_id", None)
        if isinstance(eos, int) and kwargs["input_ids"].device.type != "meta":
            kwargs["input_ids"][:, -1] = eos  # classifiers read their answer where the text ends
        kwargs.update(_decoder(maker, length))
    if "bbox" in maker.taken:
        kwargs["bbox"] = maker.whole(torch.zeros(batch, length, 4, dtype=torch.int64))
    dual = "pixel_values" in maker.taken and not both
    if "pixel_values" in maker.taken:
        kwargs["pixel_values"] = _pixels(maker)
    return Inputs(kwargs, None if dual else batch * length, batch)


def _decoder(maker: _Maker, length: int) -> dict[str, Any]:
    if "decoder_input_ids" not in maker.taken:
        return {}
    return {"decoder_input_ids": _ids(maker, maker.request.batch, length)}


def _length(maker: _Maker, least: int = 0) -> int:
    """--seq, or the usual length where the positions reach so far. Raises UsageError where they do not."""
    reach = _reach(maker)
    asked = maker.request.seq
    if asked is None:
        wanted = max(_TOKENS, least + 64 if least else 0)
        return wanted if reach is None else min(wanted, reach)
    if reach is not None and asked > reach:
        raise UsageError(f"--seq {asked} is longer than the model's {reach} learned positions.")
    return asked


def _reach(maker: _Maker) -> int | None:
    """The longest text that the tables of positions allow; None where positions are computed.

    On meta nobody notices an index beyond a table, so that the limit must be known.
    """
    spoken = maker.model.main_input_name not in ("input_ids", ["input_ids"])
    limits = [
        module.num_embeddings
        - (module.padding_idx + 1 if module.padding_idx is not None else int(getattr(module, "offset", 0)))
        for name, module in maker.model.named_modules()
        if isinstance(module, nn.Embedding)
        and _POSITIONS.search(name)
        and not _OTHER_TOWER.search(name)
        and (not spoken or "decoder" in name or "text" in name)
    ]
    return min(limits, default=None)


def _ids(maker: _Maker, batch: int, length: int) -> torch.Tensor:
    """Ids of ordinary words: none of the config's special tokens."""
    if batch * length > _MOST_IDS:
        return torch.empty(batch, length, dtype=torch.int64, device=maker.device)
    try:
        words = int(maker.model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        words = int(getattr(maker.text, "vocab_size", 0) or 2)
    words = min(words, int(getattr(maker.text, "vocab_size", words) or words))
    special = set(_special(maker.config)) | set(_special(maker.text))
    ordinary = torch.tensor([word for word in range(min(words, 4096)) if word not in special] or [0])
    chosen = torch.randint(len(ordinary), (batch, length), generator=torch.Generator().manual_seed(0))
    return maker.whole(ordinary[chosen])


def _special(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if _SPECIAL.search(name):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (item for item in values if isinstance(item, int))


# --- pictures -----------------------------------------------------------------------------------
def _vision(maker: _Maker) -> Inputs:
    batch = maker.request.batch
    kwargs = _picture(maker)
    if "input_ids" in maker.taken:  # CLIP and its kin, and captioners
        length = _length(maker)
        kwargs["input_ids"] = _ids(maker, batch, length)
        return Inputs(kwargs, None, batch)
    if "decoder_input_ids" in maker.taken:
        length = _length(maker)
        return Inputs({**kwargs, **_decoder(maker, length)}, batch * length, batch)
    return Inputs(kwargs, None, batch)


def _picture(maker: _Maker) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"pixel_values": _pixels(maker)}
    native = _side(maker.vision)
    if maker.request.image_size not in (None, native) and "interpolate_pos_encoding" in maker.taken:
        kwargs["interpolate_pos_encoding"] = True
    return kwargs


def _pixels(maker: _Maker, count: int | None = None) -> torch.Tensor:
    """(batch, channels, height, width), with frames after batch where the config counts frames."""
    height, width = _sides(maker)
    frames = getattr(maker.vision, "num_frames", None) if count is None else None
    lead = (maker.request.batch, frames) if isinstance(frames, int) else (count or maker.request.batch,)
    return maker.floats(*lead, _channels(maker.vision), height, width)


def _clip(maker: _Maker) -> Inputs:
    vision = maker.vision
    frames = next((n for n in (getattr(vision, k, None) for k in ("frames_per_clip", "num_frames")) if n), _FRAMES)
    height, width = _sides(maker)
    shape = (maker.request.batch, int(frames), _channels(vision), height, width)
    return Inputs({"pixel_values_videos": maker.floats(*shape)}, None, maker.request.batch)


def _sides(maker: _Maker) -> tuple[int, int]:
    if maker.request.image_size is not None:
        return maker.request.image_size, maker.request.image_size
    side = _side(maker.vision)
    return side if isinstance(side, tuple) else (side, side)


def _side(vision: Any) -> Any:
    """The config's picture size, as one number or (height, width)."""
    for name in ("image_size", "img_size", "input_size", "crop_size"):
        value = getattr(vision, name, None)
        if isinstance(value, Mapping):
            value = [value.get("height"), value.get("width")]
        if isinstance(value, list | tuple) and len(value) >= 2 and all(isinstance(n, int) for n in value):
            return (value[-2], value[-1]) if value[-2] != value[-1] else value[-1]
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        if isinstance(value, int) and value > 0:
            return value
    return _SIDE


def _channels(vision: Any) -> int:
    names = ("num_channels", "in_channels", "in_chans", "num_input_channels")
    return next((value for value in (getattr(vision, name, None) for name in names) if isinstance(value, int)), 3)


# --- sound --------------------------------------------------------------------------------------
def _wave(maker: _Maker) -> Inputs:
    """`input_values`: sound itself, or a spectrogram where the config counts mel bins and a length."""
    batch, config = maker.request.batch, maker.config
    bins, longest = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if isinstance(bins, int) and isinstance(longest, int):
        wave = maker.floats(batch, longest, bins)
    else:
        samples = round(_seconds(maker) * int(getattr(config, "sampling_rate", None) or _RATE))
        channels = getattr(config, "audio_channels", None)
        wave = maker.floats(*((batch, channels) if isinstance(channels, int) else (batch,)), samples)
    return _heard(maker, "input_values", wave)


def _features(maker: _Maker) -> Inputs:
    """`input_features`: (batch, bins, time) for Whisper's kind, whose windows are fixed; else (batch, time, bins)."""
    batch, config = maker.request.batch, maker.config
    encoder = getattr(config, "encoder_config", None) or getattr(config, "audio_config", None) or config
    seconds = _seconds(maker)
    stacked = getattr(encoder, "feature_projection_input_dim", None) or getattr(
        encoder, "feature_projection_size", None
    )
    single = getattr(encoder, "input_feat_per_channel", None)
    bins = getattr(encoder, "num_mel_bins", None)
    window = getattr(encoder, "max_source_positions", None)
    if isinstance(stacked, int):  # pairs of frames side by side
        return _heard(maker, "input_features", maker.floats(batch, round(seconds * _MEL_RATE / 2), stacked))
    if isinstance(single, int):
        return _heard(maker, "input_features", maker.floats(batch, round(seconds * _MEL_RATE), single))
    if isinstance(bins, int) and isinstance(window, int):
        frames = 2 * window  # the second convolution's stride
        if maker.request.audio_seconds is not None and maker.request.audio_seconds * _MEL_RATE > frames:
            raise UsageError(
                f"--audio-seconds {maker.request.audio_seconds:g} is longer than the model's window of "
                f"{frames / _MEL_RATE:g} s: raise --batch, one sample a window."
            )
        return _heard(maker, "input_features", maker.floats(batch, bins, frames))
    if isinstance(bins, int):
        return _heard(maker, "input_features", maker.floats(batch, round(seconds * _MEL_RATE), bins))
    raise UsageError(f"the config of {type(maker.model).__name__} counts no mel bins: give --input SHAPE.")


def _heard(maker: _Maker, name: str, sound: torch.Tensor) -> Inputs:
    batch = maker.request.batch
    kwargs: dict[str, Any] = {name: sound}
    if "decoder_input_ids" in maker.taken:
        length = _length(maker)
        return Inputs({**kwargs, **_decoder(maker, length)}, batch * length, batch)
    if "input_ids" in maker.taken and name != "input_ids":
        kwargs["input_ids"] = _ids(maker, batch, _length(maker))
    return Inputs(kwargs, None, batch)


def _seconds(maker: _Maker) -> float:
    return _SECONDS if maker.request.audio_seconds is None else maker.request.audio_seconds


# --- pictures inside text -----------------------------------------------------------------------
def _image_text(maker: _Maker) -> Inputs:
    """Ids with as many placeholders as the model's own image encoder gives features, and the pictures."""
    batch, images = maker.request.batch, maker.request.images
    if images == 0:
        length = _length(maker)
        return Inputs({"input_ids": _ids(maker, batch, length)}, batch * length, batch)
    pictures = _pictures(maker, batch * images)
    each = _placeholders(maker, pictures, batch * images)
    config = maker.config
    marks = [_token(config, name) for name in ("vision_start_token_id", "vision_end_token_id")]
    start, end = ([mark] if mark is not None else [] for mark in marks)
    run = [*start, *[_placeholder(config)] * each, *end]
    least = images * (len(run) + 1)  # a word before each, so that no two pictures are one
    length = _length(maker, least)
    if length < least:
        raise UsageError(
            f"{length} tokens do not hold {images} images of {each} placeholders each: give --seq {least} or more, "
            "or fewer --images."
        )
    ids = _ids(maker, batch, length)
    if ids.is_meta:
        raise UsageError(f"{batch} x {length} tokens are too many to hold placeholders: take a smaller --batch.")
    for image in range(images):
        at = image * (len(run) + 1) + 1
        ids[:, at : at + len(run)] = torch.tensor(run, device=ids.device)
    kwargs = {"input_ids": ids, **pictures}
    seen = (ids == _placeholder(config)).to(torch.int64)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in maker.taken and (name != "token_type_ids" or maker.request.train):
            kwargs[name] = seen
    return Inputs(kwargs, batch * length, batch)


def _pictures(maker: _Maker, count: int) -> dict[str, Any]:
    """Pixels in the layout that the config's own sizes and `forward` ask for."""
    vision, taken = maker.vision, maker.taken
    if "image_grid_thw" in taken:
        return _patches(maker, count)
    height, width = _sides(maker)
    one = (_channels(vision), height, width)
    sizes = {"image_sizes": maker.whole(torch.tensor([[height, width]] * count))} if "image_sizes" in taken else {}
    if getattr(maker.config, "image_grid_pinpoints", None) is not None:
        return {"pixel_values": maker.floats(count, 2, *one), **sizes}  # the whole picture, and one tile
    if "pixel_attention_mask" in taken:
        return {"pixel_values": maker.floats(maker.request.batch, maker.request.images, *one)}
    return {"pixel_values": maker.floats(count, *one), **sizes}


def _patches(maker: _Maker, count: int) -> dict[str, Any]:
    """Flattened patches of every picture one after the other, and their grids of (time, height, width)."""
    vision = maker.vision
    patch, merge = int(vision.patch_size), int(getattr(vision, "spatial_merge_size", 1))
    step = patch * merge
    sides = _sides(maker) if maker.request.image_size or _side(vision) != _SIDE else (2 * _SIDE, 2 * _SIDE)
    rows, columns = (max(1, round(side / step)) * merge for side in sides)
    width = _channels(vision) * int(getattr(vision, "temporal_patch_size", 1)) * patch * patch
    return {
        "pixel_values": maker.floats(count * rows * columns, width),
        "image_grid_thw": maker.whole(torch.tensor([[1, rows, columns]] * count)),
    }


def _placeholders(maker: _Maker, pictures: Mapping[str, Any], count: int) -> int:
    """Tokens a picture takes: the features that the image encoder gives, over the width of the text."""
    encode = getattr(maker.model, "get_image_features", None) or getattr(
        getattr(maker.model, "model", None), "get_image_features", None
    )
    width = getattr(maker.text, "hidden_size", None)
    if encode is None or not isinstance(width, int):
        raise UsageError(f"{type(maker.model).__name__} does not say how many tokens a picture takes: --images 0.")
    try:
        with torch.no_grad(), carried(lambda _: None):
            known = inspect.signature(encode).parameters
            given: dict[str, Any] = {name: value for name, value in pictures.items() if name in known}
            if maker.device == "meta":
                given = {name: value.to("meta") for name, value in given.items()}
            features = _features_of(encode(**given))
    except Exception as error:
        raise ModelFailed(
            f"the image encoder of {type(maker.model).__name__} failed: {type(error).__name__}: {first_line(error)}"
        ) from error
    numbers = sum(feature.numel() for feature in features)
    if not numbers or numbers % (width * count):
        raise UsageError(f"{type(maker.model).__name__} gives {numbers} features: no whole number of tokens a picture.")
    return numbers // (width * count)


def _features_of(output: Any) -> list[torch.Tensor]:
    found = getattr(output, "pooler_output", None)
    found = output if found is None else found
    if isinstance(found, Mapping):
        found = next(iter(found.values()))
    if isinstance(found, torch.Tensor):
        return [found]
    return [part for item in found for part in _features_of(item)]


def _placeholder(config: Any) -> int | None:
    for part in (config, _part(config, _TEXT)):
        for name in ("image_token_id", "image_token_index"):
            value = _token(part, name)
            if value is not None:
                return value
    return None


def _token(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _part(config: Any, names: tuple[str, ...]) -> Any:
    """The config of one tower, or the whole where there are none."""
    for name in names:
        inner = getattr(config, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            return inner
    return config


_MAKERS: Mapping[str, Callable[[_Maker], Inputs]] = {
    "input_ids": _text,
    "pixel_values": _vision,
    "pixel_values_videos": _clip,
    "input_values": _wave,
    "input_features": _features,
}
