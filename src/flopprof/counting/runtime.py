"""FlopCounter: tallies operators as they run, in forward, backward, recompute and optimizer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import Any

import torch
from torch._C._dynamo import eval_frame as _eval_frame
from torch.utils._python_dispatch import TorchDispatchMode

from flopprof.counting import opaque
from flopprof.counting.attribution import Frame, Names
from flopprof.counting.foreign import SYMBOLIC, foreign, functional, symbolic
from flopprof.counting.instrument import active, counter_types, installed
from flopprof.counting.lines import line_now, remember_line, running_line
from flopprof.counting.operands import Sources
from flopprof.counting.operators import PRODUCT_NODES, Entry, Kind, entries, is_product, learn
from flopprof.counting.tally import Tally, first_shape
from flopprof.counting.unseen import OUTSIDE, Unseen, cached, passed_through, storages
from flopprof.counting.whereabouts import Whereabouts
from flopprof.formulas import Cost, LengthsUnknown
from flopprof.formulas.elementwise import elementwise_flops
from flopprof.profile import Attention, Phase, Profile

# Looked up once: these run for every operator.
_node = torch._C._current_autograd_node
_grad_enabled = torch.is_grad_enabled
_Tensor = torch.Tensor
_FREE, _ELEMENTWISE, _COUNTED = Kind.FREE, Kind.ELEMENTWISE, Kind.COUNTED


class FlopCounter(TorchDispatchMode):
    """Context manager that counts the FLOPs of whatever runs inside it; `.profile` during and after.

    model gives modules their names (`layer1.0.conv2`, root ""); without it roots are named after their class.
    lines also tells each count's line of source (`profile.by_line()`), for about a tenth more time.
    Counters nest, each counting everything inside it once; entering one again goes on with its tally, `reset()`
    empties it. A counter counts the thread that entered it. What runs is not changed: results are bitwise those
    without the counter.

    >>> import torch
    >>> model = torch.nn.Linear(4, 5)
    >>> with FlopCounter(model) as counter:
    ...     loss = model(torch.randn(3, 4)).sum()
    ...     loss.backward()
    >>> counter.profile.forward_flops, counter.profile.backward_flops
    (120, 120)
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The wrapper that True would put around __torch_dispatch__ costs more than counting does.
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: whether a function runs compiled is not for torch to tell by this mode (see compiled.py).

        The mark that False leaves is seen by every thread, and compiles nothing there; and control-flow operators,
        which compile themselves to be run at all, insist on it.
        """
        return True

    def __init__(
        self, model: torch.nn.Module | None = None, *, attention: Attention = "full", lines: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if model is not None and not isinstance(model, torch.nn.Module):
            raise TypeError(f"FlopCounter takes a module or nothing, got {type(model).__name__}.")
        if attention not in ("full", "causal"):
            raise ValueError(f"attention {attention!r} is neither 'full' nor 'causal'.")
        self.model = model
        self.attention: Attention = attention
        self._open = self._thread = 0
        self.lines = lines
        if lines:
            self._count = self._count_at_line  # type: ignore[method-assign, assignment]  # the usual way pays nothing
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far. Raises RuntimeError while the counter is open."""
        if self._open:
            raise RuntimeError("FlopCounter.reset() is for a closed counter: leave its `with` block first.")
        self._sources = Sources()
        self._names = Names(self.model, self._sources)
        self.tally = Tally()  # the counts under way
        self.where = Whereabouts(self._names, running_line if self.lines else None)
        self.unseen = Unseen()
        self._entries = entries()
        self.seen = 0  # operators that produced storage
        self.counted_calls = 0

    @property
    def profile(self) -> Profile:
        """Everything counted so far."""
        return self.tally.profile(self._names.frames, self.model, self.attention)

    def __enter__(self) -> FlopCounter:
        if not self._open:
            self._entries = entries()
            self.tally.reopen()
            self._thread = threading.get_ident()
            self.where.open()
            installed.acquire()
            super().__enter__()  # type: ignore[no-untyped-call]
        elif self._thread != threading.get_ident():
            raise RuntimeError("this FlopCounter is open in another thread: give each thread a counter of its own.")
        self._open += 1  # entered within itself, it still counts once
        return self

    def __exit__(self, *error: Any) -> None:
        self._open -= 1
        if not self._open:
            super().__exit__(*error)  # type: ignore[no-untyped-call]
            installed.release()
            self.tally.close(self._names.frames, self.model)
            self.where.close()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Active once more, for what an operator runs inside: the mode is off while it handles one."""
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    @contextmanager
    def muted(self) -> Iterator[None]:
        """What runs inside is seen and forgotten."""
        kept = self.tally, self.counted_calls
        self.tally = Tally()
        try:
            yield
        finally:
            self.tally, self.counted_calls = kept

    def __torch_dispatch__(  # noqa: PLR0915 - calls within would cost more than some of the operators
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if types:
            if foreign(types):
                return func(*args, **(kwargs or {})) if functional(types) else NotImplemented
            if symbolic(args, kwargs):
                return self._symbolic(func, args, kwargs or {})
        entry = self._entries.get(id(func)) or learn(func)
        if entry.silent:
            return entry.call(*args, **kwargs) if kwargs else entry.call(*args)
        kind = entry.kind
        self.seen += 1
        if kind is _FREE:
            out = entry.call(*args, **kwargs) if kwargs else entry.call(*args)
            if entry.derives:
                self._sources.derive(args, out)
        elif kind is _ELEMENTWISE:
            out = entry.call(*args, **kwargs) if kwargs else entry.call(*args)
            node = _node()
            if node is None:
                frame = self.where.frame
                phase = "optimizer" if self.where.steps and self.where.stepping() else "forward"
                if entry.derives and phase == "forward":
                    self._sources.derive(args, out)
            else:
                frame, phase = self.where.backward(node)
                if entry.derives and phase == "recompute":  # as it did when it was not yet a replay
                    self._sources.derive(args, out)
                if entry.product and node.name() in PRODUCT_NODES and is_product(*args[:2]):
                    signed = self.identify(entry, args, kwargs)
                    self._count(entry, frame, phase, signed, args, kwargs, out, 2 * out.numel())
                    return out
            if entry.per_out and type(out) is _Tensor:
                flops = entry.unit * out.numel()
            elif entry.per_in and args and isinstance(args[0], _Tensor):
                flops = entry.unit * args[0].numel()
            else:
                flops = self.elementwise(entry, args, kwargs or {}, out)
            counts = self.tally.elementwise
            key = (entry, frame, phase, flops)
            try:
                counts[key] += 1
            except KeyError:
                counts[key] = 1
            except TypeError:  # made of symbolic sizes
                self.uncounted(entry.name, (), SYMBOLIC)
        elif kind is _COUNTED:
            try:
                signed = self.identify(entry, args, kwargs)
            except RuntimeError:  # a strided nested tensor has no shape: look inside its kernel
                return opaque.run(self, entry, args, kwargs or {})
            if entry.complex_inside and args[0].is_complex():
                return opaque.run(self, entry, args, kwargs or {})
            out = entry.call(*args, **kwargs) if kwargs else entry.call(*args)
            cost = self._cost(entry, args, kwargs, out)
            if cost is not None:
                node = _node()
                if node is None:
                    frame = self.where.frame
                    phase = "optimizer" if self.where.steps and self.where.stepping() else "forward"
                else:
                    frame, phase = self.where.backward(node)
                if isinstance(cost, Cost):
                    self.charge(entry, frame, phase, signed, args, kwargs, out, cost)
                else:
                    self._count(entry, frame, phase, signed, args, kwargs, out, cost)
        else:
            out = opaque.run(self, entry, args, kwargs or {})
        if self.unseen.produced is not None and entry.makes_storage:
            self.unseen.saw(out)
        return out

    def _symbolic(self, func: Any, args: Any, kwargs: Any) -> Any:
        entry = self._entries.get(id(func)) or learn(func)
        if entry.kind is not _FREE:
            self.uncounted(entry.name, (), SYMBOLIC)
        return func(*args, **kwargs)

    def identify(self, entry: Entry, args: Any, kwargs: Any) -> tuple[bool, tuple[Any, ...]]:
        """Whether a factor wants a gradient; and what tells this call from others.

        That is as little as will do, because it is read at every call: the whole description is made once a row.
        """
        graded = _grad_enabled()
        wanted = wants = False
        if not kwargs and not self._sources.shared:
            known = self._sources.known
            identity: list[Any] = []
            try:  # the usual call: dense tensors by position
                for position in entry.positions:
                    item = args[position]
                    if graded:
                        wants = item.requires_grad
                        if wants:
                            wanted = True
                    identity += (item.shape, known.get(item.untyped_storage()._cdata), wants)
                identity.append(item.dtype)
                for position in entry.optional:
                    identity.append(len(args) > position and args[position] is not None)
                return wanted, tuple(identity)
            except (AttributeError, IndexError, RuntimeError):  # a list, one left out, one without storage or shape
                wanted = False
        operands = self._sources.describe(args, kwargs)
        for position, _shape, _dtype, wants, _source in zip(*[iter(operands)] * 5, strict=True):
            wanted = wanted or (wants and position in entry.positions)
        return wanted, operands

    def elementwise(self, entry: Entry, args: Any, kwargs: Any, out: Any) -> int:
        """Elementwise FLOPs of a call."""
        assert entry.elementwise is not None
        try:
            cost_of = entry.elementwise.cost_of
            if cost_of is not None and "out" not in kwargs:
                return cost_of(*args, out=out, **kwargs)
            return elementwise_flops(entry.elementwise, args, kwargs, out)
        except Exception as error:  # as in _cost
            self.uncounted(entry.name, args, f"its elementwise cost is not known: {error}")
            return 0

    def _cost(self, entry: Entry, args: Any, kwargs: Any, out: Any) -> int | Cost | None:
        try:
            if not kwargs and not entry.wanted:
                cost = entry.formula(*args, out=out)
            else:
                # A result tensor that the caller passed is `out` already.
                named = {**(kwargs or {}), "out": out}
                if entry.wanted:
                    named["wanted"] = _wanted(_node())
                cost = entry.formula(*args, **named)
            return cost if (type(cost) is int and cost >= 0) or type(cost) is Cost else _checked(cost)
        except LengthsUnknown as unknown:
            self.uncounted(entry.name, args, str(unknown))
        except Exception as error:  # a handler must not raise: what ran is right, only its count is not known
            self.uncounted(entry.name, args, f"its formula failed: {type(error).__name__}: {error}")
        return None

    def charge(
        self, entry: Entry, frame: Frame, phase: Phase, signed: Any, args: Any, kwargs: Any, out: Any, cost: Cost
    ) -> None:
        """Count a call that costs this, what it computes again apart."""
        self._count(entry, frame, phase, signed, args, kwargs, out, cost.flops, cost)
        if cost.recompute:
            again = Cost(cost.recompute, cost.recompute_causal, mask_known=cost.mask_known)
            self._count(entry, frame, "recompute", signed, args, kwargs, out, cost.recompute, again)

    def _count(
        self,
        entry: Entry,
        frame: Frame,
        phase: Phase,
        signed: Any,
        args: Any,
        kwargs: Any,
        out: Any,
        flops: int,
        cost: Cost | None = None,
    ) -> None:
        wanted, identity = signed
        causal, known = flops, False
        if cost is not None:
            known = cost.mask_known
            if cost.causal is not None:
                causal = cost.causal
        elif frame.visible is not None:  # unfused attention: its products do not know the mask that its caller gave
            known = True
            causal = flops * frame.visible[0] // frame.visible[1]
        origin = None
        if phase == "backward" or phase == "recompute":  # noqa: PLR1714 - a set costs more
            origin = self.where.origin()
        self.counted_calls += 1
        key = (entry, frame, phase, origin, identity, flops, causal, known)
        row = self.tally.counted.get(key)
        if row is None:
            row = self.tally.add_row(key, self._sources.describe(args, kwargs, frame.own()), out)
        row.calls += 1
        if wanted:
            self.where.remember(row)

    def _count_at_line(self, entry: Entry, frame: Frame, phase: Phase, signed: Any, *call: Any) -> None:
        """As _count, of the line that runs; a backward operator's is that of its forward."""
        line = line_now(self.where, phase)
        FlopCounter._count(self, entry, frame.at(line), phase, signed, *call)
        remember_line(self.where, line, own_node=signed[0])

    def uncounted(self, name: str, tensors: Any, reason: str = "") -> None:
        """Record a call that does arithmetic and has no count: never silently 0."""
        self._uncounted(name, *self.where.now(), tensors, reason)

    def _uncounted(self, name: str, frame: Frame, phase: Phase, tensors: Any, reason: str) -> None:
        self.seen += 1  # the modules above need not report it again
        self.tally.add_uncounted(name, frame, phase, tensors, reason)

    def assume(self, sentence: str) -> None:
        """Note what had to be guessed."""
        self.tally.assumptions[sentence] = None

    def returned(self, frame: Frame, seen: int, inputs: Any, output: Any) -> None:
        """A module returned: note its output, and whether it came from outside the dispatcher."""
        if torch._C._get_tracing_state() is not None:  # a size that is read would be an operator of the trace
            return
        if self._sources.lazy:
            self._sources.settle()
        if frame.output_shape is None:
            frame.output_shape = first_shape(output)
        if seen == self.seen and self.unseen.produced is None and not passed_through(inputs, output):
            made = storages(output)
            if made and not made <= storages(inputs) and self._sources.apart(made) and not cached(output):
                module = frame.module() if frame.module is not None else None
                if module is None or not made <= storages([dict(vars(part)) for part in module.modules()]):
                    self._uncounted(frame.cls, frame, self.where.now()[1], inputs, OUTSIDE)


