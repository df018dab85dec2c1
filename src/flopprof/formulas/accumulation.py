"""Elementwise costs of scattered additions and of distances: indices decide how much is added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flopprof.formulas.shaped import Shaped


def scatter(_x: Any, _dim: int, index: Shaped, _src: Any, *, reduce: str | None = None, **_: Any) -> int:
    """1 per index where values are combined (`reduce`), 0 where they are stored."""
    return 0 if reduce is None else index.numel()


def scatter_add(_x: Any, _dim: int, index: Shaped, *_: Any, **__: Any) -> int:
    """1 per index."""
    return index.numel()


def index_add(_x: Any, _dim: int, _index: Any, source: Shaped, *, alpha: object = 1, **_: Any) -> int:
    """x[index] + alpha source: 1 per element of source, 2 where alpha is not 1."""
    return (1 + (alpha != 1)) * source.numel()


def index_reduce(_x: Any, _dim: int, _index: Any, source: Shaped, *_: Any, **__: Any) -> int:
    """1 per element of source."""
    return source.numel()


def index_put(_x: Any, _indices: Any, values: Shaped, accumulate: bool = False, *_: Any, **__: Any) -> int:
    """1 per value where values accumulate, 0 where they are stored."""
    return values.numel() if accumulate else 0


def masked_index_put(_x: Any, _mask: Any, _indices: Any, values: Shaped, **_: Any) -> int:
    """1 per value."""
    return values.numel()


def bincount(x: Shaped, weights: Any = None, *_: Any, **__: Any) -> int:
    """1 per weight; counting alone is free."""
    return 0 if weights is None else x.numel()


def embedding_bag(
    weight: Shaped,
    indices: Shaped,
    _offsets: Any,
    _scale_grad_by_freq: bool = False,
    _mode: int = 0,
    _sparse: bool = False,
    per_sample_weights: Any = None,
    *_: Any,
    **__: Any,
) -> int:
    """Sum, mean or max of rows: 1 per element gathered, 2 with weights; the mean's division is once a bag."""
    return (1 + (per_sample_weights is not None)) * indices.numel() * weight.shape[-1]


def embedding_bag_backward(grad: Shaped, indices: Shaped, *_: Any, **__: Any) -> int:
    """1 per index and column."""
    return indices.numel() * grad.shape[-1]


def embedding_bag_weights_backward(_grad: Any, weight: Shaped, indices: Shaped, *_: Any, **__: Any) -> int:
    """A row of grad times a row of weight: 2 per index and column."""
    return 2 * indices.numel() * weight.shape[-1]


def embedding_renorm(weight: Shaped, indices: Shaped, *_: Any, **__: Any) -> int:
    """Norm 2 and scale 1 per index and column."""
    return 3 * indices.numel() * weight.shape[-1]


def distance(a: Shaped, _b: Any = None, *_: Any, out: Shaped, **__: Any) -> int:
    """|a - b|^p summed over columns: 3 per pair and column."""
    return 3 * out.numel() * a.shape[-1]


def cdist_backward(grad: Shaped, a: Shaped, *_: Any, **__: Any) -> int:
    """g (a - b) / d added up: 4 per pair and column."""
    return 4 * grad.numel() * a.shape[-1]


COSTS: dict[str, Callable[..., int]] = {
    "aten::scatter": scatter,
    "aten::scatter_add": scatter_add,
    "aten::scatter_reduce": scatter_add,
    "aten::index_add": index_add,
    "aten::index_reduce": index_reduce,
    "aten::index_put": index_put,
    "aten::_index_put_impl": index_put,
    "aten::_unsafe_index_put": index_put,
    "aten::_unsafe_masked_index_put_accumulate": masked_index_put,
    "aten::bincount": bincount,
    "aten::_embedding_bag": embedding_bag,
    "aten::_embedding_bag_forward_only": embedding_bag,
    "aten::_embedding_bag_backward": embedding_bag_backward,
    "aten::_embedding_bag_dense_backward": embedding_bag_backward,
    "aten::_embedding_bag_per_sample_weights_backward": embedding_bag_weights_backward,
    "aten::embedding_renorm": embedding_renorm,
    "aten::put": index_put,
    "aten::_cdist_forward": distance,
    "aten::_pdist_forward": distance,
    "aten::_cdist_backward": cdist_backward,
    "aten::_pdist_backward": cdist_backward,
}
