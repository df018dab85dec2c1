"""The flow of gradients through a graph: which operands want one, and which calls a backward pass would reach.

No tensor is asked: parameters and inputs that require gradients are told, and what follows from them is worked out
call by call, as autograd would. A result wants a gradient where grad mode is on, an operand wants one, the operator
passes one on and the result is floating or complex. Results that share storage change together when one of them is
written to. From the results that are differentiated, the calls that a backward pass runs are found backwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from flopprof.counting.attribution import Frame
from flopprof.counting.operands import Source, merged
from flopprof.counting.operators import Entry


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in text.split())


# Results that autograd takes for new, whatever they were made from (torch's derivatives.yaml, and detach).
CUTS = _names(
    """detach detach_copy data empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty
    new_empty_strided new_full new_ones new_zeros empty empty_strided empty_permuted zeros ones full arange range
    linspace logspace eye rand randn randint randperm normal_functional scalar_tensor tril_indices triu_indices
    _efficientzerotensor histc"""
)
# Only the first operand is differentiated: of the others, shape or type is read.
FIRST_ONLY = _names("expand_as view_as reshape_as type_as to resize_as _reshape_alias")
# Composite operators that give their operand's values in another shape, type or place.
_PASSED_ON = _names(
    """reshape reshape_as view_as flatten unflatten contiguous to type_as expand_as lift_fresh
    lift_fresh_copy swapaxes moveaxis movedim mT mH numpy_T adjoint"""
)


class _Group:
    """Tensors that share storage: what they hold, and the call that last wrote a gradient's path into it."""

    __slots__ = ("source", "stamp", "writer")

    def __init__(self, source: Source | None) -> None:
        self.source = source
        self.writer: Step | None = None
        self.stamp = 0


class Value:
    """One tensor of the graph: the storage that it lies in, and the call (or leaf) that a gradient would go to."""

    __slots__ = ("group", "leaf", "maker", "stamp")

    def __init__(self, group: _Group, maker: Step | None = None, *, leaf: bool = False) -> None:
        self.group = group
        self.stamp = group.stamp
        self.maker = maker
        self.leaf = leaf

    @property
    def source(self) -> Source | None:
        """The parameter or buffer that its elements come from."""
        return self.group.source

    def producer(self) -> Step | None:
        """The call that a gradient of this tensor goes to next."""
        return self.group.writer if self.group.stamp > self.stamp else self.maker

    def origin(self) -> tuple[Any, Any] | None:
        """What tells whether two readers of it send their gradients to one place; None: nobody wants one."""
        if self.group.stamp > self.stamp:
            return self.group.writer, self.group
        return (self.maker, self) if self.maker is not None else (self, None) if self.leaf else None

    def wants(self) -> bool:
        """Does autograd want its gradient?"""
        return self.leaf or self.producer() is not None


class Step:
    """One operator call of a graph: its arguments as shaped things, and what autograd knows of it."""

    __slots__ = (
        "args", "edges", "entry", "frame", "kwargs", "line", "live", "operands", "origins", "out", "reached",
        "results", "times", "wants",
    )  # fmt: skip

    def __init__(
        self, entry: Entry, args: Any, kwargs: Any, out: Any, frame: Frame, times: int, line: str = ""
    ) -> None:
        self.entry = entry
        self.args = args
        self.kwargs = kwargs
        self.out = out
        self.frame = frame
        self.line = line
        self.times = times  # a call inside a scanned body runs once for each element
        self.operands: list[tuple[int, Any, Value]] = []  # of each tensor: position of its argument, itself, value
        self.origins: list[tuple[Any, Any] | None] = []  # of each operand: where its gradient goes
        self.wants: tuple[bool, ...] = ()  # of each operand, as the call saw it
        self.edges: list[tuple[Any, Any] | None] = []  # where its backward sends gradients
        self.results: list[Value] = []
        self.live = False  # a backward pass runs it
        self.reached: set[int] = set()  # ids of the results that a gradient comes from

    def differentiated(self) -> tuple[int, ...]:
        """Which of its results a backward pass comes from, by number; all where it is not told apart."""
        found = tuple(i for i, value in enumerate(self.results) if id(value) in self.reached)
        return found or tuple(range(len(self.results)))

    def wanted_at(self, position: int) -> bool:
        """Does any tensor at this argument want a gradient, and a backward pass run this call?"""
        return self.live and any(
            want for (where, _tensor, _value), want in zip(self.operands, self.wants, strict=True) if where == position
        )


class Severed(Exception):
    """An operator that the flow went through passes no gradient on: the flow is to be followed again without it."""

    def __init__(self, func: Any) -> None:
        super().__init__(str(func))
        self.func = func


