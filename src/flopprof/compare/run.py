"""compare(): models, modules and saved profiles side by side."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import nn

from flopprof.compare import workers as pool
from flopprof.compare.comparison import Comparison, Ideal, Latency, Row, side_by_side
from flopprof.compare.latency import free_bytes, measure_latency
from flopprof.compare.models import Job, failed, row_of, row_of_profile
from flopprof.compare.resume import finished
from flopprof.compare.targets import jobs_of, parse_at
from flopprof.errors import FlopprofError, NoPeak, UsageError
from flopprof.hardware import Device, device
from flopprof.models import Workload, load
from flopprof.models.inputs import first_line, make_input, parse_input, samples_in, tensors_in, tokens_in
from flopprof.profile import Attention, Profile
from flopprof.units import format_bytes

Target = str | Job | nn.Module | Workload | Profile | tuple[nn.Module, Any]
Progress = Callable[[int, int, str], object]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a comparison; `comparison` holds the rows that were finished."""

    def __init__(self, comparison: Comparison, left: int) -> None:
        super().__init__(f"interrupted after {len(comparison)} rows; {left} are left")
        self.comparison, self.left = comparison, left


@dataclass
class _Slot:
    """One row to be: a job for any process, or an object of this one."""

    name: str
    job: Job | None = None
    thing: Workload | Profile | None = None
    row: Row | None = None
    measured: Latency | str | None = field(default=None)


