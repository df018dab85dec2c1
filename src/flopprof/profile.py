"""The result: an immutable Profile, its sums and its JSON. No torch, no counting, no printing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import msgspec

from flopprof.errors import InvalidProfile, NoForm, UsageError
from flopprof.forms import Form
from flopprof.rows import (
    PHASES,
    Attention,
    ElementwiseRow,
    ExpertsRow,
    Kind,
    ModuleRow,
    Operand,
    OperatorRow,
    ParameterRow,
    Phase,
    RoutingRow,
    UncountedRow,
)
from flopprof.symbolic import Forms, sums_of

if TYPE_CHECKING:
    from flopprof.ledger import Ledger

__all__ = [
    "PHASES",
    "SCHEMA",
    "Attention",
    "ElementwiseRow",
    "ExpertsRow",
    "Kind",
    "ModuleRow",
    "Operand",
    "OperatorRow",
    "ParameterRow",
    "Phase",
    "Profile",
    "RoutingRow",
    "UncountedRow",
    "ancestors",
    "tally_modules",
    "within_depth",
]

SCHEMA = "flopprof.profile/1"
_FIELDS = {"flops": ("", "FLOPs"), "elementwise": ("flops", "elementwise FLOPs"), "bytes": ("bytes", "bytes")}


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """FLOPs of one run, per operator, module and phase. One multiply-add is 2 FLOPs."""

    modules: tuple[ModuleRow, ...] = ()
    operators: tuple[OperatorRow, ...] = ()
    elementwise: tuple[ElementwiseRow, ...] = ()
    uncounted_rows: tuple[UncountedRow, ...] = ()
    routing: tuple[RoutingRow, ...] = ()
    experts: tuple[ExpertsRow, ...] = ()
    assumptions: tuple[str, ...] = ()
    attention: Attention = "full"
    device: str = "cpu"
    tokens: int | None = None
    samples: int | None = None
    n_params: int = 0
    n_params_trainable: int = 0
    parameters: tuple[ParameterRow, ...] = ()
    target: str = ""
    torch_version: str = ""
    forms: Forms | None = None
    schema: str = SCHEMA

    # --- totals -------------------------------------------------------------------------------
    @property
    def forward_flops(self) -> int:
        """FLOPs of the forward pass."""
        return self.by_phase()["forward"]

    @property
    def backward_flops(self) -> int:
        """FLOPs of the backward pass that the mathematics requires, without recompute."""
        return self.by_phase()["backward"]

    @property
    def recompute_flops(self) -> int:
        """FLOPs executed again: activation checkpointing, and the score recompute of fused attention backward."""
        return self.by_phase()["recompute"]

    @property
    def optimizer_flops(self) -> int:
        """FLOPs of matrix products inside optimizer steps."""
        return self.by_phase()["optimizer"]

    @property
    def model_flops(self) -> int:
        """forward + backward: what the mathematics requires."""
        return self.forward_flops + self.backward_flops

    @property
    def active_flops(self) -> int:
        """model_flops without the experts that no token chose; the same where only chosen ones were multiplied.

        A graph of torch.export shows no choice: a profile that was traced from one has the same number, too.
        """
        return self.model_flops - sum(row.flops - row.active_flops for row in self.experts)

    @property
    def hardware_flops(self) -> int:
        """Everything executed: model_flops + recompute + optimizer."""
        return sum(self.by_phase().values())

    @property
    def elementwise_flops(self) -> int:
        """Additions, activations, norms, softmax, pooling ...: apart, in none of the counts above."""
        known = sums_of(self.elementwise)
        return sum(row.flops for row in self.elementwise) if known is None else known["flops"]

    @property
    def bytes_moved(self) -> int:
        """Bytes of counted operators: each operand read once, each result written once."""
        known = sums_of(self.operators)
        return sum(row.bytes for row in self.operators) if known is None else known["bytes"]

    @property
    def macs(self) -> int:
        """Multiply-adds of the model FLOPs: flops // 2."""
        return self.model_flops // 2

    @property
    def exact(self) -> bool:
        """Nothing uncounted and nothing assumed."""
        return not self.uncounted_rows and not self.assumptions

    @property
    def uncounted(self) -> dict[str, int]:
        """operator -> calls, for operators that do arithmetic and have no formula."""
        return _tally((row.op, row.calls) for row in self.uncounted_rows)

    @property
    def causal_flops(self) -> int:
        """model_flops with attention counted over only the pairs that the mask lets through."""
        known = sums_of(self.operators)
        if known is not None:
            return known["causal"]
        return sum(row.flops_causal for row in self.operators if row.phase in ("forward", "backward"))

    # --- tables -------------------------------------------------------------------------------
    def by_phase(self) -> dict[str, int]:
        """FLOPs per phase; every phase is present."""
        known = sums_of(self.operators)
        if known is not None:
            return {phase: known[phase] for phase in PHASES}
        return {**dict.fromkeys(PHASES, 0), **_tally((row.phase, row.flops) for row in self.operators)}

    def by_operator(self, phase: Phase | None = None) -> dict[str, int]:
        """FLOPs per operator (`aten::mm`), largest first."""
        return _descending(_tally((row.op, row.flops) for row in self._rows(phase)))

    def by_dtype(self, phase: Phase | None = None) -> dict[str, int]:
        """FLOPs per dtype of the operands multiplied, largest first."""
        return _descending(_tally((row.dtype, row.flops) for row in self._rows(phase)))

    def by_parameter(self, phase: Phase | None = None) -> dict[str, int]:
        """FLOPs per parameter: products with it, and products that make its gradient; largest first."""
        return _descending(_tally((row.parameter, row.flops) for row in self._rows(phase) if row.parameter))

    def by_line(self, phase: Phase | None = None) -> dict[str, int]:
        """FLOPs per line of source (`path/to/model.py:123`), largest first; of a backward, the line of its forward.

        `""` is what no line is known of: everything, unless the counter was told to look (`lines=True`).
        """
        return _descending(_tally((row.line, row.flops) for row in self._rows(phase)))

    def by_module(self, phase: Phase | None = None, depth: int | None = None, *, own: bool = False) -> dict[str, int]:
        """FLOPs per module, keyed by fqn (root `""`): totals with children, or `own=True` without.

        depth keeps modules at most that many names below the root. Every module that ran is present.
        """
        table = dict.fromkeys((row.fqn for row in self.modules), 0)
        table.setdefault("", 0)
        return within_depth(tally_modules(table, ((row.fqn, row.flops) for row in self._rows(phase)), own), depth)

    def elementwise_by_module(self, phase: Phase | None = None, *, own: bool = False) -> dict[str, int]:
        """Elementwise FLOPs per module, keyed as by_module."""
        table = dict.fromkeys((row.fqn for row in self.modules), 0)
        table.setdefault("", 0)
        rows = (row for row in self.elementwise if phase is None or row.phase == phase)
        return tally_modules(table, ((row.fqn, row.flops) for row in rows), own)

    def elementwise_by_operator(self, phase: Phase | None = None) -> dict[str, int]:
        """Elementwise FLOPs per operator, largest first."""
        rows = (row for row in self.elementwise if phase is None or row.phase == phase)
        return _descending(_tally((row.op, row.flops) for row in rows))

    # --- closed forms -------------------------------------------------------------------------
    def formula(
        self,
        phase: Phase | None = None,
        *,
        op: str | None = None,
        module: str | None = None,
        own: bool = False,
        of: Literal["flops", "elementwise", "bytes"] = "flops",
    ) -> str:
        """The closed form in the sizes that `trace(..., dynamic=...)` named: `FLOPs = 24*batch*seq`.

        phase          one phase; without it forward and backward, as model_flops
        op, module     of one operator (`aten::mm`), of one module and its children (`own=True`: without them)
        of             `flops`, `elementwise` FLOPs, or `bytes` (of counted operators)

        Where it holds is in `forms.conditions`, and printed behind it. Raises NoForm, which says why none is proved.
        """
        forms = self._forms()
        if of not in _FIELDS:
            raise UsageError(f"a formula is of {', '.join(_FIELDS)}, got {of!r}.")
        name, label = _FIELDS[of]
        if of == "flops":
            name = "flops_causal" if self.attention == "causal" else "flops_full"
        rows = forms.elementwise if of == "elementwise" else forms.operators
        for given, known in ((op, {row.op for row in rows}), (module, {row.fqn for row in forms.modules} | {""})):
            if given is not None and given not in known:
                raise UsageError(f"{given!r} did not run: there are {', '.join(map(repr, sorted(known)))}.")
        if phase is not None and phase not in PHASES:
            raise ValueError(f"phase {phase!r} is none of {', '.join(PHASES)}.")
        phases = (phase,) if phase else ("forward", "backward") if of == "flops" else PHASES

        def chosen(forms: Forms) -> Form:
            return forms.total(
                getattr(row, name)
                for row in (forms.elementwise if of == "elementwise" else forms.operators)
                if row.phase in phases
                and op in (None, row.op)
                and (module is None or module == row.fqn or (not own and module in ancestors(row.fqn)))
            )

        return forms.spell(label, chosen)

    def at(self, **sizes: int) -> Profile:
        """The profile at other sizes, from the closed forms: totals at once, rows when they are first read.

        It equals a count at these sizes; how many tokens and samples they hold is not known. Raises NoForm where no
        form is proved, UsageError for sizes that are unknown, missing, not positive or outside forms.conditions.

        >>> profile.at(batch=8, seq=4096).model_flops  # doctest: +SKIP
        """
        forms = self._forms()
        rows = forms.rows(forms.checked(sizes), self.attention == "causal")
        names = ("modules", "operators", "elementwise", "uncounted_rows", "experts")
        return msgspec.structs.replace(
            self, forms=None, tokens=None, samples=None, **dict(zip(names, rows, strict=True))
        )

    def _forms(self) -> Forms:
        if self.forms is None:
            raise NoForm("this profile has no closed forms: make it by trace(..., dynamic={'batch': (0, 0)}).")
        return self.forms.proved()

    def _rows(self, phase: Phase | None) -> Iterable[OperatorRow]:
        if phase is not None and phase not in PHASES:
            raise ValueError(f"phase {phase!r} is none of {', '.join(PHASES)}.")
        return (row for row in self.operators if phase is None or row.phase == phase)

    # --- conversions --------------------------------------------------------------------------
    def with_attention(self, attention: Attention) -> Profile:
        """The same run counted with the other attention convention."""
        if attention not in ("full", "causal"):
            raise ValueError(f"attention {attention!r} is neither 'full' nor 'causal'.")
        rows = tuple(
            msgspec.structs.replace(row, flops=row.flops_causal if attention == "causal" else row.flops_full)
            for row in self.operators
        )
        return msgspec.structs.replace(self, operators=rows, attention=attention)

    def reconcile(self, tokens: int | None = None) -> Ledger:
        """Why these counts differ from 2 N T and 6 N T, term by term; `flopprof.ledger.reconcile` says more."""
        from flopprof.ledger import reconcile

        return reconcile(self, tokens)

    def _repr_html_(self) -> str:
        """Small tables for a notebook."""
        from flopprof.report.notebook import profile_html

        return profile_html(self)

    def to_json(self) -> str:
        """The whole profile as JSON, schema `flopprof.profile/1`."""
        return msgspec.json.encode(self, enc_hook=tuple).decode()

    @classmethod
    def from_json(cls, text: str | bytes, *, name: str = "") -> Profile:
        """The profile that to_json wrote. Raises InvalidProfile, naming the field (and the file, by `name`)."""
        where = f"{name}: " if name else ""
        try:
            schema = msgspec.json.decode(text, type=_Versioned).schema
            if schema not in ("", SCHEMA):
                raise InvalidProfile(f"{where}profile schema is {schema!r}; this flopprof reads {SCHEMA!r}.")
            profile = msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidProfile(f"{where}not a flopprof profile: {error}.") from error
        if not schema:
            raise InvalidProfile(f"{where}not a flopprof profile: it has no field `schema`.")
        return profile


