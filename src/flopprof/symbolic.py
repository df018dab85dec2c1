"""A profile's counts as closed forms in named sizes: its totals, and rows whose integers are forms. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar, overload

import msgspec

from flopprof.errors import NoForm, UsageError
from flopprof.forms import Condition, Form
from flopprof.rows import PHASES, ElementwiseRow, ExpertsRow, ModuleRow, OperatorRow, UncountedRow

T_co = TypeVar("T_co", covariant=True)


class PhaseForms(msgspec.Struct, frozen=True, kw_only=True):
    """FLOPs of each phase."""

    forward: Form = Form()
    backward: Form = Form()
    recompute: Form = Form()
    optimizer: Form = Form()


class Forms(msgspec.Struct, frozen=True, kw_only=True):
    """Counts in named sizes (`symbols`), proved where every condition holds; or the reason why none is proved.

    forms holds each distinct form once. In the rows below, every integer (a dimension, calls, flops, bytes) is
    the position in `forms` of the form that it has. at_one: where a size of 1 runs other operators (a sum over one
    element is no sum), the symbol and the forms in the other symbols that hold there.
    """

    symbols: tuple[str, ...]
    reason: str = ""
    conditions: tuple[Condition, ...] = ()
    flops_full: PhaseForms = PhaseForms()
    flops_causal: PhaseForms = PhaseForms()
    elementwise_flops: Form = Form()
    bytes_moved: Form = Form()
    forms: tuple[Form, ...] = ()
    modules: tuple[ModuleRow, ...] = ()
    operators: tuple[OperatorRow, ...] = ()
    elementwise: tuple[ElementwiseRow, ...] = ()
    uncounted_rows: tuple[UncountedRow, ...] = ()
    experts: tuple[ExpertsRow, ...] = ()
    at_one: tuple[tuple[str, Forms], ...] = ()

    def __post_init__(self) -> None:
        known = set(self.symbols)
        parts = [condition.left for condition in self.conditions]
        for form in (*self.forms, *parts, *self._totals().values(), *self._totals(causal=True).values()):
            if not form.symbols() <= known:
                raise ValueError(f"a form speaks of {sorted(form.symbols() - known)}, which are no symbols of it")
        for rows in (self.modules, self.operators, self.elementwise, self.uncounted_rows, self.experts):
            for position in integers(rows):
                if not 0 <= position < len(self.forms):
                    raise ValueError(f"a row speaks of form {position} of {len(self.forms)}")

    @classmethod
    def summed(
        cls,
        symbols: tuple[str, ...],
        conditions: tuple[Condition, ...],
        forms: tuple[Form, ...],
        rows: tuple[Any, Any, Any, Any, Any],
    ) -> Forms:
        """The forms of these rows (modules, operators, elementwise, uncounted, experts), totals added up."""
        modules, operators, elementwise, uncounted, experts = rows
        total = partial(_total, forms)
        phases = {phase: [row for row in operators if row.phase == phase] for phase in PHASES}
        return cls(
            symbols=symbols,
            conditions=conditions,
            flops_full=PhaseForms(**{phase: total(row.flops_full for row in phases[phase]) for phase in PHASES}),
            flops_causal=PhaseForms(**{phase: total(row.flops_causal for row in phases[phase]) for phase in PHASES}),
            elementwise_flops=total(row.flops for row in elementwise),
            bytes_moved=total(row.bytes for row in operators),
            forms=forms,
            modules=modules,
            operators=operators,
            elementwise=elementwise,
            uncounted_rows=uncounted,
            experts=experts,
        )

    def total(self, positions: Iterable[int]) -> Form:
        """The sum of the forms at these positions."""
        return _total(self.forms, positions)

    def proved(self) -> Forms:
        """These forms. Raises NoForm, saying why, where none is proved."""
        if self.reason:
            raise NoForm(f"no closed form in {', '.join(self.symbols)} is proved: {self.reason}")
        return self

    def checked(self, sizes: Mapping[str, Any]) -> dict[str, int]:
        """The sizes, once all are there, whole, positive and inside the conditions. Raises UsageError."""
        self.proved()
        listed = ", ".join(self.symbols)
        for name in sizes:
            if name not in self.symbols:
                raise UsageError(f"{name!r} is no size of this profile: it has {listed}.")
        for name in self.symbols:
            if name not in sizes:
                raise UsageError(f"no size given for {name!r}: pass each of {listed}.")
            if isinstance(sizes[name], bool) or not isinstance(sizes[name], int) or sizes[name] < 1:
                raise UsageError(f"{name} is a positive integer, got {sizes[name]!r}.")
        given = {name: sizes[name] for name in self.symbols}
        forms, inner = self._narrowed(given)
        for condition in forms.conditions:
            if not condition.holds(inner):
                at = ", ".join(f"{name}={size}" for name, size in given.items())
                raise UsageError(f"the closed form holds only where {condition}, which {at} is not: count there.")
        return given

    def spell(self, label: str, chosen: Callable[[Forms], Form]) -> str:
        """`FLOPs = 24*batch*seq  where seq <= 512`, of the form that `chosen` takes of these and of those at_one."""
        form, conditions = chosen(self), self._uncovered()
        text = f"{label} = {form}" + (f"  where {', '.join(map(str, conditions))}" if conditions else "")
        for name, forms in self.at_one:
            if not forms._follows(form.with_one(name), conditions, chosen):
                text += f"; where {name} == 1: {forms.spell(label, chosen)}"
        return text

    def _uncovered(self) -> list[Condition]:
        """The conditions that bar from somewhere: not those of sizes of 1 that have forms of their own."""
        covered = [Condition(Form.of(name), ">=", 2) for name, _ in self.at_one]
        return [condition for condition in self.conditions if condition not in covered]

    def _follows(self, form: Form, conditions: list[Condition], chosen: Callable[[Forms], Form]) -> bool:
        """Is it this form, under no other conditions?"""
        return (
            chosen(self) == form
            and all(condition in conditions for condition in self._uncovered())
            and all(inner._follows(form.with_one(name), conditions, chosen) for name, inner in self.at_one)
        )

    def _narrowed(self, sizes: dict[str, int]) -> tuple[Forms, dict[str, int]]:
        """The forms that hold at these sizes, and those sizes that they are in."""
        for name, forms in self.at_one:
            if sizes[name] == 1:
                return forms._narrowed({other: size for other, size in sizes.items() if other != name})
        return self, sizes

    def rows(self, sizes: Mapping[str, int], causal: bool) -> tuple[Any, Any, Any, Any, Any]:
        """Modules, operators, elementwise, uncounted and experts' rows at these sizes, made when first read."""
        forms, sizes = self._narrowed(dict(sizes))
        values = _Values(forms.forms, sizes)
        sums = {name: form.at(sizes) for name, form in forms._totals(causal).items()}
        return (
            _deferred(forms.modules, values, None, {}),
            _deferred(forms.operators, values, causal, sums),
            _deferred(forms.elementwise, values, None, {"flops": sums["elementwise"]}),
            _deferred(forms.uncounted_rows, values, None, {}),
            _deferred(forms.experts, values, None, {}),
        )

    def _totals(self, causal: bool = False) -> dict[str, Form]:
        flops = self.flops_causal if causal else self.flops_full
        phases: dict[str, Form] = {phase: getattr(flops, phase) for phase in PHASES}
        seen = self.flops_causal.forward + self.flops_causal.backward
        return {**phases, "causal": seen, "bytes": self.bytes_moved, "elementwise": self.elementwise_flops}


