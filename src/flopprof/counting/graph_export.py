"""torch.export's graph of a model: made without data, with each node's module; nothing is executed.

Export runs the model's own Python on fake tensors. While it does, each module call is noted in the metadata of the
nodes made inside it, so that a module is named as it is when it runs: by itself, not by the attribute that export
found first. Parameters that no module registers would be constants in the graph, without a gradient: they are
registered for as long as the tracing takes.
"""

from __future__ import annotations

import io
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any, NamedTuple

import torch
import torch.fx.traceback
import torch.utils.checkpoint
from torch import fx, nn

from flopprof.counting.attribution import Frame, Names
from flopprof.counting.ends import tensors_in
from flopprof.counting.graph_walk import WANTED
from flopprof.counting.imports import replaced
from flopprof.counting.operands import Source
from flopprof.counting.runtime import FlopCounter
from flopprof.counting.tally import first_shape
from flopprof.profile import Kind

HELD = "held"
# Where torch makes autograd.Functions for operators: registered ones, and control flow.
_OPERATORS = ("torch._library.", "torch._higher_order_ops.")
FRAME, FUNCTION = "flopprof_frame", "flopprof_function"

_annotate: Callable[[dict[str, Any]], Any] = getattr(torch.fx.traceback, "annotate", lambda _notes: nullcontext())


class Exported(NamedTuple):
    """A model's graph, and what it does not say of itself.

    frame_of   the frame that a node ran in; None: the one around it
    sources    of placeholders, by name: the parameter or buffer
    functions  the autograd.Functions that the model called
    replays    whether it called a checkpoint
    """

    program: Any
    frames: dict[str, Frame]
    frame_of: Callable[[fx.Node], Frame | None]
    sources: dict[str, Source]
    functions: tuple[str, ...] = ()
    replays: bool = False


