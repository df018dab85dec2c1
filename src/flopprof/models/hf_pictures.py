"""Pictures and clips as transformers models take them: pixels, flattened patches, pairs, of sizes that they accept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from flopprof.models.hf_documented import Documented, documented
from flopprof.models.hf_maker import SIDE, Maker, channels, every_part, side, sides

_FRAMES = 16
# Tried in this order where a model refuses the size that its config names, or none is named.
_SIDES = (224, 256, 288, 336, 384, 448, 490, 512, 518, 560, 640, 768, 896, 980, 1024, 1120, 1280, 1536)
GRIDS = ("grid_thw", "image_grid_thw", "grid_hws", "image_grid_hws", "grid_hw", "image_grid_hw")


def picture(maker: Maker) -> dict[str, Any]:
    """`pixel_values` of the config's size, with what goes along."""
    if "spatial_shapes" in maker.taken and isinstance(getattr(maker.vision, "patch_size", None), int):
        return flattened(maker, maker.request.batch)
    kwargs: dict[str, Any] = {"pixel_values": pixels(maker)}
    native = side(maker.vision)
    if maker.request.image_size not in (None, native) and "interpolate_pos_encoding" in maker.taken:
        kwargs["interpolate_pos_encoding"] = True
    return kwargs


def pictures(maker: Maker) -> Iterator[dict[str, Any]]:
    """Other layouts of `pixel_values`: patches with their grid, other sizes, one or two pictures a sample."""
    if come_in_patches(maker):
        yield from patches(maker, maker.request.batch, "pixel_values")
    height, width = sides(maker)
    colours = channels(maker.vision)
    for count in (1, 2):
        yield {"pixel_values": maker.floats(maker.request.batch, count, colours, height, width)}
    for other in sized(maker):
        yield {"pixel_values": pixels(other)}


def sized(maker: Maker) -> Iterator[Maker]:
    """The same with pictures of other sizes, where none was asked for."""
    if maker.request.image_size is None:
        native = side(maker.vision)
        half = sorted(native) if isinstance(native, tuple) else ()  # of two pictures, one above the other
        others = dict.fromkeys((*half[:1], *_SIDES))
        yield from (replace(maker, side=other) for other in others if other != native)


def flattened(maker: Maker, count: int) -> dict[str, Any]:
    """Pictures of any shape: their patches, one row each, which of them are real, and (rows, columns)."""
    patch = int(maker.vision.patch_size)
    rows, columns = (max(1, length // patch) for length in sides(maker))
    kwargs: dict[str, Any] = {
        "pixel_values": maker.floats(count, rows * columns, channels(maker.vision) * patch * patch),
        "spatial_shapes": maker.whole(torch.tensor([[rows, columns]] * count)),
    }
    if "pixel_attention_mask" in maker.taken:
        kwargs["pixel_attention_mask"] = maker.whole(torch.ones(count, rows * columns, dtype=torch.int64))
    return kwargs


def pixels(maker: Maker, count: int | None = None) -> torch.Tensor:
    """(batch, channels, height, width), with frames after batch where the config counts frames."""
    height, width = sides(maker)
    frames = getattr(maker.vision, "num_frames", None) if count is None else None
    lead = (maker.request.batch, frames) if isinstance(frames, int) else (count or maker.request.batch,)
    return maker.floats(*lead, channels(maker.vision), height, width)


def clip(maker: Maker) -> torch.Tensor:
    """`pixel_values_videos`: (batch, frames, channels, height, width)."""
    vision = maker.vision
    frames = next((n for n in (getattr(vision, k, None) for k in ("frames_per_clip", "num_frames")) if n), _FRAMES)
    height, width = sides(maker)
    return maker.floats(maker.request.batch, int(frames), channels(vision), height, width)


def come_in_patches(maker: Maker) -> bool:
    """Does `forward` take where the patches of each picture lie?"""
    return bool(_grids(maker) or _places(maker))


def _pages(maker: Maker) -> dict[str, Documented]:
    """What `forward` and the encoder of pictures say of what `forward` takes."""
    encode = getattr(maker.model, "get_image_features", None)
    pages = {**documented(encode), **documented(maker.model.forward)}
    return {name: said for name, said in pages.items() if name in maker.taken and "video" not in name}


def _grids(maker: Maker) -> dict[str, int]:
    """Inputs that count the patches of each picture, and by how many numbers: (time,) height, width."""
    known = {name: 3 if name.endswith("thw") else 2 for name in GRIDS if name in maker.taken}
    return known or {name: int(said.sizes[-1]) for name, said in _pages(maker).items() if said.counts_patches}


def _places(maker: Maker) -> list[str]:
    """Inputs that say at which (x, y) each patch of each picture lies."""
    pages = _pages(maker).items()
    return [name for name, said in pages if name.endswith("position_ids") and said.sizes[1:] == ("max_patches", "2")]


def patches(maker: Maker, count: int, name: str) -> Iterator[dict[str, Any]]:
    """Flattened patches of every picture one after the other, with their grids of (time, height, width).

    First a row each, as most take them; then as little pictures, and both with a batch dimension around.
    """
    vision = maker.vision
    merges = ("spatial_merge_size", "merge_size", "pooling_kernel_size")
    patch, merge = _whole(vision, ("patch_size",), 14), _whole(vision, merges, 1)
    known = maker.request.image_size is not None or maker.side is not None or side(vision) != SIDE
    lengths = sides(maker) if known else (2 * SIDE, 2 * SIDE)
    rows, columns = (max(1, round(length / (patch * merge))) * merge for length in lengths)
    colours = channels(vision)

    def grid(rows: int, columns: int) -> dict[str, Any]:
        sizes = _grids(maker).items()
        return {name: maker.whole(torch.tensor([[1, rows, columns][-size:]] * count)) for name, size in sizes}

    number = count * rows * columns
    places = _places(maker)
    if places:
        at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
        laid = {place: maker.whole(at.expand(count, -1, -1).contiguous()) for place in places}
        yield {name: maker.floats(count, rows * columns, colours * patch * patch), **laid}
        return
    along = grid(rows, columns)
    for sizes in ("merge_sizes", "image_merge_sizes"):
        if sizes in maker.taken:
            along[sizes] = maker.whole(torch.full((count,), merge))
    if along and not any(known in along for known in GRIDS):  # the pictures side by side, one patch high
        yield {name: maker.floats(1, colours, patch, number * patch), **along}
    times = dict.fromkeys((_whole(vision, ("temporal_patch_size",), 1), 1, 2))
    for time in times:
        yield {name: maker.floats(number, colours * time * patch * patch), **along}
    width = _whole(vision, ("hidden_size", "embed_dim"), 1)
    for shape in (
        (number, colours, patch, patch),
        (1, number, colours, patch, patch),
        (1, number, colours * patch * patch),
        (number, 2, colours, patch, patch),
        (number, next(iter(times)), patch, patch, colours),
        (number, width),
    ):
        yield {name: maker.floats(*shape), **along}
    if merge > 1:  # the grid counts what is merged
        merged = maker.floats(number // (merge * merge), patch * merge, patch * merge, colours)
        yield {name: merged, **along, **grid(rows // merge, columns // merge)}


def _whole(config: Any, names: tuple[str, ...], otherwise: int) -> int:
    for part in every_part(config):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[-1]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return otherwise
