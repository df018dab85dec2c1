"""trace(): the Profile of a model from its graph, without data, weights or kernels."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from torch import nn

from flopprof.counting import graph_fx
from flopprof.counting.attribution import Frame
from flopprof.counting.closed import closed
from flopprof.counting.count import count
from flopprof.counting.ends import own_inputs, to_differentiate
from flopprof.counting.exported_code import EXPORTED, asking
from flopprof.counting.fold_charge import ordered
from flopprof.counting.gradients import Flow, Severed, Value, reach, tensors_of
from flopprof.counting.graph_export import Exported, export, read
from flopprof.counting.graph_rows import Rows, step_cost
from flopprof.counting.graph_walk import Walk
from flopprof.counting.guesses import named
from flopprof.counting.parameters import dtype_name
from flopprof.counting.placing import moved_to_meta, outermost
from flopprof.counting.preserve import modules_within, preserved
from flopprof.counting.runtime import FlopCounter
from flopprof.counting.values import carried, on_meta
from flopprof.errors import Untraceable, UsageError
from flopprof.profile import Attention, ModuleRow, Profile
from flopprof.rows import ParameterRow

Engine = Literal["auto", "fx", "export"]
_ENGINES = ("auto", "fx", "export")

REPLAYED = "Checkpointed regions run again in backward: that recomputation is not in a graph, and not in these counts."
RUN = "{}: a custom autograd.Function: its own backward was run, on meta."
CUSTOM = (
    "{}: the backward of a custom autograd.Function is not in the graph: it was taken to be what autograd would run "
    "for its forward."
)


def trace(
    model: nn.Module | torch.export.ExportedProgram,
    *args: Any,
    backward: bool = False,
    loss: Callable[[Any], torch.Tensor] | None = None,
    dynamic: Mapping[str, Any] | None = None,
    engine: Engine = "auto",
    attention: Attention = "full",
    lines: bool = False,
    **kwargs: Any,
) -> Profile:
    """FLOPs of `model(*args, **kwargs)` from its graph: the same Profile as count(), without running a kernel.

    model      a module, a GraphModule or an ExportedProgram, on any device (its example inputs are its arguments)
    backward   also the backward pass of `loss(output)`, or of the sum of the output's floating tensors
    dynamic    name -> (argument, dimension), or several of them: counts are closed forms in these sizes as well,
               `profile.formula()`, `profile.at(batch=8)`; an argument is a position or a keyword
    engine     `fx`: torch.fx's symbolic trace, each node run on meta; `export`: torch.export's graph, only read;
               `auto`: fx where it traces and proves equal to a counted forward, else export
    attention  `full` counts every query-key pair, `causal` only those that the operator's mask lets through
    lines      also tell the line of source of every count: `profile.by_line()`

    Raises Untraceable, naming the construct and the line of the model that stopped it, and UsageError.

    >>> import torch
    >>> trace(torch.nn.Linear(4, 5), torch.randn(3, 4), backward=True).by_phase()
    {'forward': 120, 'backward': 120, 'recompute': 0, 'optimizer': 0}
    """
    if engine not in _ENGINES:
        raise UsageError(f"engine {engine!r} is none of {', '.join(_ENGINES)}.")
    if attention not in ("full", "causal"):
        raise UsageError(f"attention {attention!r} is neither 'full' nor 'causal'.")
    backward = backward or loss is not None
    if isinstance(model, torch.export.ExportedProgram):
        if dynamic is not None:
            raise UsageError("an ExportedProgram has the sizes that it was exported with: give trace the module.")
        profile = _program(model, engine, loss, backward, lines)
    elif not isinstance(model, nn.Module):
        raise UsageError(f"trace takes a module or an exported program, got {type(model).__name__}: use count.")
    elif dynamic is not None:
        profile = _closed(model, args, kwargs, dynamic, engine, Wish(loss, backward, lines))
    else:
        profile = _traced(model, args, kwargs, engine, Wish(loss, backward, lines))
    profile = msgspec.structs.replace(profile, device="meta").with_attention(attention)
    return ordered(profile, model) if isinstance(model, nn.Module) else profile


class Wish(NamedTuple):
    """What is to be counted beside the forward."""

    loss: Callable[[Any], Any] | None
    backward: bool
    lines: bool


def _traced(model: nn.Module, args: Any, kwargs: Any, engine: Engine, wish: Wish) -> Profile:
    profile = None if engine == "export" else _by_fx(model, args, kwargs, wish, insist=engine == "fx")
    return _by_export(model, args, kwargs, wish) if profile is None else profile


def _closed(model: nn.Module, args: Any, kwargs: Any, dynamic: Mapping[str, Any], engine: Engine, wish: Wish) -> Any:
    """Forms fitted to counts on meta: whole counts, or traces where an engine was asked for."""

    def count_at(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Profile:
        if engine != "auto":
            return _traced(model, args, kwargs, engine, wish)
        return count(model, *args, backward=wish.backward, loss=wish.loss, lines=wish.lines, **kwargs)

    def count_symbolic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Profile:
        return count(model, *args, backward=wish.backward, loss=wish.loss, fold=False, **kwargs)

    modules = outermost(modules_within(model, args, kwargs, wish.loss))
    with preserved(modules, (args, kwargs)), moved_to_meta(modules) as move:
        return closed(count_at, move(args), move(kwargs), dynamic, count_symbolic=count_symbolic)


# --- torch.export ----------------------------------------------------------------------------------------------------
def _program(program: torch.export.ExportedProgram, engine: Engine, loss: Any, backward: bool, lines: bool) -> Profile:
    if engine == "fx":
        raise UsageError("an ExportedProgram is a graph of torch.export: leave engine='fx' out.")
    if loss is not None:
        raise UsageError("an ExportedProgram returns its tensors alone: give trace the module to have loss= applied.")
    exported = read(program)
    rows, assumptions = _read(exported, backward, lines)
    profile = rows.extend(Profile(modules=_modules(program, exported.frames), torch_version=str(torch.__version__)))
    parameters = {id(tensor): (name, tensor) for name, tensor in program.named_parameters()}.values()
    return msgspec.structs.replace(
        profile,
        assumptions=(*profile.assumptions, *assumptions),
        n_params=sum(tensor.numel() for _name, tensor in parameters),
        n_params_trainable=sum(tensor.numel() for _name, tensor in parameters if tensor.requires_grad),
        parameters=tuple(
            ParameterRow(
                name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), trainable=tensor.requires_grad
            )
            for name, tensor in parameters
        ),
    )


def _modules(program: torch.export.ExportedProgram, frames: dict[str, Frame]) -> tuple[ModuleRow, ...]:
    """The modules that the program's nodes name; parameters by the names that they have in it."""
    sizes = {name: tensor.numel() for name, tensor in program.named_parameters()}
    return tuple(
        ModuleRow(
            fqn=frame.fqn,
            cls=frame.cls,
            calls=frame.calls,
            parameters=sum(size for name, size in sizes.items() if not frame.fqn or name.startswith(f"{frame.fqn}.")),
            own_parameters=sum(size for name, size in sizes.items() if name.rpartition(".")[0] == frame.fqn),
        )
        for frame in frames.values()
    )


