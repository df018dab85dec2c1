"""What a plan says: immutable, in plain units, as JSON too."""

from __future__ import annotations

import datetime
from typing import Literal

import msgspec

SCHEMA = "flopprof.plan/1"
Counting = Literal["6nd", "detailed"]


class Optimum(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters and tokens that make the best of a budget of FLOPs, by one reading of the scaling laws."""

    rule: str
    params: int
    tokens: int


class TrainingMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on the fullest device of a training run. Buffers, fragments and the framework's own come on top."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int | None
    logits_bytes: int | None
    total_bytes: int
    devices_per_replica: int
    data_parallel: int
    settings: str

    def fits(self, memory_bytes: int | None) -> bool | None:
        """Whether it is less than a device holds; None where that is not known."""
        return None if memory_bytes is None else self.total_bytes <= memory_bytes


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """One decoded token for each sequence of a batch, on `devices` devices that share the work evenly.

    compute_s, memory_s  at the peak, and at the full memory bandwidth; time_s: the longer one
    weight_bytes         read once for the whole batch (experts: those that some token visits)
    compute_bound_from   the smallest batch whose products take as long as its bytes; None: none does, or not known
    """

    batch: int
    context: int
    devices: int
    weight_bits: int
    flops_per_token: int
    weight_bytes: int
    resident_bytes: int
    cache_bytes_per_token: int | None
    bytes_per_step: int
    compute_s: float | None
    memory_s: float | None
    time_s: float | None
    bound: Literal["memory", "compute"] | None
    tokens_per_s: float | None
    usd_per_million_tokens: float | None
    joules_per_token: float | None
    compute_bound_from: int | None


class Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A published training run, and what its figures imply. params: those that a token visits.

    flops_per_s: model FLOP/s of each device, as its authors say or as 6 N D over the device-hours; utilisation: the
    share of the dense peak.
    """

    name: str
    params: int
    tokens: int
    device: str
    dtype: str
    source: str
    date: datetime.date
    flops_per_s: float
    utilisation: float
    device_hours: float | None = None
    devices: int | None = None
    usd_per_device_hour: float | None = None
    energy_kwh: float | None = None
    note: str = ""

    @property
    def flops(self) -> int:
        """6 N D."""
        return 6 * self.params * self.tokens


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A training run and a service: what was given, what follows, and what was assumed. None: not known.

    params, active_params   all, and those that a token visits (the N of 6 N D); counted_by says which FLOPs `flops` are
    peak_flops_per_s        dense, of one device in `dtype`. mfu: a fraction of it,
    assumed to be 1 where nothing tells it
    """

    given: tuple[str, ...]
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    model: str | None = None
    params: int | None = None
    active_params: int | None = None
    seq: int | None = None
    tokens: int | None = None
    flops: int | None = None
    flops_6nd: int | None = None
    flops_detailed: int | None = None
    counted_by: Counting = "6nd"
    hardware: str | None = None
    dtype: str | None = None
    peak_flops_per_s: int | None = None
    bytes_per_s: float | None = None
    device_memory_bytes: int | None = None
    peak_source: str = ""
    mfu: float | None = None
    mfu_assumed: bool = False
    devices: float | None = None
    days: float | None = None
    device_hours: float | None = None
    usd_per_device_hour: float | None = None
    cost_usd: float | None = None
    power_w: float | None = None
    power_is: Literal["TDP", "given"] | None = None
    pue: float = 1.0
    energy_j: float | None = None
    co2_kg: float | None = None
    optima: tuple[Optimum, ...] = ()
    memory: TrainingMemory | None = None
    serving: Serving | None = None
    schema: str = SCHEMA

    @property
    def device_days(self) -> float | None:
        """Days that one device would need."""
        return None if self.device_hours is None else self.device_hours / 24

    def to_json(self) -> str:
        """The whole plan as JSON, schema `flopprof.plan/1`."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()