class Deferred(Sequence[T_co], Generic[T_co]):
    """Rows that are made when they are first read; `sums` of them are known before. Equal to the tuple of them."""

    __slots__ = ("_make", "_rows", "sums")

    def __init__(self, make: Callable[[], tuple[T_co, ...]], sums: Mapping[str, int]) -> None:
        self._make = make
        self._rows: tuple[T_co, ...] | None = None
        self.sums = sums

    @property
    def all(self) -> tuple[T_co, ...]:
        """The rows."""
        if self._rows is None:
            self._rows = self._make()
        return self._rows

    def __len__(self) -> int:
        return len(self.all)

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T_co, ...]: ...
    def __getitem__(self, index: int | slice) -> T_co | tuple[T_co, ...]:
        return self.all[index]

    def __iter__(self) -> Iterator[T_co]:
        return iter(self.all)

    def __add__(self, other: tuple[T_co, ...]) -> tuple[T_co, ...]:
        return self.all + tuple(other)

    def __radd__(self, other: tuple[T_co, ...]) -> tuple[T_co, ...]:
        return tuple(other) + self.all

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Deferred):
            return self.all == other.all
        return self.all == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.all)

    def __repr__(self) -> str:
        return repr(self.all)

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self.all,)


def sums_of(rows: Sequence[object]) -> Mapping[str, int] | None:
    """What is known of rows that are not made yet; None for rows that are there."""
    return rows.sums if isinstance(rows, Deferred) else None


