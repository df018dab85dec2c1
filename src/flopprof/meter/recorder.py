"""The step under way: what was called in it and when, as the hooks tell."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from flopprof.meter.padding import Unpadded
from flopprof.meter.places import Done
from flopprof.meter.signature import Root, arguments, size_of
from flopprof.meter.timing import Timer
from flopprof.meter.tracking import Tracker
from flopprof.meter.watching import Watch, compiled_call, compiled_within, instruments
from flopprof.meter.work import Work, total
from flopprof.profile import Attention

_thread = threading.get_ident
_grad_enabled = torch.is_grad_enabled
_OUTSIDE = (
    "a model is called inside a compiled function, where its inputs are not seen: use meter.track(loader), "
    "meter.step(batch) or meter.wrap(step), whose arguments then tell steps apart."
)


NO_PAUSES: dict[str, float] = {}


class OpenStep:
    """A step under way, or one that no record was made of yet."""

    calls = optimizer_steps = tokens = samples = compilations = 0
    other_tokens = other_samples = 0  # of calls that autograd does not record
    number = 0
    batch: Any = None
    data_wait_s = 0.0
    start: Any = None
    end: Any = None
    host_end = 0.0
    segments: tuple[Done, ...] = ()
    spans: tuple[tuple[str, Any, Any], ...] = ()  # name ("" is evaluation), start, end
    unpadded: tuple[Any, ...] = ()
    left_out: tuple[str, ...] = ()
    unseen = False


class Roots(list[Root]):
    """The models, in the order in which they were given."""

    def named(self) -> torch.nn.Module | None:
        """What names the counter's modules."""
        return self[0].module if len(self) == 1 else None

    def compiled(self) -> bool:
        """Does a part of the models run compiled?"""
        return any(compiled_within(root.module) for root in self)


