"""The step under way: what was called in it and when, as the hooks tell."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from flopprof.meter.signature import Structure, arguments, size_of
from flopprof.meter.timing import Timer
from flopprof.meter.tracking import Segment, Tracker
from flopprof.meter.watching import Watch, compiled_around
from flopprof.meter.work import Work
from flopprof.profile import Attention

_grad_enabled = torch.is_grad_enabled
# The list of a model's parameters is made anew after so many of its calls.
_REFRESH = 64


class OpenStep:
    """A step under way, or one whose end the device has not reached yet."""

    __slots__ = (
        *("batch", "calls", "data_wait_s", "effective", "end", "ended_at", "left_out", "memory", "number"),
        *("optimizer_steps", "samples", "segments", "spans", "start", "tokens", "untrained"),
    )

    def __init__(self, number: int, batch: Any, data_wait_s: float) -> None:
        self.number, self.batch, self.data_wait_s = number, batch, data_wait_s
        self.calls = self.optimizer_steps = self.tokens = self.samples = 0
        self.untrained = (0, 0)  # tokens and samples of calls that autograd does not record
        self.effective: list[Any] = []
        self.left_out: list[str] = []
        self.segments: tuple[Segment, ...] = ()
        self.spans: list[tuple[str, Any, Any]] = []  # name ("" is evaluation), start, end
        self.start: Any = None
        self.end: Any = None
        self.ended_at = 0.0
        self.memory: int | None = None


class Root:
    """A model, and what of it is part of every call's structure."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.trained = False
        self.calls = 0
        self.refresh()
        self._flags: list[bool] = []
        self._number = 0
        self._numbers: dict[tuple[bool, ...], int] = {}

    def refresh(self) -> None:
        """Look its parameters up again."""
        self.parameters = list(self.module.parameters())
        tensor = next(iter(self.parameters), None)
        self.device = "cpu" if tensor is None else tensor.device.type

    def wanted(self) -> int:
        """A number for the set of parameters that want a gradient."""
        self.calls += 1
        if self.calls % _REFRESH == 0:
            self.refresh()
        flags = [parameter.requires_grad for parameter in self.parameters]
        if flags != self._flags:
            self._flags = flags
            self._number = self._numbers.setdefault(tuple(flags), len(self._numbers))
        return self._number


