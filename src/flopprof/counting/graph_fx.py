"""torch.fx's graph of a model, and its run on meta, node by node, under a counter.

Symbolic tracing sees the model's Python with stand-ins for tensors. A node may hide whatever a wrapped function or a
leaf module does; so nothing is read off the graph: each node runs on meta, in the modules, the grad mode and the
autocast state that it was traced in, and the counter sees its operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from flopprof.counting.imports import replaced
from flopprof.counting.lines import line_in_trace
from flopprof.counting.runtime import FlopCounter

_CALLS, _STATE, _MODULE = "flopprof_calls", "flopprof_state", "flopprof_module"
_DEVICES = ("cpu", "cuda")

# What a node was traced in: grad mode, and of each device kind whether autocast is on, and its type.
State = tuple[bool, tuple[tuple[bool, Any], ...]]


class Traced:
    """A graph, the nodes that its outputs are found in, and a tree of them and of what was no tensor."""

    def __init__(self, graph: fx.Graph, outputs: list[fx.Node], tracer: _Tracer) -> None:
        self.graph = graph
        self.outputs = outputs
        self.functions = tuple(tracer.functions)  # autograd.Functions that the model calls
        self.casts = any(on for node in graph.nodes for on, _dtype in node.meta[_STATE][1])  # under autocast?
        self.replays = tracer.replays  # does it call a checkpoint that the graph does not show?


class _Call:
    """One call of a module, while it is traced."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class _Whole(nn.Module):
    """The model with its arguments, tensors among them replaced by placeholders: a forward without parameters."""

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        super().__init__()
        self.held = model
        self.run = run

    def forward(self) -> None:
        self.run()


class _Function:
    """An autograd.Function's call, looked up when it runs."""

    def __init__(self, cls: Any) -> None:
        self.cls = cls
        self.__name__ = cls.__name__
        self.__qualname__ = cls.__qualname__
        self.__module__ = cls.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.cls.apply(*args, **kwargs)