def compare(
    targets: Sequence[Target] | Mapping[str, Target],
    *,
    at: str | Sequence[str] = (),
    attention: Attention = "full",
    hardware: str | Device | None = None,
    measure: bool = False,
    sort: str | None = None,
    workers: int | None = None,
    resume: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """Models side by side: a Comparison with a row for each, ratios to the first. One multiply-add is 2 FLOPs.

    targets    what `flopprof.load` takes, globs too (`timm:convnext*`); (module, inputs), with inputs a tensor, a tuple
               or a dict; a module, whose input `at` gives; a Workload; a Profile; a Job, which has options of its own.
               As a mapping, its keys are the names.
    at         `input=1x3x288x288` or `batch=8,image_size=288` for every target that brings no inputs of its own; with
               several, each makes a row of it
    attention  `full` counts every query-key pair, `causal` those that the operator's mask lets through
    hardware   a device of the table ("H100"): then rows have the roofline's ideal latency
    measure    also measure a forward here, one model at a time: on `device=`, else the GPU, else the CPU
    sort       one of flopprof.compare.comparison.FIGURES, or "name"
    workers    processes for named models; None: as many as pay, 0: none
    resume     a file that keeps finished rows, and spares those it has
    progress   called with (rows done, rows in all, name) after each
    options    as for `flopprof.load`, for every named model: `dtype`, `lora`, `train`, ...

    A model that fails has a row that says why. Raises UsageError for a wrong request, Interrupted on Ctrl-C.

    >>> import torch
    >>> inputs = torch.zeros(3, 4)
    >>> nets = {"small": (torch.nn.Linear(4, 5), inputs), "large": (torch.nn.Linear(4, 50), inputs)}
    >>> compare(nets).ratios("flops")
    {'small': 1.0, 'large': 10.0}
    """
    chosen = device(hardware) if isinstance(hardware, str) else hardware
    if sort is not None:
        Comparison(rows=()).sorted(sort)
    places = [at] if isinstance(at, str) else list(at)
    known = [name for name in inspect.signature(load).parameters if name != "target"]
    for option in options:
        if option not in known:
            raise UsageError(f"compare has no option {option!r}: flopprof.load takes {', '.join(known)}.")
    if "dtype" in options and isinstance(options["dtype"], torch.dtype):
        options["dtype"] = str(options["dtype"]).removeprefix("torch.")
    slots = list(_slots(targets, places, options, attention))
    if not slots:
        raise UsageError("there is nothing to compare: give at least one model.")
    try:
        _count(slots, workers, resume, attention, progress)
        if measure:
            _measure(slots, progress)
    except KeyboardInterrupt as error:
        left = sum(slot.row is None for slot in slots)
        raise Interrupted(_collected(slots, chosen, sort, interrupted=True), left) from error
    return _collected(slots, chosen, sort)


def _count(
    slots: list[_Slot], workers: int | None, resume: str | None, attention: Attention, progress: Progress | None
) -> None:
    """Fills in the rows: those of the file, those of objects here, the others wherever."""
    with finished(resume) as kept:
        for slot in slots:
            slot.row = None if slot.job is None else kept.get(slot.job)
        done = sum(slot.row is not None for slot in slots)

        def note(slot: _Slot, row: Row) -> None:
            nonlocal done
            slot.row = row
            if slot.job is not None:
                kept.add(slot.job, row)
            done += 1
            if progress is not None:
                progress(done, len(slots), slot.name)

        for slot in slots:
            if slot.thing is not None:
                note(slot, _row(slot.thing, slot.name, attention))
        waiting = {id(slot.job): slot for slot in slots if slot.row is None}
        jobs = [slot.job for slot in waiting.values() if slot.job is not None]
        count = pool.worth(len(jobs)) if workers is None else workers
        with closing(pool.rows(jobs, count)) as coming:
            for job, row in coming:
                note(waiting[id(job)], row)


def _row(thing: Workload | Profile, name: str, attention: Attention) -> Row:
    try:
        if isinstance(thing, Profile):
            return row_of_profile(thing.with_attention(attention), name)
        return row_of(thing, name, attention=attention)
    except (Exception, SystemExit) as error:  # one's own model may raise anything
        return failed(name, error)


def _measure(slots: list[_Slot], progress: Progress | None) -> None:
    """Measures every model whose row did not fail, one at a time, in this process."""
    for number, slot in enumerate(slots, 1):
        if slot.row is None or slot.row.failed or isinstance(slot.thing, Profile):
            continue
        try:
            slot.measured = measure_latency(_with_values(slot, slot.row))
        except (Exception, SystemExit) as error:  # out of memory, an operator that this device lacks
            text = str(error) if isinstance(error, FlopprofError) else f"{type(error).__name__}: {first_line(error)}"
            slot.measured = f"not measured: {text}"
        if progress is not None:
            progress(number, len(slots), f"{slot.name}, measured")


def _with_values(slot: _Slot, row: Row) -> Workload:
    """The workload on a device that computes. Raises FlopprofError where its weights would not fit there."""
    if slot.job is None:
        assert isinstance(slot.thing, Workload)
        return slot.thing
    wanted = slot.job.options.get("device")
    if wanted in (None, "meta"):
        wanted = "cuda" if torch.cuda.is_available() and not slot.job.target.startswith("quantized_") else "cpu"
    needed, free = row.size_bytes.get("stored", 0), free_bytes(wanted)
    if free is not None and needed > free:
        sizes = f"its weights take {format_bytes(needed)}, and {format_bytes(free)} are free"
        raise FlopprofError(f"{sizes} on {wanted}.")
    return slot.job.load(wanted)


def _collected(slots: list[_Slot], chosen: Device | None, sort: str | None, *, interrupted: bool = False) -> Comparison:
    rows = []
    for slot in slots:
        if slot.row is None:
            continue
        row = slot.row
        if isinstance(slot.measured, Latency):
            row = msgspec.structs.replace(row, latency=slot.measured)
        elif slot.measured is not None:
            row = msgspec.structs.replace(row, notes=(*row.notes, slot.measured))
        if chosen is not None and not row.failed:
            row = msgspec.structs.replace(row, ideal=ideal(row, chosen))
        rows.append(row)
    found = side_by_side(rows, hardware="" if chosen is None else chosen.name, interrupted=interrupted)
    return found if sort is None else found.sorted(sort)


def ideal(row: Row, on: Device) -> Ideal:
    """The roofline of a row's forward: FLOPs / peak summed over dtypes, and bytes of counted operators / bandwidth."""
    memory_s = None if on.bytes_per_s is None or row.bytes_moved is None else row.bytes_moved / on.bytes_per_s
    try:
        compute_s = sum(flops / on.peak(dtype).flops_per_s for dtype, flops in row.flops_by_dtype.items())
    except NoPeak as error:
        return Ideal(compute_s=None, memory_s=memory_s, device=on.name, reason=str(error))
    reason = "" if on.bytes_per_s is not None else f"the memory bandwidth of {on.name} is not known."
    return Ideal(compute_s=compute_s, memory_s=memory_s, device=on.name, reason=reason)


def _slots(
    targets: Sequence[Target] | Mapping[str, Target], at: list[str], options: dict[str, Any], attention: Attention
) -> Iterator[_Slot]:
    if isinstance(targets, str | nn.Module | Workload | Profile):
        raise UsageError("compare takes a list of models, or a mapping of names to models.")
    named = targets.items() if isinstance(targets, Mapping) else (("", target) for target in targets)
    for name, target in named:
        if isinstance(target, str):
            for job in jobs_of(target, options, at, name=name, attention=attention):
                yield _Slot(name=job.name, job=job)
        elif isinstance(target, Job):
            yield _Slot(name=target.name, job=target)
        elif isinstance(target, Profile | Workload):
            shown = name or (target.target if isinstance(target, Profile) else target.name)
            shown = shown or (row_of_profile(target).name if isinstance(target, Profile) else "workload")
            yield _Slot(name=shown, thing=target)
        else:
            yield from _own(name, target, at)


def _own(name: str, target: Any, at: list[str]) -> Iterator[_Slot]:
    """One's own module: with the inputs beside it, or with those that `at` describes."""
    if isinstance(target, nn.Module):
        shown = name or type(target).__name__
        places = [(text, parse_at(text)) for text in at]
        if not places or any(set(place) != {"inputs"} for _text, place in places):
            raise UsageError(f"{shown} comes without inputs: give (module, inputs), or at='input=1x3x224x224'.")
        for text, place in places:
            held = next(target.parameters(), None)
            on = "cpu" if held is None else str(held.device)
            specs = [parse_input(shape) for shape in place["inputs"]]
            kind = held.dtype if held is not None and held.is_floating_point() else None
            args = tuple(make_input(spec, on, kind) for spec in specs)
            yield _Slot(
                name=f"{shown} @ {text}" if len(places) > 1 else shown, thing=_workload(target, args, {}, shown)
            )
        return
    module, inputs = target if isinstance(target, tuple) and len(target) == 2 else (target, None)
    if not isinstance(module, nn.Module) or inputs is None:
        raise UsageError(f"cannot compare a {type(module).__name__}: give a name, (module, inputs) or a Profile.")
    shown = name or type(module).__name__
    if isinstance(inputs, Mapping):
        yield _Slot(name=shown, thing=_workload(module, (), dict(inputs), shown))
    else:
        args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        yield _Slot(name=shown, thing=_workload(module, args, {}, shown))


def _workload(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Workload:
    tensors = tensors_in([*args, *kwargs.values()])
    held = next(module.parameters(), next(iter(tensors), None))
    return Workload(
        model=module,
        args=args,
        kwargs=kwargs,
        name=name,
        device="cpu" if held is None else held.device.type,
        tokens=tokens_in(args, kwargs),
        samples=samples_in(tensors[0]) if tensors else None,
    )
