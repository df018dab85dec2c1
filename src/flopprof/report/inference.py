"""What generating text takes, printed: where FLOPs and bytes go, the cache, and what a device allows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.inference.result import Bounds, Inference
from flopprof.profile import Profile
from flopprof.report.facts import Facts
from flopprof.report.grid import Column, Grid
from flopprof.units import common_step, format_fixed, format_flops, format_share, format_si, unit_name

_CONVENTION = "1 MAC = 1 multiply-add = 2 FLOPs"
_PAIRS = {
    "full": "full: every query-key pair counted",
    "causal": "causal: only the query-key pairs that the mask lets through",
}
_BYTES = "weights, rows looked up and the cache, each as often as it is used; no activations"


def render(found: Inference) -> RenderableType:
    """The whole report as one renderable; width, colour and file are its printer's."""
    parts: list[RenderableType] = [Text(heading(found), style="bold", overflow="fold"), Text()]
    if found.mode != "prefill":
        parts += [_step(found), Text()]
    parts += [_cache(found), Text(), Facts(list(facts(found)))]
    return Group(*parts)


def heading(found: Inference) -> str:
    """Model, mode, sizes, dtype and device in one line."""
    sizes = [f"batch {found.batch}"]
    if found.prompt is not None:
        sizes.append(f"{'source' if found.paired else 'prompt'} {found.prompt}")
    if found.mode == "decode":
        sizes.append(f"context {found.context}")
    if found.new_tokens is not None:
        sizes.append(f"new {found.new_tokens}")
    return ", ".join([found.target, found.mode, *sizes, found.dtype, found.device])


# --- a step -------------------------------------------------------------------------------------
def _step(found: Inference) -> RenderableType:
    """FLOPs and bytes of the (first) decoding step, by what is multiplied and moved."""
    profile, traffic = found.decode, found.traffic
    if profile is None or traffic is None:
        return Text("One step cannot be told apart into weights and cache.")
    weights, others = _multiplied(profile)
    shares = [(share, round(share.expected(found.batch))) for share in traffic.routed]
    routed = [(found.batch * share.flops, share, some) for share, some in shares]
    rows = [("weights", weights - sum(part for part, _, _ in routed), traffic.weight_bytes)]
    rows += [(f"experts, {share.chosen} of {share.experts} a token", part, some) for part, share, some in routed]
    rows += [
        ("rows looked up", 0, found.batch * traffic.row_bytes),
        ("cache, read", others, found.batch * traffic.cache_read_bytes),
        ("cache, written", 0, found.batch * traffic.cache_written_bytes),
    ]
    flops, moved = weights + others, sum(some for _, _, some in rows)
    steps = common_step([flops]), common_step([moved])
    first = f"First step, after {found.context} {'token' if found.context == 1 else 'tokens'}"
    title = "One step" if found.mode == "decode" else first
    columns = [
        Column(title, number=False, elastic=True),
        Column(f"FLOPs\n{unit_name(steps[0], 'FLOPs')}"),
        Column("Share"),
        Column(f"Bytes\n{unit_name(steps[1], 'B')}"),
        Column("Share"),
    ]
    cells = [
        [
            name,
            format_fixed(part, steps[0]),
            format_share(part, flops) if part else "",
            format_fixed(some, steps[1]),
            format_share(some, moved) if some else "",
        ]
        for name, part, some in rows
    ]
    total = ["total", format_fixed(flops, steps[0]), "", format_fixed(moved, steps[1]), ""]
    return Grid(columns, [*cells, total])


def _multiplied(profile: Profile) -> tuple[int, int]:
    """FLOPs (of products with parameters, of those between activations)."""
    whole = profile.forward_flops
    weights = sum(row.flops for row in profile.operators if row.parameter)
    return weights, whole - weights


# --- the cache ----------------------------------------------------------------------------------
def _cache(found: Inference) -> RenderableType:
    cache = found.cache
    step = common_step([part.bytes for part in cache.parts])
    columns = [
        Column("Cache of a sequence", number=False, elastic=True),
        Column("Type", number=False, optional=True),
        Column("Tensors", optional=True),
        Column(f"Bytes\n{unit_name(step, 'B')}"),
        Column("Per token\nB"),
    ]
    rows = [
        [part.kind, part.dtype, str(part.tensors), format_fixed(part.bytes, step), f"{part.bytes_per_token:,}"]
        for part in cache.parts
    ]
    tensors = sum(part.tensors for part in cache.parts)
    total = ["total", "", str(tensors), format_fixed(cache.bytes, step), f"{cache.bytes_per_token:,}"]
    return Grid(columns, [*rows, total] if len(rows) > 1 else rows)


# --- facts --------------------------------------------------------------------------------------
def facts(found: Inference) -> Iterator[tuple[str, str]]:
    """Labelled sentences."""
    yield from _flops(found)
    yield "bytes", f"{format_si(found.bytes_moved, 'B')}: {_BYTES}"
    yield "intensity", f"{found.intensity:.4g} FLOPs per byte"
    yield "weights", f"{format_si(found.weight_bytes, 'B')} in memory"
    yield from _kept(found)
    if found.bounds is not None:
        yield from _bounds(found, found.bounds)
    yield "counted", _counted(found)
    yield "convention", _CONVENTION
    yield "attention", _PAIRS[found.attention]
    yield from zip(chain(["assumed"], repeat("")), found.notes, strict=False)
    uncounted = _uncounted(found)
    if uncounted:
        named = ", ".join(f"{op} ({calls} {'call' if calls == 1 else 'calls'})" for op, calls in uncounted.items())
        yield "uncounted", f"no formula for {named}: what they do is in no number above (hence >=)"


