"""One call of a block: what it gave, and how a sibling's call gives the same without running."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from flopprof.counting.fold_graph import Edge, Graph
from flopprof.counting.fold_likeness import Signature, Unlike
from flopprof.counting.fold_numbers import Log

if TYPE_CHECKING:
    from flopprof.counting.fold_groups import Member

_SCALARS = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size})


class Doubt(Exception):
    """A fold that was made cannot be upheld. suspects: names of the modules to leave alone, where those are known."""

    def __init__(self, why: str, suspects: frozenset[str] = frozenset()) -> None:
        super().__init__(why)
        self.suspects = suspects


class _Passed(int):
    """An output that is one of the inputs: which."""


class _Made(int):
    """An output that the block made: which."""


class Outcome:
    """What a call gave: its tensors by shape, and the structure around them. Raises Unlike where it cannot be told.

    effects: attributes that it set on its own place in what it was given (a cache's layer), made again for siblings.
    """

    def __init__(
        self,
        output: Any,
        effects: list[dict[str, Any]],
        inputs: list[torch.Tensor],
        held: Collection[int],
        valued: Callable[[torch.Tensor], bool],
    ) -> None:
        self.tensors: list[torch.Tensor] = []
        self.shapes: list[Any] = []
        self._inputs = {id(tensor): position for position, tensor in enumerate(inputs)}
        self._storages = {tensor.untyped_storage()._cdata for tensor in inputs if tensor.is_meta}
        self._held, self._valued = held, valued
        self._made: dict[int, _Made] = {}
        self.output = self._stripped(output, apart=True)
        self.effects = [
            {key: self._stripped(value, apart=False) for key, value in effect.items()} for effect in effects
        ]
        self.differentiable = [number for number, shape in enumerate(self.shapes) if shape[3]]

    def _stripped(self, value: Any, *, apart: bool) -> Any:
        cls = type(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, apart=apart)
        if cls in _SCALARS:
            return value
        if cls is list or cls is tuple:
            return cls(self._stripped(item, apart=apart) for item in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return cls(*(self._stripped(item, apart=apart) for item in value))
        if cls is dict or cls is OrderedDict:
            return cls((key, self._stripped(item, apart=apart)) for key, item in value.items())
        raise Unlike(f"an output of type {cls.__name__}")

    def _tensor(self, tensor: torch.Tensor, *, apart: bool) -> _Passed | _Made:
        if id(tensor) in self._inputs:
            return _Passed(self._inputs[id(tensor)])
        if id(tensor) in self._made:
            return self._made[id(tensor)]
        if type(tensor) is not torch.Tensor or not tensor.is_meta or tensor.layout is not torch.strided:
            raise Unlike("an output that is no plain tensor")
        storage = tensor.untyped_storage()._cdata
        if storage in self._storages or storage in self._held:
            raise Unlike("an output that shares its memory")
        if tensor._backward_hooks or (tensor.requires_grad and tensor.grad_fn is None) or self._valued(tensor):
            raise Unlike("an output that holds more than a shape")
        if apart:
            self._storages.add(storage)
        self._made[id(tensor)] = made = _Made(len(self.tensors))
        self.tensors.append(tensor)
        self.shapes.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad))
        return made

    def forget(self) -> None:
        """Hold no tensor any more."""
        self.tensors.clear()
        self._inputs.clear()
        self._made.clear()

    def same(self, other: Outcome) -> bool:
        """The same structure and shapes?"""
        return self.shapes == other.shapes and self.output == other.output and self.effects == other.effects

    def again(self, call: Call, inputs: list[torch.Tensor], places: list[Any], nothing: torch.Tensor) -> Any:
        """The same for a sibling's call: empty tensors, of which the inputs get empty gradients."""
        made: dict[int, torch.Tensor] = {}
        if self.differentiable:
            wanting = [tensor for tensor in inputs if tensor.requires_grad]
            call.gradients = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in wanting]
            shapes = [self.shapes[number] for number in self.differentiable]
            outputs = Folded.applied(call, shapes, nothing, *wanting)
            call.node = outputs[0].grad_fn
            made = dict(zip(self.differentiable, outputs, strict=True))
        for number, shape in enumerate(self.shapes):
            if number not in made:
                made[number] = _empty(*shape[:3])
        for place, effect in zip(places, self.effects, strict=True):
            vars(place).update({key: _filled(value, inputs, made) for key, value in effect.items()})
        return _filled(self.output, inputs, made)


