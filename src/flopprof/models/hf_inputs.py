"""Inputs of a transformers model, made from its configuration and from what its `forward` takes.

What is made of ids has values (on the CPU, whatever the model's device is meta), because models look for special
tokens in them; what is made of pixels and sound has none. How many image placeholders a text holds is asked of the
model's own image encoder. Where config and documentation leave a layout open, the model is asked: the first that it
runs on is taken.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from flopprof.errors import FlopprofError, UsageError
from flopprof.models.hf_agreed import agreed, alike, unsaid_masks
from flopprof.models.hf_documented import Unsaid, documented, made, required
from flopprof.models.hf_maker import Inputs, Maker, every_part, ids, is_learned, length_of, token
from flopprof.models.hf_pictures import GRIDS, clip, come_in_patches, patches, picture, pictures, pixels, sized
from flopprof.models.hf_placeholders import mixed
from flopprof.models.hf_sound import spectrogram, spectrograms, stacks, states, wave, waves
from flopprof.models.hf_trial import failing, lengths
from flopprof.models.request import Request

_SEEN_OR_HEARD = re.compile(r"(^|_)(pixel_values|image_patches|flattened_patches|input_features|input_values)(_|$)")
_OF_SOUND = re.compile(r"(features|audio|mel|attention|padding)_mask$")
_NEVER = re.compile(
    r"^(labels|past_|output_|head_mask|inputs_embeds|return_|use_|cache_|(attention_mask|position_ids)$)"
)
_LONGEST = 4096  # of texts that are tried where nobody asked for a length
_MOST_TRIED = 24  # layouts of one input
_MOST_CHANGED = 3  # changes to which a second one is made
_MOST_CHANGES = 30
_MOST_LENGTHS = 4


def make_inputs(model: nn.Module, request: Request, device: str) -> Inputs:
    """The inputs that one call of a transformers model takes. Raises UsageError where a size does not fit."""
    maker = Maker(model, request, device)
    found = mixed(maker) or _first_that_runs(maker)
    kwargs = dict(found.kwargs)
    if _caches(maker):  # a cache multiplies nothing, and is made of many objects
        kwargs["use_cache"] = False
    left = [name for name in maker.taken if _SEEN_OR_HEARD.search(name) and name not in kwargs]
    alone = "input_ids" in kwargs and not any(_SEEN_OR_HEARD.search(name) for name in kwargs)
    note = (f"only text was given: the model also takes {', '.join(left)}",) if left and alone else ()
    return Inputs(kwargs, found.tokens, found.samples, (*found.assumptions, *(note if not found.assumptions else ())))


def _caches(maker: Maker) -> bool:
    """Does `forward` take `use_cache`, or hand whatever it is given to a model inside that does?"""
    inner = getattr(maker.model, "base_model", None)
    hands_on = any(item.kind is item.VAR_KEYWORD for item in maker.taken.values())
    return "use_cache" in maker.taken or (
        hands_on and inner is not None and "use_cache" in inspect.signature(inner.forward).parameters
    )


def _first_that_runs(maker: Maker) -> Inputs:
    bases = _bases(maker)
    first = next(bases, None)
    if first is None:
        raise UsageError(
            f"no input is known for {type(maker.model).__name__}, which takes {maker.model.main_input_name!r}: "
            "give --input SHAPE."
        )
    if set(first.kwargs) <= {"input_ids", "decoder_input_ids"} and _usual(maker) and not _is_short(maker, first):
        return first
    found = _searched(maker, chain([first], bases))
    return first if found is None else agreed(maker, found)


def _is_short(maker: Maker, found: Inputs) -> bool:
    """May the model not take texts as long as these?"""
    said = token(maker.text, "max_position_embeddings")
    return is_learned(maker) or (said is not None and any(item.shape[-1] > said for item in found.kwargs.values()))


def _searched(maker: Maker, bases: Iterable[Inputs]) -> Inputs | None:
    """The first that the model runs on: of the bases, of those with one input changed, then with two.

    A second change is tried where the first has moved the line on which the model fails.
    """
    further: list[Inputs] = []
    for base in bases:
        where = failing(maker, base.kwargs)
        if where is None:
            return base
        for other in islice(_varied(maker, base), _MOST_CHANGES):
            there = failing(maker, other.kwargs)
            if there is None:
                return other
            if there != where:
                further.append(other)
    for changed in further[:_MOST_CHANGED]:
        for other in islice(_varied(maker, changed), _MOST_CHANGES):
            if failing(maker, other.kwargs) is None:
                return other
    return None


def _usual(maker: Maker) -> bool:
    """Are ids of text documented as (batch, length) of any length, and nothing else as needed, seen or heard?"""
    said = documented(maker.model.forward)
    words = [item for name, item in said.items() if name in ("input_ids", "decoder_input_ids")]
    more = any(_SEEN_OR_HEARD.search(name) for name in maker.taken)
    plain = all(len(item.sizes) == 2 and "multiple of" not in item.says for item in words)
    plain = plain and not more and not any(_codes(maker))
    return plain and not _also_needed(maker, {"input_ids"})


def _also_needed(maker: Maker, given: Any) -> list[str]:
    """Documented as no option, though `forward` has a default."""
    said = documented(maker.model.forward)
    return [name for name, item in said.items() if not item.optional and name in maker.taken and name not in given]


def _bases(maker: Maker) -> Iterator[Inputs]:
    """Inputs that the model may take, the fewest first: the main one, all that is needed, all that it senses."""
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
    senses = [name for name in _PARTS if name in maker.taken and name != "inputs"]
    seen: list[set[str]] = []
    for also in ([], _also_needed(maker, base.kwargs), senses):
        names = dict.fromkeys([*([main] if main in _PARTS and main in maker.taken else []), *needed, *also])
        found = _completed(maker, base, list(names))
        if found is not None and found.kwargs and set(found.kwargs) not in seen:
            seen.append(set(found.kwargs))
            yield found
    if not seen and problem is not None:
        raise problem


def _completed(maker: Maker, base: Inputs, names: list[str]) -> Inputs | None:
    """With inputs of these names too; None where one is not known."""
    kwargs, notes = dict(base.kwargs), list(base.assumptions)
    for name in names:
        if name not in kwargs:
            try:
                kwargs.update(_part(maker, name, notes, kwargs))
            except (Unsaid, FlopprofError):
                return None
    return replace(base, kwargs=_fitted(maker, kwargs), assumptions=tuple(notes))


def _part(maker: Maker, name: str, notes: list[str], given: Mapping[str, Any]) -> dict[str, Any]:
    if name in _PARTS:
        return _PARTS[name](maker)
    if name in ("hidden_states", *GRIDS, "merge_sizes") and come_in_patches(maker):
        return next(patches(maker, maker.request.batch, "hidden_states" if name == "hidden_states" else "pixel_values"))
    if _is_unsaid(maker, name):
        notes.append(f"{name}, of which nothing is said, is taken to be of the first shape that the model takes")
        return {name: next(states(maker))}
    return {name: made(maker, name, maker.model.forward, notes, given)}


def _is_unsaid(maker: Maker, name: str) -> bool:
    return name == "hidden_states" and name not in documented(maker.model.forward)


def _fitted(maker: Maker, kwargs: dict[str, Any]) -> dict[str, Any]:
    """With masks of sound as long as the sound is."""
    frames = kwargs.pop("frames", None)
    if isinstance(frames, int):
        for mask in [name for name in kwargs if _OF_SOUND.search(name)]:
            kwargs[mask] = maker.whole(torch.ones(maker.request.batch, frames, dtype=kwargs[mask].dtype))
    return kwargs


def _varied(maker: Maker, found: Inputs) -> Iterator[Inputs]:
    """The same with one of its inputs in another layout, or one more."""
    for name in found.kwargs:
        if name == "hidden_states" and come_in_patches(maker):
            layouts: Iterator[dict[str, Any]] = patches(maker, maker.request.batch, name)
        elif _is_unsaid(maker, name):
            layouts = ({"hidden_states": rows} for rows in states(maker))
        elif name in _LAYOUTS:
            layouts = chain(_LAYOUTS[name](maker), _heard_texts(maker, found, name), _rows(maker, name))
        else:
            continue
        for layout in islice(layouts, _MOST_TRIED):
            yield _retold(found, layout, _fitted(maker, {**found.kwargs, **layout, **alike(maker, found, layout)}))
    if "input_features" in found.kwargs:
        for rows, frames, note in stacks(maker):
            kwargs = _fitted(maker, {**found.kwargs, "input_features": rows, "frames": frames})
            yield replace(found, kwargs=kwargs, assumptions=(*found.assumptions, note))
    for name in documented(maker.model.forward):
        if name in maker.taken and name not in found.kwargs and not _NEVER.search(name):
            notes = list(found.assumptions)
            try:
                extra = {name: made(maker, name, maker.model.forward, notes, found.kwargs)}
            except (Unsaid, FlopprofError):
                continue
            sound = found.kwargs.get("input_features")
            if sound is not None and _OF_SOUND.search(name):
                for frames in sound.shape[1:]:
                    extra = {name: maker.whole(torch.ones(maker.request.batch, frames, dtype=extra[name].dtype))}
                    yield replace(found, kwargs={**found.kwargs, **extra}, assumptions=tuple(notes))
            else:
                for more in chain([extra], _rows(maker, name)):
                    yield replace(found, kwargs={**found.kwargs, **more}, assumptions=tuple(notes))
    yield from unsaid_masks(maker, found)


def _rows(maker: Maker, name: str) -> Iterator[dict[str, Any]]:
    """A row of numbers for each place of a text, where the documentation says that hidden states may be given."""
    said = documented(maker.model.forward).get(name)
    if said is not None and "hidden states" in said.says and len(said.sizes) == 2:
        yield {name: next(states(maker))}


def _retold(found: Inputs, layout: Mapping[str, Any], kwargs: dict[str, Any]) -> Inputs:
    """The same with these tensors, as many tokens as they hold, and nothing noted of what they replace."""
    words = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
    tokens = None if found.tokens is None or words is None else words.shape[0] * words.shape[1]
    notes = tuple(note for note in found.assumptions if not any(f" of {name} is taken " in note for name in layout))
    return replace(found, kwargs=kwargs, tokens=tokens, assumptions=notes)


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


def _spectrum(maker: Maker, name: str) -> dict[str, Any]:
    try:
        sound, frames = spectrogram(maker)
    except FlopprofError:
        sound, frames = next(spectrograms(maker))
    mask = f"{name}_mask"
    along = {mask: maker.whole(torch.ones(maker.request.batch, frames, dtype=torch.bool))}
    return {name: sound, "frames": frames, **(along if mask in required(maker.model.forward) else {})}


def _spectra(maker: Maker, name: str) -> Iterator[dict[str, Any]]:
    return ({name: sound, "frames": frames} for sound, frames in spectrograms(maker))


def _texts(maker: Maker, name: str) -> Iterator[dict[str, Any]]:
    """Texts as long as the positions reach, and those of several codes a place."""
    batch, length = maker.request.batch, length_of(maker)
    if maker.request.seq is None:
        for config in every_part(maker.config):
            reach = getattr(config, "max_position_embeddings", None)
            if isinstance(reach, int) and 0 < reach <= _LONGEST and reach != length:
                yield {name: ids(maker, batch, reach)}
        if is_learned(maker):  # some tables have a row or two that no text reaches
            yield from ({name: ids(maker, batch, length - fewer)} for fewer in (1, 2) if fewer < length)
    for codes in (*_codes(maker), *_codes(maker, ("num_channels", "n_codes_total"))):
        for number in (codes, codes + 1):
            words = ids(maker, batch, length * number).view(batch, length, number)
            yield {name: words if words.is_meta else words % _words_of_sound(maker)}


def _words_of_sound(maker: Maker) -> int:
    """As many codes as a place of sound may be one of: tables of codes are shorter than those of words."""
    names = ("codebook_vocab_size", "codebook_size", "audio_vocab_size", "vocab_size")
    return next((size for size in (token(maker.config, name) for name in names) if size), 1)


def _codes(maker: Maker, names: tuple[str, ...] = ("num_codebooks",)) -> Iterator[int]:
    """How many codes a place of a text may hold."""
    counted = (getattr(config, name, None) for config in every_part(maker.config) for name in names)
    return (codes for codes in counted if isinstance(codes, int) and codes > 1)


def _heard_texts(maker: Maker, found: Inputs, name: str) -> Iterator[dict[str, Any]]:
    """A text as long as what a tower makes of the sound that is given with it."""
    if name == "input_ids" and "input_features" in found.kwargs and maker.request.seq is None:
        for length in (lengths(maker, found.kwargs) or ())[:_MOST_LENGTHS]:
            yield {name: ids(maker, maker.request.batch, length)}


def _any_inputs(maker: Maker) -> Iterator[dict[str, Any]]:
    """What a model that takes anything may take: pictures, or a row of numbers a place."""
    yield {"inputs": pixels(maker)}
    yield {"inputs": pixels(maker, maker.request.batch)}
    yield from ({"inputs": pixels(other)} for other in sized(maker))
    width = getattr(maker.config, "d_model", None)
    if isinstance(width, int):
        yield {"inputs": maker.floats(maker.request.batch, length_of(maker), width)}


_PARTS: Mapping[str, Callable[[Maker], dict[str, Any]]] = {
    "input_ids": lambda maker: {"input_ids": ids(maker, maker.request.batch, length_of(maker))},
    "pixel_values": picture,
    "pixel_values_videos": lambda maker: {"pixel_values_videos": clip(maker)},
    "input_values": lambda maker: {"input_values": wave(maker)},
    "input_features": lambda maker: _spectrum(maker, "input_features"),
    "audio_mel": lambda maker: _spectrum(maker, "audio_mel"),
    "inputs": lambda maker: {"inputs": ids(maker, maker.request.batch, length_of(maker))},
}
_LAYOUTS: Mapping[str, Callable[[Maker], Iterator[dict[str, Any]]]] = {
    "input_ids": lambda maker: _texts(maker, "input_ids"),
    "decoder_input_ids": lambda maker: _texts(maker, "decoder_input_ids"),
    "pixel_values": pictures,
    "pixel_values_videos": lambda maker: ({"pixel_values_videos": clip(other)} for other in sized(maker)),
    "input_values": lambda maker: ({"input_values": sound} for sound in waves(maker)),
    "input_features": lambda maker: _spectra(maker, "input_features"),
    "audio_mel": lambda maker: _spectra(maker, "audio_mel"),
    "inputs": _any_inputs,
}
