"""Meta tensors that carry small values, so that models that ask tensors questions run without data.

Beside the meta storage of each small integer or boolean tensor (and of very small floating ones) a CPU storage is
held, and an operator whose operands are all known runs there too. Views share storages, so views and writes in place
need nothing of their own. Questions (`.item()`, `bool(mask.all())`, `nonzero`, `x[mask]`) are answered from it; one
about a value that nobody knows raises ValuesUnknown, unless `guesses` has an answer, which is then noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from flopprof.counting import guesses
from flopprof.counting.operators import base_name
from flopprof.counting.values_answers import Call, answer, forge, gathered, higher, joined, read
from flopprof.counting.values_inputs import holds_numbers, moved, needs_values, on_meta, remember, remembered
from flopprof.counting.values_lists import Lists
from flopprof.counting.values_plans import Plan, labelled, leaves_meta, on_cpu, tensors_in
from flopprof.counting.values_stack import foreign, lifted
from flopprof.counting.values_store import Fact, Store, aside, fits, is_large
from flopprof.errors import ValuesUnknown
from flopprof.formulas.attention import READERS

__all__ = ["Values", "bypassed", "carried", "holds_numbers", "moved", "needs_values", "on_meta", "remembering"]

_Tensor = torch.Tensor
_aten = torch.ops.aten
_node = torch._C._current_autograd_node
_stack_size = torch._C._len_torch_dispatch_stack
_stack_at = torch._C._get_dispatch_stack_at

_MASKED_SCATTER_BACKWARD = _aten.masked_scatter_backward.default
_NOTHING: frozenset[str] = frozenset()
_LARGE_FLOATS = 1 << 27  # elements of large floating tensors that are computed in all


@contextmanager
def carried(
    note: Callable[[str], object],
    inputs: Mapping[str, torch.Tensor] | None = None,
    told: guesses.Tokens | None = None,
    model: Any = None,
) -> Iterator[None]:
    """While open, meta tensors carry small values; `note` is called with a sentence for each guess that was used.

    inputs  tensors on meta whose values were not given, by name: the names tell what may be taken for them
    model   a module that runs inside: what it was built with, as far as that is remembered, is known
    told    what routers choose, where that is known

    Open inside another it joins it. Operators are counted as they are without it: whatever counter is open, before
    or later, sees each first. Questions that cannot be answered raise ValuesUnknown, at the latest on leaving.
    """
    outer = _open()
    values = outer if outer is not None else Values()
    values.listeners.append(note)
    before, values.told = values.told, told or values.told
    refused = len(values.refused)
    try:
        if outer is not None:
            for sentence in values.noted:
                note(sentence)
            values.take(inputs or {}, model)
            yield
        else:
            with values, Lists(values):
                values.take(inputs or {}, model)
                yield
        if len(values.refused) > refused:  # the model caught it, and went on by a branch that nobody knows to be right
            raise values.refused[refused]
    finally:
        values.listeners.remove(note)
        values.told = before
        if outer is None:
            values.store.clear()
            values.refused.clear()  # their tracebacks hold what the model held


def remembering(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """What `build` makes on meta: a model whose buffers remember the numbers that they were built with."""
    with carried(lambda _: None):
        model = build()
        values = _open()
        if values is not None:
            remember(model, values.known)
        return model


def bypassed(func: Any, args: Any, kwargs: Any) -> None:
    """An operator ran that open values did not see: they forget what it wrote."""
    values = _open()
    if values is not None:
        values.forget(values.plan(func), args, kwargs)


def _lengths(tensor: torch.Tensor) -> list[int] | None:
    """The elements of a meta tensor, for formulas; None where they are not known."""
    values = _open()
    fact = values.fact(tensor) if values is not None else None
    if values is None or fact is None or fact.labels:
        return None
    values.say(fact.guesses)
    with aside():
        value = values.store.shadow(tensor, fact)
        return None if value is None else value.tolist()


READERS.append(_lengths)


def _open() -> Values | None:
    for index in range(_stack_size()):
        mode = _stack_at(index)
        if type(mode) is Values:
            return mode
    return None


class Values(TorchDispatchMode):
    """The values that are known, followed through every operator. It lies below every other mode."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True, as for the counter: whether a function runs compiled is not for torch to tell by this mode."""
        return True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store = Store()
        self.listeners: list[Callable[[str], object]] = []
        self.noted: dict[str, None] = {}
        self.refused: list[ValuesUnknown] = []
        self.told: guesses.Tokens | None = None
        self._plans: dict[Any, Plan] = {}
        self._budget = _LARGE_FLOATS

    def __enter__(self) -> Values:
        with lifted():
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        with lifted(down_to=self):
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def plan(self, func: Any) -> Plan:
        """How to follow values through this overload."""
        plan = self._plans.get(func)
        if plan is None:
            plan = self._plans[func] = Plan(func, base_name(func))
        return plan

    def take(self, inputs: Mapping[str, torch.Tensor], model: Any = None) -> None:
        """Take for these inputs what their names allow, and for what a model holds what it was built with."""
        for tensor, value in remembered(model):
            if self.store.get(tensor) is None:
                with aside():
                    self.store.bind(tensor, value, _NOTHING, labels=False)
        for name, tensor in inputs.items():
            if type(tensor) is _Tensor and tensor.is_meta and self.store.get(tensor) is None:
                if tensor._base is not None or not fits(tensor, floats=False):
                    continue
                with aside():
                    guess = guesses.of_input(name, tensor)
                    if guess is not None:
                        self.store.bind(tensor, guess.values, frozenset({guess.sentence}), guess.labels)

    def learn(self, tensor: torch.Tensor, data: Any) -> None:
        """A meta tensor was made of Python numbers."""
        if not self.fits(tensor) or self.store.get(tensor) is not None:
            return
        said: set[str] = set()

        def known(leaf: Any) -> Any:
            if not isinstance(leaf, _Tensor) or not leaf.is_meta:
                return leaf
            fact = self.fact(leaf)
            value = None if fact is None or fact.labels else self.store.shadow(leaf, fact)
            if fact is None or value is None:
                raise LookupError
            said.update(fact.guesses)
            return value

        with aside():
            try:
                value = torch.tensor(tree_map(known, data), dtype=tensor.dtype, device="cpu")
            except Exception:  # not known then: of numpy's own kinds, or of unknown scalars
                return
            if value.shape == tensor.shape:
                self.store.bind(tensor, value, frozenset(said), labels=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and foreign(types):
            return NotImplemented
        kwargs = kwargs or {}
        plan = self.plan(func)
        if plan.view:
            return func(*args, **kwargs)
        if plan.higher:
            return higher(self, Call(plan, func, args, kwargs, None, _NOTHING, labels=False))
        if plan.composite:
            with self:
                return func.decompose(*args, **kwargs)
        metas, facts, known = self._facts(plan, args, kwargs)
        if not metas and plan.device is None:
            return func(*args, **kwargs)  # real tensors alone
        if plan.filled is not None:
            return self._filled(plan, func, args, kwargs)
        if not known and plan.plain:  # as nearly all of a model does
            try:
                out = func(*args, **kwargs)
            except RuntimeError as error:
                args, kwargs = gathered(self, plan, args, kwargs, error)
                out = func(*args, **kwargs)
            if plan.writes:
                self.forget(plan, args, kwargs)
            elif plan.guessed and not self._in_backward():
                self._guess(plan, args, out)
            elif facts and plan.base == "aten::cat":
                joined(self, args, out)
            return out
        call = self._call(plan, func, args, kwargs, facts if known and not plan.random else None)
        if leaves_meta(plan, args, kwargs):
            return read(self, call)
        if func is _MASKED_SCATTER_BACKWARD:  # its result's size is given, though its kernel for meta looks for it
            return _aten.empty.memory_format(args[2], dtype=args[0].dtype, device="meta")
        if plan.asks:
            return answer(self, call)
        try:
            out = func(*args, **kwargs)
        except RuntimeError as error:
            if call.lowered is not None and not plan.writes:  # no kernel for meta
                return forge(self, call)
            args, kwargs = gathered(self, plan, args, kwargs, error)
            out = func(*args, **kwargs)
        if not self.compute(call, out):
            self.forget(plan, args, kwargs)
        return out

    # --- what is known of the operands ------------------------------------------------------------------------------
    def fact(self, tensor: torch.Tensor) -> Fact | None:
        """What is known of a tensor's values, if it is on meta."""
        fact = self.store.get(tensor) if tensor.is_meta else None
        return fact if fact is not None and fact.written else None

    def known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The values of a meta tensor, on the CPU; None where they are not known, or guessed."""
        fact = self.fact(tensor)
        if fact is None or fact.guesses:
            return None
        with aside():
            return self.store.shadow(tensor, fact)

    def floats(self) -> bool:
        """Are floats worth following? In a backward no model asks for them, but where it runs forward again."""
        return not self._in_backward()

    def fits(self, tensor: torch.Tensor) -> bool:
        """Is a tensor worth carrying values, within the budget?"""
        if not fits(tensor, floats=self.floats()):
            return False
        if is_large(tensor):
            self._budget -= tensor.numel()
            return self._budget >= 0
        return True

    def _in_backward(self) -> bool:
        return _node() is not None and not torch.is_grad_enabled()

    def _facts(self, plan: Plan, args: Any, kwargs: Any) -> tuple[bool, list[Fact], bool]:
        """Is a meta tensor among them; the facts of those that are known; are all known?"""
        metas, known = False, True
        facts: list[Fact] = []
        for tensor in tensors_in(args, kwargs):
            if tensor.is_meta:
                metas = True
                fact = self.store.get(tensor)
                if fact is None or not (fact.written or plan.overwrites(tensor, args, kwargs)):
                    known = False
                else:
                    facts.append(fact)
        return metas, facts, known

    def _call(self, plan: Plan, func: Any, args: Any, kwargs: Any, facts: list[Fact] | None) -> Call:
        labels: bool | None = None
        if facts is not None:
            labels = labelled(plan, args, kwargs, self.fact) if any(fact.labels for fact in facts) else False
        if facts is None or labels is None:
            return Call(plan, func, args, kwargs, None, _NOTHING, labels=False)
        said = _NOTHING.union(*(fact.guesses for fact in facts))
        return Call(plan, func, args, kwargs, self._lowered(plan, args, kwargs), said, labels)

    def _lowered(self, plan: Plan, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The same call on the CPU."""
        with aside():
            try:
                positional = [self._lower(item) for item in args]
                named = {name: self._lower(item) for name, item in kwargs.items()}
            except LookupError:  # the bits of one do not tell its values
                return None
        if plan.device is not None and plan.device < len(positional):
            positional[plan.device] = on_cpu(positional[plan.device])
        elif "device" in named:
            named["device"] = on_cpu(named["device"])
        return positional, named

    def _lower(self, item: Any) -> Any:
        if isinstance(item, _Tensor):
            if not item.is_meta:
                return item
            fact = self.store.get(item)
            value = self.store.shadow(item, fact) if fact is not None else None
            if value is None:
                raise LookupError
            return value
        if type(item) in (list, tuple):
            return [self._lower(each) for each in item] if any(isinstance(each, _Tensor) for each in item) else item
        return item

    # --- following them ---------------------------------------------------------------------------------------------
    def compute(self, call: Call, out: Any) -> bool:
        """Run the operator on the CPU too, and let its results on meta carry what comes out. Was that possible?"""
        if call.lowered is None:
            return False
        plan = call.plan
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, _Tensor) and leaf.is_meta]
        fitting = [self.fits(result) for result in results]
        if not any(fitting):
            return False
        with aside():
            if plan.unwritten:
                self.store.bind(results[0], None, _NOTHING, labels=False)
                return True
            args, kwargs = call.lowered
            try:
                values = [leaf for leaf in tree_leaves(call.func(*args, **kwargs)) if isinstance(leaf, _Tensor)]
            except Exception:  # the CPU has no kernel for this dtype, an index is out of bounds: not known
                return False
            for position, (result, value) in enumerate(zip(results, values, strict=True)):
                if self.store.get(result) is None and result.shape == value.shape and fitting[position]:
                    self.store.bind(result, value, call.said, call.labels and not (plan.unique and position))
        for tensor in plan.written(call.args, call.kwargs):
            fact = self.store.get(tensor)
            if fact is not None:
                fact.guesses |= call.said
                fact.labels |= call.labels
                fact.written = True
        return True

    def _guess(self, plan: Plan, args: Any, out: Any) -> None:
        with aside():
            guess = guesses.of_operator(plan.base, args, out, self.told)
            if guess is not None and fits(guess[0], floats=False):
                self.store.bind(guess[0], guess[1].values, frozenset({guess[1].sentence}), guess[1].labels)

    def _filled(self, plan: Plan, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if isinstance(out, _Tensor) and out.is_meta and self.fits(out):
            value: Any = plan.filled[0]  # type: ignore[index]
            if isinstance(value, tuple):
                value = args[value[0]] if len(args) > value[0] else kwargs["fill_value"]
            with aside():
                filled = None
                if value is not None:
                    filled = _aten.full.default(out.shape, value, dtype=out.dtype, device="cpu")
                self.store.bind(out, filled, _NOTHING, labels=False)
        return out

    def forget(self, plan: Plan, args: Any, kwargs: Any) -> None:
        """Whatever the operator writes to is not known any more."""
        for tensor in plan.written(args, kwargs):
            if tensor.is_meta:
                self.store.forget(tensor)

    def say(self, sentences: frozenset[str]) -> None:
        """These guesses have decided something."""
        for sentence in sorted(sentences - self.noted.keys()):
            self.noted[sentence] = None
            for note in self.listeners:
                note(sentence)