counter_types.add(FlopCounter)
# Control-flow operators run inside compiled frames: nothing of the counter, nor what it calls, is compiled along.
_eval_frame.set_code_exec_strategy(
    FlopCounter.__torch_dispatch__.__code__,
    _eval_frame._FrameExecStrategy(_eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.SKIP),
)


@contextmanager
def region(name: str) -> Iterator[None]:
    """Name code outside modules: its FLOPs are charged to `name`, under the module that runs.

    >>> with FlopCounter() as counter, region("loss"):
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> counter.profile.by_module()
    {'': 48, 'loss': 48}
    """
    if not name or "." in name:
        raise ValueError(f"a region's name is a word without dots, got {name!r}.")
    calls = [(counter, counter.where.enter(None, name)) for counter in active()]
    try:
        yield
    finally:
        for counter, call in reversed(calls):
            counter.where.leave(call)


def _checked(cost: Any) -> int:
    """What a user's formula returned, as an int: of numpy, symbolic ... Raises for what is no count."""
    if isinstance(cost, torch.SymInt):
        return cost  # type: ignore[return-value]  # sums like one
    flops = index(cost)
    if flops < 0:
        raise ValueError(f"{flops} FLOPs are less than none")
    return flops


def _wanted(node: Any) -> tuple[bool, ...] | None:
    if node is None or isinstance(node, torch.autograd.function.BackwardCFunction):
        return None
    return tuple(function is not None for function, _index in node.next_functions)
