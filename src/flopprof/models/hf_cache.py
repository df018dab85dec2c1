"""What a generating model keeps between tokens: the tensors of its cache, of which kind each is, and what a token adds.

Nothing is known of a cache's class: it is searched for tensors, and what one more token does to them tells the kind.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Kind = Literal["attention", "latent", "sliding window", "indexer", "cross-attention", "convolution state", "state"]
KINDS: tuple[Kind, ...] = (
    "attention",
    "latent",
    "sliding window",
    "indexer",
    "cross-attention",
    "convolution state",
    "state",
)

# Under these names a model's output holds what its next call is to be given.
CACHES = ("past_key_values", "cache_params", "state", "mems")
_DEEPEST = 8
_MODULE = "module"


@dataclass(frozen=True)
class Held:
    """One tensor of a cache: where it hangs, what it takes, and the window of the layer that holds it.

    n_bytes: of its elements; storage: of the memory that they lie in, which may hold more (`owner` tells which).
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int
    storage: int
    owner: int
    window: int | None = None
    identity: tuple[int, int] = (0, 0)
    tensor: Any = field(default=None, repr=False, compare=False)  # alive, so that its identity stays its own


@dataclass(frozen=True)
class Kept:
    """One tensor of a cache before a step, and what that step did to it.

    n_bytes      that the step found, and reads
    per_token    bytes that one more token adds; 0 where it takes the place of an older one, or of a state
    written      bytes that the step writes: one token's entry, or the whole of a state
    """

    kind: Kind
    path: tuple[str, ...]
    dtype: str
    n_bytes: int
    per_token: int
    written: int


def cache_in(output: Any) -> tuple[str, Any] | None:
    """(name of the argument, cache) of a model's output; None where it keeps nothing."""
    for name in CACHES:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if found is not None and any(True for _ in held(found)):
            return name, found
    return None


def held(cache: Any) -> Iterator[Held]:
    """Every tensor of a cache that holds numbers of the model's, each once."""
    seen: set[int] = set()
    yield from _held(cache, (), None, seen)


def _held(value: Any, path: tuple[str, ...], window: int | None, seen: set[int]) -> Iterator[Held]:
    if isinstance(value, torch.Tensor):
        if id(value) not in seen and value.dim() and value.numel() and not isinstance(value, torch.nn.Parameter):
            seen.add(id(value))
            storage = value.untyped_storage()
            yield Held(
                path=path,
                shape=tuple(value.shape),
                dtype=str(value.dtype).removeprefix("torch."),
                n_bytes=value.numel() * value.element_size(),
                storage=storage.nbytes(),
                owner=storage._cdata,
                window=window,
                identity=(id(value), value._version),
                tensor=value,
            )
        return
    if len(path) > _DEEPEST or isinstance(value, str | int | float | type | torch.nn.Module) or value is None:
        return
    if id(value) in seen:
        return
    items: Any = None
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif hasattr(value, "__dict__") and not hasattr(value, "to_dict"):  # a config has that, and holds no cache
        items = vars(value).items()
        reach = getattr(value, "sliding_window", None)
        window = reach if isinstance(reach, int) and getattr(value, "is_sliding", True) else None
    if items is not None:
        seen.add(id(value))
        for name, item in list(items):
            yield from _held(item, (*path, str(name)), window, seen)


def held_by_modules(model: torch.nn.Module, before: Mapping[tuple[str, ...], int]) -> Iterator[Held]:
    """Floating tensors that modules hold as plain attributes, as some keep their states; none that was there before."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                for item in _held(value, (_MODULE, name, attribute), None, set()):
                    if before.get(item.path) != item.identity[0]:
                        yield item


def layers_of(cache: Any) -> tuple[str, ...]:
    """Qualified names of the classes of a cache's layers, each once; `""` for a cache that is not made of layers."""
    inner = [getattr(cache, f"{part}_attention_cache", None) for part in ("self", "cross")]
    found: dict[str, None] = {}
    for part in [item for item in inner if item is not None] or [cache]:
        for layer in getattr(part, "layers", None) or [None]:
            found["" if layer is None else f"{type(layer).__module__}.{type(layer).__qualname__}"] = None
    return tuple(found)


def allocated(cache: Any) -> int:
    """Bytes of the memory in which the tensors of a cache lie, each storage once."""
    return sum({item.owner: item.storage for item in held(cache)}.values())


