"""Many devices: what each rank of a run did, and the utilisation of all of them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from flopprof.errors import UsageError
from flopprof.meter.figures import Figures
from flopprof.meter.summary import Summary, format_time, laid_out, percent
from flopprof.units import format_flops, format_si

_NAMED = 8
_NO_MFU = "no MFU: "
_SHARED = (
    "not known: ranks share data (tensor or pipeline parallelism); meter.world(data_parallel=N) says how many read "
    "their own"
)


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank did; FLOPs are that rank's own (one multiply-add is 2).

    model_flops, hardware_flops   of all steps whose work is known
    timed         figures of the steps that are timed; None where there is none
    shared_data   its model is split in a way that makes ranks read the same data (tensor or pipeline parallelism)
    reason        why its MFU is not known
    """

    rank: int
    host: str = ""
    device: str = ""
    peak: str = ""
    steps: int = 0
    model_flops: int = 0
    hardware_flops: int = 0
    timed: Figures | None = None
    shared_data: bool = False
    reason: str = ""


class World(msgspec.Struct, frozen=True, kw_only=True):
    """All ranks of a run. Fractions are of the dense peaks of all devices; what is not known is None.

    data_parallel   how many ranks read data of their own; None: not known, and throughput is not told
    missing         ranks that nothing is known of
    """

    ranks: tuple[RankReport, ...]
    data_parallel: int | None
    missing: tuple[int, ...] = ()

    @property
    def model_flops(self) -> int:
        """Forward and backward of all ranks, in all steps whose work is known."""
        return sum(rank.model_flops for rank in self.ranks)

    @property
    def hardware_flops(self) -> int:
        """Everything that all ranks executed, in all steps whose work is known."""
        return sum(rank.hardware_flops for rank in self.ranks)

    @property
    def mfu(self) -> float | None:
        """Device-seconds that the model's FLOPs take at the peaks, over the device-seconds that passed."""
        return self._share([each.mfu for each in self._timed()])

    @property
    def hfu(self) -> float | None:
        """As mfu, of everything executed."""
        return self._share([each.hfu for each in self._timed()])

    @property
    def model_flops_per_s(self) -> float:
        """Model FLOP/s of all devices together."""
        return sum(each.model_flops_per_s for each in self._timed())

    @property
    def hardware_flops_per_s(self) -> float:
        """FLOP/s executed by all devices together."""
        return sum(each.hardware_flops_per_s for each in self._timed())

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of all ranks that read data of their own; None where it is not known which those are."""
        return self._throughput([each.tokens_per_s for each in self._timed()])

    @property
    def samples_per_s(self) -> float | None:
        """Samples per second, as tokens_per_s."""
        return self._throughput([each.samples_per_s for each in self._timed()])

    @property
    def slowest(self) -> RankReport | None:
        """The rank with the longest median step."""
        return max((rank for rank in self.ranks if rank.timed is not None), key=_median, default=None)

    @property
    def spread(self) -> float | None:
        """By what share the slowest rank's median step is longer than the fastest's."""
        medians = [each.step_time_s.median for each in self._timed()]
        return max(medians) / min(medians) - 1 if medians and min(medians) > 0 else None

    def _timed(self) -> list[Figures]:
        return [rank.timed for rank in self.ranks if rank.timed is not None]

    def _share(self, utilisations: Sequence[float | None]) -> float | None:
        """The mean over devices, each by the time it was at work."""
        times = [each.time_s for each in self._timed()]
        if not times or None in utilisations:
            return None
        return sum(u * t for u, t in zip(utilisations, times, strict=True) if u is not None) / sum(times)

    def _throughput(self, each: Sequence[float | None]) -> float | None:
        known = [value for value in each if value is not None]
        if self.data_parallel is None or not known:
            return None
        return sum(known) * self.data_parallel / len(self.ranks)

    def facts(self) -> list[tuple[str, str]]:
        """Labelled lines: what `print(meter.world())` shows."""
        lines = [("ranks", f"{len(self.ranks)}: {', '.join(_devices(self.ranks))}")]
        if self.missing:
            lines.append(("missing", f"nothing is known of rank {', '.join(map(str, self.missing))}"))
        flops = f"{format_flops(self.model_flops)} model, {format_flops(self.hardware_flops)} hardware"
        lines += [("FLOPs", f"{flops}, of all ranks and steps; a multiply-add is 2")]
        if not self._timed():
            return [
                *lines,
                ("note", "no step is timed yet: the first ones, and those that are counted, are in no figure."),
            ]
        reason = next((rank.reason for rank in self.ranks if rank.reason), "").removeprefix(_NO_MFU)
        lines += [
            ("MFU", percent(self.mfu) if self.mfu is not None else f"not known: {reason}"),
            ("HFU", percent(self.hfu)),
        ]
        lines.append(("rate", f"{format_si(self.model_flops_per_s, 'FLOP/s')} model, all devices together"))
        speeds = [
            format_si(value, f"{unit}/s")
            for value, unit in ((self.tokens_per_s, "tokens"), (self.samples_per_s, "samples"))
            if value is not None
        ]
        if speeds:
            lines.append(("throughput", ", ".join(speeds)))
        elif self.data_parallel is None:
            lines.append(("throughput", _SHARED))
        slowest, spread = self.slowest, self.spread
        if slowest is not None and spread is not None:
            longer = f"{percent(spread)} over the fastest" if len(self._timed()) > 1 else "the only one"
            lines.append(("slowest", f"rank {slowest.rank}, {format_time(_median(slowest))} a step, {longer}"))
        lines += [(f"rank {rank.rank}", _line(rank)) for rank in self._shown()]
        if len(self.ranks) > _NAMED:
            lines.append(("", f"and {len(self.ranks) - _NAMED} ranks more, none of them slower"))
        return lines

    def _shown(self) -> list[RankReport]:
        """All ranks where they are few, else the slowest."""
        if len(self.ranks) <= _NAMED:
            return list(self.ranks)
        return sorted(self.ranks, key=_median, reverse=True)[:_NAMED]

    def __str__(self) -> str:
        return laid_out(self.facts())


def rank_report(summary: Summary, *, rank: int, host: str = "", shared_data: bool = False) -> RankReport:
    """What a rank's own summary says."""
    model, hardware = (sum(row[which] for row in summary.flops.values()) for which in (0, 1))
    known = summary.whole is None or summary.whole.mfu is not None
    return RankReport(
        rank=rank,
        host=host,
        device=summary.device,
        peak=summary.peak,
        steps=summary.steps,
        model_flops=model,
        hardware_flops=hardware,
        timed=summary.whole,
        shared_data=shared_data,
        reason="" if known else next((note for note in summary.notes if note.startswith(_NO_MFU)), ""),
    )


