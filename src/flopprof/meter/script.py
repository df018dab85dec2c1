"""Meters a training script that knows nothing of it: finds the modules it calls, and where its steps end.

A step ends where the last optimizer stepped before one of them steps a second time: accumulation, several optimizers
in turn (a GAN, Muon beside AdamW), closures and skipped steps of a GradScaler are then all one step each. Waiting for
a DataLoader and saving with torch.save are rows of their own.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import optimizer as optimizers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import dataloader

from flopprof.counting.imports import WhenImported, replaced
from flopprof.counting.instrument import closure_outside
from flopprof.meter.contiguous import RECOUNT_WITHOUT_CALLS, Contiguous
from flopprof.meter.roots import CompiledFunction, Finder, Roots, move
from flopprof.meter.summary import Summary
from flopprof.meter.watching import instruments

_node = torch._C._current_autograd_node
_thread = threading.get_ident


class Script:
    """Finds the steps of whatever trains in this thread between `install` and `remove`.

    make      gives the meter, once a device is known: that of the first module that trains
    finished  is called after every step
    """

    def __init__(self, make: Callable[[], Contiguous], finished: Callable[[Contiguous], object] | None = None) -> None:
        self.meter: Contiguous | None = None
        self.stepped = 0  # how often an optimizer did
        self.elsewhere = False  # one did in another thread
        self._make, self._finished = make, finished
        self._roots = Roots(self._called)
        self._finder: Finder | None = None
        self._thread = 0
        self._pid = 0
        self._seen: dict[int, weakref.ref[torch.Tensor]] = {}  # what stepped in this step: its first parameter
        self._inside: list[Any] = []  # optimizers that are stepping
        self._compiled_step = False
        self._in_backward: Any = None  # an optimizer that stepped there
        self._aside = False
        self._undo: list[Callable[[], object]] = []

    # --- in and out --------------------------------------------------------------------------------------------------
    def install(self) -> None:
        """From now on. `remove` leaves torch as it was."""
        self._thread, self._pid = _thread(), os.getpid()
        self._undo = [_changeable("_global_optimizer_pre_hooks"), _changeable("_global_optimizer_post_hooks")]
        before = register_optimizer_step_pre_hook(self._before)  # a step is told of an optimizer once it is its own
        instruments.acquire()
        after = register_optimizer_step_post_hook(self._after)  # and before it ends
        self._undo += [instruments.release, before.remove, after.remove]
        self._undo += [
            replaced(GradScaler, "step", self._scaled(GradScaler.step)),
            replaced(torch, "compile", self._compiling(torch.compile)),
            replaced(torch, "save", self._outside("saving", torch.save)),
            replaced(torch.jit, "trace", self._outside("tracing", torch.jit.trace)),
        ]
        for name in ("torch.export", "torch.onnx"):
            exporter = WhenImported(name, lambda module: replaced(module, "export", self._exporting(module)))
            exporter.install()
            self._undo.append(exporter.remove)
        loader: Any = dataloader.DataLoader
        batches: Any = dataloader._BaseDataLoaderIter
        self._undo += [
            replaced(loader, "__iter__", self._outside("data_wait", loader.__iter__)),
            replaced(batches, "__next__", self._outside("data_wait", batches.__next__)),
        ]
        self._roots.install()
        self._undo.append(self._roots.remove)
        if hasattr(os, "register_at_fork"):
            here = weakref.ref(self)

            def forked() -> None:
                script = here()
                if script is not None:
                    script._forked()

            os.register_at_fork(after_in_child=forked)

    def remove(self) -> None:
        """The open step is dropped, and torch is as it was; the meter keeps what it found."""
        self._thread = 0
        try:
            if self.meter is not None and os.getpid() == self._pid:
                self.meter.decide()
                self.meter.drop()
                self.meter.close()
        finally:
            while self._undo:
                self._undo.pop()()

    def _forked(self) -> None:
        """In a child, nothing is metered: a worker of a DataLoader, or a process that trains by itself."""
        if self._thread and os.getpid() != self._pid:
            self._thread = 0
            if self.meter is not None:
                self.meter._recorder.repeat.thread = 0
                self.meter._recorder.tracker.abandon()
            while self._undo:
                self._undo.pop()()

    def summary(self) -> Summary | None:
        """Of all finished steps; None where there was none."""
        if self.meter is None or not self.meter.records:
            return None
        summary = self.meter.summary()
        notes = [_meant(note) for note in summary.notes]
        without = sum(not record.calls for record in self.meter.records)
        if without:
            notes.append(
                f"{without} steps call no module: what they multiply was counted in every "
                f"{RECOUNT_WITHOUT_CALLS}th of them, and is taken to be the same in the others."
            )
        if self.elsewhere:
            notes.append("an optimizer stepped in another thread, too: its steps are not seen.")
        told = summary.convention
        if told is not None:
            told = msgspec.structs.replace(told, reason=_meant(told.reason))
        return msgspec.structs.replace(summary, notes=tuple(notes), convention=told)

    def nothing(self) -> str:
        """Why there is no summary."""
        if self.stepped:
            return (
                "no step was finished: where nothing is called that trains, the first step of an optimizer is where "
                "metering begins, and no other one came."
            )
        if self.elsewhere:
            return (
                "no step was found: an optimizer stepped in a thread that the script started, and steps of other "
                "threads are not seen. Train in the main thread, or use flopprof.Meter in that one."
            )
        if self.meter is not None:
            return (
                "no step was found: a model was called to train, but no torch optimizer stepped, and it is by their "
                "steps that steps are told. For another kind of optimizer use flopprof.Meter in the loop."
            )
        return (
            "no step was found: no torch optimizer stepped in this process. Processes that the script starts are "
            "not seen; start those with torchrun."
        )

    # --- modules -----------------------------------------------------------------------------------------------------
    def _called(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._aside:
            return
        if self._in_backward is not None:
            self._step_over(self._in_backward)
        if self.meter is None:
            parameters = list(module.parameters())
            if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in parameters):
                return
            self._begin(parameters[0])
        if self._finder is not None:
            self._finder.called(module, args, kwargs)

    def _begin(self, parameter: torch.Tensor) -> None:
        """The first step begins: in the middle of what the script does, so that its start is not another's."""
        self.meter = meter = self._make()
        move(meter, parameter)
        self._finder = Finder(meter._recorder)
        meter.start_step()
        tracker = meter._recorder.tracker
        tracker._enter(tracker.tree.alone.child(("script",)).start(()), None)
        if self._inside:  # in a closure that an optimizer runs
            meter._recorder.stepped(self._inside[0], closure=True, over=False)

    def _compiling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile, whose functions tell of their calls: inside them, nothing else does."""

        @functools.wraps(original)
        def compile(model: Any = None, *args: Any, **kwargs: Any) -> Any:
            if model is None:
                return lambda function: compile(function, *args, **kwargs)
            made = original(model, *args, **kwargs)
            if made is model or isinstance(made, torch.nn.Module | type) or not callable(made):
                return made
            return self._entry(model, made)

        return compile

    def _entry(self, function: Callable[..., Any], made: Callable[..., Any]) -> Callable[..., Any]:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, torch.optim.Optimizer):
            return self._stepping(owner, made)
        of_module = isinstance(owner, torch.nn.Module) and getattr(function, "__name__", "") == "_call_impl"
        module: torch.nn.Module = owner if of_module else CompiledFunction(function)  # type: ignore[assignment]
        roots = self._roots

        @functools.wraps(made)
        def entry(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not roots.outside():
                return made(*args, **kwargs)
            if isinstance(module, CompiledFunction):
                module.refers(*args, *kwargs.values())
            return roots.around(module, made, args, kwargs)

        return entry

    def _stepping(self, optimizer: torch.optim.Optimizer, made: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(made)
        def entry(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or self._compiled_step or self._thread != _thread():
                return made(*args, **kwargs)
            self._before(optimizer, args, kwargs)
            recorder = None if self.meter is None else self.meter._recorder
            if recorder is not None and recorder.tracker.counter.open is None:  # else its own hooks run, and tell
                recorder.stepped(optimizer, closure=False, over=False)
            self._compiled_step = True
            try:
                result = made(*args, **kwargs)
            finally:
                self._compiled_step = False
            self._after(optimizer, args, kwargs)
            return result

        return entry

    # --- optimizers --------------------------------------------------------------------------------------------------
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self._compiled_step:
            return None
        if _node() is not None or self._thread != _thread():
            self.elsewhere |= _node() is None and self._thread != 0
            return None
        if optimizer in self._inside:  # its last step raised
            self._inside.clear()
        self._inside.append(optimizer)
        if len(self._inside) == 1:
            self._steps(optimizer)
        # Metering may begin in its closure, and is told then what of the step lies outside that.
        return closure_outside(sys._getframe(1), args, kwargs) if self.meter is None else None

    def _after(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self._compiled_step:
            return
        if (
            _node() is not None and self._thread
        ):  # each parameter's own, as its gradient arrives; on a GPU in its thread
            self._in_backward = optimizer
            if self.meter is not None and self.meter._open is not None:
                self.meter._open.optimizer_steps += 1
            return
        if self._thread != _thread():
            return
        while self._inside and self._inside.pop() is not optimizer:
            pass
        if not self._inside:
            self._step_over(optimizer)

    def _steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Does a new step begin with this one's?"""
        self._roots.arm()
        if self._in_backward is not None:
            self._step_over(self._in_backward)
        if self.meter is None:
            return
        if self._seen and (
            id(_first(optimizer)) in self._seen or any(found() is None for found in self._seen.values())
        ):
            self._seen.clear()
            if self.meter.decide() and self._finished is not None:
                self._finished(self.meter)

    def _step_over(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped, or was skipped."""
        self.stepped += 1
        first = _first(optimizer)
        if self._in_backward is not None:
            self._in_backward = None
            self._seen.clear()
            if self.meter is not None and self.meter.decide() and self._finished is not None:
                self._finished(self.meter)
        if first is None:
            return
        if self.meter is not None and not self.meter.fits(first):
            self.meter.drop()  # what was called before was no training
            self.meter.close()
            self.meter = None
        if self.meter is None or self._finder is None:
            self._begin(first)
            return
        self._seen[id(first)] = weakref.ref(first)
        self.meter.boundary()

    def _scaled(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """GradScaler.step: where it skips the optimizer's, the step ends all the same."""

        @functools.wraps(original)
        def step(scaler: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            before = self.stepped
            result = original(scaler, optimizer, *args, **kwargs)
            if self._thread == _thread() and self.stepped == before and self.meter is not None:
                self._steps(optimizer)
                self._step_over(optimizer)
            return result

        return step

    # --- beside the step ---------------------------------------------------------------------------------------------
    def _exporting(self, module: Any) -> Callable[..., Any]:
        return self._outside("tracing", module.export)

    def _outside(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time is a row of its own, and whose products are none of the step's."""

        @functools.wraps(original)
        def aside(*args: Any, **kwargs: Any) -> Any:
            meter = self.meter
            if meter is None or self._aside or self._thread != _thread() or _node() is not None:
                return original(*args, **kwargs)
            self._roots.arm()
            self._aside = True
            try:
                return meter.aside(name, original, args, kwargs)
            finally:
                self._aside = False

        return aside


# What notes advise, as it is said where there is no Meter in the script.
_MEANT = (
    ("recount_every=", "recount_every= of a flopprof.Meter in the script"),
    ("give Meter tokens= and samples=", "a flopprof.Meter in the script is told how many by tokens= and samples="),
    ("`peak=flopprof.measure_peak()` or `flopprof peaks --measure`", "`--peak measure`"),
    ("peak=...", "--peak"),
    ("use meter.track(loader), meter.step(batch) or meter.wrap(step)", "use a flopprof.Meter in the script"),
)


def _meant(note: str) -> str:
    for said, meant in _MEANT:
        note = note.replace(said, meant)
    return note


class _Changeable(OrderedDict[int, Any]):
    """Hooks that may come and go while they are called: a counter that a hook opens or closes has hooks of its own."""

    def values(self) -> Any:
        """Those of this moment."""
        return list(super().values())


def _changeable(name: str) -> Callable[[], object]:
    """Makes torch's list of that name such a one; returns what undoes it."""
    before = vars(optimizers)[name]
    own, known = _Changeable(before), set(before)
    undo = replaced(optimizers, name, own)

    def put_back() -> None:
        undo()
        before.update({key: hook for key, hook in own.items() if key not in known})

    return put_back


def _first(optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    """The parameter by which an optimizer is known: another one over the same parameters takes its place."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            return parameter  # type: ignore[no-any-return]  # the groups are plain dicts
    return None
