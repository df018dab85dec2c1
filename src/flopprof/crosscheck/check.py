"""crosscheck(): our engines, FlopCounterMode, fvcore and torchvision's published figures on one workload."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import msgspec

from flopprof.crosscheck import flop_counter_mode, fvcore, published, reasons
from flopprof.crosscheck.cells import Place, Sheet, rows_by_place, sheet_of
from flopprof.crosscheck.gaps import gaps
from flopprof.crosscheck.result import Crosscheck, Disagreement, Gap, Reading
from flopprof.errors import FlopprofError, UsageError
from flopprof.models import Workload, vision
from flopprof.models.inputs import first_line
from flopprof.profile import OperatorRow, Profile

# fvcore multiplies for real: beyond these the answer is not worth the wait and the memory.
_MOST_PARAMETERS = 1_000_000_000
_MOST_FLOPS = 5_000_000_000_000

_LONGEST = 400  # characters of an error

Rows = Mapping[Place, Sequence[OperatorRow]]


def crosscheck(workload: Workload, *, backward: bool = False) -> Crosscheck:
    """Every counter's reading of the workload, each difference from flopprof's count explained by operator.

    A counter that fails has a reading that says why. Raises ModelFailed where flopprof itself cannot count it.
    """
    if workload.program is not None:
        raise UsageError(f"{workload.name} is one graph already: cross-check the model that it was exported from.")
    profile = workload.count(backward=backward, fold=False)
    if profile.device == "cpu" and workload.device == "meta" and workload.on_cpu is not None:
        workload = workload.on_cpu()  # it needed values; so will the others
    counted = Reading(
        counter="flopprof count",
        own=True,
        forward_flops=profile.forward_flops,
        backward_flops=profile.backward_flops if backward else None,
        recompute_flops=profile.recompute_flops if backward else None,
        difference=0,
        assumptions=profile.assumptions,
    )
    readings = [counted]
    disagreements: list[Disagreement] = []
    engines: dict[str, Callable[..., Profile]] = {
        "flopprof trace, fx": partial(workload.trace, engine="fx"),
        "flopprof trace, export": partial(workload.trace, engine="export"),
    }
    if profile.device == "meta":
        engines = {"flopprof count, blocks folded": workload.count, **engines}
    for name, engine in engines.items():
        reading, differing = _engine(name, engine, profile, backward=backward)
        readings.append(reading)
        disagreements += differing
    readings += [_flop_counter_mode(workload, profile, backward=backward), _fvcore(workload, profile)]
    if vision.knows(workload.name):
        readings.append(_published(workload, profile))
    return Crosscheck(
        target=workload.name,
        described=f"{workload.describe()}, {profile.device}",
        backward=backward,
        readings=tuple(readings),
        disagreements=tuple(disagreements),
        uncounted=profile.uncounted,
    )


# --- our own ------------------------------------------------------------------------------------
def _engine(
    name: str, engine: Callable[..., Profile], expected: Profile, *, backward: bool
) -> tuple[Reading, list[Disagreement]]:
    try:
        profile = engine(backward=backward)
    except (Exception, SystemExit) as error:  # what an engine cannot do must not keep the others from being compared
        return Reading(counter=name, own=True, absent=_said(error)), []
    theirs, ours = sheet_of(profile, backward=backward), rows_by_place(expected, backward=backward, recompute=False)
    reading = msgspec.structs.replace(
        _compared(name, theirs, ours, theirs.total()),
        own=True,
        forward_flops=profile.forward_flops,
        backward_flops=profile.backward_flops if backward else None,
        assumptions=tuple(sentence for sentence in profile.assumptions if sentence not in expected.assumptions),
    )
    return reading, list(_disagreements(name, theirs, ours))


def _disagreements(engine: str, theirs: Sheet, ours: Rows) -> Iterator[Disagreement]:
    for place in dict.fromkeys([*ours, *theirs.counts]):
        flops = sum(theirs.counts.get(place, {}).values())
        expected = sum(row.flops for row in ours.get(place, ()))
        if flops != expected:
            yield Disagreement(module=place[0], side=place[1], engine=engine, flops=flops, expected=expected)


# --- others -------------------------------------------------------------------------------------
def _flop_counter_mode(workload: Workload, profile: Profile, *, backward: bool) -> Reading:
    name = reasons.FLOP_COUNTER_MODE
    try:
        forward, behind = flop_counter_mode.totals(workload, backward=backward)
        sheet = flop_counter_mode.sheet(workload, backward=backward)
    except (Exception, SystemExit) as error:  # whatever another tool raises is that tool's answer
        return Reading(counter=name, absent=_said(error))
    ours = rows_by_place(profile, backward=backward, recompute=True)
    reading = _compared(name, sheet, ours, forward + (behind or 0))
    return msgspec.structs.replace(reading, forward_flops=forward, backward_flops=behind)


def _fvcore(workload: Workload, profile: Profile) -> Reading:
    name = reasons.FVCORE
    if importlib.util.find_spec("fvcore") is None:
        return Reading(counter=name, macs=True, absent="not installed: pip install fvcore")
    if profile.n_params > _MOST_PARAMETERS or profile.forward_flops > _MOST_FLOPS:
        return Reading(counter=name, macs=True, absent="it computes for real, and this model is too large for that")
    try:
        if workload.device == "meta":
            if workload.on_cpu is None:
                return Reading(counter=name, macs=True, absent="it computes for real: leave --device out, or say cpu")
            workload = workload.on_cpu()
        sheet = fvcore.sheet(workload)
    except (Exception, SystemExit) as error:  # as above
        return Reading(counter=name, macs=True, absent=_said(error))
    ours = rows_by_place(profile, backward=False, recompute=False)
    reading = _compared(name, sheet, ours, sheet.total())
    return msgspec.structs.replace(reading, macs=True, forward_flops=sheet.total())


def _published(workload: Workload, profile: Profile) -> Reading:
    name = "torchvision _ops"
    try:
        flops = published.published_flops(workload)
    except LookupError as error:
        return Reading(counter=name, macs=True, absent=str(error))
    difference = flops - profile.forward_flops
    rounding = published.is_rounding(difference)
    gap = Gap(operator="", side="forward", flops=difference, reason=published.ROUNDING)
    return Reading(
        counter=name,
        macs=True,
        forward_flops=flops,
        difference=difference,
        gaps=(gap,) if rounding and difference else (),
        unexplained=0 if rounding else difference,
    )


def _compared(counter: str, theirs: Sheet, ours: Rows, total: int) -> Reading:
    """The difference, its parts, and what of the counter's total none of its operators holds."""
    found = gaps(counter, theirs, ours)
    difference = total - sum(row.flops for rows in ours.values() for row in rows)
    return Reading(
        counter=counter, difference=difference, gaps=found, unexplained=difference - sum(gap.flops for gap in found)
    )


def _said(error: BaseException) -> str:
    """An error in one line, of a length that one reads."""
    text = first_line(error) if isinstance(error, FlopprofError) else f"{type(error).__name__}: {first_line(error)}"
    return textwrap.shorten(text, _LONGEST, placeholder=" ...")