def _flops(found: Inference) -> Iterator[tuple[str, str]]:
    sign = ">= " if _uncounted(found) else ""
    whole = f"{sign}{format_flops(found.flops)}  (= {format_flops(found.flops, 'mac')})"
    each = f"{sign}{format_si(found.flops_per_token, 'FLOPs')}"
    per = {"decode": "token", "generate": "new token", "prefill": "source token" if found.paired else "prompt token"}
    if found.mode == "prefill" and found.paired and found.prompt is None:
        yield "FLOPs", f"{whole}; {each} per sample"
        return
    yield "FLOPs", f"{whole}; {each} per {per[found.mode]}"
    if found.mode == "generate" and found.prefill is not None:
        yield "", f"of the prefill {format_flops(found.prefill.forward_flops)}"
        if found.steps is not None:
            yield "", f"of {found.steps.number} steps {format_flops(found.steps.flops)}; {_how(found)}"


def _how(found: Inference) -> str:
    steps = found.steps
    if steps is None or steps.counted >= steps.number:
        return "each was run"
    return f"{steps.counted} were run, the others lie on lines that those prove"


def _kept(found: Inference) -> Iterator[tuple[str, str]]:
    cache = found.cache
    tokens = f"{cache.tokens} {'token' if cache.tokens == 1 else 'tokens'}"
    where = f"after {tokens} of the decoder" if found.paired else f"after {tokens}"
    yield "cache", f"{format_si(found.cache_bytes, 'B')} for the batch {where} ({cache.cls})"
    if cache.allocated_bytes is not None and cache.allocated_bytes > cache.bytes:
        yield (
            "",
            f"a prefill that long leaves {format_si(found.batch * cache.allocated_bytes, 'B')} allocated until the "
            "next step: what lies before a window is let go only then",
        )
    if cache.latent_bytes is not None:
        yield "", f"compressed it would be {format_si(found.batch * cache.latent_bytes, 'B')}: this code expands it"
    elif any(part.kind == "latent" for part in cache.parts):
        yield "", "latent: this code keeps the compressed entries, and expands all of them at every step"


def _bounds(found: Inference, bounds: Bounds) -> Iterator[tuple[str, str]]:
    peak, rate = format_si(bounds.flops_per_s, "FLOP/s"), format_si(bounds.bytes_per_s, "B/s")
    yield "device", f"{bounds.device}, {bounds.dtype}: {peak} dense, {rate}, {bounds.ridge:.1f} FLOPs per byte"
    sides = {"memory": bounds.memory_s, "compute": bounds.compute_s}
    yield "at best", f"{_seconds(bounds.time_s)}, {format_si(bounds.tokens_per_s, 'tokens/s')}"
    yield (
        "bound by",
        f"{bounds.bound}: bytes alone {_seconds(sides['memory'])}, FLOPs alone {_seconds(sides['compute'])}",
    )
    if found.mode != "prefill" and found.traffic is not None:
        if bounds.compute_bound_from is None:
            yield (
                "crossing",
                f"never: at this context no batch gets above {bounds.most_intensity:.4g} FLOPs per byte, "
                f"and the device needs {bounds.ridge:.4g}",
            )
        else:
            yield "crossing", f"from batch {bounds.compute_bound_from:,} on FLOPs take as long as bytes"
    if bounds.largest_batch is not None and bounds.memory_bytes is not None:
        memory = format_si(bounds.memory_bytes, "B")
        if bounds.largest_batch:
            caches = "cache fits" if bounds.largest_batch == 1 else "caches fit"
            yield "memory", f"{bounds.largest_batch:,} such {caches} in {memory} beside the weights, activations apart"
        else:
            yield "memory", f"the weights and one such cache do not fit in {memory}"


def _counted(found: Inference) -> str:
    logits = "the last position's logits" if found.logits == "last" else "every position's logits, as this code does"
    start = "the encoder and the decoder's first token" if found.paired else f"the whole prompt, {logits}"
    where = "the decoder's cache" if found.paired else "the cache"
    if found.mode == "prefill":
        return f"{start}, filling the cache; it gives the first new token"
    if found.mode == "decode":
        return f"one new token of each sequence, after {found.context} in {where}"
    new = found.new_tokens or 1
    rest = f"then {new - 1} steps of one token after {found.context} to {(found.context or 0) + new - 2} in {where}"
    return f"{start}, which gives the first new token; {rest}" if new > 1 else f"{start}, which gives the new token"


def _uncounted(found: Inference) -> dict[str, int]:
    profiles = [profile for profile in (found.prefill, found.decode) if profile is not None]
    return {op: calls for profile in profiles for op, calls in profile.uncounted.items()}


def _seconds(value: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1 or unit == "µs":
            return f"{value * factor:.4g} {unit}"
    raise AssertionError
