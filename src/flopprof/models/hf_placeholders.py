"""Pictures and sound inside text: ids with as many placeholders as the model's own encoder gives features."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from flopprof.counting.values import carried, needs_values
from flopprof.errors import FlopprofError, ModelFailed, UsageError
from flopprof.models.hf_agreed import scattered
from flopprof.models.hf_documented import Unsaid, documented, made, required
from flopprof.models.hf_maker import TEXT_PARTS, Inputs, Maker, channels, ids, length_of, part, sides, token
from flopprof.models.hf_pictures import come_in_patches, flattened, patches, sized
from flopprof.models.hf_sound import spectrogram, spectrograms
from flopprof.models.hf_trial import failing, lengths
from flopprof.models.inputs import first_line

_MOST_TRIED = 40
_MOST_TRIED_WHOLE = 8  # in forwards of the whole model
_TOO_FEW = 2  # placeholders: for no sound; some models take a single one to stand for a whole sound


@dataclass(frozen=True)
class _Run:
    """What stands for one picture, or one sound, in a text: ids of which the placeholders are `each` times `mark`."""

    mark: int
    each: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def tokens(self) -> list[int]:
        return [*self.before, *[self.mark] * self.each, *self.after]


def mixed(maker: Maker) -> Inputs | None:
    """The inputs of a model whose text holds placeholders; None for a model of another kind."""
    picture, sound = _mark(maker.config, "image"), _mark(maker.config, "audio")
    sees = picture is not None and "pixel_values" in maker.taken
    hears = sound is not None and "input_features" in maker.taken
    if not (sees or hears) or "input_ids" not in maker.taken:
        return None
    sees, hears = sees and _has(maker.config, "vision"), hears and _has(maker.config, "audio")
    if "decoder_input_ids" in maker.taken and _encoder(maker, "get_image_features") is None:
        return None
    images = maker.request.images if sees else 0
    kwargs: dict[str, Any] = {}
    runs: list[_Run] = []
    notes: list[str] = []
    if sees and images:
        given, each = _pictures(maker, maker.request.batch * images, picture or 0)
        kwargs.update(given)
        around = [token(maker.config, f"vision_{end}_token_id") for end in ("start", "end")]
        runs += [_Run(picture or 0, each, *((() if mark is None else (mark,)) for mark in around))] * images
    if hears and maker.request.audio_seconds != 0 and (not sees or maker.request.audio_seconds is not None):
        given, each = _sound(maker, sound or 0)
        kwargs.update(given)
        runs.append(_Run(sound or 0, each, (), ()))
    elif hears:
        notes.append("the text holds no sound, which the model could hear: --audio-seconds gives it some")
    return _filled(maker, runs, kwargs, picture, tuple(notes))


def _has(config: Any, sense: str) -> bool:
    """Some kinds are built with or without a tower, of which the config says None."""
    return getattr(config, f"{sense}_config", True) is not None


def _filled(
    maker: Maker, runs: list[_Run], kwargs: dict[str, Any], picture: int | None, notes: tuple[str, ...]
) -> Inputs:
    batch = maker.request.batch
    least = sum(len(run.tokens) + 1 for run in runs)  # a word before each, so that no two pictures are one
    length = length_of(maker, least)
    if length < least:
        raise UsageError(
            f"{length} tokens do not hold the {least} that the placeholders of {len(runs)} pictures or sounds take: "
            f"give --seq {least} or more, or fewer --images."
        )
    words = ids(maker, batch, length)
    if words.is_meta:
        raise UsageError(f"{batch} x {length} tokens are too many to hold placeholders: take a smaller --batch.")
    at = 0
    for run in runs:
        words[:, at + 1 : at + 1 + len(run.tokens)] = torch.tensor(run.tokens, device=words.device)
        at += 1 + len(run.tokens)
    kwargs = {"input_ids": words, **kwargs}
    if picture is not None:
        seen = (words == picture).to(torch.int64)
        if "mm_token_type_ids" in maker.taken:
            kwargs["mm_token_type_ids"] = seen
        if "token_type_ids" in maker.taken and maker.request.train:
            kwargs["token_type_ids"] = seen
    tiles = kwargs.get("aspect_ratio_mask")
    if tiles is not None:  # every word looks at every tile
        shape = (batch, length, maker.request.images, tiles.shape[-1])
        kwargs["cross_attention_mask"] = maker.whole(torch.ones(shape, dtype=torch.int64))
    if "decoder_input_ids" in maker.taken:
        kwargs["decoder_input_ids"] = ids(maker, batch, length)
    for name in required(maker.model.forward):
        if name not in kwargs:
            try:
                kwargs[name] = made(maker, name, maker.model.forward, [], kwargs)
            except Unsaid as error:
                raise UsageError(f"{type(maker.model).__name__} also takes {name}, which nothing tells.") from error
    return Inputs(kwargs, batch * length, batch, notes)


# --- pictures -----------------------------------------------------------------------------------
def _pictures(maker: Maker, count: int, mark: int) -> tuple[dict[str, Any], int]:
    """(the pictures, placeholders for each): the first of the layouts that the model's encoder takes, or the whole."""
    if "aspect_ratio_ids" in maker.taken:
        return _tiles(maker), 1
    problem: Exception | None = None
    for layout in islice(_layouts(maker, count), _MOST_TRIED):
        try:
            return layout, _placeholders(maker, "get_image_features", layout, count)
        except FlopprofError as error:
            problem = problem or error
            if isinstance(error.__cause__, Exception) and needs_values(error.__cause__):
                break  # a layout that it takes
    for layout in islice(_layouts(maker, count), _MOST_TRIED_WHOLE):
        each = _watched(maker, count, mark, layout)
        if each is not None:
            return layout, each
    raise problem or UsageError(f"{type(maker.model).__name__} takes pictures in no known layout: --images 0.")


