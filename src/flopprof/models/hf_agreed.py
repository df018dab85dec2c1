"""Inputs that go with a picture: others of its size, masks of it, as many places in a text as it has features.

On meta nobody notices where a mask marks more or fewer places than rows are given for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from flopprof.models.hf_documented import documented, made
from flopprof.models.hf_maker import Inputs, Maker, every_part, token
from flopprof.models.hf_trial import failing

_NOT_OF_PICTURES = re.compile(r"^(attention|head|cross_attn_head|decoder_head|decoder_attention)_mask$")
_MARK = re.compile(r"(image|video|audio)_token_(id|index)$")
_MASKS = (torch.bool, torch.uint8)


def alike(maker: Maker, found: Inputs, layout: Mapping[str, Any]) -> dict[str, Any]:
    """The other pictures of the same size."""
    shown = layout.get("pixel_values")
    if shown is None or shown.dim() < 4:
        return {}
    pages, other = documented(maker.model.forward), replace(maker, side=tuple(shown.shape[-2:]))
    others = [name for name in found.kwargs if name not in layout and name in pages and pages[name].is_picture]
    return {name: made(other, name, maker.model.forward, []) for name in others}


def unsaid_masks(maker: Maker, found: Inputs) -> Iterator[Inputs]:
    """The same with a mask of which the documentation tells no shape: of places, of pictures, of both."""
    shown, words = found.kwargs.get("pixel_values"), found.kwargs.get("input_ids")
    if shown is None or words is None:
        return
    batch, length = words.shape[:2]
    images = shown.shape[1] if shown.dim() > 4 else 1
    pages = documented(maker.model.forward)
    for name in maker.taken:
        if "mask" in name and name not in pages and name not in found.kwargs and not _NOT_OF_PICTURES.search(name):
            for shape in ((batch, length), (batch, length, images), (batch, images)):
                mask = maker.whole(torch.ones(shape, dtype=torch.bool))
                yield replace(found, kwargs={**found.kwargs, name: mask})


class _Watch(TorchFunctionMode):
    """Notes (places, rows) of every tensor that is filled where a mask says so, with rows of another."""

    def __init__(self) -> None:
        super().__init__()
        self.filled: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("masked_scatter", "masked_scatter_") and len(args) == 3:
            target, mask, source = args
            width = target.shape[-1]
            self.filled.append((int(mask.expand(target.shape).sum()) // width, source.numel() // width))
        elif name == "__setitem__" and _is_of_rows(*args):
            target, mask, source = args
            self.filled.append((int(mask.sum()), source.shape[0]))
        return func(*args, **(kwargs or {}))


def _is_of_rows(target: torch.Tensor, mask: Any, source: Any) -> bool:
    """Does every place get a row of its own?"""
    return (
        isinstance(mask, torch.Tensor)
        and mask.dtype in _MASKS
        and isinstance(source, torch.Tensor)
        and source.dim() == target.dim() - mask.dim() + 1
    )


def scattered(maker: Maker, kwargs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(places, rows for them) of all that a forward fills by a mask, as far as it runs."""
    watch = _Watch()
    failing(maker, kwargs, watch)
    return watch.filled


def agreed(maker: Maker, found: Inputs) -> Inputs:
    """The same with as many places marked, by a mask or by placeholders, as there are features for them.

    What is found is given back where nothing makes them agree.
    """
    words = found.kwargs.get("input_ids")
    if words is None or words.is_meta or words.dim() != 2 or len(found.kwargs) < 2:
        return found
    each = _missing(maker, found.kwargs)
    if each is not None and 0 < each < words.shape[1]:
        for kwargs in _marked(maker, found.kwargs, words, each):
            if failing(maker, kwargs) is None and _missing(maker, kwargs) is None:
                return replace(found, kwargs=kwargs)
    return found


def _missing(maker: Maker, kwargs: Mapping[str, Any]) -> int | None:
    """Features for each sample of which not all, or more than all, have a place; None where they agree."""
    for places, rows in scattered(maker, kwargs):
        if places != rows:
            return rows // maker.request.batch
    return None


def _marked(maker: Maker, kwargs: Mapping[str, Any], words: torch.Tensor, each: int) -> Iterator[dict[str, Any]]:
    """The same with so many places marked: by one of the masks, by one of the config's placeholders."""
    for name, mask in kwargs.items():
        if "mask" in name and isinstance(mask, torch.Tensor) and mask.shape == words.shape:
            marks = torch.zeros_like(mask)
            marks[:, 1 : 1 + each] = 1
            yield {**kwargs, name: marks}
    for config in every_part(maker.config):
        for name in filter(_MARK.search, vars(config)):
            mark = token(config, name)
            if mark is not None:
                held = words.clone()
                held[:, 1 : 1 + each] = mark
                yield {**kwargs, "input_ids": held}
