"""Which modules of a model may stand for each other: groups of one structure, and the numbers by which they differ."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from flopprof.counting.attribution import is_wrapper, walk
from flopprof.counting.fold_call import Call
from flopprof.counting.fold_likeness import Description, Unlike, described

_VARIES = object()
_FEW = 6
_LEAVES = (nn.modules.batchnorm._BatchNorm,)  # dear on meta, and nothing in them but tensors and numbers


class Group:
    """Modules of one structure: the same classes, names and shapes throughout."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.templates: list[Call] = []
        self.proofs: list[tuple[Call, Call]] = []  # (call that ran to prove, what it is to prove)
        self.varying: dict[int, None] | None = None  # positions among the facts: numbers that are not all the same
        self.barred = False
        self.folds = self.failures = 0
        self._highest = 0

    def learn(self) -> None:
        """Find the numbers by which members differ, once. Raises Unlike."""
        if self.varying is not None:
            return
        self.varying = {}
        if len(self.members) < 2 or self.members[0].size == 1:
            return
        descriptions = []
        for member in self.members:
            try:
                descriptions.append(described(member.module))
            except Unlike:
                continue
        first = descriptions[0] if descriptions else Description()
        for number in first.numbers:
            position = number[0]
            values = [each.facts[position] for each in descriptions if len(each.facts) == len(first.facts)]
            if len({*values}) > 1 and all(type(value) in (int, float) for value in values):
                self.varying[position] = None
                self._highest = max([self._highest, *(value for value in values if type(value) is int)])
        # One that has every reason to do the same runs all the same, where that costs little of what folding saves.
        self.members[-1].last = bool(self.varying) or len(self.members) > _FEW

    def split(self, description: Description) -> tuple[list[Any], list[Any]]:
        """(facts but for the numbers that vary, those numbers)."""
        if not self.varying:
            return description.facts, []
        key = list(description.facts)
        values = []
        for position in self.varying:
            if position < len(key):
                values.append(key[position])
                key[position] = _VARIES
        return key, values

    def index_number(self, description: Description) -> int | None:
        """Which of the varying numbers is the index among siblings: the first integer."""
        for number, position in enumerate(self.varying or ()):
            if position < len(description.facts) and type(description.facts[position]) is int:
                return number
        return None

    def agree(self, call: Call, values: list[Any], tables: list[Any]) -> bool:
        """Would a template's course of things have been the same with these numbers?"""
        if call.values == values:
            return True
        if len(call.values) != len(values) or not call.log.agrees(values):
            return False
        for mine, theirs in zip(values, call.values, strict=True):
            # torch itself skips what a rate of 0 or 1 makes idle, and is not heard to compare.
            if type(mine) is not type(theirs) or (
                type(mine) is float and (mine == 0, mine == 1, mine < 0) != (theirs == 0, theirs == 1, theirs < 0)
            ):
                return False
        tables = [table for table in tables if len(table) > self._highest]
        picks = {(ask(call.values), ask(values)) for ask in call.log.indices}
        return all(_alike(table, *pick) for table in tables for pick in picks)


class Member:
    """A module that may be folded."""

    def __init__(self, fqn: str, module: nn.Module, size: int, group: Group, owner: Member | None) -> None:
        self.fqn = fqn
        self.module = module
        self.size = size  # how many modules, itself included
        self.group = group
        self.owner = owner  # the nearest member around it
        self.calls: list[Call] = []
        self.active = 0  # calls of it that are running
        self.template: Member | None = None  # which ran in its place
        self.unlike = False  # some call of it ran that nothing can stand for
        self.last = False

    @property
    def proves(self) -> bool:
        """Did it run to prove that siblings do the same?"""
        return any(call.member is self for call, _match in self.group.proofs)


def _alike(table: Any, theirs: int, mine: int) -> bool:
    if not (-len(table) <= theirs < len(table) and -len(table) <= mine < len(table)):
        return True
    first, second = table[theirs], table[mine]
    if first is second:
        return True
    described_first, described_second = Description(), Description()
    try:
        described_first.value(first)
        described_second.value(second)
    except Unlike:
        return False
    return described_first.facts == described_second.facts


def members_of(model: nn.Module) -> tuple[dict[int, Member], dict[int, Member], frozenset[int]]:
    """(members by id, the member around every module below one by id, storages of all parameters and buffers)."""
    names: dict[int, str] = {}
    times: Counter[int] = Counter()
    for name, module in walk(model):
        names.setdefault(id(module), name)
        times[id(module)] += 1
    storages = Counter(
        tensor.untyped_storage()._cdata
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and not is_lazy(tensor) and tensor.is_meta
    )
    structures: dict[Any, int] = {}
    facts: dict[int, tuple[int, int, bool]] = {}  # structure, size, may be folded

    def learn(module: nn.Module) -> tuple[int, int, bool]:
        if id(module) in facts:
            return facts[id(module)]
        facts[id(module)] = (-1, 0, False)  # a cycle
        sound = times[id(module)] == 1 and not is_wrapper(module) and not isinstance(module, torch.jit.ScriptModule)
        size = 1
        key: list[Any] = [type(module)]
        if not isinstance(module, torch.jit.ScriptModule):
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is None:
                        key.append(name)
                    elif is_lazy(tensor) or not tensor.is_meta or type(tensor) not in (torch.Tensor, nn.Parameter):
                        sound = False
                    else:
                        sound = sound and storages[tensor.untyped_storage()._cdata] == 1
                        key += (name, tensor.shape, tensor.dtype, tensor.requires_grad)
        for name, child in module._modules.items():
            if child is not None:
                structure, below, fit = learn(child)
                key += (name, structure)
                size += below
                sound = sound and fit
        facts[id(module)] = (structures.setdefault(tuple(key), len(structures)), size, sound)
        return facts[id(module)]

    learn(model)
    groups: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        structure, size, sound = facts[id(module)]
        if sound and module is not model and (size > 2 or isinstance(module, _LEAVES)):
            groups.setdefault(structure, []).append(module)
    return (*_placed(model, names, facts, groups), frozenset(storages))


def _placed(
    model: nn.Module,
    names: dict[int, str],
    facts: dict[int, tuple[int, int, bool]],
    groups: dict[int, list[nn.Module]],
) -> tuple[dict[int, Member], dict[int, Member]]:
    """Members and owners, of groups that are large enough, and not just the one part of every larger member."""
    kept: dict[int, Group] = {}
    for structure, modules in groups.items():
        if len(modules) > 1 and type(modules[0]).forward is not nn.Module.forward:
            kept[structure] = Group()
    members: dict[int, Member] = {}
    owners: dict[int, Member] = {}

    def place(module: nn.Module, owner: Member | None) -> None:
        if owner is not None:
            owners[id(module)] = owner
        structure, size, _sound = facts[id(module)]
        group = kept.get(structure)
        if (
            group is not None
            and id(module) in chosen[structure]
            and (owner is None or size == 1 or len(groups[structure]) > len(groups[facts[id(owner.module)][0]]))
        ):
            owner = members[id(module)] = Member(names[id(module)], module, size, group, owner)
            group.members.append(owner)
        for child in module._modules.values():
            if child is not None and id(child) not in owners and id(child) not in members:
                place(child, owner)

    chosen = {structure: {id(module) for module in modules} for structure, modules in groups.items()}
    place(model, None)
    return members, owners