def world_of(reports: Iterable[RankReport], *, size: int | None = None, data_parallel: int | None = None) -> World:
    """All ranks together. data_parallel None: every rank reads data of its own, unless a report says otherwise.

    Raises UsageError where data_parallel does not fit the number of ranks.
    """
    ranks = tuple(sorted(reports, key=lambda report: report.rank))
    size = len(ranks) if size is None else size
    if data_parallel is None:
        data_parallel = None if any(rank.shared_data for rank in ranks) else len(ranks)
    elif data_parallel < 1 or size % data_parallel:
        raise UsageError(f"data_parallel is {data_parallel}: give a divisor of the {size} ranks.")
    known = {rank.rank for rank in ranks}
    return World(ranks=ranks, data_parallel=data_parallel, missing=tuple(r for r in range(size) if r not in known))


def _median(rank: RankReport) -> float:
    return 0.0 if rank.timed is None else rank.timed.step_time_s.median


def _devices(ranks: Iterable[RankReport]) -> list[str]:
    """`2x NVIDIA H100 80GB HBM3`, each kind once."""
    kinds: dict[str, int] = {}
    for rank in ranks:
        name = rank.peak or rank.device or "unknown device"
        kinds[name] = kinds.get(name, 0) + 1
    return [f"{count}x {name}" for name, count in kinds.items()]


def _line(rank: RankReport) -> str:
    timed = rank.timed
    if timed is None:
        return f"{format_flops(rank.model_flops)} model, no step timed"
    per_step = format_flops(round(timed.model_flops / timed.steps))
    return f"{per_step} model a step, {format_time(timed.step_time_s.median)}, MFU {percent(timed.mfu)}"