def _watched(maker: Maker, count: int, mark: int, layout: dict[str, Any]) -> int | None:
    """Placeholders for each picture: the features that a forward puts where they are. None for another layout."""

    def text(each: int) -> Mapping[str, Any]:
        return _filled(maker, [_Run(mark, each, (), ())] * maker.request.images, layout, mark, ()).kwargs

    for _, rows in scattered(maker, text(1))[:1]:
        each = rows // count
        if each and scattered(maker, text(each))[:1] == [(rows, rows)] and failing(maker, text(each)) is None:
            return each
    return None


def _layouts(maker: Maker, count: int) -> Iterator[dict[str, Any]]:
    if come_in_patches(maker):
        yield from patches(maker, count, "pixel_values")
        return
    height, width = sides(maker)
    one = (channels(maker.vision), height, width)
    sizes = {"image_sizes": maker.whole(torch.tensor([[height, width]] * count))}
    grid = getattr(maker.config, "image_grid_pinpoints", None)
    if grid is not None:  # the whole picture, and the tiles of the best of these grids
        module = sys.modules.get(type(maker.model).__module__)
        tiles = getattr(module, "image_size_to_num_patches", None)
        number = tiles([height, width], grid, height) if tiles is not None else 1
        yield {"pixel_values": maker.floats(count, number, *one), **sizes}
        return
    if "spatial_shapes" in maker.taken:
        yield flattened(maker, count)
    for other in (maker, *sized(maker)):
        height, width = sides(other)
        one = (channels(maker.vision), height, width)
        if "pixel_attention_mask" in maker.taken:
            yield {"pixel_values": maker.floats(maker.request.batch, maker.request.images, *one)}
            continue
        sizes = {"image_sizes": maker.whole(torch.tensor([[height, width]] * count))}
        yield {"pixel_values": maker.floats(count, *one)}
        if "image_sizes" in maker.taken:
            yield {"pixel_values": maker.floats(count, *one), **sizes}
    patch = getattr(maker.vision, "patch_size", None)
    if isinstance(patch, int):  # a row for each patch
        height, width = sides(maker)
        shape = (count, max(1, height // patch) * max(1, width // patch), channels(maker.vision) * patch * patch)
        pages = [documented(model.forward).get("pixel_values") for model in (maker.model, maker.model.base_model)]
        if any(said is not None and len(said.sizes) == 2 for said in pages):  # (patches, numbers)
            yield from islice(patches(maker, count, "pixel_values"), 1)
        yield {"pixel_values": maker.floats(*shape)}
        yield from patches(maker, count, "pixel_values")


def _tiles(maker: Maker) -> dict[str, Any]:
    """Pictures that the text looks at from outside: one tile each, of as many as there is room for."""
    height, width = sides(maker)
    batch, images = maker.request.batch, maker.request.images
    room = int(getattr(maker.vision, "max_num_tiles", 1))
    mask = torch.zeros(batch, images, room, dtype=torch.int64)
    mask[..., 0] = 1
    return {
        "pixel_values": maker.floats(batch, images, room, channels(maker.vision), height, width),
        "aspect_ratio_ids": maker.whole(torch.ones(batch, images, dtype=torch.int64)),
        "aspect_ratio_mask": maker.whole(mask),
    }


# --- sound --------------------------------------------------------------------------------------
def _sound(maker: Maker, mark: int) -> tuple[dict[str, Any], int]:
    """(the sound, placeholders for it): as the encoder says, or the whole model; the first layout that it takes."""
    problem: FlopprofError | None = None
    for layout in islice(_spectrograms(maker), _MOST_TRIED):
        try:
            return layout, _placeholders(maker, "get_audio_features", layout, maker.request.batch)
        except FlopprofError as error:
            problem = problem or error
    for layout in islice(_spectrograms(maker), _MOST_TRIED_WHOLE):
        each = _told(maker, mark, layout)
        if each is not None:
            return layout, each
    raise UsageError(f"{problem} --audio-seconds 0 counts the text alone.") from problem


def _told(maker: Maker, mark: int, layout: dict[str, Any]) -> int | None:
    """Placeholders that a model asks for which counts them in its forward: as many as its tower gave before it failed.

    None where it takes another layout, or any number of placeholders.
    """

    def text(each: int) -> Mapping[str, Any]:
        return _filled(maker, [_Run(mark, each, (), ())], layout, None, ()).kwargs

    for each in (lengths(maker, text(_TOO_FEW)) or ())[:_MOST_TRIED_WHOLE]:
        if each > _TOO_FEW and failing(maker, text(each)) is None and failing(maker, text(each - 1)) is not None:
            return each
    return None


def _spectrograms(maker: Maker) -> Iterator[dict[str, Any]]:
    try:
        yield _masked(maker, *spectrogram(maker))
    except UsageError:
        if maker.request.audio_seconds is not None:
            raise
    for features, frames in spectrograms(maker):
        yield _masked(maker, features, frames)


def _masked(maker: Maker, features: torch.Tensor, frames: int) -> dict[str, Any]:
    """A spectrogram, with the masks of its frames; one that the encoder knows nothing of is of something else."""
    kwargs: dict[str, Any] = {"input_features": features}
    encode = _encoder(maker, "get_audio_features")
    known = maker.taken if encode is None else inspect.signature(encode).parameters
    for name in ("input_features_mask", "feature_attention_mask", "padding_mask"):
        if name in maker.taken and name in known:
            kind = torch.int64 if name == "feature_attention_mask" else torch.bool
            kwargs[name] = maker.whole(torch.ones(maker.request.batch, frames, dtype=kind))
    return kwargs


# --- how many -----------------------------------------------------------------------------------
def _placeholders(maker: Maker, method: str, given: dict[str, Any], count: int) -> int:
    """Tokens that one takes: the features that the model's encoder gives, over the width of the text.

    What the encoder needs besides is added to `given`.
    """
    encode = _encoder(maker, method)
    width = getattr(part(maker.config, TEXT_PARTS), "hidden_size", None)
    if encode is None or not isinstance(width, int):
        raise UsageError(f"{type(maker.model).__name__} does not say how many tokens a picture or sound takes.")
    known = inspect.signature(encode).parameters
    named = [item for item in known.values() if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)]
    taken = {name: value for name, value in given.items() if not named or name in known}
    try:
        for name in required(encode):
            if name not in taken:
                taken[name] = made(maker, name, encode, [], taken)
                if name in maker.taken:
                    given[name] = taken[name]
    except Unsaid as error:
        raise UsageError(f"{type(maker.model).__name__}.{method} also takes {error}, which nothing tells.") from error
    try:
        with torch.no_grad(), carried(lambda _: None, model=maker.model):
            if maker.device == "meta":
                taken = {name: value.to("meta") for name, value in taken.items()}
            features = _tensors(encode(**taken))
    except Exception as error:
        raise ModelFailed(
            f"{method} of {type(maker.model).__name__} failed: {type(error).__name__}: {first_line(error)}"
        ) from error
    numbers = sum(feature.numel() for feature in features)
    if numbers % (width * count) and len({feature.shape[-1] for feature in features}) == 1:
        width = features[0].shape[-1]  # what the model makes as wide as its text later
    if not numbers or numbers % (width * count):
        raise UsageError(f"{type(maker.model).__name__} gives {numbers} features: no whole number of tokens for each.")
    return numbers // (width * count)


def _encoder(maker: Maker, method: str) -> Any:
    """The method of the model, or of the one inside it where that one says more of what it takes."""
    both = "decoder_input_ids" in maker.taken
    owners = (maker.model, getattr(maker.model, "model", None), maker.model.get_encoder() if both else None)
    found = [encode for encode in (getattr(owner, method, None) for owner in owners) if encode is not None]
    return max(found, key=lambda encode: len(required(encode)), default=None)


def _tensors(output: Any) -> list[torch.Tensor]:
    found = getattr(output, "pooler_output", None)
    found = output if found is None else found
    if isinstance(found, Mapping):
        found = next(iter(found.values()))
    if isinstance(found, torch.Tensor):
        return [found]
    return [tensor for item in found for tensor in _tensors(item)]


def _mark(config: Any, kind: str) -> int | None:
    """The id of the placeholder for an image or a sound; None where the config names none."""
    for owner in (config, part(config, TEXT_PARTS)):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            value = token(owner, name)
            if value is not None:
                return value
    return None
