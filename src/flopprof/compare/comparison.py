"""Models side by side: one row each, ratios to one of them, and which of them no other beats. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Literal

import msgspec

from flopprof.errors import InvalidProfile, UsageError
from flopprof.profile import Attention

SCHEMA = "flopprof.comparison/1"
SIZES = ("stored", "float32", "bfloat16", "int8", "int4")
_LOWER_IS_BETTER = ("epe", "per_image_epe", "fl_all")


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """A published figure of one set of weights, as the model's own package states it."""

    metric: str
    value: float
    dataset: str
    weights: str

    @property
    def lower_is_better(self) -> bool:
        """Is it an error (the end-point error of optical flow) instead of an accuracy?"""
        return self.metric in _LOWER_IS_BETTER


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes held while training. flopprof.compare.memory says what each is."""

    activations: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def peak(self) -> int:
        """All four at once: as at the end of an accumulation step, when gradients are kept and a forward has run."""
        return self.activations + self.weights + self.gradients + self.optimizer


class Density(msgspec.Struct, frozen=True, kw_only=True):
    """Elements that are not zero, among those of the weights that products multiply."""

    nonzero: int
    elements: int

    @property
    def share(self) -> float:
        """nonzero / elements; 1 is dense."""
        return self.nonzero / self.elements if self.elements else 1.0


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one forward without gradients, as measured on `device`; samples: of one forward."""

    median_s: float
    p95_s: float
    runs: int
    device: str
    samples: int | None = None

    @property
    def samples_per_s(self) -> float | None:
        """Throughput at the median."""
        return None if self.samples is None else self.samples / self.median_s


