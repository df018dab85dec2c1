"""Comparison -> what `flopprof compare` prints: what models compute, hold and take, and how to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.compare.comparison import Comparison, Row
from flopprof.report.facts import Facts
from flopprof.report.grid import Column, Grid
from flopprof.units import common_step, format_fixed, format_si, unit_name

UNKNOWN = "n/a"
_NAMED = 4
_DIGITS = 4
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_SIZES = (("stored", "Stored"), ("float32", "fp32"), ("bfloat16", "bf16"), ("int8", "int8"), ("int4", "int4"))


@dataclass(frozen=True)
class Table:
    """One table of the report: its columns, the first of which names the model, and a row of cells for each."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Figure:
    """A column to be: head, unit under it, and the cell of each row."""

    column: Column
    cells: Sequence[str]


def render(comparison: Comparison) -> RenderableType:
    """The whole report as one renderable; width, colour and file are its printer's."""
    parts: list[RenderableType] = []
    for table in tables(comparison):
        parts += [Text(table.title, style="bold", overflow="fold"), Grid(table.columns, table.rows), Text()]
    return Group(*parts, Facts(list(facts(comparison))))


def tables(comparison: Comparison) -> Iterator[Table]:
    """What models compute, what they hold, and how fast they can be and are."""
    rows = [row for row in comparison.rows if not row.failed]
    if not rows:
        return
    same = inputs_of(rows)
    yield _table(f"Compute{f': {same}' if same else ''}", rows, list(_compute(comparison, rows, same=bool(same))))
    if any(row.memory is not None or row.size_bytes for row in rows):
        yield _table("Memory in training, and size on disk", rows, list(_memory(comparison, rows)))
    yield _table("Traffic and time of a forward", rows, list(_time(comparison, rows)))


def inputs_of(rows: Sequence[Row]) -> str:
    """What all rows ran on, where that is one thing; else nothing."""
    seen = {row.inputs for row in rows}
    return seen.pop() if len(seen) == 1 else ""


def _table(title: str, rows: Sequence[Row], figures: Sequence[_Figure]) -> Table:
    columns = [Column("Model", number=False, elastic=True), *(figure.column for figure in figures)]
    cells = [[row.name, *(figure.cells[i] for figure in figures)] for i, row in enumerate(rows)]
    return Table(title, columns, cells)


def _compute(comparison: Comparison, rows: Sequence[Row], *, same: bool) -> Iterator[_Figure]:
    bounds = [">=" if row.uncounted else "" for row in rows]
    if not same:
        yield _Figure(Column("Input", number=False, elastic=True), [_shapes(row) for row in rows])
    yield _counts("Params", "", [row.n_params for row in rows])
    yield _counts("Forward", "FLOPs", [row.forward_flops for row in rows], bounds)
    yield _ratios(comparison, "flops", rows)
    if any(row.density is not None and row.density.share < 1 for row in rows):
        yield _counts("Sparse", "FLOPs", [row.sparse_forward_flops for row in rows], bounds)
        yield _Figure(Column("Density\n%"), [_percent(row) for row in rows])
    yield _counts("Training", "FLOPs", [row.training_flops for row in rows], bounds)
    if any(row.accuracy is not None for row in rows):
        front = comparison.pareto()
        yield _Figure(Column("Accuracy"), [_accuracy(row, on_front=row.name in front) for row in rows])
    yield _counts("Elementwise", "FLOPs", [row.elementwise_flops for row in rows], optional=True)
    yield _counts("Forward", "MACs", [row.macs for row in rows], bounds, optional=True)


def _memory(comparison: Comparison, rows: Sequence[Row]) -> Iterator[_Figure]:
    held = [row.memory for row in rows]
    yield _counts("Activations", "B", [None if memory is None else memory.activations for memory in held])
    yield _counts("Peak", "B", [None if memory is None else memory.peak for memory in held])
    yield _ratios(comparison, "memory", rows)
    apart = _far_apart(size for row in rows for size in row.size_bytes.values())
    step = common_step(size for row in rows for size in row.size_bytes.values())
    spell: Callable[[int], str] = partial(format_fixed, step=step)
    if apart:
        spell = partial(format_si, unit="B", digits=_DIGITS)
    for key, head in _SIZES:
        cells = [spell(row.size_bytes[key]) if key in row.size_bytes else UNKNOWN for row in rows]
        shown = head if apart else f"{head}\n{unit_name(step, 'B')}"
        yield _Figure(Column(shown, optional=key == "float32"), cells)


