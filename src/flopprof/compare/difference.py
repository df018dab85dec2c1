"""What changed between two profiles: per phase, operator and module, every change exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from flopprof.errors import UsageError
from flopprof.profile import PHASES, Phase, Profile

SCHEMA = "flopprof.difference/1"


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One figure in two profiles; None where the profile has no such module or operator."""

    name: str
    before: int | None
    after: int | None

    @property
    def delta(self) -> int:
        """after - before; what is absent counts 0."""
        return (self.after or 0) - (self.before or 0)

    @property
    def kind(self) -> Literal["added", "removed", "changed", "same"]:
        """Is it only in the second, only in the first, or in both with other figures?"""
        if self.before is None:
            return "added"
        if self.after is None:
            return "removed"
        return "changed" if self.delta else "same"


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Two profiles compared, FLOPs unless said otherwise; one multiply-add is 2.

    phases holds every phase. totals: model_flops, hardware_flops, elementwise_flops, bytes_moved (bytes), n_params and
    n_params_trainable (elements). operators and modules (own: what a module does outside its children, so that
    their deltas add up to that of hardware_flops; modules: with children) hold what is not the same, the largest
    delta first. parameters: elements per module with its children, where they are not the same.
    """

    before: str
    after: str
    totals: tuple[Change, ...]
    phases: tuple[Change, ...]
    operators: tuple[Change, ...]
    own: tuple[Change, ...]
    modules: tuple[Change, ...]
    parameters: tuple[Change, ...]
    uncounted: tuple[Change, ...]  # calls
    phase: Phase | None = None
    schema: str = SCHEMA

    @property
    def same(self) -> bool:
        """Is there no difference in any figure?"""
        tables = (self.totals, self.phases, self.operators, self.own, self.modules, self.parameters, self.uncounted)
        return not any(change.kind != "same" for table in tables for change in table)

    def to_json(self) -> str:
        """The whole difference as JSON, schema `flopprof.difference/1`."""
        return msgspec.json.encode(self).decode()


_TOTALS = ("model_flops", "hardware_flops", "elementwise_flops", "bytes_moved", "n_params", "n_params_trainable")


def diff(before: Profile, after: Profile, *, phase: Phase | None = None) -> Difference:
    """What changed from one profile to another, per total, phase, operator and module.

    phase   look at the operators and modules of one phase only

    Raises UsageError where the profiles follow different attention conventions, since their counts mean different
    things, and where neither has anything in that phase.
    """
    if before.attention != after.attention:
        raise UsageError(
            f"one profile counts {before.attention} attention, the other {after.attention}: "
            "make both with the same --attention, or convert one by Profile.with_attention."
        )
    if phase is not None and not (before.by_operator(phase) or after.by_operator(phase)):
        has = [name for name in PHASES if before.by_operator(name) or after.by_operator(name)]
        raise UsageError(
            f"neither profile has FLOPs in the phase {phase}: between them they have {', '.join(has) or 'none at all'}."
        )
    return Difference(
        before=_label(before),
        after=_label(after),
        totals=tuple(Change(name=name, before=getattr(before, name), after=getattr(after, name)) for name in _TOTALS),
        phases=tuple(
            Change(name=name, before=first, after=before_after[name])
            for before_after in [after.by_phase()]
            for name, first in before.by_phase().items()
            if name in PHASES
        ),
        operators=_changes(before.by_operator(phase), after.by_operator(phase)),
        own=_changes(before.by_module(phase, own=True), after.by_module(phase, own=True)),
        modules=_changes(before.by_module(phase), after.by_module(phase)),
        parameters=_changes(
            {row.fqn: row.parameters for row in before.modules}, {row.fqn: row.parameters for row in after.modules}
        ),
        uncounted=_changes(before.uncounted, after.uncounted),
        phase=phase,
    )


def _changes(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[Change, ...]:
    """What is not the same in both, the largest delta first."""
    names = dict.fromkeys([*before, *after])
    changes = [Change(name=name, before=before.get(name), after=after.get(name)) for name in names]
    return tuple(
        sorted((each for each in changes if each.kind != "same"), key=lambda each: (-abs(each.delta), each.name))
    )


def _label(profile: Profile) -> str:
    return profile.target or next((row.cls for row in profile.modules if row.fqn == ""), "")