class _Outputs(nn.Module):
    """The model, returning the tensors that count() would differentiate and no structure around them."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Any] | None) -> None:
        super().__init__()
        self.held = model  # the name in HELD
        self.loss = loss

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        output = self.held(*args, **kwargs)
        return tuple(tensors_in(output)) if self.loss is None else (self.loss(output),)


def export(
    model: nn.Module, args: Any, kwargs: Any, loss: Callable[[Any], Any] | None, counter: FlopCounter
) -> Exported:
    """The graph of `loss(model(*args, **kwargs))`, modules named by `counter`. Raises what torch.export raises."""
    whole = _Outputs(model, loss)
    loose = _register_tensors(model)
    watch = _Watch(model, counter)
    program = _program(whole, args, kwargs, watch)
    if watch.strangers:  # called though nobody registers them: their parameters became constants
        for number, module in enumerate(watch.strangers):
            whole.add_module(f"stranger{number}", module)
        counter.reset()
        watch = _Watch(model, counter)
        program = _program(whole, args, kwargs, watch)
    names = counter.where.names
    registered = _registered(model, watch.strangers, names)
    sources = {name: source for name, source in _sources(program, registered).items() if source.name not in loose}
    return Exported(program, names.frames, watch.frame_of, sources, tuple(watch.functions), watch.replays)


def _registered(model: nn.Module, strangers: list[nn.Module], names: Names) -> dict[str, Source]:
    """The first name of every parameter and buffer, under each name that export may know it by."""
    first: dict[int, Source] = {}
    known: dict[str, Source] = {}
    tops = [(HELD, "", model)]
    for number, module in enumerate(strangers):
        fqn = next(fqn for fqn, frame in names.frames.items() if frame.module is not None and frame.module() is module)
        tops.append((f"stranger{number}", fqn, module))
    for exported, fqn, top in tops:
        for kind, held in (("parameter", top.named_parameters), ("buffer", top.named_buffers)):
            for name, tensor in held(remove_duplicate=False):
                source = Source("parameter" if kind == "parameter" else "buffer", f"{fqn}.{name}" if fqn else name)
                known[f"{exported}.{name}"] = first.setdefault(id(tensor), source)
    return known


def _sources(program: Any, registered: dict[str, Source] | None) -> dict[str, Source]:
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is not None and spec.kind.name in ("PARAMETER", "BUFFER"):
            kind: Kind = "parameter" if spec.kind.name == "PARAMETER" else "buffer"
            own = Source(kind, spec.target)
            found[spec.arg.name] = own if registered is None else registered.get(spec.target, own)
    return found


def read(program: Any) -> Exported:
    """A program that somebody exported: its modules are those that its nodes name."""
    root = Frame("", "")
    frames = {"": root}
    calls: dict[str, set[str]] = {}

    def frame_of(node: fx.Node) -> Frame | None:
        stack = node.meta.get("nn_module_stack")
        frame = None
        for key, (path, cls) in (stack or {}).items():
            name = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
            frame = frames.get(path)
            if frame is None:
                frame = frames[path] = Frame(path, name.rpartition(".")[2])
            elif not frame.cls:
                frame.cls = name.rpartition(".")[2]
            calls.setdefault(path, set()).add(key)
            frame.calls = len(calls[path])
        return frame

    return Exported(program, frames, frame_of, _sources(program, None))


def _program(whole: nn.Module, args: Any, kwargs: Any, watch: _Watch) -> Any:
    with warnings.catch_warnings(), torch.enable_grad(), watch.watching(), torch.fx.traceback.preserve_node_meta():
        warnings.simplefilter("ignore")  # export's advice is about programs that are kept
        # Where it fails, export prints the graph as far as it came: thousands of lines.
        with redirect_stderr(io.StringIO()) as said:
            program = torch.export.export(whole, tuple(args), dict(kwargs), strict=False)
    sys.stderr.write(said.getvalue())
    return program


def _register_tensors(model: nn.Module) -> set[str]:
    """Make parameters of the tensors that want gradients and are none; returns their names."""
    names = set()
    for fqn, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf:
                del vars(module)[name]
                module._parameters[name] = nn.Parameter(value.detach())
                names.add(f"{fqn}.{name}" if fqn else name)
    return names


class _Watch:
    """What export's graph does not say: which module ran, in which autograd.Function, under a checkpoint."""

    def __init__(self, model: nn.Module, counter: FlopCounter) -> None:
        self._counter = counter
        self._model = model
        # Export calls proxies of the modules, which share nothing but their attributes with them.
        self._known = {id(module.__dict__): module for module in model.modules()}
        self._inside = False
        self._thread = threading.get_ident()
        self._numbers: dict[int, int] = {}
        self.frames: list[Frame] = []
        self.strangers: list[nn.Module] = []
        self.functions: dict[str, None] = {}
        self.replays = False

    def frame_of(self, node: fx.Node) -> Frame | None:
        """The frame of the module that was running when the node was made."""
        number = node.meta.get("custom", {}).get(FRAME)
        return None if number is None else self.frames[number]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Calls of modules and of autograd.Functions are noted."""
        call: Callable[..., Any] = nn.Module._call_impl
        apply = torch.autograd.Function.__dict__["apply"]
        wanted = torch.Tensor.requires_grad_
        region: Callable[..., None] = torch.utils.checkpoint._checkpoint_hook.__init__
        watch = self

        def module_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling() or threading.get_ident() != watch._thread:
                return call(module, *args, **kwargs)
            return watch._called(module, call, args, kwargs)

        def function_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            original = apply.__get__(None, cls)
            if torch.compiler.is_dynamo_compiling() or threading.get_ident() != watch._thread or not watch._inside:
                return original(*args, **kwargs)
            if cls is torch.utils.checkpoint.CheckpointFunction:  # runs its forward without gradients, then again
                watch.replays = True
                return args[0](*args[2:])
            if not cls.__module__.startswith(_OPERATORS):
                watch.functions[cls.__name__] = None
            with _annotate({FUNCTION: cls.__name__}):
                return original(*args, **kwargs)

        def region_init(hook: Any, *args: Any, **kwargs: Any) -> None:
            watch.replays = True
            region(hook, *args, **kwargs)

        def want(tensor: torch.Tensor, requires_grad: bool = True) -> torch.Tensor:
            if requires_grad and watch._inside and not tensor.requires_grad and threading.get_ident() == watch._thread:
                with _annotate({WANTED: True}):
                    torch.ops.aten.copy_.default(tensor, tensor)
            return wanted(tensor, requires_grad)

        undo = [
            replaced(torch.Tensor, "requires_grad_", want),
            replaced(nn.Module, "_call_impl", module_call),
            replaced(torch.autograd.Function, "apply", classmethod(function_apply)),
            replaced(torch.utils.checkpoint._checkpoint_hook, "__init__", region_init),
        ]
        try:
            yield
        finally:
            for put_back in reversed(undo):
                put_back()

    def _called(self, proxy: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        module = self._known.get(id(proxy.__dict__))
        if module is None:
            # Export's own around the model, and the bodies that it makes of control flow.
            if not self._inside or isinstance(proxy, fx.GraphModule):
                return call(proxy, *args, **kwargs)
            module = proxy
            self._known[id(module.__dict__)] = module
            self.strangers.append(module)
        outermost, self._inside = self._inside, True
        entered = self._counter.where.enter(module)
        frame = entered[2]
        number = self._numbers.setdefault(id(frame), len(self.frames))
        if number == len(self.frames):
            self.frames.append(frame)
        try:
            with _annotate({FRAME: number}):
                output = call(proxy, *args, **kwargs)
        finally:
            self._counter.where.leave(entered)
            self._inside = outermost
        if frame.output_shape is None:
            frame.output_shape = first_shape(output)
        return output