class Recorder:
    """Turns what the hooks tell into a step's segments, times and sizes."""

    def __init__(self, models: Sequence[torch.nn.Module], attention: Attention, timer: Timer) -> None:
        self.thread = 0
        self.tracker = Tracker(self._named, attention)
        self._timer = timer
        self._watch = Watch(self)
        self._roots: list[Root] = []
        self._step: OpenStep | None = None
        self._span: tuple[str, Any] | None = None
        self._opaque = False
        self._closures = False
        for model in models:
            self.add(model)

    def add(self, model: torch.nn.Module) -> None:
        """One more model."""
        if any(root.module is model for root in self._roots):
            return
        self._watch.add(len(self._roots), model)
        self._roots.append(Root(model))

    @property
    def models(self) -> list[torch.nn.Module]:
        """What is watched."""
        return [root.module for root in self._roots]

    def remove(self) -> None:
        """Take the hooks off."""
        self._watch.remove()

    def _named(self) -> torch.nn.Module | None:
        return self._roots[0].module if len(self._roots) == 1 else None

    # --- the step ----------------------------------------------------------------------------------------------------
    def open(self, step: OpenStep, *, recount: bool) -> None:
        """A step begins."""
        self._step = step
        self.thread = threading.get_ident()
        self._watch.open()
        structure, ints = arguments((step.batch,), {}) if self._opaque else ((), ())
        step.start = self._timer.mark()
        self.tracker.begin(structure, ints, recount=recount)
        if self.tracker.counting:
            step.left_out.append("counted")

    def close(self, step: OpenStep, *, failed: bool) -> None:
        """The step is over."""
        self._resume()
        self._step = None
        self.thread = 0
        counting = self.tracker.counting
        if failed:
            self.tracker.abandon()
        else:
            step.segments = self.tracker.finish()
        step.end = self._timer.mark()
        self._watch.close()
        if counting:
            step.left_out.append("counted")
        if not step.tokens and not step.samples:
            step.tokens, step.samples = step.untrained

    def pause(self, step: OpenStep, name: str) -> None:
        """What runs from here on is no part of the step."""
        self._resume()
        self.tracker.interrupt()
        self._span = (name, self._timer.mark())

    def resume(self, step: OpenStep) -> None:
        """The pause is over."""
        self._resume()

    def _resume(self) -> None:
        if self._span is not None and self._step is not None:
            name, start = self._span
            self._step.spans.append((name, start, self._timer.mark()))
        self._span = None

    # --- told by the hooks -------------------------------------------------------------------------------------------
    def called(self, index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A model is called."""
        step, root = self._step, self._roots[index]
        if step is None:
            return
        grad, training = _grad_enabled(), module.training
        if self._span is not None and self._span[0]:
            return  # inside a pause
        if not grad and not training and root.trained:
            if self._span is None:
                self.tracker.interrupt()
                self._span = ("", self._timer.mark())
            return
        if self._span is not None:
            self._resume()
        if grad and training:
            root.trained = True
        if self.tracker.counting and compiled_around():
            self._opaque = True
            return
        structure, ints = arguments(args, kwargs)
        device = root.device
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        weight = root.parameters[0].dtype if root.parameters else None
        wanted = root.wanted() if grad else 0
        step.calls += 1
        if index == 0:
            tokens, samples, _mask = size_of(module, args, kwargs)
            if grad:
                step.tokens += tokens
                step.samples += samples
            else:
                step.untrained = step.untrained[0] + tokens, step.untrained[1] + samples
        was = self.tracker.counting
        self.tracker.call((index, training, grad, wanted, cast, weight, structure), ints, records=grad)
        if not was and self.tracker.counting:
            step.left_out.append("counted")

    def differentiated(self, structure: Structure) -> None:
        """A backward pass starts."""
        if self._span is None:
            self.tracker.backward(structure)

    def stepped(self, optimizer: torch.optim.Optimizer, *, closure: bool, over: bool) -> None:
        """An optimizer's step begins, or one with a closure ends."""
        step = self._step
        if step is None or self._span is not None:
            return
        if over:
            self.tracker.after_closure()
            return
        step.optimizer_steps += 1
        self._closures |= closure
        wanted = tuple(root._number for root in self._roots)
        self.tracker.optimizer(("optimizer", type(optimizer).__name__, wanted), closure=closure)

    # --- read later --------------------------------------------------------------------------------------------------
    def times(self, step: OpenStep, *, wait: bool) -> tuple[float, float, dict[str, float]] | None:
        """(seconds in all, of evaluation, of each pause); None where the device is not past the step yet."""
        total = self._timer.seconds(step.start, step.end, wait=wait)
        if total is None:
            return None
        evaluation = 0.0
        paused: dict[str, float] = {}
        for name, start, end in step.spans:
            passed = self._timer.seconds(start, end, wait=True) or 0.0
            if name:
                paused[name] = paused.get(name, 0.0) + passed
            else:
                evaluation += passed
        return total, evaluation, paused

    def work(self, step: OpenStep) -> Work | None:
        """What the step multiplied; None where it is not known."""
        return self.tracker.work(step.segments)

    def effective(self, step: OpenStep) -> int | None:
        """Tokens without padding; None where no mask was seen."""
        return None

    def uncounted(self) -> dict[str, int]:
        """Operators without a count, in all steps so far."""
        return {}

    def notes(self) -> Iterator[str]:
        """What a reader of the figures must know."""
        if self._closures:
            yield "what an optimizer with a closure multiplies itself depends on its state, and is in no count."
        if self.tracker.corrections:
            yield (
                f"{self.tracker.corrections} counts differed from an earlier one of the same signature: work depends "
                "on something that shapes do not tell; recount_every= narrows it down."
            )
