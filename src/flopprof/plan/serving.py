"""Decoding with a model: FLOPs and bytes of a token, what bounds its time, tokens a second and what a million costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flopprof.analytic import TransformerShape
from flopprof.errors import UsageError
from flopprof.plan.result import Serving
from flopprof.plan.sizes import Sizes

_MILLION = 10**6
_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Service:
    """What is served: a batch of sequences of `context` tokens so far, weights of so many bits, so many devices."""

    batch: int = 1
    context: int | None = None
    weight_bits: int = 16
    cache_bits: int = 16
    devices: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "weight_bits", "cache_bits", "devices"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.context is not None and self.context < 0:
            raise UsageError(f"context must be 0 or more, got {self.context}.")


def serve(
    sizes: Sizes,
    service: Service,
    *,
    peak_flops_per_s: float | None,
    bytes_per_s: float | None,
    usd_per_device_hour: float | None,
    watts: float | None,
) -> Serving:
    """One step of decoding at the device's rates, which nothing reaches. watts: of one device, PUE included.

    FLOPs of a token: 2 N (active parameters), or, of a known shape, those of its products and its attention to the
    context. Bytes of a step: the weights once, and every sequence's keys and values.
    """
    context = sizes.seq if service.context is None else service.context
    flops = flops_per_token(sizes, context)
    read = _visited(sizes, service.batch) * service.weight_bits // _BITS
    resident = sizes.params * service.weight_bits // _BITS
    cache = None if sizes.shape is None else cache_bytes_per_token(sizes.shape, service.cache_bits)
    moved = read + service.batch * context * (cache or 0)
    compute = memory = time = rate = None
    if peak_flops_per_s:
        compute = service.batch * flops / peak_flops_per_s / service.devices
    if bytes_per_s:
        memory = moved / bytes_per_s / service.devices
    if compute is not None and memory is not None:
        time = max(compute, memory)
        rate = service.batch / time
    seconds = None if rate is None else service.devices / rate  # of one device, per token
    return Serving(
        batch=service.batch,
        context=context,
        devices=service.devices,
        weight_bits=service.weight_bits,
        flops_per_token=flops,
        weight_bytes=read,
        resident_bytes=resident,
        cache_bytes_per_token=cache,
        bytes_per_step=moved,
        compute_s=compute,
        memory_s=memory,
        time_s=time,
        bound=None if compute is None or memory is None else "memory" if memory > compute else "compute",
        tokens_per_s=rate,
        usd_per_million_tokens=(
            None if seconds is None or usd_per_device_hour is None else usd_per_device_hour / 3600 * seconds * _MILLION
        ),
        joules_per_token=None if seconds is None or watts is None else watts * seconds,
        compute_bound_from=_compute_bound_from(sizes, service, context, cache, flops, peak_flops_per_s, bytes_per_s),
    )


def flops_per_token(sizes: Sizes, context: int) -> int:
    """FLOPs of one decoded token after `context` others, itself included in what it attends to."""
    shape = sizes.shape
    if shape is None:
        return 2 * sizes.active
    attended = 2 * shape.layers * shape.heads * (shape.d_head + shape.d_head_value) * (context + 1)
    return 2 * (shape.n_params_active - looked_up(shape)) + attended


def looked_up(shape: TransformerShape) -> int:
    """Parameters of which a token reads one row, and multiplies none."""
    return (shape.positions + (0 if shape.tied else shape.vocab)) * shape.d_embedding


def cache_bytes_per_token(shape: TransformerShape, bits: int = 16) -> int | None:
    """Keys and values of one token in all layers; None for attention in a latent space, whose cache is another."""
    if shape.attention_parameters is not None:
        return None
    return shape.layers * shape.kv_heads * (shape.d_head + shape.d_head_value) * bits // _BITS


def _visited(sizes: Sizes, batch: int) -> int:
    """Parameters that a step reads: of experts, those that some token of the batch is expected to visit.

    Even routing: each of E experts stays unread with probability (1 - k / E)^batch. Without a shape, no two tokens are
    taken to share an expert.
    """
    idle = sizes.params - sizes.active
    shape = sizes.shape
    always = sizes.active - (looked_up(shape) if shape is not None else 0)
    if not idle or batch == 1:
        return always
    if shape is None or not shape.experts:
        return min(sizes.params, sizes.active * batch)
    first = shape.experts_per_token / shape.experts
    share = 1 - (1 - first) ** batch
    return always + math.ceil(idle * (share - first) / (1 - first))


def _compute_bound_from(
    sizes: Sizes,
    service: Service,
    context: int,
    cache: int | None,
    flops: int,
    peak: float | None,
    rate: float | None,
) -> int | None:
    """The smallest batch whose products take as long as its bytes; dense models only, whose weights are all read."""
    if not peak or not rate or sizes.active != sizes.params:
        return None
    weights = _visited(sizes, 1) * service.weight_bits // _BITS / rate
    gained = flops / peak - context * (cache or 0) / rate  # a sequence more: its products, less its cache
    return math.ceil(weights / gained) if gained > 0 else None