class _Versioned(msgspec.Struct):
    """What every document says first of itself: another kind of document is no empty profile."""

    schema: str = ""


def ancestors(fqn: str) -> list[str]:
    """The module itself and every module above it, up to the root: `a.b` -> `["a.b", "a", ""]`."""
    chain = [fqn]
    while fqn:
        fqn = fqn.rpartition(".")[0]
        chain.append(fqn)
    return chain


def tally_modules(table: dict[str, int], flops: Iterable[tuple[str, int]], own: bool) -> dict[str, int]:
    """`table` with each (fqn, flops) added to its module and, unless `own`, to every module above it."""
    for fqn, count in flops:
        for name in [fqn] if own else ancestors(fqn):
            table[name] = table.get(name, 0) + count
    return table


def within_depth(table: dict[str, int], depth: int | None) -> dict[str, int]:
    """The entries at most `depth` names below the root."""
    if depth is None:
        return table
    return {fqn: count for fqn, count in table.items() if (fqn.count(".") + 1 if fqn else 0) <= depth}


def _tally(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    table: defaultdict[str, int] = defaultdict(int)
    for name, count in pairs:
        table[name] += count
    return dict(table)


def _descending(table: dict[str, int]) -> dict[str, int]:
    return dict(sorted(table.items(), key=lambda item: (-item[1], item[0])))