def _by_export(model: nn.Module, args: Any, kwargs: Any, wish: Wish) -> Profile:
    counter = FlopCounter(model)
    with preserved(outermost(modules_within(model, args, kwargs, wish.loss)), (args, kwargs)):
        try:
            exported = export(model, args, kwargs, wish.loss, counter)
        except Exception as error:
            raise _untraceable("torch.export", model, error) from error
        rows, assumptions = _read(exported, wish.backward, wish.lines)
    assumptions += [EXPORTED.format(name) for name in asking(model)]
    profile = rows.extend(counter.profile)
    return msgspec.structs.replace(profile, assumptions=(*profile.assumptions, *assumptions))


def _read(exported: Exported, backward: bool, lines: bool) -> tuple[Rows, list[str]]:
    """Rows of every call in the graph, and what had to be guessed."""
    severed: frozenset[Any] = frozenset()
    while True:
        try:
            return _read_once(exported, backward, lines, Flow(severed))
        except Severed as error:
            if error.func in severed:
                raise
            severed |= {error.func}


def _read_once(exported: Exported, backward: bool, lines: bool, flow: Flow) -> tuple[Rows, list[str]]:
    program = exported.program
    values: dict[str, list[Value]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            held = tensors_of(node.meta.get("val"))
            if any(not isinstance(size, int) for tensor in held for size in tensor.shape):
                raise UsageError(
                    f"{node.name} has the shape {tuple(held[0].shape)}, which is not fixed: export the program "
                    "without dynamic shapes, or give trace the module with dynamic=."
                )
            source = exported.sources.get(node.name)
            values[node.name] = [flow.leaf(wants=backward and tensor.requires_grad, source=source) for tensor in held]
    walk = Walk(flow, exported.frame_of, step_cost, lines=lines)
    returned = walk.graph(program.graph_module, values, exported.frames[""])
    kinds = [spec.kind.name for spec in program.graph_signature.output_specs]
    outputs: list[Value] = []
    if backward:
        outputs = [
            value
            for kind, (shown, held_values) in zip(kinds, returned, strict=True)
            for tensor, value in zip(tensors_of(shown), held_values, strict=True)
            if kind == "USER_OUTPUT" and value.wants() and (tensor.is_floating_point() or tensor.is_complex())
        ]
        reach(outputs)
    rows = Rows()
    rows.add(flow, outputs)
    assumptions = list(walk.assumptions)
    if backward:
        assumptions += [CUSTOM.format(name) for name in exported.functions]
        assumptions += [REPLAYED] if exported.replays else []
    return rows, assumptions


# --- torch.fx --------------------------------------------------------------------------------------------------------
def _by_fx(model: nn.Module, args: Any, kwargs: Any, wish: Wish, *, insist: bool) -> Profile | None:
    """The profile of the model's fx graph; None where there is none that proves right and nobody insists on it."""
    try:
        traced, profile = _run_fx(model, args, kwargs, wish)
        counted = _forward(model, args, kwargs, wish)
    except Exception as error:
        if insist:
            raise _untraceable("torch.fx", model, error) from error
        return None
    if _said(profile) != _said(counted):
        if insist:
            raise Untraceable(
                f"torch.fx's graph of {type(model).__name__} does not run what the model runs "
                f"({profile.forward_flops} FLOPs forward instead of {counted.forward_flops}, or in other modules): "
                "use engine='export', or flopprof.count, which runs the model."
            )
        return None
    assumptions = [RUN.format(name) for name in traced.functions] if wish.backward else []
    assumptions += [REPLAYED] if wish.backward and traced.replays else []
    # The graph's nodes know no module's output.
    return msgspec.structs.replace(profile, modules=counted.modules, assumptions=(*profile.assumptions, *assumptions))


@contextmanager
def _on_meta(model: nn.Module, args: Any, kwargs: Any, wish: Wish) -> Iterator[tuple[Any, Any, FlopCounter, Any]]:
    """(args, kwargs, open counter, keep): everything on meta, with values carried where the model came so."""
    modules = outermost(modules_within(model, args, kwargs, wish.loss))
    valued = on_meta(model, args, kwargs)
    with preserved(modules, (args, kwargs)) as keep, moved_to_meta(modules) as move, ExitStack() as stack:
        if wish.backward:
            stack.enter_context(torch.enable_grad())
        given, also = own_inputs(move(args)), own_inputs(move(kwargs))
        counter = FlopCounter(model, lines=wish.lines)
        if valued:
            stack.enter_context(carried(counter.assume, named(model, args, kwargs)))
        yield given, also, counter, keep


def _run_fx(model: nn.Module, args: Any, kwargs: Any, wish: Wish) -> tuple[graph_fx.Traced, Profile]:
    """The graph, and the profile of its run on meta."""
    moved = not on_meta(model, args, kwargs)
    with _on_meta(model, args, kwargs, wish) as (given, also, counter, keep):
        traced = graph_fx.symbolic_trace(model, given, also, wish.loss, lines=wish.lines)
        if traced.casts and moved:
            raise NotImplementedError("autocast of this device does nothing to tensors that are moved to meta")
        with counter:
            leaves = to_differentiate(graph_fx.run(traced, given, also, counter), None)
            if wish.backward and leaves:
                keep.gradients(leaves)
                torch.autograd.backward(leaves, [torch.ones_like(leaf) for leaf in leaves])
        return traced, counter.profile


def _forward(model: nn.Module, args: Any, kwargs: Any, wish: Wish) -> Profile:
    """The profile of the model's own forward on meta."""
    with _on_meta(model, args, kwargs, wish) as (given, also, counter, _keep):
        with counter:
            output = model(*given, **also)
            if wish.loss is not None:
                wish.loss(output)
        return counter.profile


def _said(profile: Profile) -> Any:
    """What the forward alone says, per module and of its masks; modules without operators are in no graph."""
    rows = [row for row in profile.operators if row.phase == "forward"]
    missing = {(row.op, row.fqn, row.calls) for row in profile.uncounted_rows if row.phase == "forward"}
    tables = (profile.by_module("forward", own=True), profile.elementwise_by_module("forward", own=True))
    found = [{fqn: flops for fqn, flops in table.items() if flops} for table in tables]
    return found, missing, sum(row.flops_causal for row in rows)


# --- errors ----------------------------------------------------------------------------------------------------------
def _untraceable(tracer: str, model: nn.Module, error: Exception) -> Untraceable:
    line = _line_of_model(error.__traceback__)
    reason = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
    where = f" at {line}" if line else ""
    return Untraceable(
        f"{tracer} cannot trace {type(model).__name__}{where}: {type(error).__name__}: {reason}. "
        "Use flopprof.count, which runs the model."
    )


def _line_of_model(trace: TracebackType | None) -> str:
    """`file.py:12 (the source line)`: the innermost one that is neither torch's nor ours; empty if there is none."""
    ours = (Path(torch.__file__).parent, Path(__file__).parent)
    found = ""
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.suffix == ".py" and not any(folder in file.parents for folder in ours):
            code = linecache.getline(str(file), trace.tb_lineno).strip()
            found = f"{file.name}:{trace.tb_lineno} ({code})"
        trace = trace.tb_next
    return found
