"""Profile -> what `flopprof count` prints: modules, operators, totals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Literal

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.profile import PHASES, Attention, OperatorRow, Profile
from flopprof.report.facts import Facts, idle_experts
from flopprof.report.grid import Column, Grid
from flopprof.report.lines import lines_table
from flopprof.report.tree import Node, module_tree
from flopprof.units import common_step, format_fixed, format_flops, format_share, format_si, unit_name

By = Literal["module", "operator", "both", "line"]
Unit = Literal["flop", "mac"]

DEFAULT_DEPTH = 3
_UNIT_NAMES: dict[Unit, str] = {"flop": "FLOPs", "mac": "MACs"}
_OTHER: dict[Unit, Unit] = {"flop": "mac", "mac": "flop"}
_CONVENTION = "1 MAC = 1 multiply-add = 2 FLOPs"
_CONVENTIONS: dict[Attention, str] = {
    "full": "full: every query-key pair counted",
    "causal": "causal: only the query-key pairs that the mask lets through",
}


def render(
    profile: Profile,
    *,
    heading: str = "",
    depth: int = DEFAULT_DEPTH,
    by: By = "both",
    unit: Unit = "flop",
    sources: Mapping[str, str] | None = None,
    stored: Mapping[str, str] | None = None,
) -> RenderableType:
    """The whole report as one renderable; width, colour and file are its printer's.

    heading describes what was run (inputs, mode, device). depth: levels below the root. unit: `flop`, or `mac` for
    multiply-adds everywhere. sources: the text of source lines, for by="line".
    stored: labelled facts of the checkpoint that the model was built from.
    """
    view = _View(profile, unit, tuple(_phases(profile)))
    title = ", ".join(part for part in (profile.target, heading) if part)
    parts: list[RenderableType] = [Text(title, style="bold", overflow="fold"), Text()] if title else []
    if by in ("module", "both"):
        parts += [*_modules(view, depth), Text()]
    if by in ("operator", "both"):
        parts += [_operators(view), Text()]
    if by == "line":
        parts += [lines_table(profile, sources, unit=unit), Text()]
    parts.append(Facts([*_totals(view), *(stored or {}).items()]))
    return Group(*parts)


@dataclass(frozen=True)
class _View:
    """A profile, the unit it is shown in and the phases that it has."""

    profile: Profile
    unit: Unit
    phases: tuple[int, ...]

    def amount(self, flops: int) -> int:
        """FLOPs, or multiply-adds, as this view shows them."""
        return flops // 2 if self.unit == "mac" else flops

    def columns(self, largest: int) -> tuple[list[Column], Callable[[int], str]]:
        """One number column per phase, all in the unit that suits `largest`, and what prints a number of them."""
        step = common_step([self.amount(largest)])
        name = unit_name(step, _UNIT_NAMES[self.unit])
        columns = [Column(f"{PHASES[phase].capitalize()}\n{name}") for phase in self.phases]
        return columns, lambda flops: format_fixed(self.amount(flops), step)

    def total(self, flops: int, *, bound: bool) -> str:
        """`8.178 GFLOPs  (= 4.089 GMACs)`, after `>=` where something of it is uncounted."""
        sign = ">= " if bound else ""
        shown, other = format_flops(flops, self.unit), format_flops(flops, _OTHER[self.unit])
        return f"{sign}{shown}  (= {other})"


def _phases(profile: Profile) -> Iterator[int]:
    """Positions in PHASES of those that occur; forward always."""
    used = {row.phase for row in profile.operators if row.flops} | {row.phase for row in profile.uncounted_rows}
    return (i for i, phase in enumerate(PHASES) if phase == "forward" or phase in used)


# --- modules ------------------------------------------------------------------------------------
def _modules(view: _View, depth: int) -> Iterator[RenderableType]:
    root = module_tree(view.profile)
    shown = list(_visible(root, depth, 0))
    numbers, flops = view.columns(max(root.flops))
    params = common_step([root.parameters])
    columns = [
        Column("Module", number=False, elastic=True),
        Column("Class", number=False, elastic=True, optional=True),
        Column(f"Params\n{unit_name(params, '')}".rstrip()),
        Column("Output shape", optional=True),
        *numbers,
        Column("Share"),
    ]
    rows = []
    for level, label, node in shown:
        shape = "x".join(map(str, node.output_shape)) if node.output_shape is not None else ""
        cells = [_bounded(flops(node.flops[i]), bound=node.uncounted[i]) for i in view.phases]
        name = label or view.profile.target or node.cls or "(all)"
        share = format_share(node.total, root.total)
        rows.append(["  " * level + name, node.cls, format_fixed(node.parameters, params), shape, *cells, share])
    yield Grid(columns, rows)
    if any(node.repeats > 1 for _, _, node in shown):
        yield Facts([("", "(Nx): N identical modules in a row, their figures added up.")])


def _visible(node: Node, depth: int, level: int) -> Iterator[tuple[int, str, Node]]:
    """(level, label, node) of the rows to print; `(own)` is what a module does outside its children."""
    label = f"{node.name} ({node.repeats}x)" if node.repeats > 1 else node.name
    yield level, label, node
    if level >= depth or not node.children:
        return
    if any(node.own):
        silent = (False,) * len(PHASES)
        yield level + 1, "(own)", Node("(own)", "", node.calls, 0, None, node.own, node.own, silent)
    for child in node.children:
        yield from _visible(child, depth, level + 1)


def _bounded(text: str, *, bound: bool) -> str:
    if not bound:
        return text
    return ">=" + ("0" if text == "-" else text)


# --- operators ----------------------------------------------------------------------------------
def _operators(view: _View) -> RenderableType:
    profile = view.profile
    calls: dict[str, int] = {}
    for row in profile.operators:
        calls[row.op] = calls.get(row.op, 0) + row.calls
    tables = [profile.by_operator(PHASES[i]) for i in view.phases]
    numbers, flops = view.columns(max(profile.by_phase().values()))
    columns = [Column("Operator", number=False, elastic=True), Column("Calls"), *numbers, Column("Share")]
    rows = [
        [op, str(calls[op]), *(flops(table.get(op, 0)) for table in tables), format_share(sum_, profile.hardware_flops)]
        for op, sum_ in profile.by_operator().items()
    ]
    if not rows:
        return Text("No counted operator ran.")
    return Grid(columns, rows)


# --- totals -------------------------------------------------------------------------------------
def _totals(view: _View) -> Iterator[tuple[str, str]]:
    profile = view.profile
    holes = {row.phase for row in profile.uncounted_rows}
    yield "parameters", f"{profile.n_params:,}  ({format_si(profile.n_params)})"
    for i in view.phases:
        yield PHASES[i], view.total(profile.by_phase()[PHASES[i]], bound=PHASES[i] in holes)
    if len(view.phases) > 1:
        model = view.total(profile.model_flops, bound=bool(holes & {"forward", "backward"}))
        yield "model", f"{model}  forward + backward"
        yield "hardware", f"{view.total(profile.hardware_flops, bound=bool(holes))}  everything executed"
    if idle := idle_experts(profile):
        active = view.total(profile.active_flops, bound=bool(holes & {"forward", "backward"}))
        yield "active", f"{active}  {'forward + backward, ' if len(view.phases) > 1 else ''}{idle}"
    yield "elementwise", f"{format_si(profile.elementwise_flops, 'FLOPs')}  apart: in none of the numbers above"
    yield "convention", _CONVENTION
    yield from _attention(view)
    yield "device", f"{profile.device}, torch {profile.torch_version}" if profile.torch_version else profile.device
    yield from _routing(profile)
    yield from zip(chain(["assumed"], repeat("")), profile.assumptions, strict=False)
    if profile.uncounted_rows:
        yield "uncounted", "no formula for the operators below: what they do is in no number above (hence >=)"
        for op, number in profile.uncounted.items():
            reasons = dict.fromkeys(row.reason for row in profile.uncounted_rows if row.op == op and row.reason)
            calls = "1 call" if number == 1 else f"{number} calls"
            yield "", ": ".join([f"{op}, {calls}", *(["; ".join(reasons)] if reasons else [])])


def _routing(profile: Profile) -> Iterator[tuple[str, str]]:
    if profile.routing:
        fullest = max(profile.routing, key=lambda row: row.load)
        mean = sum(row.load for row in profile.routing) / len(profile.routing)
        among = f"; mean of {len(profile.routing)} routers {mean:.2f}" if len(profile.routing) > 1 else ""
        yield "expert load", f"max/mean {fullest.load:.2f} in {fullest.fqn or 'the root'}{among}"


def _attention(view: _View) -> Iterator[tuple[str, str]]:
    rows = [row for row in view.profile.operators if _is_attention(row)]
    yield "attention", f"counted as {_CONVENTIONS[view.profile.attention]}"
    if not rows:
        return
    full, causal = (view.profile.with_attention(kind).model_flops for kind in ("full", "causal"))
    unknown = sum(row.calls for row in rows if not row.mask_known)
    yield "", f"model with full attention {format_flops(full, view.unit)}, causal {format_flops(causal, view.unit)}"
    if unknown:
        yield (
            "",
            f"the mask is not known to {unknown} of {sum(row.calls for row in rows)} calls: causal equals full there",
        )


def _is_attention(row: OperatorRow) -> bool:
    return "attention" in row.op or row.mask_known or row.flops_full != row.flops_causal
