"""From what is given, the whole plan."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from flopprof.analytic import TransformerShape
from flopprof.errors import UsageError
from flopprof.hardware import Device, device
from flopprof.hardware.table import canonical
from flopprof.plan.memory import Layout, training_memory
from flopprof.plan.optima import TOKENS_PER_PARAM, optima
from flopprof.plan.relations import solve
from flopprof.plan.result import Counting, Plan
from flopprof.plan.serving import Service, serve
from flopprof.plan.sizes import Sizes, of_name, of_numbers, of_shape

_HOUR_S = 3600


def plan(
    model: str | None = None,
    *,
    params: int | None = None,
    active_params: int | None = None,
    shape: TransformerShape | Mapping[str, Any] | None = None,
    seq: int | None = None,
    tokens: int | None = None,
    flops: int | None = None,
    count_by: Counting | None = None,
    hardware: str | None = None,
    dtype: str | None = None,
    peak: float | None = None,
    bandwidth: float | None = None,
    mfu: float | None = None,
    devices: int | None = None,
    days: float | None = None,
    device_hours: float | None = None,
    price: float | None = None,
    cost: float | None = None,
    power_w: float | None = None,
    pue: float = 1.0,
    co2_kg_per_kwh: float | None = None,
    layout: Layout | None = None,
    service: Service | None = None,
) -> Plan:
    """What follows from the figures that are given. Needs no torch.

    model           a name of the catalogue; or params (active_params: those that a token visits); or a shape
    tokens          that it is trained on. flops: of the whole training
    count_by        "6nd": 6 x active parameters x tokens; "detailed": three forwards, attention over every pair
                    included. None: detailed where the shape is known
    hardware        a device of `flopprof peaks`, in `dtype` (None: bfloat16, else float16); or peak in FLOP/s of a
                    device and bandwidth in bytes/s, which also go before the table's
    mfu             a fraction; None where it cannot follow: 1, and the plan says so
    price           USD a device-hour. cost: USD in all
    power_w         of a device, measured; None: its TDP. pue: of the building
    layout          of training memory; service: of serving

    Raises UsageError where figures contradict each other or nothing follows, UnknownDevice, NoPeak.
    """
    sizes = _sizes(model, params, active_params, shape, seq)
    given = {
        "tokens": tokens,
        "flops": flops,
        "mfu": mfu,
        "devices": devices,
        "days": days,
        "device_hours": device_hours,
        "usd_per_device_hour": price,
        "cost_usd": cost,
    }
    for name, value in (*given.items(), ("peak", peak), ("bandwidth", bandwidth), ("power_w", power_w)):
        if value is not None and not 0 < value < inf:
            raise UsageError(f"{name} must be positive, got {value:g}.")
    if mfu is not None and mfu > 1:
        raise UsageError(f"mfu is a fraction of the peak, at most 1, got {mfu:g}: write 40 % as 0.4.")
    if not 1 <= pue < inf:
        raise UsageError(f"pue is at least 1, and finite (all power over that of the devices), got {pue:g}.")
    if co2_kg_per_kwh is not None and not 0 <= co2_kg_per_kwh < inf:
        raise UsageError(f"co2 is in kg a kWh, a number that is not negative, got {co2_kg_per_kwh:g}.")
    asked = {"model": model, "params": params, "shape": shape, "hardware": hardware, "peak": peak, **given}
    row = None if hardware is None else device(hardware)
    table = None if row is None else row.peak(dtype)
    rate = round(peak) if peak is not None else None if table is None else table.flops_per_s
    bytes_per_s = bandwidth if bandwidth is not None else None if table is None else table.bytes_per_s
    assumptions: list[str] = [sizes.assumption] if sizes is not None and sizes.assumption else []
    if row is not None and row.per != "torch device":
        assumptions.append(f"a device of {row.name} is one {row.per}")
    known = {name: value for name, value in given.items() if value is not None}
    if rate is not None:
        known["peak_flops_per_s"] = rate
    counting: Counting = count_by or ("detailed" if sizes and sizes.forward_per_token else "6nd")
    known |= _flops_per_token(sizes, counting)
    found = _complete(known, assumptions)
    if not found.keys() & {"flops", "device_hours", "days", "cost_usd"} and sizes is None:
        raise UsageError(
            "nothing follows from that: give a model (a name, params or a shape) and tokens, or flops, or a device "
            "with devices and days, device_hours or a cost at a price."
        )
    if sizes is None and "active_params" in found:
        sizes = of_numbers(max(1, round(found["active_params"])), None, seq)
    hours = found.get("device_hours")
    watts, power_is = _power(row, power_w)
    energy = None if hours is None or watts is None else hours * _HOUR_S * watts * pue
    all_tokens = _whole(found.get("tokens"))
    flops = _whole(found.get("flops"))
    return Plan(
        given=tuple(name for name, value in asked.items() if value is not None),
        assumptions=tuple(assumptions),
        warnings=_warnings(found.get("mfu")),
        model=None if sizes is None else sizes.name,
        params=None if sizes is None else sizes.params,
        active_params=None if sizes is None else sizes.active,
        seq=None if sizes is None or sizes.forward_per_token is None else sizes.seq,
        tokens=all_tokens,
        flops=flops,
        flops_6nd=None if sizes is None or all_tokens is None else 6 * sizes.active * all_tokens,
        flops_detailed=(
            None
            if sizes is None or all_tokens is None or sizes.forward_per_token is None
            else 3 * sizes.forward_per_token * all_tokens
        ),
        counted_by=counting,
        hardware=None if row is None else row.name,
        dtype=canonical(dtype) if table is None and dtype else None if table is None else table.dtype,
        peak_flops_per_s=rate,
        bytes_per_s=bytes_per_s,
        device_memory_bytes=None if row is None else row.memory_bytes,
        peak_source="as given" if peak is not None else "" if table is None else table.source,
        mfu=found.get("mfu"),
        mfu_assumed=any(text.startswith("MFU") for text in assumptions),
        devices=found.get("devices"),
        days=found.get("days"),
        device_hours=hours,
        usd_per_device_hour=found.get("usd_per_device_hour"),
        cost_usd=found.get("cost_usd"),
        power_w=watts,
        power_is=power_is,
        pue=pue,
        energy_j=energy,
        co2_kg=None if energy is None or co2_kg_per_kwh is None else energy / 3.6e6 * co2_kg_per_kwh,
        optima=() if flops is None else optima(flops),
        memory=None if sizes is None else training_memory(sizes, layout or Layout(), devices),
        serving=(
            None
            if sizes is None or not sizes.decodes
            else serve(
                sizes,
                service or Service(),
                peak_flops_per_s=rate,
                bytes_per_s=bytes_per_s,
                usd_per_device_hour=found.get("usd_per_device_hour"),
                watts=None if watts is None else watts * pue,
            )
        ),
    )


def _sizes(
    model: str | None,
    params: int | None,
    active: int | None,
    shape: TransformerShape | Mapping[str, Any] | None,
    seq: int | None,
) -> Sizes | None:
    if seq is not None and seq < 1:
        raise UsageError(f"seq must be 1 or more, got {seq}.")
    if model is not None:
        if params is not None or shape is not None or active is not None:
            raise UsageError(f"{model!r} says how large it is: leave params, active params and shape out.")
        return of_name(model, seq)
    if shape is not None:
        if active is not None:
            raise UsageError("a shape says which parameters are active: leave active params out.")
        return of_shape(shape, seq, params)
    if params is None:
        if active is not None:
            raise UsageError("active params need params too: all of them.")
        return None
    return of_numbers(params, active, seq)


def _flops_per_token(sizes: Sizes | None, counting: Counting) -> dict[str, float]:
    if counting not in ("6nd", "detailed"):
        raise UsageError(f"FLOPs are counted by 6nd or detailed, got {counting!r}.")
    if counting == "6nd":
        return {} if sizes is None else {"active_params": sizes.active}
    if sizes is None or sizes.forward_per_token is None:
        raise UsageError("the detailed form needs a model's name or shape: parameters alone give 6nd.")
    return {"flops_per_token": 3 * sizes.forward_per_token}


def _complete(known: dict[str, float], assumptions: list[str]) -> dict[str, float]:
    """What follows, with the two assumptions that are made where nothing else can tell."""
    found = solve(known)
    if "mfu" not in found and "peak_flops_per_s" in found and {"flops", "device_hours"} & found.keys():
        assumptions.append("MFU 100 %: none was given or follows; real runs reach 30-60 %, so take this as the least")
        found = solve(known | {"mfu": 1.0})
    if "flops" in found and not {"tokens", "active_params", "flops_per_token"} & found.keys():
        assumptions.append(f"{TOKENS_PER_PARAM} tokens a parameter (Chinchilla): neither model nor tokens were given")
        found = solve(known | found | {"active_params": optima(round(found["flops"]))[0].params})
    return found


def _power(row: Device | None, watts: float | None) -> tuple[float | None, Any]:  # Any: "TDP" or "given" or None
    if watts is not None:
        return watts, "given"
    if row is None or row.tdp_w is None:
        return None, None
    return row.tdp_w, "TDP"


def _warnings(mfu: float | None) -> tuple[str, ...]:
    if mfu is None or mfu <= 1:
        return ()
    return (
        f"MFU {mfu:.0%} is more than the peak allows: these device-hours cannot hold these FLOPs. Likely causes: "
        "another dtype than the run's, a count of other FLOPs than it did, device-hours that are not all of them.",
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