class _Tracer(fx.Tracer):
    """Notes of each node which module calls were under way, and in which modes; takes modules nobody registered."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []
        self.functions: dict[str, None] = {}
        self.replays = False

    @contextmanager
    def observing(self) -> Iterator[None]:
        """An autograd.Function is one node, which runs as it would; checkpoints are noted."""
        original = torch.autograd.Function.__dict__["apply"]
        region = torch.utils.checkpoint._checkpoint_hook.__init__
        tracer = self

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
                return original.__get__(None, cls)(*args, **kwargs)
            if cls is not torch.utils.checkpoint.CheckpointFunction:
                tracer.functions[cls.__name__] = None
            return tracer.create_proxy("call_function", _Function(cls), args, kwargs)

        def region_init(hook: Any, *args: Any, **kwargs: Any) -> None:
            tracer.replays = True
            region(hook, *args, **kwargs)

        undo = [
            replaced(torch.autograd.Function, "apply", classmethod(apply)),
            replaced(torch.utils.checkpoint._checkpoint_hook, "__init__", region_init),
        ]
        try:
            yield
        finally:
            for put_back in reversed(undo):
                put_back()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[_CALLS] = tuple(self._calls)
        node.meta[_STATE] = _state()
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, fx.GraphModule):
            return False
        return isinstance(m, torch.jit.ScriptModule) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, ""):
            proxy = self.create_proxy("call_module", type(m).__name__, args, kwargs)
            proxy.node.meta[_MODULE] = m
            return proxy
        self._calls.append(_Call(m))
        try:
            return forward(*args, **kwargs)
        finally:
            self._calls.pop()

    def create_arg(self, a: Any) -> Any:
        if callable(a) and not isinstance(a, fx.Proxy | fx.node.Node | torch.Tensor | torch._ops.OpOverload | type):
            return a  # what a checkpoint runs
        if isinstance(a, torch.Tensor):  # whether somebody registered it or not
            node = self.create_node("get_attr", "tensor", (), {})
            node.meta[_MODULE] = a
            return node
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, torch.Tensor):
            key = str(id(attr_val))
            if key not in parameter_proxy_cache:
                node = self.create_arg(attr_val)
                parameter_proxy_cache[key] = self.proxy(node)
            return parameter_proxy_cache[key]
        return attr_val


def symbolic_trace(
    model: nn.Module, args: Any, kwargs: Any, loss: Callable[[Any], Any] | None, *, lines: bool = False
) -> Traced:
    """The graph of `loss(model(*args, **kwargs))`. Raises what torch.fx, or the model on stand-ins, raises."""
    tracer = _Tracer()
    tracer.record_stack_traces = lines
    leaves, spec = tree_flatten((args, kwargs))
    outputs: list[Any] = []

    def run() -> None:
        stand_ins = [
            tracer.create_proxy("placeholder", f"input_{i}", (), {}) if isinstance(leaf, torch.Tensor) else leaf
            for i, leaf in enumerate(leaves)
        ]
        called, named = tree_unflatten(stand_ins, spec)
        output = whole.held(*called, **named)
        outputs.extend(_proxies(output if loss is None else loss(output)))

    whole = _Whole(model, run)
    with tracer.observing():
        graph = tracer.trace(whole)
    return Traced(graph, [proxy.node for proxy in outputs], tracer)


def run(traced: Traced, args: Any, kwargs: Any, counter: FlopCounter) -> list[Any]:
    """Run the graph on these meta inputs under the open counter; returns what its output nodes gave."""
    values: dict[fx.Node, Any] = {}
    inputs = iter(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    place = _Place(counter)
    try:
        for node in traced.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = node.meta[_MODULE]
            else:
                with place.at(node):
                    values[node] = _at_line(node, partial(_run, node, values))
    finally:
        place.leave(0)
    return [values[node] for node in traced.outputs]


def _at_line(node: fx.Node, run: Callable[[], Any]) -> Any:
    """Run it as though it were called on the line of the model that it was traced on: a counter looks there."""
    classes = [type(call.module) for call in node.meta[_CALLS]]
    file, _, number = line_in_trace(node.stack_trace, classes).rpartition(":")
    if not file:
        return run()
    result: list[Any] = []
    code = compile("\n" * (int(number) - 1) + "result.append(run())", file, "exec")
    exec(code, {"result": result, "run": run})
    return result[0]


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        return node.meta[_MODULE](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = node.target
    if target is torch._C._nn.scaled_dot_product_attention:  # a counter observes it under its other name
        target = torch.nn.functional.scaled_dot_product_attention
    return target(*args, **kwargs)


class _Place:
    """The module calls that are open while the nodes run."""

    def __init__(self, counter: FlopCounter) -> None:
        self._where = counter.where
        self._open: list[tuple[_Call, Any]] = []

    @contextmanager
    def at(self, node: fx.Node) -> Iterator[None]:
        """Inside the module calls and the modes that the node was traced in."""
        calls = node.meta[_CALLS]
        common = 0
        while common < min(len(calls), len(self._open)) and calls[common] is self._open[common][0]:
            common += 1
        self.leave(common)
        for call in calls[common:]:
            self._open.append((call, self._where.enter(call.module)))
        with ExitStack() as modes:
            graded, casts = node.meta[_STATE]
            if graded != torch.is_grad_enabled():
                modes.enter_context(torch.set_grad_enabled(graded))
            for device, now, then in zip(_DEVICES, _state()[1], casts, strict=True):
                if now != then:
                    modes.enter_context(torch.autocast(device, dtype=then[1], enabled=then[0]))
            yield

    def leave(self, depth: int) -> None:
        """Close the calls beyond this depth."""
        while len(self._open) > depth:
            self._where.leave(self._open.pop()[1])


def _state() -> State:
    return (
        torch.is_grad_enabled(),
        tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES),
    )


def _proxies(output: Any) -> Iterator[fx.Proxy]:
    """The stand-ins in an output, in the order in which count() would differentiate them."""
    if isinstance(output, fx.Proxy):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _proxies(value)
    elif isinstance(output, list | tuple | set):
        for value in output:
            yield from _proxies(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for item in fields(output):
            yield from _proxies(getattr(output, item.name))
