"""What a measurement found: shapes, their times, and the peak that they show. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from flopprof.hardware.table import Peak

Shape = tuple[int, int, int]  # (m, k, n) of (m, k) @ (k, n)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One shape: the median of its repetitions in seconds, and half of them lie within q1_s and q3_s."""

    shape: Shape
    repetitions: int
    median_s: float
    q1_s: float
    q3_s: float

    @property
    def flops(self) -> int:
        """2 m k n."""
        m, k, n = self.shape
        return 2 * m * k * n

    @property
    def flops_per_s(self) -> float:
        """FLOP/s of the median repetition."""
        return self.flops / self.median_s

    @property
    def spread(self) -> float:
        """Interquartile range over the median: 0.02 says that half of the runs lie within 2 %."""
        return (self.q3_s - self.q1_s) / self.median_s


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one device reached in one dtype, shape by shape, in the order in which they ran."""

    device: str
    dtype: str
    timings: tuple[Timing, ...]
    torch_version: str
    threads: int | None
    date: str

    @property
    def best(self) -> Timing:
        """The shape with the highest FLOP/s."""
        return max(self.timings, key=lambda timing: timing.flops_per_s)

    @property
    def peak(self) -> Peak:
        """The best shape as a Peak, labelled as measured."""
        best = self.best
        threads = "" if self.threads is None else f", {self.threads} threads"
        return Peak(
            device=self.device,
            dtype=self.dtype,
            flops_per_s=round(best.flops_per_s),
            measured=True,
            source=f"measured: {' x '.join(map(str, best.shape))}, median of {best.repetitions} runs, "
            f"torch {self.torch_version}{threads}",
            date=self.date,
        )
