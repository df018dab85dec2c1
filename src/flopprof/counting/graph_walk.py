"""Walk an exported graph: each operator call becomes a step of the flow, bodies of control flow included."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from flopprof.counting.attribution import Frame
from flopprof.counting.gradients import Flow, Step, Value, tensors_of
from flopprof.counting.graph_backward import entry_of
from flopprof.counting.lines import line_in_trace, source_text
from flopprof.errors import Untraceable

_HIGHER = torch._ops.HigherOrderOperator

# Marks a node that stands for `requires_grad_`, which no operator is.
WANTED = "flopprof_wanted"

BRANCH = "torch.cond: one of its branches runs, and the graph does not say which: the one with more FLOPs was counted."
LOOP = "torch.while_loop: the graph does not say how often it runs: one round was counted."


class Walk:
    """One walk over a graph and the graphs inside it."""

    def __init__(
        self,
        flow: Flow,
        frame_of: Callable[[fx.Node], Frame | None],
        cost: Callable[[Step], int],
        *,
        lines: bool = False,
    ) -> None:
        self.flow = flow
        self.assumptions: dict[str, None] = {}
        self._frame_of = frame_of
        self._cost = cost
        self._lines = lines

    def graph(
        self, module: Any, values: dict[str, list[Value]], frame: Frame, *, graded: bool = True, times: int = 1
    ) -> list[tuple[Any, list[Value]]]:
        """Of each thing that the graph returns: it, and the values of its tensors.

        `values` holds those of the placeholders, by name.
        """
        env: dict[fx.Node, list[Value]] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = values.get(node.name) or self._constants(node.meta.get("val"))
            elif node.op == "get_attr":
                env[node] = self._constants(_attribute(module, node.target))
            elif node.op == "call_function":
                env[node] = self._call(module, node, env, frame, graded, times)
            elif node.op == "output":
                returned = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
                return [(_shown(item), [value for one in _nodes(item) for value in env[one]]) for item in returned]
            else:
                raise LookupError(f"a graph of operators holds the node {node.op} {node.target}")
        return []

    def _constants(self, held: Any) -> list[Value]:
        return [self.flow.leaf(wants=False) for _tensor in tensors_of(held)]

    def _call(
        self, module: Any, node: fx.Node, env: dict[fx.Node, list[Value]], frame: Frame, graded: bool, times: int
    ) -> list[Value]:
        target: Any = node.target
        frame = self._frame_of(node) or frame
        if target is operator.getitem:
            return _item(node, env)
        if isinstance(target, _HIGHER):
            return self._higher(module, node, env, frame, graded, times)
        if getattr(target, "__module__", "") == "torch._functorch.predispatch":
            raise Untraceable(
                "torch.export writes the inside of torch.vmap down without its batch. Use flopprof.count, which runs "
                "the model."
            )
        if not isinstance(target, torch._ops.OpOverload):
            return self._constants(node.meta.get("val"))  # arithmetic on sizes
        return self._step(target, node, env, frame, graded, times)

    def _step(
        self, target: Any, node: fx.Node, env: dict[fx.Node, list[Value]], frame: Frame, graded: bool, times: int
    ) -> list[Value]:
        if node.meta.get("custom", {}).get(WANTED):
            (value,) = env[_nodes(node.args)[0]]
            self.flow.want(value)
            return [value]
        step = self._made(target, node, frame, times)
        operands = []
        positions = _keyword_positions(target, node)
        for position, item in [*enumerate(node.args), *((positions[key], value) for key, value in node.kwargs.items())]:
            for operand in _nodes(item):
                tensors = tensors_of(_held(operand))
                operands += [(position, tensor, value) for tensor, value in zip(tensors, env[operand], strict=True)]
        return self.flow.record(step, operands, graded=graded)

    def _made(self, target: Any, node: fx.Node, frame: Frame, times: int) -> Step:
        self._sized(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _held)
        line = self._line(node, frame)
        return Step(entry_of(target), args, kwargs, node.meta.get("val"), frame, times=times, line=line)

    def _sized(self, node: fx.Node) -> None:
        for tensor in tensors_of(_held(node)):
            # Of a sparse tensor, how many elements are not zero is no part of the graph.
            if any(not isinstance(size, int) for size in tensor.shape) or _is_sparse(tensor):
                line = line_in_trace(node.meta.get("stack_trace"))
                where = f" at {line} ({source_text(line)})" if line else ""
                raise Untraceable(
                    f"the shape {tuple(tensor.shape)} of {node.name}{where} depends on values, which a graph of "
                    "torch.export does not have. Use flopprof.count, which runs the model."
                )

    def _line(self, node: fx.Node, frame: Frame) -> str:
        if not self._lines:
            return ""
        stack = node.meta.get("nn_module_stack") or {}
        classes: list[Any] = [cls for _path, cls in stack.values()]
        module = frame.module() if frame.module is not None else None
        return line_in_trace(node.meta.get("stack_trace"), [*classes, *([type(module)] if module is not None else [])])

    # --- control flow ------------------------------------------------------------------------------------------
    def _higher(
        self, module: Any, node: fx.Node, env: dict[fx.Node, list[Value]], frame: Frame, graded: bool, times: int
    ) -> list[Value]:
        name = node.target.name()  # type: ignore[union-attr]  # the caller saw a higher-order operator
        bodies = [_attribute(module, item.target) for item in _nodes(node.args) if _is_body(module, item)]
        operands = [value for item in _nodes(node.args) if not _is_body(module, item) for value in env[item]]
        if name == "wrap_with_set_grad_enabled":
            return self._body(bodies[0], operands, frame, bool(node.args[0]), times)
        if name == "cond" and len(bodies) == 2:
            return self._branch(bodies, operands[1:], frame, graded, times)
        if name == "while_loop" and len(bodies) == 2:
            self.assumptions[LOOP] = None
            self._body(bodies[0], operands, frame, graded, times)
            return self._body(bodies[1], operands, frame, graded, times)
        if name in ("scan", "map_impl", "map") and bodies:
            return self._scan(name, bodies[0], node, env, frame, graded, times)
        if len(bodies) == 1 and len(operands) == len(_placeholders(bodies[0])):
            return self._body(bodies[0], operands, frame, graded, times)
        step = self._made(node.target, node, frame, times)
        tensors = [
            (position, tensor, value)
            for position, item in enumerate(node.args)
            for operand in _nodes(item)
            if not _is_body(module, operand)
            for tensor, value in zip(tensors_of(_held(operand)), env[operand], strict=True)
        ]
        return self.flow.record(step, tensors, graded=graded)

    def _body(self, body: Any, operands: list[Value], frame: Frame, graded: bool, times: int) -> list[Value]:
        given = {name: [value] for name, value in zip(_placeholders(body), operands, strict=True)}
        returned = self.graph(body, given, frame, graded=graded, times=times)
        return [value for _shown, values in returned for value in values]

    def _branch(self, bodies: list[Any], operands: list[Value], frame: Frame, graded: bool, times: int) -> list[Value]:
        costs = []
        for body in bodies:
            trial = Walk(Flow(), self._frame_of, self._cost)
            trial._body(body, [trial.flow.leaf(wants=False) for _value in operands], frame, graded, times)
            costs.append(sum(self._cost(step) * step.times for step in trial.flow.steps))
        if costs[0] != costs[1]:
            self.assumptions[BRANCH] = None
        return self._body(bodies[costs.index(max(costs))], operands, frame, graded, times)

    def _scan(
        self, name: str, body: Any, node: fx.Node, env: Any, frame: Frame, graded: bool, times: int
    ) -> list[Value]:
        """The body, as many times as there are elements; what it carries wants a gradient once any round does."""
        groups = [
            [value for item in _nodes(group) for value in env[item]] if not isinstance(group, int | bool) else []
            for group in node.args[1:]
        ]
        sliced = next(_held(item) for item in _nodes(node.args[2 if name == "scan" else 1]))
        rounds = int(sliced.shape[0])
        carried = len(groups[0]) if name == "scan" else 0
        operands = [value for group in groups for value in group]
        trial = Walk(Flow(), self._frame_of, self._cost)
        mirrored = [trial.flow.leaf(wants=value.wants()) for value in operands]
        results = trial._body(body, mirrored, frame, graded, times)
        for index, result in enumerate(results[:carried]):
            if result.wants() and not operands[index].wants():
                operands[index] = self.flow.leaf(wants=True)
        return self._body(body, operands, frame, graded, times * rounds)


def _nodes(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(tree, found.append)  # called for what it does
    return found


def _shown(tree: Any) -> Any:
    return fx.node.map_arg(tree, _held)


def _held(node: fx.Node) -> Any:
    return node.meta.get("val")


def _attribute(module: Any, target: Any) -> Any:
    for part in str(target).split("."):
        module = getattr(module, part)
    return module


def _is_body(module: Any, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(_attribute(module, node.target), fx.GraphModule)


def _placeholders(body: Any) -> list[str]:
    return [node.name for node in body.graph.nodes if node.op == "placeholder"]


def _keyword_positions(target: Any, node: fx.Node) -> dict[str, int]:
    if not node.kwargs:
        return {}
    places = {item.name: position for position, item in enumerate(target._schema.arguments)}
    return {key: places.get(key, len(places)) for key in node.kwargs}


def _item(node: fx.Node, env: dict[fx.Node, list[Value]]) -> list[Value]:
    """The values of one element of a result that is a list."""
    whole, index = node.args
    assert isinstance(whole, fx.Node)
    held = _held(whole)
    if not isinstance(held, list | tuple) or not isinstance(index, int):
        return env[whole]
    before = sum(len(tensors_of(item)) for item in held[:index])
    return env[whole][before : before + len(tensors_of(held[index]))]


def _is_sparse(tensor: Any) -> bool:
    layout = getattr(tensor, "layout", torch.strided)
    return bool(str(layout).startswith("torch.sparse"))