class Recorder:
    """Turns what the hooks tell into a step's segments, times and sizes."""

    def __init__(self, models: Sequence[torch.nn.Module], attention: Attention, timer: Timer) -> None:
        self.thread = 0
        self._roots = Roots()
        self.tracker = Tracker(self._roots, attention)
        self.known = self.tracker.known
        self.opaque = False  # a model runs inside a compiled function
        self.timer = timer
        self._watch = Watch()
        self._step: OpenStep | None = None
        self._span: tuple[str, Any] | None = None  # a pause or an evaluation inside the step
        self._outside: Any = None  # an evaluation between steps
        self._between: list[tuple[Any, Any]] = []
        self._between_s = 0.0
        self._closures = False
        self._rebuilt = 0
        self._unpadded = Unpadded()
        for model in models:
            self.add(model)

    def add(self, model: torch.nn.Module) -> None:
        """One more model."""
        if any(root.module is model for root in self._roots):
            return
        self._watch.add(self, len(self._roots), model)
        self._roots.append(Root(model))

    def remove(self) -> None:
        """Take the hooks off."""
        self._watch.remove()

    @property
    def models(self) -> list[torch.nn.Module]:
        """The models, in the order in which they were given."""
        return [root.module for root in self._roots]

    @property
    def trained(self) -> list[bool]:
        """Which of the models have been trained: without a gradient, they are evaluated."""
        return [root.trained for root in self._roots]

    @trained.setter
    def trained(self, flags: Sequence[bool]) -> None:
        for root, flag in zip(self._roots, flags, strict=False):
            root.trained = flag

    # --- the step ----------------------------------------------------------------------------------------------------
    def open(self, step: OpenStep, *, recount: bool) -> None:
        """A step begins."""
        self._step = step
        self.thread = _thread()
        if not self._watch.begun:
            self._watch.begin(self)
        if self._rebuilt != instruments.rebuilt:
            self._rebuilt = instruments.rebuilt
            for root in self._roots:
                root.refresh()
        if self._outside is not None:
            self._between.append((self._outside, self.timer.mark()))
            self._outside = None
        step.compilations = instruments.compilations
        step.start = self.timer.mark()
        if not self.opaque:
            self.tracker.begin(recount=recount)
        else:
            step.unseen = step.batch is None
            structure, ints = arguments((step.batch,), {})
            self.tracker.begin(("given", *structure), ints, recount=recount)
        if self.tracker.counter is not None:
            step.left_out = ("counted",)

    def close(self, step: OpenStep, *, failed: bool) -> None:
        """The step is over."""
        if self._span is not None:
            self._resume()
        self._step = None
        self.thread = 0
        if failed:
            self.tracker.abandon()
        else:
            step.segments = self.tracker.finish()
        step.end = self.timer.mark()
        if instruments.compilations != step.compilations:
            step.left_out = (*step.left_out, "compiled")
            if not self.tracker.whole:
                self.tracker.lose_sight()

    def forget_outside(self) -> None:
        """Somebody else takes the time of what runs between steps."""
        self._outside = None

    def pause(self, name: str) -> None:
        """What runs from here on is no part of the step."""
        if self._span is not None:
            self._resume()
        self.tracker.interrupt()
        self._span = (name, self.timer.mark())

    def resume(self) -> None:
        """The pause is over."""
        if self._span is not None:
            self._resume()

    def _resume(self) -> None:
        assert self._span is not None
        if self._step is not None:
            self._step.spans = (*self._step.spans, (*self._span, self.timer.mark()))
        self._span = None

    # --- told by the hooks -------------------------------------------------------------------------------------------
    def called(self, index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A model is called."""
        root = self._roots[index]
        step, grad, training = self._step, _grad_enabled(), module.training
        if (
            step is None
            or self._span is not None
            or (root.trained and not grad and not training)
            or self.tracker.counter is not None
        ):
            if self._aside(root, evaluates=not grad and not training):
                return
            step = self._step
            assert step is not None
        event = root.quick(index, training, grad, args, kwargs)
        kept = None if event is None else self.known(event)
        if kept is None:
            kept = self._describe(index, root, grad, event, args, kwargs)
        step.calls += 1
        if index == 0:
            tokens, samples, mask = kept
            if grad:
                step.tokens += tokens
                step.samples += samples
                if mask:
                    step.unpadded = (*step.unpadded, self._unpadded.seen(kwargs["attention_mask"]))
            else:
                step.other_tokens += tokens
                step.other_samples += samples
        if training and grad:
            root.trained = True

    def _describe(
        self, index: int, root: Root, grad: bool, event: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[int, int, bool]:
        """A call that is not known to follow here."""
        step = self._step
        assert step is not None
        root.refresh()
        structure, ints = arguments(args, kwargs, root.flash)
        about = index, root.module.training, grad, root.wanted() if grad else 0, root.cast(), root.weight()
        kept = size_of(root.module, args, kwargs)
        counted = self.tracker.counter is not None
        self.tracker.call(event or (about, structure, ints), (*about, structure), ints, kept, records=grad)
        if not counted and self.tracker.counter is not None:
            step.left_out = (*step.left_out, "counted")
        return kept

    def _aside(self, root: Root, *, evaluates: bool) -> bool:
        """A call that may be no part of the step; is it none?"""
        step = self._step
        if step is None:
            if evaluates and root.trained and self._outside is None:
                self._outside = self.timer.mark()
            return True
        if self._span is not None and self._span[0]:
            return True  # a pause
        if evaluates and root.trained:
            if self._span is None:
                self.tracker.interrupt()
                self._span = ("", self.timer.mark())
            return True
        if self._span is not None:
            self._resume()
        itself, inside = (False, False) if self.tracker.counter is None else compiled_call()
        if inside:
            self.tracker.from_start |= not self.opaque
            self.opaque = True
        elif itself:
            self.tracker.lose_sight()
        return inside

    def differentiated(self, structure: tuple[Any, ...]) -> None:
        """A backward pass starts that is not known to follow here."""
        if self._span is None and self.tracker.backward(structure) and self._step is not None:
            self._step.left_out = (*self._step.left_out, "counted")

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
        roots = self._roots
        wanted = roots[0].number if len(roots) == 1 else tuple([root.number for root in roots])
        event = "optimizer", type(optimizer).__name__, wanted
        if closure or self.known(event) is None:
            self.tracker.optimizer(event, closure=closure)

    # --- read later --------------------------------------------------------------------------------------------------
    def times(self, step: OpenStep, *, wait: bool) -> tuple[float, float, dict[str, float]] | None:
        """(seconds in all, of evaluation, of each pause); None where the device is not past the step yet."""
        whole = self.timer.seconds(step.start, step.end, wait=wait)
        if whole is None:
            return None
        if not step.spans:
            return whole, 0.0, NO_PAUSES
        evaluation = 0.0
        paused: dict[str, float] = {}
        for name, start, end in step.spans:
            passed = self.timer.seconds(start, end, wait=True) or 0.0
            if name:
                paused[name] = paused.get(name, 0.0) + passed
            else:
                evaluation += passed
        return whole, evaluation, paused

    def evaluation_between_s(self) -> float:
        """Seconds of evaluations between steps, so far."""
        for start, end in self._between:
            self._between_s += self.timer.seconds(start, end, wait=True) or 0.0
        self._between.clear()
        return self._between_s

    def work(self, segments: tuple[Done, ...]) -> Work | None:
        """What a step of these segments multiplied; None where one of them is not counted."""
        parts = [done.place.end(done.ints).work if done.work is None else done.work for done in segments]
        return None if any(part is None for part in parts) else total(part for part in parts if part is not None)

    def effective_tokens(self, step: OpenStep) -> int | None:
        """Tokens without padding; None where no mask was seen."""
        return sum(map(self._unpadded.read, step.unpadded)) if step.unpadded else None

    def notes(self) -> Iterator[str]:
        """What a reader of the figures must know."""
        if self.opaque:
            yield _OUTSIDE
        if self._closures:
            yield "what an optimizer with a closure multiplies itself depends on its state, and is in no count."
        if self.tracker.corrections:
            yield (
                f"{self.tracker.corrections} counts differed from an earlier one of the same signature: work depends "
                "on something that shapes do not tell; recount_every= narrows it down."
            )