def integers(value: Any) -> Iterator[int]:
    """Every integer in rows, in the order of their fields."""
    if type(value) is int:
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from integers(item)
    elif isinstance(value, msgspec.Struct):
        yield from integers(msgspec.structs.astuple(value))


def replaced(value: Any, integer: Callable[[Any], Any], kinds: tuple[type, ...] = (int,)) -> Any:
    """Rows with `integer` of every integer in its place; kinds: what counts as one (a bool does not)."""
    if type(value) in kinds:
        return integer(value)
    if isinstance(value, tuple):
        return tuple([replaced(item, integer, kinds) for item in value])
    if isinstance(value, msgspec.Struct):
        names = value.__struct_fields__
        return type(value)(**{name: replaced(getattr(value, name), integer, kinds) for name in names})
    return value


class _Values:
    """The value of each form at some sizes, computed once."""

    def __init__(self, forms: tuple[Form, ...], sizes: Mapping[str, int]) -> None:
        self._forms, self._sizes = forms, sizes
        self._values: dict[int, int] = {}

    def __call__(self, position: int) -> int:
        value = self._values.get(position)
        if value is None:
            value = self._values[position] = self._forms[position].at(self._sizes)
        return value


def _deferred(rows: tuple[Any, ...], values: _Values, causal: bool | None, sums: Mapping[str, int]) -> Any:
    return Deferred(partial(_made, rows, values, causal), sums) if rows else ()


def _made(rows: tuple[Any, ...], values: _Values, causal: bool | None) -> tuple[Any, ...]:
    """The rows at these sizes; those that only the symbols told apart are one, as when they are counted."""
    table: dict[Any, Any] = {}
    twins: dict[Any, int] = {}
    for row in rows:
        made = replaced(row, values)
        if causal is not None:
            made = msgspec.structs.replace(made, flops=made.flops_causal if causal else made.flops_full)
        if isinstance(row, ModuleRow | ExpertsRow):
            table[len(table)] = made
            continue
        nothing = dict.fromkeys(set(_ADDED) & set(row.__struct_fields__), 0)
        alike = msgspec.structs.replace(row, **nothing)
        number = twins[alike] = twins.get(alike, 0) + 1
        each = {name: getattr(made, name) // max(made.calls, 1) for name in nothing if name != "calls"}
        key = msgspec.structs.replace(made, **{**nothing, **each}), number
        before = table.get(key)
        if before is not None:
            made = msgspec.structs.replace(made, **{n: getattr(before, n) + getattr(made, n) for n in nothing})
        table[key] = made
    return tuple(table.values())


_ADDED = ("calls", "flops", "flops_full", "flops_causal", "bytes")


def _total(forms: tuple[Form, ...], positions: Iterable[int]) -> Form:
    return Form.total(forms[position] for position in positions)


def flops_position(row: OperatorRow, causal: bool) -> int:
    """Where the FLOPs of a row of forms are, in either attention convention."""
    return row.flops_causal if causal else row.flops_full