def _filled(tree: Any, inputs: list[torch.Tensor], made: dict[int, torch.Tensor]) -> Any:
    cls = type(tree)
    if cls is _Made:
        return made[tree]
    if cls is _Passed:
        return inputs[tree]
    if cls is list or cls is tuple:
        return cls(_filled(item, inputs, made) for item in tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return cls(*(_filled(item, inputs, made) for item in tree))
    if cls is dict or cls is OrderedDict:
        return cls((key, _filled(item, inputs, made)) for key, item in tree.items())
    return tree


def _empty(shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    # Out of every mode's sight: nothing ran.
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


class Folded(torch.autograd.Function):
    """Empty outputs for a call that is not run, and empty gradients for those inputs that the template gives one."""

    @classmethod
    def applied(cls, *args: Any) -> Any:
        """apply, past the counter, which would see that nobody made the outputs."""
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]  # torch's own, in C

    @staticmethod
    def forward(ctx: Any, call: Call, shapes: list[Any], _nothing: torch.Tensor, *_inputs: torch.Tensor) -> Any:
        """Empty tensors of these shapes."""
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(_empty(*shape[:3]) for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Empty gradients, and a note of which came. Raises Doubt in a pass that the graph was not read for."""
        call: Call = ctx.call
        if call.gives is None:
            raise Doubt("a backward pass before that of the loss")
        call.arriving = {position: gradient is not None for position, gradient in enumerate(gradients)}
        given = (_empty(*shape) if gives else None for shape, gives in zip(call.gradients, call.gives, strict=True))
        return (None, None, None, *given)


class Call:
    """A call of a member that ran and may stand for others, or that one of those stands for."""

    def __init__(self, member: Member, key: list[Any], values: list[Any], signature: Signature) -> None:
        self.member = member
        self.key = key
        self.values = values
        self.facts = signature.facts
        self.valued: list[torch.Tensor] = []  # kept, so that being the same tensor means something
        self.number = len(member.calls)
        self.log = Log()
        self.outcome: Outcome | None = None
        self.start = self.end = 0
        self.input_edges: list[Edge] = []
        self.output_edges: list[Edge] = []
        self.template: Call | None = None  # what stands for it; it did not run
        self.folds = self.proofs = 0
        self.node: Any = None
        self.gradients: list[Any] = []
        self.gives: tuple[bool, ...] | None = None
        self.arriving: dict[int, bool] = {}  # by output, once a backward pass ran: did it get a gradient?
        self.inputs_reached: tuple[bool, ...] = ()
        self.sums: tuple[bool, ...] = ()
        self.outputs_wanted: tuple[bool, ...] = ()

    def read(self, graph: Graph) -> None:
        """Note which gradients reach it and which it gives."""
        if self.template is None:
            self.inputs_reached = tuple(graph.within(edge, self) for edge in self.input_edges)
            self.sums = tuple(graph.first_after(edge, self) for edge in self.input_edges)
            self.outputs_wanted = tuple(graph.first_after(edge, self) for edge in self.output_edges)
            return
        self.inputs_reached = self.template.inputs_reached
        if self.node is None:
            return
        number = self.node._sequence_nr()
        edges = self.node.next_functions[1:]
        self.sums = tuple(any(other > number for other in graph.consumers.get(edge, ())) for edge in edges)
        self.outputs_wanted = tuple(
            bool(graph.consumers.get((self.node, position))) for position in range(len(self.template.output_edges))
        )

    @property
    def arrived(self) -> set[int]:
        """The outputs that got a gradient from outside in the backward pass."""
        return {position for position, arrived in self.arriving.items() if arrived}

    def like(self, other: Call) -> tuple[bool, bool]:
        """(the same gradients come and go, and of those that go the same are added to what was there)."""
        same = self.inputs_reached == other.inputs_reached and self.outputs_wanted == other.outputs_wanted
        reached = self.inputs_reached
        return same, same and all(
            mine == theirs for mine, theirs, used in zip(self.sums, other.sums, reached, strict=True) if used
        )
