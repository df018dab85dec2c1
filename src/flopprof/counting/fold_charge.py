"""Charging what a template did to each sibling that was folded into it: rows copied, names changed by prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import torch

from flopprof.counting.attribution import walk
from flopprof.counting.idle import MERGED, Choices, idle_experts
from flopprof.profile import PHASES, ElementwiseRow, ModuleRow, Operand, OperatorRow, Profile, UncountedRow, ancestors

_PHASE = {phase: number for number, phase in enumerate(PHASES)}
_replace = msgspec.structs.replace


class Fold(NamedTuple):
    """`fqn` was not run: it did what `template` did. size: how many modules each of them holds."""

    fqn: str
    template: str
    size: int


class Proof(NamedTuple):
    """`fqn` was run although it is like `template`; its rows must be the same, where gradients arrive alike."""

    fqn: str
    template: str
    same_gradients: bool
    same_sums: bool


@dataclass
class _Rows:
    operators: list[OperatorRow] = field(default_factory=list)
    elementwise: list[ElementwiseRow] = field(default_factory=list)
    uncounted: list[UncountedRow] = field(default_factory=list)
    module: ModuleRow | None = None


def charge(
    profile: Profile, folds: Iterable[Fold], proofs: Iterable[Proof] = (), choices: Iterable[Choices] = ()
) -> tuple[Profile, str]:
    """The profile with each folded module's rows: its template's, of all phases, under the folded module's names.

    Also the first of `proofs` that did not do what its template did, empty where all did. What the profile has under a
    folded module's own name is dropped: the sums that autograd makes of its gradients, which its template's rows hold
    already. Rows are not in order: see `ordered`. choices: of the routers that ran, whose siblings chose alike.
    """
    table = _by_module(profile)
    folds = sorted(folds, key=lambda fold: fold.size)
    templates = {fold.template for fold in folds}
    within: dict[str, list[str]] = {}
    # A template's own parts first: whatever was folded inside it must be charged before it is copied.
    for fold in folds:
        if fold.template not in within:
            within[fold.template] = _below(table, fold.template)
        for fqn in within[fold.template]:
            table[fold.fqn + fqn[len(fold.template) :]] = _renamed(table[fqn], fold.template, fold.fqn)
    charged = _replace(
        profile,
        modules=tuple(rows.module for rows in table.values() if rows.module is not None),
        operators=tuple(row for rows in table.values() for row in rows.operators),
        elementwise=tuple(row for rows in table.values() for row in rows.elementwise),
        uncounted_rows=tuple(row for rows in table.values() for row in rows.uncounted),
    )
    known = list(choices)
    for fold in folds:
        known += [made for each in known if (made := each.renamed(fold.template, fold.fqn)) is not None]
    charged = _replace(charged, experts=idle_experts(charged, known))
    wrong = (proof.fqn for proof in proofs if proof.template in templates and not _same(table, proof))
    return charged, next(wrong, "")


def ordered(profile: Profile, model: torch.nn.Module | None) -> Profile:
    """The profile with its modules as the model registers them, and rows by phase, then by module."""
    registered = (
        {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in walk(model)))}
        if model is not None
        else {}
    )
    last = len(registered)

    def place(fqn: str) -> tuple[int, int]:
        number = registered.get(fqn)
        if number is not None:
            return 0, number
        return 1, next((registered[name] for name in ancestors(fqn) if name in registered), last)

    modules = sorted(profile.modules, key=lambda row: place(row.fqn))
    order = {row.fqn: number for number, row in enumerate(modules)}

    def key(row: Any) -> tuple[int, int]:
        return _PHASE[row.phase], order.get(row.fqn, -1)

    return _replace(
        profile,
        modules=tuple(modules),
        operators=tuple(sorted(profile.operators, key=key)),
        elementwise=tuple(sorted(profile.elementwise, key=key)),
        uncounted_rows=tuple(sorted(profile.uncounted_rows, key=key)),
    )


def used_outside(profile: Profile, folds: Iterable[Fold]) -> str:
    """A template whose parameters are multiplied outside of it, so that nobody knows by how many siblings' places."""
    templates = {fold.template for fold in folds}
    owners: dict[str, set[str]] = {}
    for row in profile.operators:
        names = {row.parameter, *(operand.name for operand in row.operands)} - {""}
        for part in () if row.phase == "optimizer" else {part for name in names for part in name.split(MERGED)}:
            if part not in owners:
                owners[part] = templates.intersection(ancestors(part))
            if owners[part] and not owners[part].issubset(ancestors(row.fqn)):
                return min(owners[part].difference(ancestors(row.fqn)))
    return ""


def _same(table: dict[str, _Rows], proof: Proof) -> bool:
    names = _below(table, proof.template)
    if {proof.fqn + name[len(proof.template) :] for name in names} != set(_below(table, proof.fqn)):
        return False
    for name in names:
        expected = _renamed(table[name], proof.template, proof.fqn)
        found = table[proof.fqn + name[len(proof.template) :]]
        if expected.module != found.module:
            return False
        for mine, theirs in (
            (expected.operators, found.operators),
            (expected.elementwise, found.elementwise),
            (expected.uncounted, found.uncounted),
        ):
            if _comparable(mine, proof) != _comparable(theirs, proof):
                return False
    return True


def _comparable(rows: Iterable[Any], proof: Proof) -> Counter[Any]:
    return Counter(
        row
        for row in rows
        if (row.phase == "forward" or proof.same_gradients)
        and (proof.same_sums or row.phase == "forward" or row.op != "aten::add")
    )


def _by_module(profile: Profile) -> dict[str, _Rows]:
    table: dict[str, _Rows] = {}
    for module in profile.modules:
        table.setdefault(module.fqn, _Rows()).module = module
    for operator in profile.operators:
        table.setdefault(operator.fqn, _Rows()).operators.append(operator)
    for elementwise in profile.elementwise:
        table.setdefault(elementwise.fqn, _Rows()).elementwise.append(elementwise)
    for uncounted in profile.uncounted_rows:
        table.setdefault(uncounted.fqn, _Rows()).uncounted.append(uncounted)
    return table


def _below(table: Iterable[str], prefix: str) -> list[str]:
    return [fqn for fqn in table if fqn == prefix or fqn.startswith(f"{prefix}.")]


def _renamed(rows: _Rows, old: str, new: str) -> _Rows:
    cut = len(old)

    def name(fqn: str) -> str:
        if MERGED in fqn:  # made of several parameters
            return MERGED.join(map(name, fqn.split(MERGED)))
        # a module's own name, a name below it, or a site in it (`layers.0#2`)
        return new + fqn[cut:] if fqn.startswith(old) and fqn[cut : cut + 1] in ("", ".", "#") else fqn

    def operand(item: Operand) -> Operand:
        return _replace(item, name=name(item.name)) if item.name else item

    return _Rows(
        operators=[
            _replace(
                row,
                fqn=name(row.fqn),
                operands=tuple(map(operand, row.operands)),
                parameter=name(row.parameter),
                site=name(row.site),
                joined_to=name(row.joined_to),
            )
            for row in rows.operators
        ],
        elementwise=[_replace(row, fqn=name(row.fqn)) for row in rows.elementwise],
        uncounted=[_replace(row, fqn=name(row.fqn)) for row in rows.uncounted],
        module=None if rows.module is None else _replace(rows.module, fqn=name(rows.module.fqn)),
    )
