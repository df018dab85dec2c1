"""What a device allows at best: times at its peaks, the batch where FLOPs take as long as bytes, the largest batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from msgspec.structs import replace

from flopprof.errors import UsageError
from flopprof.inference.result import Bounds, Inference
from flopprof.inference.traffic import Traffic


@dataclass(frozen=True)
class Rates:
    """A device of the table by its name, or two rates that were given, and how much memory there is."""

    name: str | None
    flops_per_s: Fraction | None = None
    bytes_per_s: Fraction | None = None
    memory_bytes: int | None = None

    @classmethod
    def read(
        cls,
        hardware: str | None,
        flops_per_s: float | None = None,
        bytes_per_s: float | None = None,
        memory_bytes: int | None = None,
    ) -> Rates | None:
        """None where nothing was asked. Raises UsageError for half a device, UnknownDevice for an unknown one."""
        given = (flops_per_s, bytes_per_s)
        if hardware is not None:
            if given != (None, None):
                raise UsageError("a device was named and rates were given: leave one of them out.")
            from flopprof.hardware import device

            device(hardware)
            return cls(hardware, memory_bytes=memory_bytes)
        if given == (None, None):
            return None
        if flops_per_s is None or bytes_per_s is None or flops_per_s <= 0 or bytes_per_s <= 0:
            raise UsageError("bounds need both flops_per_s and bytes_per_s, each more than 0.")
        return cls(None, Fraction(flops_per_s), Fraction(bytes_per_s), memory_bytes)

    def of(self, dtype: str) -> tuple[str, Fraction, Fraction, int | None]:
        """(name, FLOP/s, bytes/s, bytes of memory) for products in this type. Raises NoPeak, UsageError."""
        if self.flops_per_s is not None and self.bytes_per_s is not None:
            return "rates as given", self.flops_per_s, self.bytes_per_s, self.memory_bytes
        from flopprof.hardware import device

        peak = device(self.name).peak(dtype)
        if peak.bytes_per_s is None:
            raise UsageError(f"the bandwidth of {peak.device} is not known: give bytes_per_s and flops_per_s instead.")
        memory = peak.memory_bytes if self.memory_bytes is None else self.memory_bytes
        return peak.device, Fraction(peak.flops_per_s), Fraction(peak.bytes_per_s), memory


def bounded(found: Inference, rates: Rates | None, each: Sequence[tuple[int, Fraction]], traffic: Traffic) -> Inference:
    """With the device's bounds, if one was asked for. each: (FLOPs, bytes) of what runs one after the other."""
    if rates is None:
        return found
    name, flops_per_s, bytes_per_s, memory = rates.of(found.dtype)
    times = [(flops / flops_per_s, moved / bytes_per_s) for flops, moved in each]
    time_s = sum(max(pair) for pair in times)
    decoding = found.mode != "prefill" and found.traffic is not None
    limit = traffic.most_intensity
    return replace(
        found,
        bounds=Bounds(
            device=name,
            dtype=found.dtype,
            flops_per_s=float(flops_per_s),
            bytes_per_s=float(bytes_per_s),
            memory_bytes=memory,
            compute_s=float(sum(compute for compute, _ in times)),
            memory_s=float(sum(moving for _, moving in times)),
            time_s=float(time_s),
            tokens_per_s=float(found.tokens / time_s),
            compute_bound_from=traffic.compute_bound_from(flops_per_s, bytes_per_s) if decoding else None,
            most_intensity=float(limit) if decoding and limit is not None else None,
            largest_batch=None if memory is None else _largest(found, memory),
        ),
    )


def _largest(found: Inference, memory: int) -> int:
    """Sequences whose caches, one token longer, fit beside the weights."""
    each = found.cache.bytes + found.cache.bytes_per_token
    return max(0, memory - found.weight_bytes) // each