class Ideal(msgspec.Struct, frozen=True, kw_only=True):
    """The roofline of one forward: the longer of computing and moving bytes; None where one of both is not known."""

    compute_s: float | None
    memory_s: float | None
    device: str
    reason: str = ""

    @property
    def seconds(self) -> float | None:
        """max(FLOPs / peak, bytes / bandwidth)."""
        if self.compute_s is None or self.memory_s is None:
            return None
        return max(self.compute_s, self.memory_s)

    @property
    def bound(self) -> Literal["compute", "memory", ""]:
        """Which of both is the longer."""
        if self.compute_s is None or self.memory_s is None:
            return ""
        return "compute" if self.compute_s >= self.memory_s else "memory"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one input. None: not known, and `notes` say why. failed: why there is nothing but the name.

    flops_by_dtype, bytes_moved, elementwise_flops are of the forward. bytes_moved: of counted operators, each operand
    read once, each result written once. One multiply-add is 2 FLOPs.
    """

    name: str
    inputs: str = ""
    failed: str = ""
    dtype: str = ""
    device: str = ""
    samples: int | None = None
    tokens: int | None = None
    attention: Attention = "full"
    n_params: int | None = None
    n_params_trainable: int | None = None
    forward_flops: int | None = None
    backward_flops: int | None = None
    recompute_flops: int = 0
    elementwise_flops: int | None = None
    sparse_forward_flops: int | None = None
    flops_by_dtype: dict[str, int] = {}
    bytes_moved: int | None = None
    memory: Memory | None = None
    size_bytes: dict[str, int] = {}
    density: Density | None = None
    accuracy: Accuracy | None = None
    ideal: Ideal | None = None
    latency: Latency | None = None
    uncounted: dict[str, int] = {}
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def training_flops(self) -> int | None:
        """forward + backward: what one training step requires, without recompute."""
        if self.forward_flops is None or self.backward_flops is None:
            return None
        return self.forward_flops + self.backward_flops

    @property
    def macs(self) -> int | None:
        """Multiply-adds of the forward."""
        return None if self.forward_flops is None else self.forward_flops // 2

    @property
    def arithmetic_intensity(self) -> float | None:
        """FLOPs of the forward for each byte that its counted operators move."""
        if self.forward_flops is None or not self.bytes_moved:
            return None
        return self.forward_flops / self.bytes_moved

    @property
    def flops_per_sample(self) -> Fraction | None:
        """FLOPs of the forward over its samples, exactly: what models at different batches are held against."""
        return None if self.forward_flops is None else Fraction(self.forward_flops, self.samples or 1)


FIGURES: Mapping[str, Callable[[Row], int | float | None]] = {
    "params": lambda row: row.n_params,
    "flops": lambda row: row.forward_flops,
    "training": lambda row: row.training_flops,
    "macs": lambda row: row.macs,
    "elementwise": lambda row: row.elementwise_flops,
    "activations": lambda row: None if row.memory is None else row.memory.activations,
    "memory": lambda row: None if row.memory is None else row.memory.peak,
    "bytes": lambda row: row.bytes_moved,
    "intensity": lambda row: row.arithmetic_intensity,
    "size": lambda row: row.size_bytes.get("stored"),
    "accuracy": lambda row: None if row.accuracy is None else row.accuracy.value,
    "ideal": lambda row: None if row.ideal is None else row.ideal.seconds,
    "latency": lambda row: None if row.latency is None else row.latency.median_s,
    "p95": lambda row: None if row.latency is None else row.latency.p95_s,
    "throughput": lambda row: None if row.latency is None else row.latency.samples_per_s,
}
_MOST_FIRST = ("accuracy", "intensity", "throughput")


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Rows in the order asked for. reference: the name of the row that ratios are to, the first that did not fail."""

    rows: tuple[Row, ...]
    reference: str = ""
    hardware: str = ""
    interrupted: bool = False
    schema: str = SCHEMA

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        """The row of that name. Raises KeyError."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def ratios(self, figure: str) -> dict[str, float | None]:
        """name -> figure / figure of the reference, for one of FIGURES; None where either is not known."""
        value = _figure(figure)
        found = [value(row) for row in self.rows if row.name == self.reference]
        base = found[0] if found else None
        return {
            row.name: value(row) / base if base and value(row) is not None else None  # type: ignore[operator]
            for row in self.rows
        }

    def pareto(self) -> frozenset[str]:
        """Names of the rows that no other beats: none has as good an accuracy for fewer FLOPs a sample, or a better
        one for as few.

        Only accuracies of one metric on one data set are held against each other. Rows whose FLOPs are a lower bound
        are left out.
        """
        groups: dict[tuple[str, str], list[tuple[str, float, Fraction]]] = {}
        for row in self.rows:
            cost = row.flops_per_sample
            if row.accuracy is not None and cost is not None and not row.uncounted:
                worth = -row.accuracy.value if row.accuracy.lower_is_better else row.accuracy.value
                key = (row.accuracy.dataset, row.accuracy.metric)
                groups.setdefault(key, []).append((row.name, worth, cost))
        return frozenset(
            name
            for group in groups.values()
            for name, worth, cost in group
            if not any(
                other >= worth and less <= cost and (other > worth or less < cost) for _name, other, less in group
            )
        )

    def sorted(self, by: str) -> Comparison:
        """By one of FIGURES, or by `name`: the least first, of accuracy, intensity and throughput the most first.

        What is not known, and what failed, comes last. Ratios stay to the same row. Raises UsageError.
        """
        if by == "name":
            return msgspec.structs.replace(self, rows=tuple(sorted(self.rows, key=lambda row: row.name)))
        value, sign = _figure(by), -1 if by in _MOST_FIRST else 1

        def key(row: Row) -> tuple[bool, float]:
            found = value(row)
            return found is None, 0 if found is None else sign * found

        return msgspec.structs.replace(self, rows=tuple(sorted(self.rows, key=key)))

    def to_json(self) -> str:
        """The whole comparison as JSON, schema `flopprof.comparison/1`, which from_json reads.

        What follows from it is in it too: the figures of every row, their ratios, and the Pareto front.
        """
        derived = {
            "figures": {row.name: {name: value(row) for name, value in FIGURES.items()} for row in self.rows},
            "ratios": {name: self.ratios(name) for name in FIGURES},
            "pareto": sorted(self.pareto()),
        }
        return msgspec.json.encode({**msgspec.to_builtins(self), **derived}).decode()

    def _repr_html_(self) -> str:
        """The tables for a notebook."""
        from flopprof.report.comparison_files import to_html

        return to_html(self)

    @classmethod
    def from_json(cls, text: str | bytes, *, name: str = "") -> Comparison:
        """The comparison that to_json wrote. Raises InvalidProfile, naming the field (and the file, by `name`)."""
        where = f"{name}: " if name else ""
        try:
            found = msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidProfile(f"{where}not a flopprof comparison: {error}.") from error
        if found.schema != SCHEMA:
            raise InvalidProfile(f"{where}comparison schema is {found.schema!r}; this flopprof reads {SCHEMA!r}.")
        return found


def side_by_side(rows: Sequence[Row], *, hardware: str = "", interrupted: bool = False) -> Comparison:
    """The comparison of these rows, names made distinct (`net`, `net #2`); ratios: to the first that did not fail."""
    seen: dict[str, int] = {}
    distinct = []
    for row in rows:
        seen[row.name] = seen.get(row.name, 0) + 1
        again = seen[row.name]
        distinct.append(row if again == 1 else msgspec.structs.replace(row, name=f"{row.name} #{again}"))
    reference = next((row.name for row in distinct if not row.failed), "")
    return Comparison(rows=tuple(distinct), reference=reference, hardware=hardware, interrupted=interrupted)


def _figure(name: str) -> Callable[[Row], int | float | None]:
    if name not in FIGURES:
        raise UsageError(f"there is no figure {name!r}: choose one of name, {', '.join(FIGURES)}.")
    return FIGURES[name]
