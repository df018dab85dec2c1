"""What a meter says at the end: figures of the whole loop and of its last steps, and everything that was left out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import msgspec

from flopprof.errors import UsageError
from flopprof.meter.figures import Figures
from flopprof.profile import Attention
from flopprof.units import format_bytes, format_flops, format_si

_COLUMNS = 80
# Rows that a meter and its report fill themselves. (evaluation and data_wait are told of from outside, too.)
_OWN = ("steps", "slow_steps", "left_out", "repeated", "down", "other")


class Convention(msgspec.Struct, frozen=True, kw_only=True):
    """What a script that follows a published convention prints of the same steps; reason: why it cannot.

    peak_flops_per_s: what that script divides by.
    """

    name: str
    flops_per_s: float | None = None
    mfu: float | None = None
    peak_flops_per_s: float | None = None
    reason: str = ""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A loop so far. Times in seconds; what is not known is None, and `notes` says why.

    peaks           by rate, that the steps are held against; peaks_differ: not all of them against the same
    whole, window   figures of all timed steps, of the latest ones
    steps           finished ones; left_out tells how many of them are in no figure, by reason
    signatures      distinct steps; counted_steps of all were counted as they ran
    rows            where the time went: step, data_wait, evaluation, each pause by its name, left_out
    """

    device: str
    peak: str
    peaks: dict[str, float]
    peak_measured: bool = False
    peaks_differ: bool = False
    attention: Attention = "full"
    steps: int
    counted_steps: int
    signatures: int
    left_out: dict[str, int]
    flops: dict[str, tuple[int, int]]
    uncounted: dict[str, int]
    tokens: int
    samples: int
    optimizer_steps: int
    whole: Figures | None
    window: Figures | None
    rows: dict[str, float]
    peak_memory_bytes: int | None = None
    energy_j: float | None = None
    joules_per_token: float | None = None
    convention: Convention | None = None
    notes: tuple[str, ...] = ()

    def facts(self) -> list[tuple[str, str]]:
        """Labelled lines: what `print(meter.summary())` shows."""
        lines = [("steps", self._steps())]
        whole = self.whole
        if whole is not None:
            against = self._against()
            lines += [
                ("MFU", f"{percent(whole.mfu)} of {against}" if whole.mfu is not None else "not known"),
                ("HFU", percent(whole.hfu)),
                ("MBU", f"{percent(whole.mbu)} (operands and results of counted operators, each once)")
                if whole.mbu is not None
                else ("", ""),
                ("model", f"{format_si(whole.model_flops_per_s, 'FLOP/s')}: {_per_step(whole.model_flops, whole)}"),
                ("hardware", f"{format_si(whole.hardware_flops_per_s, 'FLOP/s')}: "
                             f"{_per_step(whole.hardware_flops, whole)}"),
                ("", f"a multiply-add is 2 FLOPs; attention {self.attention}"),
                ("step time", _times(whole)),
            ]  # fmt: skip
            speeds = [
                f"{format_si(value, f'{unit}/s')}"
                for value, unit in (
                    (whole.tokens_per_s, "tokens"),
                    (whole.effective_tokens_per_s, "tokens without padding"),
                    (whole.samples_per_s, "samples"),
                )
                if value is not None
            ]
            if speeds:
                lines.append(("throughput", ", ".join(speeds)))
            if self.window is not None and self.window.steps < whole.steps:
                recent = f"last {self.window.steps} steps"
                lines.append((recent, f"MFU {percent(self.window.mfu)}, {_times(self.window)}"))
        lines += [
            ("time", ", ".join(f"{name.replace('_', ' ')} {seconds:.3f} s" for name, seconds in self.rows.items()))
        ]
        if self.peak_memory_bytes is not None:
            lines.append(("peak memory", format_bytes(self.peak_memory_bytes)))
        if self.energy_j is not None:
            each = f", {self.joules_per_token:.4g} J per token" if self.joules_per_token is not None else ""
            lines.append(("energy", f"{format_si(self.energy_j, 'J')}{each}"))
        if self.convention is not None:
            lines.append((self.convention.name, _convention(self.convention)))
        if self.uncounted:
            named = ", ".join(f"{op} x{calls}" for op, calls in self.uncounted.items())
            lines.append(("uncounted", f"{named}: FLOPs are at least what is said here"))
        lines += [("note", note) for note in self.notes]
        return [line for line in lines if line[1]]

    def __str__(self) -> str:
        return laid_out(self.facts())

    def _steps(self) -> str:
        timed = self.whole.steps if self.whole is not None else 0
        out = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"{self.steps}, of which {timed} {'is' if timed == 1 else 'are'} timed" + (
            f" (left out: {out})" if out else ""
        )

    def _against(self) -> str:
        peaks = "peaks that differ" if self.peaks_differ else format_peaks(self.peaks)
        return f"{peaks} ({self.peak})"


