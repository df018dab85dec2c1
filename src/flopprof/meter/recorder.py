"""The step under way: what was called in it and when, as the hooks tell."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from flopprof.meter import notes
from flopprof.meter.arguments import arguments, plain
from flopprof.meter.batches import Batches
from flopprof.meter.between import Evaluations
from flopprof.meter.compiling import compiled_call, inside_in_place
from flopprof.meter.models import Roots
from flopprof.meter.optimizers import Optimizers, stepped_number
from flopprof.meter.padding import Padding, Unpadded
from flopprof.meter.places import Done
from flopprof.meter.signature import Root, size_of
from flopprof.meter.steps import Moment, OpenStep, Repeat
from flopprof.meter.timing import Timer
from flopprof.meter.tracking import Tracker
from flopprof.meter.trail import works
from flopprof.meter.values import Values
from flopprof.meter.watching import Watch, instruments
from flopprof.meter.work import Work, total
from flopprof.profile import Attention

# The lists of the models' parameters are made anew after so many steps.
_REFRESH = 256
_grad_enabled = torch.is_grad_enabled


class Recorder:
    """Turns what the hooks tell into a step's segments, times and sizes."""

    def __init__(
        self, models: Sequence[torch.nn.Module], attention: Attention, timer: Timer, clock: Callable[[], float]
    ) -> None:
        self.repeat = Repeat(self)
        self.clock = clock
        self.timer = timer
        self._roots = Roots(self._evaluated)
        self.main = 0  # the model whose tokens and samples are those of the step
        self.tracker = Tracker(self._roots, attention)
        self.known = self.tracker.known
        self.opaque = False  # a model runs inside a compiled function
        self.needs_calls = True  # a step without one is told by nothing else
        self._bypassed = self._once_bypassed = False  # no model was called in the latest step, or in one
        self._unseen = False  # nothing told a step from others
        self._batches = Batches()
        self._watch = Watch()
        self._step: OpenStep | None = None
        self._span: tuple[str, Any] | None = None  # a pause or an evaluation inside the step
        self._evaluates: Root | None = None  # whose evaluation that is
        self.between = Evaluations()
        self._closures = False
        self._rebuilt = False  # a part of the models is another one
        self._looked = 0
        self._over: list[OpenStep] = []  # that were only held against the one before
        self._before: tuple[Done, ...] = ()  # segments of the step before
        self._learnt = False  # the next steps may be held against the one that ended last
        self._alike = False  # it was the same as the one before it
        self._moments: list[Moment] | None = None  # of this step, where the next ones may be held against it
        self._unpadded, self._values = Unpadded(), Values()
        self._optimizers = Optimizers()
        for model in models:
            self.add(model)

    def add(self, model: torch.nn.Module) -> None:
        """One more model."""
        if any(root.module is model for root in self._roots):
            return
        self.at_length()
        self.forget()
        root = Root(model, len(self._roots))
        self._watch.add(self, root)
        self._roots.append(root)

    def remove(self) -> None:
        """Take the hooks off."""
        self.forget()
        self._watch.remove()
        self.tracker.counter.leave_late()

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

    @property
    def timer(self) -> Timer:
        """What tells the moments of a step."""
        return self._timer

    @timer.setter
    def timer(self, timer: Timer) -> None:
        self._timer = timer
        self.repeat.tell_time(timer)

    # --- the step ----------------------------------------------------------------------------------------------------
    def at_length(self) -> OpenStep | None:
        """The step that is open, if one is: it is followed at length from here on."""
        if self.repeat.on:
            self._over = self.followed()
            self._step, here = self.repeat.open()
            self.tracker.go_on(here)
            self._step.unseen = lost = self._watch.stay()  # nobody told of a call
            self.tracker.from_start |= lost
        return self._step

    def followed(self) -> list[OpenStep]:
        """The steps since the last one that was closed: they did what that one did."""
        new = [*self.repeat.followed()]
        self.tracker.passed(len(new))
        self._looked += len(new)
        over, self._over = [*self._over, *new], []
        return over

    def ahead(self, most: int) -> int:
        """So many of the next steps, at most, need no more than to be held against the one that ended last."""
        if not self._learnt or self._rebuilt:
            return 0
        return min(self.tracker.ahead(most), _REFRESH - 1 - self._looked)

    def forget(self) -> None:
        """The next steps are not held against those before."""
        self.repeat.left = 0
        self._before, self._alike, self._learnt = (), False, False

    def open(self, step: OpenStep, *, recount: bool, learns: bool) -> None:
        """A step begins. learns: the next ones may be held against it."""
        self._step = step
        self.repeat.opened(blind=self.tracker.blind)
        self._watch.follow(self)
        self._looked += 1
        if self._rebuilt or self._looked >= _REFRESH:
            self._rebuilt, self._looked = False, 0
            for root in self._roots:
                root.refresh()
        if self.between.start is not None:
            self.end_outside(step.number, waited=step.data_wait_s)
        step.compilations = instruments.compilations
        step.start = self.timer.mark()
        given = self.opaque or self._bypassed or (self._once_bypassed and step.batch is not None)
        recount |= (self._closures or self.tracker.late or self._looked == 1) and self._batches.new(step.batch)
        if not given:
            self.tracker.begin(recount=recount)
        else:
            step.unseen = step.batch is None
            self._unseen |= step.unseen
            structure, ints = arguments((step.batch,), {})
            structure = self._values.told(("given", *structure), self.tracker.tree.start.children)
            self.tracker.begin(structure, ints, recount=recount)
        if self.tracker.counter.open is not None:
            step.left_out = ("counted",)
        self._moments = [] if learns and self._alike and not self.tracker.whole and not given else None

    def close(self, step: OpenStep, *, failed: bool) -> None:
        """The step is over."""
        self.resume()
        self._note(self.repeat.nodes())
        self._step = None
        self.repeat.thread = 0
        if failed:
            self.tracker.abandon()
        else:
            step.segments = self.tracker.finish()
        step.end = self.timer.mark()
        if step.calls or self._bypassed:
            self._bypassed &= not step.calls
        elif self.needs_calls and self._roots:
            found = [done.work for done in step.segments if done.work is not None]
            self._bypassed = any(row[0] for work in found for row in work.flops.values())
            self._once_bypassed |= self._bypassed
            if step.segments and not step.segments[0].place.told:  # what was not counted, no other one tells
                step.unseen |= len(found) < len(step.segments)
        if instruments.compilations != step.compilations:
            step.left_out = (*step.left_out, "compiled")
            if not self.tracker.whole:
                self.tracker.lose_sight()
        alike = step.segments == self._before and step.ordinary() and not failed
        moments, self._moments = self._moments, None
        self._learnt = alike and moments is not None and self.tracker.blind == self.repeat.blind
        if self._learnt and moments is not None:
            self.repeat.learn(moments, step)
        self._before, self._alike = step.segments, alike

    def _note(self, event: Any) -> None:
        """An event comes, perhaps in a step that the next ones may be held against."""
        if self._moments is None or self._step is None:
            return
        step = self._step.again()
        step.batch = None
        self._moments.append(Moment(event, step, *self.tracker.here()))

    def end_outside(self, step: int, *, waited: float = 0.0) -> None:
        """What is evaluated between steps was over before data was waited for that long; then that step comes."""
        self.between.end(self.timer, step=step, at=self.clock(), waited=waited)

    def forget_outside(self) -> None:
        """Somebody else takes the time of what runs between steps."""
        self.between.start = None

    def pause(self, name: str) -> None:
        """What runs from here on is no part of the step."""
        self.at_length()
        self.resume()
        self.tracker.suspend()
        self._span = (name, self.timer.mark())

    def resume(self) -> None:
        """The pause is over, or the evaluation; if there was any."""
        if self._step is not None and self._span is not None:
            self._step.spans = (*self._step.spans, (*self._span, self.timer.mark()))
            self.tracker.resume()
        self._span = None

    # --- told by the hooks -------------------------------------------------------------------------------------------
    def rebuilt(self, module: torch.nn.Module) -> None:
        """A module or a parameter was put into that module: a part of the models, or of something else."""
        for root in self._roots:
            if id(module) in root.parts:
                root.stale = self._rebuilt = True
                root.fresh = False
                self.repeat.left = min(self.repeat.left, 0)

    def frozen(self) -> None:
        """A parameter was frozen, or thawed."""
        for root in self._roots:
            root.fresh = False

    def called(self, root: Root, parts: list[Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A model is called. parts: the nodes so far, and what tells this call apart, where that is plain."""
        grad, training = _grad_enabled(), root.module.training
        step = self.at_length()
        if (
            step is None
            or self._span is not None
            or (root.trained and not grad and not training)
            or self.tracker.counter.open is not None
        ):
            if self._aside(root, evaluates=not grad and not training):
                return
            step = self._step
            assert step is not None
        told = parts if plain((*args, *kwargs.values())) else None
        event = None if told is None else tuple(told[1:])
        self._note(told)
        kept = None if event is None else self.known(event, aside=not grad)
        if kept is None:
            self._moments = None
            kept = self._describe(root, grad, event, args, kwargs)
        step.calls += 1
        if root.index == self.main:
            tokens, samples, padding = kept
            if grad:
                step.tokens += tokens
                step.samples += samples
                if padding is not None:
                    step.unpadded = (*step.unpadded, self._unpadded.seen(padding, args, kwargs))
            else:
                step.other_tokens += tokens
                step.other_samples += samples
        if training and grad:
            root.trained = True

    def _describe(
        self, root: Root, grad: bool, event: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[int, int, Padding | None]:
        """A call that is not known to follow here."""
        step = self._step
        assert step is not None
        shaped = root.shaped
        self._rebuilt |= root.refresh()  # others for this call alone, if by functional_call
        root.renew()
        if root.shaped != shaped:  # nobody told of that: the event is of what it was
            event = None
        structure, ints = arguments(args, kwargs, root.flash, root.names)
        about = (
            root.index,
            root.module.training,
            grad,
            root.number if grad else root.shaped,
            root.cast(),
            None if root.first is None else root.first.dtype,
        )
        known = self.tracker.tree.calls if grad else self.tracker.tree.alone
        structure = self._values.told((*about, *structure), known.children)
        kept = size_of(root, args, kwargs)
        counted = self.tracker.counter.open is not None
        self.tracker.call(event or (structure, ints), structure, ints, kept, records=grad)
        if not counted and self.tracker.counter.open is not None:
            step.left_out = (*step.left_out, "counted")
        return kept

    def _aside(self, root: Root, *, evaluates: bool) -> bool:
        """A call that may be no part of the step; is it none?"""
        step = self._step
        if step is None:
            if evaluates and root.trained and self.between.start is None:
                self.between.start = self.timer.mark()
                self.repeat.left = 0
            return True
        if self._span is not None and self._span[0]:
            return True  # a pause
        if evaluates and root.trained:
            if self._span is None:
                self.tracker.suspend()
                self._span, self._evaluates = ("", self.timer.mark()), root
            return True
        if self._span is not None:
            if self._evaluates is not None and not self._evaluates.module.training and not root.trains():
                return True  # a metric, say, or a teacher beside its student
            self.resume()
        counts = self.tracker.counter.open is not None
        itself, inside = compiled_call() if counts else (False, False)
        inside |= counts and inside_in_place(root.module)
        if inside:
            self.tracker.from_start |= not self.opaque
            self.opaque = True
        elif itself:
            self.tracker.lose_sight()
        return inside

    def _evaluated(self, root: Root) -> None:
        """What a model wraps is evaluated for its own sake."""
        if self._step is not None and self._span is None:
            self._aside(root, evaluates=True)

    def differentiated(self, parts: tuple[Any, ...]) -> None:
        """A backward pass starts. parts: the nodes so far, and what tells it apart."""
        if torch._guards.TracingContext.try_get() is not None:
            return  # a compiler differentiates what it compiles
        step = self.at_length()
        if self._span is not None and not self._span[0]:
            self.resume()  # what trains is no evaluation
        self._note(parts)
        event = (*parts[1:5], self._roots.placed(parts[5])) if parts[5] else parts[1:]
        if self.known(event) is None:
            self._moments = None
            if self._span is None and self.tracker.backward(event) and step is not None:
                step.left_out = (*step.left_out, "counted")

    def stepped(self, optimizer: torch.optim.Optimizer, *, closure: bool, over: bool) -> None:
        """An optimizer's step begins, or one with a closure ends."""
        step = self.at_length()
        if step is None or (self._span is not None and self._span[0]):
            return
        self.resume()
        if over:
            self.tracker.after_closure()
            return
        self._note((self.repeat.nodes(), weakref.ref(optimizer)))
        step.optimizer_steps += 1
        self._closures |= closure
        roots = self._roots
        wanted = roots[0].number if len(roots) == 1 else tuple([root.number for root in roots])
        base = "optimizer", type(optimizer).__name__, self._optimizers.number(optimizer), wanted
        event, multiplies = self.tracker.optimizer_event(base, lambda: 0 if closure else stepped_number(optimizer))
        if multiplies:  # for which parameters, is looked at in every step
            self._moments = None
        if closure or self.known(event) is None:
            self._moments = None
            self.tracker.optimizer(event, closure=closure)

    # --- read later --------------------------------------------------------------------------------------------------
    def work(self, segments: tuple[Done, ...]) -> Work | None:
        """What a step of these segments multiplied; None where one of them is not counted."""
        parts = [*works(segments)]
        return None if any(part is None for part in parts) else total(part for part in parts if part is not None)

    def effective_tokens(self, step: OpenStep) -> int | None:
        """Tokens without padding; None where nothing tells it. Calls without a mask have none."""
        return step.tokens - sum(map(self._unpadded.padded, step.unpadded)) if step.unpadded else None

    def notes(self) -> Iterator[str]:
        """What a reader of the figures must know."""
        tree, tracker = self.tracker.tree, self.tracker
        if self._unseen:
            yield notes.OUTSIDE if self.opaque else notes.BYPASSED
        if self._closures:
            yield notes.CLOSURES
        yield from self._values.notes(tree.start.children, tree.calls.children, tree.alone.children)
        if tracker.widened:
            yield notes.WIDENED
        if tracker.corrections:
            yield notes.CORRECTED.format(tracker.corrections)