def changed(before: list[Held], after: list[Held], latent: frozenset[int]) -> tuple[Kept, ...]:
    """What one step did to each tensor that it found; latent: widths that a compressed entry of a token can have."""
    later = {item.path: item for item in after}
    return tuple(
        _changed(item, later.get(item.path), latent)
        for item in before
        if item.path[0] != _MODULE or _is_state(item, later.get(item.path))
    )


def _is_state(item: Held, later: Held | None) -> bool:
    """Is what a module holds a state: another after the step, of the same shape? Else it is what a call left behind."""
    return later is not None and later.shape == item.shape and later.identity != item.identity


def _changed(item: Held, later: Held | None, latent: frozenset[int]) -> Kept:
    axis = _axis(item, later)
    entry = 0 if axis is None else item.n_bytes // item.shape[axis]
    grown = 0
    if later is not None and axis is not None:
        grown = entry * max(later.shape[axis] - item.shape[axis], 0)
    width = 0 if axis is None else math.prod(item.shape) // item.shape[axis] // item.shape[0]
    kind = _kind(item, grown=grown > 0, latent=width in latent)
    written = 0
    if kind in ("convolution state", "state"):
        written = 0 if later is not None and later.identity == item.identity else item.n_bytes
    elif kind != "cross-attention":
        written = grown or entry
    return Kept(kind, item.path, item.dtype, item.n_bytes, grown, written)


def _axis(item: Held, later: Held | None) -> int | None:
    """The dimension that counts tokens: the one that has grown, or that of a window."""
    if later is not None and len(later.shape) == len(item.shape):
        grown = [i for i, (old, new) in enumerate(zip(item.shape, later.shape, strict=True)) if new > old]
        if len(grown) == 1:
            return grown[0]
    return len(item.shape) - 2 if item.window is not None and len(item.shape) > 2 else None


def _kind(item: Held, *, grown: bool, latent: bool) -> Kind:
    names = [name.lower() for name in item.path]
    last = next((name for name in reversed(names) if not name.isdigit()), "")
    if any("cross" in name for name in names):
        return "cross-attention"
    if "conv" in last:
        return "convolution state"
    if "index" in last:
        return "indexer"
    if item.window is not None and last in ("keys", "values"):
        return "sliding window"
    if grown:
        return "latent" if latent else "attention"
    return "state"


# Layers of transformers' own of which it is known what n more tokens make of them. A class that is derived from one of
# these may keep something else.
_GROWING = frozenset({"DynamicLayer", "LinearAttentionAndFullAttentionLayer"})
_SLIDING = frozenset({"DynamicSlidingWindowLayer", "LinearAttentionAndSlidingWindowAttentionLayer"})
_RECURRENT = "LinearAttention"


def known(cache: Any) -> bool:
    """Is it transformers' own, of layers of which it is known what more tokens make of them?"""
    if _own(cache, {"EncoderDecoderCache"}):
        return known(cache.self_attention_cache) and _own(cache.cross_attention_cache, {"DynamicCache"})
    layers = getattr(cache, "layers", None)
    if not _own(cache, {"DynamicCache"}) or not isinstance(layers, list):
        return False
    return all(_own(layer, {*_GROWING, *_SLIDING, "LinearAttentionLayer", "DummyLayer"}) for layer in layers)


def recurrent(cache: Any) -> bool:
    """Do some of its layers keep a state of one size however long the text is?"""
    return any(_RECURRENT in type(layer).__name__ for layer in getattr(cache, "layers", None) or ())


def lengthen(cache: Any, tokens: int) -> None:
    """Make a known cache what it would be after so many more tokens of text: empty keys and values, longer."""
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        name, keys = type(layer).__name__, getattr(layer, "keys", None)
        if name in _SLIDING:
            layer.cumulative_length += tokens
        if name not in _GROWING | _SLIDING or not isinstance(keys, torch.Tensor):
            continue
        most = layer.sliding_window - 1 if name in _SLIDING else None
        layer.keys, layer.values = (_longer(tensor, tokens, most) for tensor in (keys, layer.values))


def _longer(tensor: torch.Tensor, tokens: int, most: int | None) -> torch.Tensor:
    length = tensor.shape[-2] + tokens
    return tensor.new_empty((*tensor.shape[:-2], length if most is None else min(length, most), tensor.shape[-1]))


def _own(value: Any, names: Collection[str]) -> bool:
    return type(value).__module__ == "transformers.cache_utils" and type(value).__name__ in names
