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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from flopprof.counting import guesses
from flopprof.counting.operators import base_name
from flopprof.counting.values_plans import Plan
from flopprof.counting.values_store import Fact, Store, fits
from flopprof.errors import ValuesUnknown

_Tensor = torch.Tensor
_aten = torch.ops.aten
_node = torch._C._current_autograd_node
_stack_size = torch._C._len_torch_dispatch_stack
_stack_at = torch._C._get_dispatch_stack_at
_plain_dispatch = torch._C._disabled_torch_dispatch_impl

_SELECTIONS = frozenset({_aten.index.Tensor, _aten.masked_select.default})
_MASKED_SCATTER_BACKWARD = _aten.masked_scatter_backward.default
_COMPLAINTS = ("meta", "data-dependent", "fake impl")
_MOST_REPEATS = 1 << 25
_MOST_SPECIAL = 64  # labels are compared with this many tokens at most: not with a whole vocabulary
_NOTHING: frozenset[str] = frozenset()


@contextmanager
def carried(note: Callable[[str], object], inputs: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
    """While open, meta tensors carry small values; `note` is called with a sentence for each guess that was used.

    inputs  tensors on meta whose values were not given, by name: the names tell what may be taken for them

    Open inside another it joins it. Operators are counted as they are without it: whatever counter is open, before
    or later, sees each first. Questions that cannot be answered raise ValuesUnknown.
    """
    outer = _open()
    values = outer if outer is not None else Values()
    values.listeners.append(note)
    try:
        if outer is not None:
            for sentence in values.noted:
                note(sentence)
            values.take(inputs or {})
            yield
        else:
            with values, _Lists(values):
                values.take(inputs or {})
                yield
    finally:
        values.listeners.remove(note)
        if outer is None:
            values.store.clear()


def bypassed(func: Any, args: Any, kwargs: Any) -> None:
    """An operator ran that open values did not see: they forget what it wrote."""
    values = _open()
    if values is not None:
        values.forget(values.plan(func), args, kwargs)


def needs_values(error: BaseException) -> bool:
    """Was this raised for want of values: of meta tensors, or by an operator that has no meta kernel?"""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        text = str(following).lower()
        if isinstance(following, NotImplementedError) or any(word in text for word in _COMPLAINTS):
            return True
        following = following.__cause__ or following.__context__
    return False


def on_meta(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Does a call compute on the meta device: are the model's parameters there, or, where it has none, an input?"""
    held = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    if held:
        return all(parameter.is_meta for parameter in held)
    return any(isinstance(leaf, _Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs)))


def moved(inputs: Any) -> Any:
    """Inputs on the CPU, moved to meta: their values are carried along where values are."""

    def move(leaf: torch.Tensor) -> torch.Tensor:
        if leaf.device.type != "cpu" or not leaf.dim() or type(leaf) is not _Tensor:
            return leaf
        return leaf.detach().to("meta").requires_grad_(leaf.requires_grad)

    return tree_map_only(_Tensor, move, inputs)


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
        self._plans: dict[Any, Plan] = {}

    def __enter__(self) -> Values:
        with _lifted():
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        with _lifted(down_to=self):
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def plan(self, func: Any) -> Plan:
        """How to follow values through this overload."""
        plan = self._plans.get(func)
        if plan is None:
            plan = self._plans[func] = Plan(func, base_name(func))
        return plan

    def take(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Take for these inputs what their names allow."""
        for name, tensor in inputs.items():
            if type(tensor) is _Tensor and tensor.is_meta and self.store.get(tensor) is None:
                if tensor._base is not None or not fits(tensor, floats=False):
                    continue
                with _aside():
                    guess = guesses.of_input(name, tensor)
                    if guess is not None:
                        self.store.bind(tensor, guess.values, frozenset({guess.sentence}), guess.labels)

    def learn(self, tensor: torch.Tensor, data: Any) -> None:
        """A meta tensor was made of Python numbers."""
        if not fits(tensor, floats=self._floats()) or self.store.get(tensor) is not None:
            return
        said: set[str] = set()

        def known(leaf: Any) -> Any:
            if not isinstance(leaf, _Tensor) or not leaf.is_meta:
                return leaf
            fact = self.store.get(leaf)
            value = None if fact is None or fact.labels else self.store.shadow(leaf, fact)
            if fact is None or value is None:
                raise LookupError
            said.update(fact.guesses)
            return value

        with _aside():
            try:
                value = torch.tensor(tree_map(known, data), dtype=tensor.dtype, device="cpu")
            except Exception:  # not known then: of numpy's own kinds, or of unknown scalars
                return
            if value.shape == tensor.shape:
                self.store.bind(tensor, value, frozenset(said), labels=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and _foreign(types):
            return NotImplemented
        kwargs = kwargs or {}
        plan = self.plan(func)
        if plan.view:
            return func(*args, **kwargs)
        if plan.higher:
            return self._higher(plan, func, args, kwargs)
        if plan.composite:
            with self:
                return func.decompose(*args, **kwargs)
        metas, facts, known = self._facts(args, kwargs)
        if not metas and plan.device is None:
            return func(*args, **kwargs)  # real tensors alone
        if plan.filled is not None:
            return self._filled(plan, func, args, kwargs)
        if known and not plan.random:
            labels = _labels(plan, args, kwargs, self._fact) if any(fact.labels for fact in facts) else False
            known = labels is not None
        else:
            labels = False
        said = _NOTHING.union(*(fact.guesses for fact in facts)) if known else _NOTHING
        lowered = self._lowered(plan, args, kwargs) if known and not plan.random else None
        if _leaves_meta(plan, args, kwargs):
            return self._read(plan, func, args, kwargs, lowered, said)
        if func is _MASKED_SCATTER_BACKWARD:  # its result's size is given, though its kernel for meta looks for it
            return _aten.empty.memory_format(args[2], dtype=args[0].dtype, device="meta")
        if plan.asks:
            return self._answer(plan, func, args, kwargs, lowered, said, bool(labels))
        try:
            out = func(*args, **kwargs)
        except RuntimeError:  # no kernel for meta
            if lowered is None or plan.writes:
                raise
            return self._forge(func, lowered, said, bool(labels))
        if lowered is not None and self._compute(plan, func, args, kwargs, lowered, out, said, bool(labels)):
            return out
        self.forget(plan, args, kwargs)
        if lowered is None and not plan.writes and not self._in_backward():
            with _aside():
                guess = guesses.of_operator(plan.base, args, out)
                if guess is not None and fits(guess[0], floats=False):
                    self._bind(guess[0], guess[1].values, frozenset({guess[1].sentence}), labels=False)
        return out

    # --- what is known of the operands --------------------------------------------------------------------------
    def _fact(self, tensor: torch.Tensor) -> Fact | None:
        return self.store.get(tensor) if tensor.is_meta else None

    def _facts(self, args: Any, kwargs: Any) -> tuple[bool, list[Fact], bool]:
        """Is a meta tensor among them; the facts of those that are known; are all known?"""
        metas, known = False, True
        facts: list[Fact] = []
        for tensor in _tensors(args, kwargs):
            if tensor.is_meta:
                metas = True
                fact = self.store.get(tensor)
                if fact is None:
                    known = False
                else:
                    facts.append(fact)
        return metas, facts, known

    def _lowered(self, plan: Plan, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The same call on the CPU."""
        with _aside():
            try:
                lowered = tuple(map(self._lower, args)), {name: self._lower(item) for name, item in kwargs.items()}
            except LookupError:
                return None
        if plan.device is not None:
            positional, named = lowered
            if plan.device < len(positional):
                positional = (
                    *positional[: plan.device],
                    _on_cpu(positional[plan.device]),
                    *positional[plan.device + 1 :],
                )
            elif "device" in named:
                named["device"] = _on_cpu(named["device"])
            lowered = positional, named
        return lowered

    def _lower(self, item: Any) -> Any:
        if isinstance(item, _Tensor):
            if not item.is_meta:
                return item
            fact = self.store.get(item)
            value = self.store.shadow(item, fact) if fact is not None else None
            if value is None:
                raise LookupError  # not known
            return value
        if type(item) in (list, tuple):
            return [self._lower(each) for each in item] if any(isinstance(each, _Tensor) for each in item) else item
        return item

    def _floats(self) -> bool:
        """Are floats worth following? In a backward no model asks for them, but where it runs forward again."""
        return not self._in_backward()

    def _in_backward(self) -> bool:
        return _node() is not None and not torch.is_grad_enabled()

    # --- following ----------------------------------------------------------------------------------------------
    def _compute(
        self, plan: Plan, func: Any, args: Any, kwargs: Any, lowered: Any, out: Any, said: frozenset[str], labels: bool
    ) -> bool:
        """Run the operator on the CPU too, and let its results on meta carry what comes out. Did that work?"""
        floats = self._floats()
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, _Tensor) and leaf.is_meta]
        if not any(fits(result, floats=floats) for result in results):
            return False
        if plan.unwritten:
            with _aside():
                self._bind(results[0], None, _NOTHING, labels=False)
            return True
        with _aside():
            try:
                values = [leaf for leaf in tree_leaves(func(*lowered[0], **lowered[1])) if isinstance(leaf, _Tensor)]
            except Exception:  # the CPU has no kernel for this dtype, an index is out of bounds: not known
                return False
            for position, (result, value) in enumerate(zip(results, values, strict=True)):
                if self.store.get(result) is None and result.shape == value.shape and fits(result, floats=floats):
                    self._bind(result, value, said, labels=labels and not (plan.unique and position))
        for tensor in plan.written(args, kwargs):
            fact = self._fact(tensor)
            if fact is not None:
                fact.guesses |= said
                fact.labels |= labels
        return True

    def _filled(self, plan: Plan, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if isinstance(out, _Tensor) and out.is_meta and fits(out, floats=self._floats()):
            value: Any = plan.filled[0]  # type: ignore[index]
            if isinstance(value, tuple):
                value = args[value[0]] if len(args) > value[0] else kwargs["fill_value"]
            with _aside():
                filled = None if not value else _aten.full.default(out.shape, value, dtype=out.dtype, device="cpu")
                self._bind(out, filled, _NOTHING, labels=False)
        return out

    def _bind(self, tensor: torch.Tensor, value: torch.Tensor | None, said: frozenset[str], labels: bool) -> None:
        if type(tensor) is _Tensor or isinstance(tensor, torch.nn.Parameter):
            self.store.bind(tensor, value, said, labels)

    def forget(self, plan: Plan, args: Any, kwargs: Any) -> None:
        """Whatever the operator writes to is not known any more."""
        for tensor in plan.written(args, kwargs):
            if tensor.is_meta:
                self.store.forget(tensor)

    # --- answering ----------------------------------------------------------------------------------------------
    def say(self, sentences: frozenset[str]) -> None:
        """These guesses have decided something."""
        for sentence in sorted(sentences):
            if sentence not in self.noted:
                self.noted[sentence] = None
                for note in self.listeners:
                    note(sentence)

    def _read(self, plan: Plan, func: Any, args: Any, kwargs: Any, lowered: Any, said: frozenset[str]) -> Any:
        """A copy to a real device: real values."""
        if lowered is None or self._holds_labels(args):
            raise _unknown(plan)
        self.say(said)
        if plan.base == "aten::copy":
            return func(args[0], lowered[0][1], *args[2:], **kwargs)
        return func(*lowered[0], **{**lowered[1], **({"device": kwargs["device"]} if "device" in kwargs else {})})

    def _answer(
        self, plan: Plan, func: Any, args: Any, kwargs: Any, lowered: Any, said: frozenset[str], labels: bool
    ) -> Any:
        """An operator whose result's shape depends on values, or is a number."""
        if func in _SELECTIONS:
            return self._select(plan, func, args, kwargs, lowered, said, labels)
        if plan.base == "aten::repeat_interleave" and lowered is not None:
            repeats = lowered[0][0]
            with _aside():
                if repeats.numel() and int(repeats.sum()) > _MOST_REPEATS:
                    lowered = None
        if lowered is not None:
            self.say(said)
            return self._forge(func, lowered, said, labels)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            raise _unknown(plan) from error

    def _select(
        self, plan: Plan, func: Any, args: Any, kwargs: Any, lowered: Any, said: frozenset[str], labels: bool
    ) -> Any:
        """x[mask]: how many it selects is read from the mask, also where x is not known."""
        if plan.base == "aten::masked_select":
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
            source: Any = _aten.expand.default(args[0], shape)
            indices: list[Any] = [_aten.expand.default(args[1], shape)]
        else:
            source, indices = args[0], list(args[1])
        found: list[Any] = []
        asked = _NOTHING
        for index in indices:
            if isinstance(index, _Tensor) and index.dtype in (torch.bool, torch.uint8):
                fact = self._fact(index)
                if index.is_meta and (fact is None or fact.labels):
                    raise _unknown(plan)
                asked |= fact.guesses if fact is not None else _NOTHING
                found += self._places(index, fact)
            else:
                found.append(index)
        self.say(asked)
        out = _aten.index.Tensor(source, found)
        if lowered is not None:
            self._compute(plan, func, args, kwargs, lowered, out, said, labels)
        return out

    def _places(self, mask: torch.Tensor, fact: Fact | None) -> list[torch.Tensor]:
        """Where a mask is True: an index tensor on meta for each dimension."""
        with _aside():
            value = mask if fact is None else self.store.shadow(mask, fact)
            assert value is not None
            places = _aten.nonzero.default(value)
            said = fact.guesses if fact is not None else _NOTHING
            columns = []
            for column in range(places.shape[1]):
                index = _aten.empty.memory_format([places.shape[0]], dtype=torch.int64, device="meta")
                self._bind(index, _aten.select.int(places, 1, column), said, labels=False)
                columns.append(index)
            return columns

    def _forge(self, func: Any, lowered: Any, said: frozenset[str], labels: bool) -> Any:
        """What the operator gives on the CPU, its tensors moved to meta with their values."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, _Tensor):
                return leaf
            empty = _aten.empty_strided.default(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")
            if fits(empty, floats=self._floats()):
                self._bind(empty, leaf, said, labels)
            return empty

        with _aside():
            return tree_map(moved, func(*lowered[0], **lowered[1]))

    def _holds_labels(self, args: Any) -> bool:
        return any(fact is not None and fact.labels for fact in map(self._fact, _tensors(args, {})))

    def _higher(self, plan: Plan, func: Any, args: Any, kwargs: Any) -> Any:
        """A control-flow operator: no mode may be active around it, but its branches are followed."""

        def inside(leaf: Any) -> Any:
            if isinstance(leaf, _Tensor | type) or not callable(leaf):
                return leaf

            def followed(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return leaf(*args, **kwargs)

            return followed

        if plan.base == "higher_order::cond" and isinstance(args[0], _Tensor) and args[0].is_meta:
            fact = self._fact(args[0])
            if fact is None:
                raise _unknown(plan)
            self.say(fact.guesses)
            with _aside():
                args = (self.store.shadow(args[0], fact), *args[1:])
        if "mutation" in plan.base or "functionalized" in plan.base:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, _Tensor) and leaf.is_meta:
                    self.store.forget(leaf)
        args, kwargs = tree_map(inside, (args, kwargs))
        return func(*args, **kwargs)


class _Lists(TorchFunctionMode):
    """torch.tensor(numbers, device="meta") drops its numbers before any dispatch mode sees it; so does x[[0, -1]]."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _INDEXED and args[0].is_meta:
            args = (args[0], self._index(args[1], args[0].device), *args[2:])
        out = func(*args, **(kwargs or {}))
        position = _FROM_NUMBERS.get(func)
        if position is not None and isinstance(out, _Tensor) and out.is_meta:
            given = [*args[position:], *((kwargs or {}).get(name) for name in ("data", "obj"))]
            if given and not isinstance(given[0], _Tensor):
                self._values.learn(out, given[0])
        return out

    def _index(self, index: Any, device: torch.device) -> Any:
        if isinstance(index, tuple):
            return tuple(self._index(each, device) for each in index)
        if not isinstance(index, list):
            return index
        try:
            made = torch.tensor(index, device=device)
        except (TypeError, ValueError, RuntimeError):  # slices within, or tensors: torch's to read
            return index
        self._values.learn(made, index)
        return made


_INDEXED = frozenset({torch.Tensor.__getitem__, torch.Tensor.__setitem__})
_FROM_NUMBERS: dict[Any, int] = {
    torch.tensor: 0, torch.as_tensor: 0, torch.asarray: 0, torch.Tensor.new_tensor: 1,
}  # fmt: skip


@contextmanager
def _aside() -> Iterator[None]:
    """What runs inside is seen by no mode, no subclass and no autograd."""
    with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        yield


@contextmanager
def _lifted(down_to: TorchDispatchMode | None = None) -> Iterator[None]:
    """The modes above the lowest place (or above this one) are off, and afterwards on again."""
    lifted = []
    while _stack_size() and _stack_at(_stack_size() - 1) is not down_to:
        if _stack_at(_stack_size() - 1).is_infra_mode():
            break
        lifted.append(_pop_mode())
    try:
        yield
    finally:
        for mode in reversed(lifted):
            _push_mode(mode)


def _labels(plan: Plan, args: Any, kwargs: Any, fact_of: Callable[[torch.Tensor], Fact | None]) -> bool | None:
    """Of an operator on labels: are its results labels, or known as usual (False), or not known at all (None)?"""
    if plan.carrying:
        dtype = kwargs.get("dtype")
        return None if dtype is torch.bool or (dtype is not None and dtype.is_floating_point) else True
    if plan.unique:
        return True
    if not (plan.equal or plan.ordered) or len(args) < 2:
        return None
    left, right = args[0], args[1]
    if not isinstance(left, _Tensor):
        return None
    fact = fact_of(left)
    if fact is None or not fact.labels:
        left, right = right, left
    if isinstance(right, _Tensor):
        other = fact_of(right)
        if other is not None and other.labels:
            return False if plan.equal else None
        return False if plan.equal and right.numel() <= _MOST_SPECIAL else None
    return False if plan.equal or (isinstance(right, int | float) and right <= 0) else None


def _leaves_meta(plan: Plan, args: Any, kwargs: Any) -> bool:
    if plan.base == "aten::copy":
        return bool(args[1].is_meta and not args[0].is_meta)
    if plan.base == "aten::_to_copy" and args[0].is_meta:
        device = kwargs.get("device")
        return device is not None and torch.device(device).type != "meta"
    return False


def _tensors(args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    for item in (*args, *kwargs.values()):
        if isinstance(item, _Tensor):
            yield item
        elif type(item) in (list, tuple):
            for each in item:
                if isinstance(each, _Tensor):
                    yield each


def _on_cpu(device: Any) -> Any:
    return "cpu" if device is not None and torch.device(device).type == "meta" else device


def _foreign(types: Any) -> bool:
    """Does a tensor subclass with its own dispatch take part? Then its inner operators are followed."""
    return any(cls is not _Tensor and cls.__torch_dispatch__ is not _plain_dispatch for cls in types)


def _unknown(plan: Plan) -> ValuesUnknown:
    return ValuesUnknown(
        f"{plan.base} asks for values that the meta device does not have, and that nothing honest can be guessed for: "
        "give the inputs that decide them on the CPU (small integers keep their values on meta), or count on the CPU."
    )