def _time(comparison: Comparison, rows: Sequence[Row]) -> Iterator[_Figure]:
    yield _counts("Moved", "B", [row.bytes_moved for row in rows])
    intensity = [row.arithmetic_intensity for row in rows]
    yield _Figure(Column("Intensity\nFLOPs/B"), [UNKNOWN if each is None else f"{each:.1f}" for each in intensity])
    if comparison.hardware:
        yield _seconds("Ideal", [None if row.ideal is None else row.ideal.seconds for row in rows])
        yield _Figure(Column("Bound", number=False), ["" if row.ideal is None else row.ideal.bound for row in rows])
        yield _ratios(comparison, "ideal", rows)
    if any(row.latency is not None for row in rows):
        found = [row.latency for row in rows]
        yield _seconds("Median", [None if latency is None else latency.median_s for latency in found])
        yield _seconds("p95", [None if latency is None else latency.p95_s for latency in found])
        yield _ratios(comparison, "latency", rows)
        rates = [None if latency is None else latency.samples_per_s for latency in found]
        yield _Figure(Column("Samples\nper s"), [UNKNOWN if rate is None else f"{rate:.4g}" for rate in rates])


def _counts(
    head: str, unit: str, values: Sequence[int | None], bounds: Sequence[str] = (), *, optional: bool = False
) -> _Figure:
    """A column of integers in one unit, or each in its own where they lie too far apart; `bounds`: before each."""
    signs = bounds or [""] * len(values)
    found = [value for value in values if value is not None]
    step = common_step(found)
    spell: Callable[[int], str] = partial(format_fixed, step=step)
    if _far_apart(found):
        spell, unit, step = partial(format_si, unit=unit, digits=_DIGITS), "", 0
    cells = [UNKNOWN if value is None else sign + spell(value) for sign, value in zip(signs, values, strict=True)]
    return _Figure(Column(f"{head}\n{unit_name(step, unit)}".rstrip(), optional=optional), cells)


def _far_apart(values: Iterable[int]) -> bool:
    """Whether the least of them would keep fewer than three digits in the unit of the largest."""
    found = [abs(value) for value in values if value]
    return bool(found) and 10 * min(found) < 1000 ** common_step(found)


def _ratios(comparison: Comparison, figure: str, rows: Sequence[Row]) -> _Figure:
    ratios = comparison.ratios(figure)
    return _Figure(Column("Ratio"), [spell_ratio(ratios[row.name]) for row in rows])


def spell_ratio(ratio: float | None) -> str:
    """`2.25x`, three significant digits; `n/a` where there is none."""
    if ratio is None:
        return UNKNOWN
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def _seconds(head: str, values: Sequence[float | None]) -> _Figure:
    """A column of times in the unit that suits the longest of them."""
    longest = max((value for value in values if value is not None), default=1.0)
    scale, unit = next(((scale, unit) for scale, unit in _TIMES if longest >= scale), _TIMES[-1])
    cells = [UNKNOWN if value is None else f"{value / scale:.3f}" for value in values]
    return _Figure(Column(f"{head}\n{unit}"), cells)


def _accuracy(row: Row, *, on_front: bool) -> str:
    return f"{UNKNOWN}  " if row.accuracy is None else f"{row.accuracy.value:g} {'*' if on_front else ' '}"


def _percent(row: Row) -> str:
    return UNKNOWN if row.density is None else f"{100 * row.density.share:.1f}"


def _shapes(row: Row) -> str:
    """What it ran on, without its mode and the dtype that it computes in: `1x3x224x224`."""
    shapes, _, mode = row.inputs.removeprefix("input ").rpartition(", ")
    shown = shapes or mode
    return shown.replace(f" {row.dtype}", "") if row.dtype else shown


