"""Pictures and clips as transformers models take them: pixels, flattened patches, pairs, of sizes that they accept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

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
    if any(name in maker.taken for name in GRIDS):
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
        yield from (replace(maker, side=other) for other in _SIDES if other != side(maker.vision))


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


def patches(maker: Maker, count: int, name: str, taken: Any = None) -> Iterator[dict[str, Any]]:
    """Flattened patches of every picture one after the other, with their grids of (time, height, width).

    First a row each, as most take them; then as little pictures, and both with a batch dimension around.
    """
    taken = maker.taken if taken is None else taken
    vision = maker.vision
    patch, merge = _whole(vision, ("patch_size",), 14), _whole(vision, ("spatial_merge_size", "merge_size"), 1)
    known = maker.request.image_size is not None or maker.side is not None or side(vision) != SIDE
    lengths = sides(maker) if known else (2 * SIDE, 2 * SIDE)
    rows, columns = (max(1, round(length / (patch * merge))) * merge for length in lengths)
    colours = channels(vision)
    along: dict[str, Any] = {}
    for grid in GRIDS:
        if grid in taken:
            sizes = [1, rows, columns] if grid.endswith("thw") else [rows, columns]
            along[grid] = maker.whole(torch.tensor([sizes] * count))
    for merges in ("merge_sizes", "image_merge_sizes"):
        if merges in taken:
            along[merges] = maker.whole(torch.full((count,), merge))
    number = count * rows * columns
    times = dict.fromkeys((_whole(vision, ("temporal_patch_size",), 1), 1, 2))
    for time in times:
        yield {name: maker.floats(number, colours * time * patch * patch), **along}
    width = _whole(vision, ("hidden_size", "embed_dim"), 1)
    for shape in (
        (number, colours, patch, patch),
        (1, number, colours, patch, patch),
        (1, number, colours * patch * patch),
        (number, 2, colours, patch, patch),
        (number // (merge * merge), patch * merge, patch * merge, colours),
        (number // (merge * merge), 2, patch * merge, patch * merge, colours),
        (number, width),
    ):
        yield {name: maker.floats(*shape), **along}


def _whole(config: Any, names: tuple[str, ...], otherwise: int) -> int:
    for part in every_part(config):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[-1]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return otherwise
