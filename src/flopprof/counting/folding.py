"""Folding: repeated blocks of a meta model are counted once, and what they did is charged to each.

The first of the siblings that are like each other (`fold_likeness`) runs: the template. A later one, called with the
same signature, does not run: one autograd.Function gives it the template's outputs, empty, and its inputs empty
gradients. The last sibling, and where only numbers such as an index tell siblings apart also the second, runs as
proof. When the graph is complete it is read (`fold_graph`), and when the run is over rows are compared: whatever speaks
against a fold makes the count be done again without any.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _modules

from flopprof.counting import fold_charge
from flopprof.counting.fold_call import Call, Doubt, Folded, Outcome
from flopprof.counting.fold_graph import Graph, edge_of, unfit
from flopprof.counting.fold_groups import Group, Member, members_of
from flopprof.counting.fold_likeness import Description, Signature, Unlike, containers_in, described, state_of_torch
from flopprof.counting.fold_numbers import Watched
from flopprof.counting.fold_trial import changes, swap, swap_back
from flopprof.counting.fold_wrapper import wrapped
from flopprof.counting.runtime import FlopCounter
from flopprof.counting.values import Values
from flopprof.profile import Profile

_stack_size = torch._C._len_torch_dispatch_stack
_function_stack_size = torch._C._len_torch_function_stack
_saved_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_node = torch._C._current_autograd_node
_sequence = torch._C._autograd._get_sequence_nr
_MOST_FAILURES = 2  # templates that cannot stand for others, until a group is left alone


class Folding:
    """The folds of one run: made as modules are called, proved and charged afterwards."""

    def __init__(self, model: nn.Module, counter: FlopCounter, barred: frozenset[str]) -> None:
        self._counter = counter
        self._model = model
        self.members, self.owners, self._storages = members_of(model)
        for member in self.members.values():
            member.group.barred |= member.fqn in barred
        self._modes = _stack_size(), _function_stack_size()
        modes = [torch._C._get_dispatch_stack_at(place) for place in range(_stack_size())]
        self._store = next((mode.store for mode in modes if isinstance(mode, Values)), None)
        self._nothing = torch.empty(0, device="meta", requires_grad=True)
        self._attributes = [vars(module) for module in model.modules()]
        self._containers = containers_in(self._attributes)
        self._calls: list[Call] = []
        self._hooks: list[Any] = []
        self.doubts: list[str] = []

    @property
    def touched(self) -> bool:
        """Was anything folded, or run to stand for others?"""
        return bool(self._calls)

    @property
    def folds(self) -> int:
        """Calls that were not run."""
        return sum(call.template is not None for call in self._calls)

    # --- while modules are called -------------------------------------------------------------------
    def call(self, beneath: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What `beneath(module, *args, **kwargs)` returns, or the like of it. Raises Doubt."""
        owner = self.owners.get(id(module))
        if owner is not None and not owner.active:
            self._bar(owner, "a part of a block was called from outside of it")
        member = self.members.get(id(module))
        if member is None:
            if owner is not None and not self._plain():
                self._bar(owner, "a block's part ran in a state of its own")
            return beneath(module, *args, **kwargs)
        if member.group.barred or self.doubts:
            return self._really(member, beneath, args, kwargs)
        if not self._plain():
            self._bar(member, "a block ran in a state of its own")
            return self._really(member, beneath, args, kwargs)
        try:
            description = described(module)
            group = member.group
            group.learn()
            key, values = group.split(description)
            number = group.index_number(description)
            signature = Signature(None if number is None else values[number], self._source)
            signature.call(args, kwargs, state_of_torch())
        except Unlike:
            return self._really(member, beneath, args, kwargs)
        match = self._match(member, key, values, description, signature)
        if match is None and member.template is not None:
            raise self._doubt("a block's later call differs from its template's")
        if match is None or (member.template is None and (member.last or (values and not match.proofs))):
            return self._record(member, match, description, signature, beneath, args, kwargs)
        return self._fold(member, match, values, signature)

    def _plain(self) -> bool:
        return (
            (_stack_size(), _function_stack_size()) == self._modes
            and _saved_hooks(True) is None
            and _node() is None
            and self._counter.unseen.produced is None
            and not torch._C._are_functorch_transforms_active()
            and not torch._C._get_tracing_state()
            and not _modules._global_forward_hooks
            and not _modules._global_forward_pre_hooks
            and not _modules._global_backward_hooks
            and not _modules._global_backward_pre_hooks
        )

    def _bar(self, member: Member | None, why: str) -> None:
        while member is not None:
            member.group.barred = True
            if member.group.folds:
                raise self._doubt(why)
            member = member.owner

    def _doubt(self, why: str, suspects: frozenset[str] = frozenset()) -> Doubt:
        self.doubts.append(why)  # also where the model catches what is raised
        return Doubt(why, suspects)

    def _really(self, member: Member, beneath: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if member.template is not None:
            raise self._doubt("a block's later call differs from its template's")
        member.unlike = True
        member.active += 1
        try:
            return beneath(member.module, *args, **kwargs)
        finally:
            member.active -= 1

    def _valued(self, tensor: torch.Tensor) -> bool:
        return self._store is not None and self._store.get(tensor) is not None

    def _source(self, tensor: torch.Tensor) -> Any:
        """What must be the very same for siblings: a parameter or buffer passed in, a tensor whose values are known."""
        known = self._counter._sources.of(tensor)
        return known, (id(tensor), tensor._version) if self._valued(tensor) else None

    def _match(
        self, member: Member, key: list[Any], values: list[Any], description: Description, signature: Signature
    ) -> Call | None:
        if member.unlike:
            return None
        if member.template is not None:
            number = len(member.calls)
            candidates = member.template.calls[number : number + 1]
        else:
            candidates = [] if member.calls else [call for call in member.group.templates if call.number == 0]
        for call in candidates:
            if (
                call.outcome is not None
                and call.key == key
                and call.facts == signature.facts
                and member.group.agree(call, values, [*description.tables, *signature.tables])
            ):
                return call
        return None

    def _fold(self, member: Member, match: Call, values: list[Any], signature: Signature) -> Any:
        assert match.outcome is not None
        call = Call(member, [], values, signature)
        call.template = match
        member.template = match.member
        member.calls.append(call)
        match.folds += 1
        member.group.folds += 1
        self._calls.append(call)
        where = self._counter.where
        entered = where.enter(member.module)
        try:
            own = [place for _holder, _key, place in signature.places]
            return match.outcome.again(call, signature.tensors, own, self._nothing)
        finally:
            where.leave(entered)
            entered[2].module = None  # its row will be its template's: its parameters need not be added up
            self._counter.seen += 1  # the module around it has not come by its output from nowhere

    def _record(  # noqa: PLR0915 - one call's before, run and after
        self,
        member: Member,
        match: Call | None,
        description: Description,
        signature: Signature,
        beneath: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        group = member.group
        key, values = group.split(description)
        call = Call(member, key, values, signature)
        call.valued = [tensor for tensor in signature.tensors if self._valued(tensor)]
        if torch.is_grad_enabled():
            call.input_edges = [edge_of(tensor) for tensor in signature.tensors if tensor.requires_grad]
        places = [dict(vars(place)) for _holder, _key, place in signature.places]
        before = self._world(member) if match is None else None
        watched: list[Watched] = []
        call.start = _sequence()
        member.active += 1
        try:
            if match is None:
                watched = swap(call, group, description, signature)
            output = beneath(member.module, *args, **kwargs)
        finally:
            member.active -= 1
            swap_back(description, signature)
        call.end = _sequence()
        member.calls.append(call)
        self._calls.append(call)
        try:
            if call.log.opaque or any(each.touched_elsewhere for each in watched):
                raise Unlike("a number that was used for more than comparing")
            if (match is None and self._world(member) != before) or not described(member.module).unchanged_since(
                description
            ):
                raise Unlike("something that was written to")
            later = Signature(signature.index, self._source)
            later.call(args, kwargs, state_of_torch())
            if not later.unchanged_since(signature):
                raise Unlike("an argument that was written to")
            effects = [changes(old, vars(place)) for old, (*_, place) in zip(places, signature.places, strict=True)]
            outcome = Outcome(output, effects, signature.tensors, self._storages, self._valued)
            made = [outcome.tensors[number] for number in outcome.differentiable]
            if why := unfit(made, call.start, Folded._backward_cls):
                raise Unlike(why)
            if match is not None and not (match.outcome is not None and outcome.same(match.outcome)):
                raise Unlike("another output than the template's")
        except Unlike as unlike:
            member.unlike = True
            group.failures += 1
            if match is not None or group.failures >= _MOST_FAILURES:
                self._bar_group(group, f"{member.fqn}: {unlike}")
            return output
        call.output_edges = [edge_of(tensor) for tensor in made]
        outcome.forget()
        call.outcome = outcome
        if match is None:
            group.templates.append(call)
        else:
            match.proofs += 1
            group.proofs.append((call, match))
        return output

    def _bar_group(self, group: Group, why: str) -> None:
        group.barred = True
        if group.folds:
            raise self._doubt(why)

    def _world(self, member: Member) -> Any:
        """What a block could write to outside of itself: other modules' attributes, random states."""
        if member.size == 1:  # torch's own
            return None
        numpy = sys.modules.get("numpy")
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            generator = torch.default_generator.get_state()
            state = ctypes.string_at(generator.data_ptr(), generator.numel())
        return (
            random.getstate(),
            state,
            None if numpy is None else numpy.random.get_state()[2],
            [tuple(map(id, held.values())) for held in self._attributes],
            [*map(len, self._containers)],
        )

    # --- when the graph is complete -----------------------------------------------------------------
    def read(self, outputs: list[torch.Tensor], *, backward: bool) -> None:
        """Prove on the graph of a run with these outputs that folded calls are like their templates. Raises Doubt."""
        templates = [call for call in self._calls if call.folds]
        if not templates:
            return
        ran = [call for call in self._calls if call.outcome is not None and (call.folds or call.member.proves)]
        graph = Graph(outputs, [(call.start, call.end, call) for call in ran])
        for call in ran:
            call.read(graph)
        suspects: set[str] = set()
        for call in self._calls:
            if call.template is not None:
                call.read(graph)
                if backward and call.node is not None and call.like(call.template) != (True, True):
                    suspects.add(call.member.fqn)
                call.gives = call.inputs_reached
        if suspects:
            raise self._doubt("other gradients than a template's", frozenset(suspects))
        self._prove_boundaries(graph, templates)
        for call in templates:
            self._listen(call)

    def _listen(self, call: Call) -> None:
        """Note which of a template's outputs get a gradient when the pass runs."""
        arrived: dict[int, bool] = {}
        call.arriving = arrived
        for position, (node, number) in enumerate(call.output_edges):
            if not call.outputs_wanted[position]:
                continue

            def note(gradients: Any, position: int = position, number: int = number) -> None:
                arrived[position] = gradients[number] is not None

            self._hooks.append(node.register_prehook(note))

    def _prove_boundaries(self, graph: Graph, templates: list[Call]) -> None:
        standing = set(templates)
        entries = {call: set(call.input_edges) for call in templates}
        exits = {call: set(call.output_edges) for call in templates}
        for here, there, edge in graph.crossings:
            if any(call in standing and edge not in exits[call] for call in there - here) or any(
                call in standing and edge not in entries[call] for call in here - there
            ):
                raise self._doubt("a tensor that went past a block's inputs and outputs")
        owned = {call: {id(parameter) for parameter in call.member.module.parameters()} for call in templates}
        folded = {
            id(parameter)
            for call in self._calls
            if call.template is not None
            for parameter in call.member.module.parameters()
        }
        running = {identity: call.member for call in templates for identity in owned[call]}
        for here, leaf, edge in graph.leaves:
            if leaf is self._nothing:
                continue
            if id(leaf) in folded:
                raise self._doubt("a parameter that is used outside of its block")
            owner = running.get(id(leaf))
            if owner is not None and not any(call.member is owner or id(leaf) in owned.get(call, ()) for call in here):
                raise self._doubt("a parameter that is used outside of its block")
            if any(call in standing and id(leaf) not in owned[call] and edge not in entries[call] for call in here):
                raise self._doubt("a block that uses another's parameter")

    def fill_gradients(self) -> None:
        """Give folded blocks' parameters gradients where their template's got one: an optimizer will look for them."""
        for member in sorted(self._folded(), key=lambda member: member.size):
            assert member.template is not None
            for mine, theirs in zip(member.module.parameters(), member.template.module.parameters(), strict=True):
                if theirs.grad is not None:
                    with torch._C._DisableTorchDispatch():
                        mine.grad = torch.empty_like(theirs.grad)

    # --- when the run is over -----------------------------------------------------------------------
    def charge(self, profile: Profile) -> Profile:
        """The profile with every fold charged. Raises Doubt."""
        folded = self._folded()
        for member in folded:
            assert member.template is not None
            if member.template.unlike or len(member.calls) != len(member.template.calls):
                raise self._doubt(f"{member.fqn} was called more or less often than its template")
        for call in self._calls:
            if call.template is not None and call.arrived != call.template.arrived:
                raise self._doubt(f"{call.member.fqn}: other gradients than its template's")
        if self.doubts:
            raise Doubt(self.doubts[0])
        folds = [fold_charge.Fold(member.fqn, member.template.fqn, member.size) for member in folded if member.template]
        proofs = [
            fold_charge.Proof(call.member.fqn, match.member.fqn, *call.like(match))
            for group in {id(member.group): member.group for member in folded}.values()
            for call, match in group.proofs
        ]
        charged, wrong = fold_charge.charge(profile, folds, proofs, self._counter.tally.routing.choices)
        if wrong := wrong or fold_charge.used_outside(profile, folds):
            raise self._doubt(f"{wrong} did not do what its siblings' template did")
        return charged

    def _folded(self) -> list[Member]:
        return [member for member in self.members.values() if member.template is not None]

    def close(self) -> None:
        """Let go of the graph."""
        for hook in self._hooks:
            hook.remove()
        for call in self._calls:
            call.node = None
            call.input_edges, call.output_edges = [], []


@contextmanager
def folded(model: nn.Module, counter: FlopCounter, barred: frozenset[str]) -> Iterator[Folding]:
    """While open, repeated blocks of `model`, which lives on meta, are folded; open inside the counter's block.

    barred: names of modules that are not folded, and with them those like them. Raises Doubt for whatever is raised
    inside once anything was folded: the run is then to be done again without.
    """
    folding = Folding(model, counter, barred)
    try:
        with wrapped(folding):
            yield folding
    except Exception as error:
        if not folding.touched or isinstance(error, Doubt):
            raise
        raise Doubt(f"{type(error).__name__} in a folded run") from error
    finally:
        folding.close()