# --- how to read it -----------------------------------------------------------------------------
def facts(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Conventions of every figure shown, and what is to be known of single models."""
    rows = [row for row in comparison.rows if not row.failed]
    if len(rows) > 1:
        yield "ratio", f"to {comparison.reference}"
    if rows:
        yield (
            "forward",
            "1 multiply-add = 2 FLOPs; of one forward of the input; elementwise FLOPs are apart, in no other",
        )
    if any(row.training_flops is not None for row in rows):
        yield "training", "forward + backward of the sum of the outputs; what is recomputed is not in it"
    if any(row.density is not None and row.density.share < 1 for row in rows):
        yield (
            "sparse",
            "forward FLOPs if the weights' zeros were skipped; density: multiplied weights that are not zero",
        )
    yield from _accuracies(comparison, rows)
    if any(row.memory is not None for row in rows):
        yield "activations", "what autograd keeps for the backward; fused attention as its kernels keep it, no scores"
        yield "peak", "activations + weights + gradients + two AdamW states of each parameter that trains"
    if any(row.size_bytes for row in rows):
        yield "stored", "parameters and persistent buffers, tied ones once; of a checkpoint, its files"
        yield (
            "int8, int4",
            "multiplied weights, with a 16-bit scale a row, or for each 128 of a row; the rest 16 bit",
        )
    if rows:
        yield "moved", "by counted operators: each operand read once, each result written once"
    if rows and comparison.hardware:
        yield "ideal", f"{comparison.hardware}: the longer of FLOPs / dense peak of the dtype and bytes / bandwidth"
    for device in dict.fromkeys(row.latency.device for row in rows if row.latency is not None):
        least = min(row.latency.runs for row in rows if row.latency is not None and row.latency.device == device)
        yield "measured", f"forward without gradients on {device}; {least} runs or more of each"
    yield from _modes(rows)
    dtypes = _by_value(rows, lambda row: [row.dtype] if row.dtype else [])
    if len(dtypes) > 1:
        for number, (dtype, names) in enumerate(dtypes.items()):
            yield "" if number else "dtype", f"{dtype}: {_names(names)}"
    elif dtypes:
        yield "dtype", next(iter(dtypes))
    yield from _remarks(rows)
    failures = [row for row in comparison.rows if row.failed]
    for number, row in enumerate(failures):
        reason = row.failed if row.failed.startswith(f"{row.name} ") else f"{row.name}: {row.failed}"
        yield "" if number else "failed", reason


def _modes(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Training mode or not, where models differ in it."""
    modes = _by_value(rows, lambda row: [row.inputs.rpartition(", ")[2]] if ", " in row.inputs else [])
    if len(modes) > 1:
        for number, (mode, names) in enumerate(modes.items()):
            yield "" if number else "mode", f"{mode}: {_names(names)}"


def _accuracies(comparison: Comparison, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    kinds = _by_value(rows, _measure)
    for number, (kind, names) in enumerate(kinds.items()):
        of = f": {_names(names)}" if len(kinds) > 1 else ""
        yield "" if number else "accuracy", f"{kind}, which torchvision publishes with its default weights{of}"
    if kinds and comparison.pareto():
        yield "*", "Pareto front: no other here is as accurate for fewer FLOPs a sample, or more so for as few"


def _measure(row: Row) -> list[str]:
    if row.accuracy is None:
        return []
    unit = "px" if row.accuracy.metric.endswith("epe") else "%"
    return [f"{row.accuracy.metric} in {unit} on {row.accuracy.dataset}"]


def _remarks(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Notes, assumptions, missing formulas: each once, with the models that it is of."""
    uncounted = _by_value(rows, lambda row: [f"{op}, {calls} calls" for op, calls in row.uncounted.items()])
    ideal = _by_value(rows, lambda row: [row.ideal.reason] if row.ideal is not None and row.ideal.reason else [])
    for label, said in (
        ("uncounted", {f"no formula (hence >=): {text}": names for text, names in uncounted.items()}),
        ("no ideal", ideal),
        ("assumed", _by_value(rows, lambda row: row.assumptions)),
        ("note", _by_value(rows, lambda row: row.notes)),
    ):
        for number, (text, names) in enumerate(said.items()):
            yield "" if number else label, f"{_names(names)}: {text}" if len(rows) > 1 else text


def _by_value(rows: Sequence[Row], told: Callable[[Row], Sequence[str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        for text in told(row):
            found.setdefault(text, []).append(row.name)
    return found


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
