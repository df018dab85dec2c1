"""Crosscheck -> what `flopprof crosscheck` prints: every counter in one unit, then why they differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.crosscheck.result import Crosscheck, Gap, Reading
from flopprof.report.facts import Facts
from flopprof.report.grid import Column, Grid
from flopprof.report.lines import fold_alike
from flopprof.units import common_step, format_fixed, unit_name

_MACS = "MACs x 2"
_NAMED = 2


def render(result: Crosscheck) -> RenderableType:
    """The whole report as one renderable; width, colour and file are its printer's."""
    amounts = [
        flops
        for reading in result.readings
        for flops in (reading.forward_flops, reading.backward_flops)
        if flops is not None
    ]
    step = common_step(amounts)
    unit = unit_name(step, "FLOPs")
    recomputed = any(reading.recompute_flops for reading in result.readings)
    columns = [
        Column("Counter", number=False, elastic=True),
        Column(f"Forward\n{unit}"),
        *([Column(f"Backward\n{unit}")] if result.backward else []),
        *([Column(f"Recompute\n{unit}")] if recomputed else []),
        Column(f"Difference\n{unit}"),
    ]
    rows = [
        [
            f"{reading.counter} ({_MACS})" if reading.macs else reading.counter,
            _amount(reading.forward_flops, step),
            *([_amount(reading.backward_flops, step)] if result.backward else []),
            *([_amount(reading.recompute_flops, step)] if recomputed else []),
            _difference(reading, step),
        ]
        for reading in result.readings
    ]
    facts = [fact for reading in result.readings for fact in _facts(reading, step, unit)]
    parts: list[RenderableType] = [
        Text(f"{result.target}, {result.described}", style="bold", overflow="fold"),
        Text(),
        Grid(columns, rows),
        Text(),
        Facts([*facts, *_notes(result, recomputed=recomputed)]),
    ]
    return Group(*parts)


def _amount(flops: int | None, step: int) -> str:
    if flops is None:
        return ""
    return format_fixed(flops, step) if flops else "0"


def _difference(reading: Reading, step: int) -> str:
    if reading.difference is None:
        return ""
    return _signed(reading.difference, step) if reading.difference else "equal"


def _signed(flops: int, step: int) -> str:
    text = format_fixed(flops, step)
    return f"{'-' if flops < 0 else '+'}{text.removeprefix('-')}"


def _facts(reading: Reading, step: int, unit: str) -> Iterator[tuple[str, str]]:
    """Why a counter differs, operator by operator, or why it has no number; its name on the first line only."""
    sentences = [reading.absent] if reading.absent else []
    sentences += [_sentence(gap, step, unit) for gap in reading.gaps]
    if reading.unexplained:
        sentences.append(f"unexplained: {_signed(reading.unexplained, step)} {unit}")
    sentences += [f"assumed: {sentence}" for sentence in reading.assumptions]
    for i, sentence in enumerate(sentences):
        yield "" if i else reading.counter, sentence


def _sentence(gap: Gap, step: int, unit: str) -> str:
    amount = f"{format_fixed(abs(gap.flops), step)} {unit} {'missing' if gap.flops < 0 else 'too many'}"
    reason = gap.reason or f"counts {gap.operator} otherwise"
    if gap.multiples is not None:
        least, most = gap.multiples
        reason += f" (x{least})" if least == most else f" (x{least} to x{most})"
    side = " in backward" if gap.side == "backward" else ""
    return f"{reason}: {amount}{side}{_where(gap.modules)}"


def _where(modules: Sequence[str]) -> str:
    if not modules or modules == ("",):
        return ""
    names = fold_alike(modules)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f", in {', '.join(names[:_NAMED])}{more}"


def _notes(result: Crosscheck, *, recomputed: bool) -> Iterator[tuple[str, str]]:
    yield "unit", "1 MAC = 1 multiply-add = 2 FLOPs; flopprof counts attention in full"
    if recomputed:
        yield "recompute", "FlopCounterMode counts what is computed again as backward"
    if result.uncounted:
        yield "uncounted", f"by flopprof, for want of a formula: {', '.join(result.uncounted)}"
    agree = "agree, module by module" if result.agree else "DISAGREE"
    yield "flopprof", f"its engines {agree}"
    for found in result.disagreements:
        yield "", f"{found.module or '(root)'}, {found.side}: {found.engine} {found.flops:,}, count {found.expected:,}"
