"""Workload: a model with the inputs that it is counted on, and what to say when it cannot run them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import nn

from flopprof.counting.count import count as count_model
from flopprof.counting.routing import Routing
from flopprof.counting.values import needs_values
from flopprof.errors import FlopprofError, ModelFailed, UsageError, ValuesUnknown
from flopprof.models.checkpoint import Checkpoint
from flopprof.models.hf_quantised import Quantised
from flopprof.models.inputs import describe_inputs, first_line
from flopprof.profile import Attention, Profile

if TYPE_CHECKING:
    from flopprof.counting.graph import Engine

logger = logging.getLogger(__name__)

_SAME_DTYPE = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::convolution"}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, the inputs it is called with, and how many tokens and samples those hold.

    tokens: integers of a (batch, length) input, the decoder's where there are two stacks. samples: rows of the first
    input where nothing else tells.

    assumptions: what was fixed about work that depends on the weights' values; they are added to the profile's.
    checkpoint: what the files of a checkpoint store, where its headers were read. quantised: how its weights are.
    program: the exported program that the model is made of, where it is one: then its graph is what is counted.
    routing: tokens for each expert, by patterns of modules, which routers are told on meta.
    `on_cpu` rebuilds the same workload with real values; it is set where flopprof itself chose the meta device.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str
    device: str
    tokens: int | None = None
    samples: int | None = None
    assumptions: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None
    quantised: Quantised | None = None
    program: torch.export.ExportedProgram | None = field(default=None, repr=False, compare=False)
    routing: Routing | None = None
    on_cpu: Callable[[], Workload] | None = field(default=None, repr=False, compare=False)

    def describe(self) -> str:
        """Inputs and mode in one line: `input 1x3x224x224 float32, eval`."""
        mode = "exported" if self.program is not None else "train" if self.model.training else "eval"
        return f"input {describe_inputs(self.args, self.kwargs)}, {mode}"

    def stored(self) -> dict[str, str]:
        """Labelled facts of the checkpoint's files: what they store, and a sentence where the model differs."""
        facts = {} if self.quantised is None else {"quantised": self.quantised.describe()}
        if self.checkpoint is None:
            return facts
        mismatch = self.checkpoint.mismatch
        return {"checkpoint": self.checkpoint.describe(), **facts, **({"mismatch": mismatch} if mismatch else {})}

    def count(
        self,
        *,
        backward: bool = False,
        attention: Attention = "full",
        loss: Callable[[Any], torch.Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        lines: bool = False,
        fold: bool | None = None,
    ) -> Profile:
        """The Profile of one run. A model that needs values is run on the CPU where meta was only flopprof's choice.

        An exported program is not run: its graph is counted, as trace() does. Raises ModelFailed, naming the module
        and the inputs, when the model itself raises.
        """
        if self.program is not None:
            if optimizer is not None:
                raise UsageError(f"{self.name} is an exported graph, which an optimizer does not step: leave it out.")
            return self.trace(backward=backward, attention=attention, loss=loss, lines=lines)
        try:
            profile = count_model(
                self.model,
                *self.args,
                backward=backward,
                attention=attention,
                loss=loss,
                optimizer=optimizer,
                lines=lines,
                fold=fold,
                routing=self.routing,
                **self.kwargs,
            )
        except (Exception, SystemExit) as error:
            if isinstance(error, FlopprofError) and not isinstance(error, ValuesUnknown):
                raise
            if self.on_cpu is not None and optimizer is None and self.routing is None and needs_values(error):
                logger.info("%s needs values that the meta device does not have; counting on the CPU", self.name)
                return self.on_cpu().count(backward=backward, attention=attention, loss=loss, lines=lines)
            raise self._failure(error) from error
        self._refuse_mixed_types(profile)
        return self._named(profile)

    def trace(
        self,
        *,
        backward: bool = False,
        dynamic: Mapping[str, Any] | None = None,
        engine: Engine = "auto",
        attention: Attention = "full",
        loss: Callable[[Any], torch.Tensor] | None = None,
        lines: bool = False,
    ) -> Profile:
        """The Profile of the model's graph, as `flopprof.trace` makes it. Raises Untraceable where there is none."""
        if self.routing is not None:
            raise UsageError(f"{self.name} is told its routing, which a graph does not follow: count it instead.")
        from flopprof.counting.graph import trace  # it needs torch's compiler, whose import takes a second

        program = self.program
        profile = trace(
            self.model if program is None else program,
            *(self.args if program is None else ()),
            backward=backward,
            dynamic=dynamic,
            engine=engine,
            attention=attention,
            loss=loss,
            lines=lines,
            **(self.kwargs if program is None else {}),
        )
        return self._named(profile)

    def _named(self, profile: Profile) -> Profile:
        return msgspec.structs.replace(
            profile,
            target=self.name,
            samples=self.samples,
            tokens=self.tokens,
            assumptions=(*profile.assumptions, *self.assumptions),
        )

    def _refuse_mixed_types(self, profile: Profile) -> None:
        """Raises ModelFailed for a product of different dtypes: every device refuses one, but meta does not look."""
        classes = {row.fqn: row.cls for row in profile.modules}
        for row in profile.operators:
            dtypes = list(dict.fromkeys(operand.dtype for operand in row.operands))
            if profile.device == "meta" and row.op in _SAME_DTYPE and len(dtypes) > 1:
                where = f" in {row.fqn} ({classes.get(row.fqn, '')})" if row.fqn else ""
                raise ModelFailed(
                    f"{self.name} failed{where} on input {describe_inputs(self.args, self.kwargs)}: {row.op} would "
                    f"multiply {' by '.join(dtypes)}, which torch refuses. Give each --input the dtype that the model "
                    "expects (1x8:float32), or cast both with --dtype."
                )

    def _failure(self, error: BaseException) -> ModelFailed:
        where = _innermost_module(self.model, error.__traceback__)
        inputs = describe_inputs(self.args, self.kwargs)
        if isinstance(error, ValuesUnknown):
            return ModelFailed(f"{self.name} failed{where} on input {inputs}: {error}")
        return ModelFailed(
            f"{self.name} failed{where} on input {inputs}: {type(error).__name__}: {first_line(error)} "
            "Check the shape and dtype of each --input, or see the whole error with --traceback."
        )


def _innermost_module(model: nn.Module, trace: TracebackType | None) -> str:
    """` in layer1.0.conv2 (Conv2d)`: the deepest module of `model` whose code was running; empty if none was."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and names.get(id(owner)):
            found = f" in {names[id(owner)]} ({type(owner).__name__})"
        trace = trace.tb_next
    return found