def checked_name(name: str) -> str:
    """The name of a pause. Raises UsageError for a row of the meter's own, or none at all."""
    if not isinstance(name, str) or not name.strip() or row_of(name) != name:
        own = ", ".join(_OWN)
        raise UsageError(f"a pause cannot be named {name!r}: give it a name that is no row of the meter's own ({own}).")
    return name


def row_of(name: str) -> str:
    """The row of a pause: its name, unless a file was written with a name that is a row of the meter's own."""
    return f"{name} (pause)" if name.strip().replace(" ", "_") in _OWN else name


def laid_out(facts: Sequence[tuple[str, str]]) -> str:
    """Labels in one column, the text beside them in lines of at most 80 characters."""
    width = max(len(label) for label, _ in facts) + 2
    lines = []
    for label, text in facts:
        wrapped = textwrap.wrap(text, _COLUMNS - width, break_long_words=False, break_on_hyphens=False)
        lines += [
            f"{start:<{width}}{line}" for start, line in zip([label, *[""] * len(wrapped)], wrapped, strict=False)
        ]
    return "\n".join(lines)


def format_peaks(peaks: Mapping[str, float]) -> str:
    """`989.4 TFLOP/s bfloat16, 66.90 TFLOP/s float32`."""
    return ", ".join(f"{format_si(value, 'FLOP/s')} {rate}" for rate, value in peaks.items())


def percent(value: float | None) -> str:
    """`41.2 %`; `-` where it is not known."""
    return "-" if value is None else f"{100 * value:.1f} %"


def most_used(of: Figures) -> float:
    """The greater of MFU and HFU; 0 where they are not known. More than 1 cannot be."""
    return max((value for value in (of.mfu, of.hfu) if value is not None), default=0.0)


def over_peak(whole: Figures, window: Figures | None = None) -> Sequence[str]:
    """A warning where more was achieved than there is, in all or in the latest steps, naming the likely causes."""
    where = []
    if most_used(whole) > 1:
        where.append(f"{percent(most_used(whole))} of the peak")
    if window is not None and window.steps < whole.steps and most_used(window) > 1:
        where.append(f"{percent(most_used(window))} of the peak in the last {window.steps} steps")
    if not where:
        return ()
    return (
        f"{' and '.join(where)} cannot be: the peak given is too low (another device or dtype, tf32 set, "
        "sparsity), the time is too short (work that is not waited for, a clock of its own), or a step does less than "
        "its signature says (data-dependent branches).",
    )


def _per_step(flops: int, whole: Figures) -> str:
    return f"{format_flops(round(flops / whole.steps))} per step"


def _times(whole: Figures) -> str:
    time = whole.step_time_s
    return (
        f"{format_time(time.median)} (median; 10 % {format_time(time.p10)}, 90 % {format_time(time.p90)}, "
        f"99 % {format_time(time.p99)})"
    )


def format_time(seconds: float) -> str:
    """`12.34 ms`."""
    for scale, unit in ((1e6, "us"), (1e3, "ms")):
        text = f"{scale * seconds:.1f}" if unit == "us" else f"{scale * seconds:.2f}"
        if float(text) < 1000:
            return f"{text} {unit}"
    return f"{seconds:.3f} s"


def _convention(convention: Convention) -> str:
    if convention.flops_per_s is None:
        return f"not known: {convention.reason}"
    text = f"{format_si(convention.flops_per_s, 'FLOP/s')}"
    if convention.mfu is not None and convention.peak_flops_per_s is not None:
        text += f", MFU {percent(convention.mfu)} of {format_si(convention.peak_flops_per_s, 'FLOP/s')}"
    return f"{text} by its formula" + (f" ({convention.reason})" if convention.reason else "")