class Flow:
    """Values and calls in the order in which they run."""

    def __init__(self, severed: frozenset[Any] = frozenset()) -> None:
        self.steps: list[Step] = []
        self._severed = severed  # operators that were found to pass no gradient on

    def leaf(self, *, wants: bool, source: Source | None = None) -> Value:
        """A tensor that no call made: an input, a parameter, a constant."""
        return Value(_Group(source), leaf=wants)

    def record(self, step: Step, operands: list[tuple[int, Any, Value]], *, graded: bool) -> list[Value]:
        """Add a call with these tensors among its arguments; returns the values of its result's tensors, in order."""
        entry, values = step.entry, [value for _position, _tensor, value in operands]
        step.operands = operands
        step.wants = tuple(graded and value.wants() for value in values)
        step.origins = [value.origin() if want else None for value, want in zip(values, step.wants, strict=True)]
        self.steps.append(step)
        passed = step.wants[:1] if entry.name in FIRST_ONLY else step.wants
        differentiated = any(passed) and entry.name not in CUTS and entry.func not in self._severed
        if differentiated:
            step.edges = step.origins[:1] if entry.name in FIRST_ONLY else step.origins
        known = _aliases(entry.func)
        for position, _tensor, value in operands:
            if position in known.written:
                _write(value, step if differentiated else None, entry.name)
        step.results = [
            _result(step, tensor, known, known.of(index), differentiated, graded)
            for index, tensor in enumerate(tensors_of(step.out))
        ]
        return step.results

    def want(self, value: Value) -> None:
        """From here on its gradient is wanted (`requires_grad_`)."""
        if not value.wants():
            value.leaf, value.maker, value.group = True, None, _Group(value.source)
            value.stamp = 0


def _result(
    step: Step, tensor: Any, known: _Aliases, sharing: frozenset[int], differentiated: bool, graded: bool
) -> Value:
    maker = step if differentiated and (tensor.is_floating_point() or tensor.is_complex()) else None
    for position, operand, value in step.operands:
        if position not in sharing and not known.composite:
            continue
        if position in known.written:  # in place: the result is the operand
            return value
        # reshape, contiguous, dropout ...: a view or a copy, as it comes
        if not known.composite or _same_storage(operand, tensor):
            # Writing to what was detached, or viewed without gradients, is nothing to its base.
            group = value.group if graded and step.entry.name not in CUTS else _Group(value.source)
            return Value(group, maker)
    return Value(_Group(_derived(step)), maker)


def reach(outputs: list[Value]) -> None:
    """Mark the calls that a backward pass from these values runs."""
    origins = [value.origin() for value in outputs]
    while origins:
        origin = origins.pop()
        if origin is None or not isinstance(origin[0], Step):
            continue
        step, result = origin
        step.reached.add(id(result))
        if not step.live:
            step.live = True
            origins += step.edges


def tensors_of(tree: Any) -> list[Any]:
    """The tensors of a result, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _write(value: Value, step: Step | None, name: str) -> None:
    if name == "aten::detach":
        value.group, value.maker, value.stamp, value.leaf = _Group(value.source), None, 0, False
    elif step is not None:
        value.group.writer = step
        value.group.stamp += 1


class _Aliases:
    """What an operator's schema says of storage: which arguments it writes to, and what its results share."""

    __slots__ = ("composite", "func", "results", "written")

    def __init__(self, func: Any) -> None:
        self.func = func  # keeps id(func) from being taken
        schema = getattr(func, "_schema", None)
        arguments = (
            [(i, item.alias_info) for i, item in enumerate(schema.arguments) if item.alias_info] if schema else []
        )
        self.written = frozenset(i for i, alias in arguments if alias.is_write)
        # Of each result: the positions of the arguments whose storage it may share.
        self.results = [
            frozenset(i for i, alias in arguments if item.alias_info and alias.before_set & item.alias_info.before_set)
            for item in (schema.returns if schema else ())
        ]
        if schema and len(schema.returns) == 1 and not self.results[0]:  # Tensor(a -> *) self -> Tensor(a)[]
            self.results = [frozenset(i for i, alias in arguments if "*" in alias.after_set and not alias.is_write)]
        self.composite = schema is not None and _composite(func)

    def of(self, index: int) -> frozenset[int]:
        """The arguments that the result's tensor with this index may share storage with."""
        if not self.results:
            return frozenset()
        return self.results[min(index, len(self.results) - 1)]


_known: dict[int, _Aliases] = {}


def _aliases(func: Any) -> _Aliases:
    found = _known.get(id(func))
    if found is None:
        found = _known[id(func)] = _Aliases(func)
    return found


def _composite(func: Any) -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))
    except RuntimeError:  # lives in Python alone
        return False


def _same_storage(operand: Any, result: Any) -> bool:
    try:
        return bool(operand.untyped_storage()._cdata == result.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse, nested
        return False


def _derived(step: Step) -> Source | None:
    """Where every operand is a parameter or buffer and the operator only reforms them, so is the result."""
    if not (step.entry.derives or step.entry.name in _PASSED_ON) or not step.operands:
        return None
    operands = step.operands[:1] if step.entry.name in FIRST_ONLY else step.operands
    sources = [value.source for _position, _tensor, value in operands]
    known = [source for source in sources if source is not None]
    return merged(known) if len(known) == len(sources) else None
