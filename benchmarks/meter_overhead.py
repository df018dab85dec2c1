"""What metering costs: training steps bare and metered, and beside them what others do to say as much.

    python benchmarks/meter_overhead.py [--rounds 60] [--seed 0] [--compile inductor]

All run interleaved in one process, in random order each round. The Meter, empty hooks for the same events, which is the
least that a meter made of hooks costs, and nothing at all, which tells how far the figures themselves are off, are on
one of two copies of the model and then on the other; the two take turns of a few steps each, and their median
difference is told: where the copies lie in memory makes more of a difference than the Meter does. The first step of a
turn is in no figure: what a step does at its start, it finds in the processor's caches because the step before it did
it last, as in a loop.
The others take blocks of steps to themselves. Each round gives a ratio to the bare steps of the same round; the median
is printed, its standard error, and the middle half. Goal: metered at most 1.005x of bare for steps of 5 ms and more,
1.02x for 0.5 ms, 1.01x for a compiled model, which is not compiled again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from flopprof import Meter
from flopprof.counting.instrument import StandIn

sys.path.insert(0, str(Path(__file__).parent))
from overhead import Transformer, training_step

# Steps before those that are timed: of the Meter, the first are left out, and two alike must go before the rest.
WARM_UP = 8
TURN = 4

Step = Callable[[], None]
Variant = Callable[[], contextlib.AbstractContextManager[Step]]


def bare(step: Step) -> Variant:
    """The step as it is."""
    return lambda: contextlib.nullcontext(step)


def within(step: Step) -> Step:
    """The step, called by a function, as each of those is that it is held against."""

    def call() -> None:
        step()

    return call


class _Forwarding(StandIn):
    """The autograd engine, called through Python."""

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine.run_backward(*args, **kwargs)


def empty_hooks(step: Step, model: torch.nn.Module) -> Variant:
    """What sees calls, backward passes, optimizer steps and the time, and does nothing, made of hooks."""

    @contextlib.contextmanager
    def variant() -> Iterator[Step]:
        engine = _Forwarding()
        handles = [
            model.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
            register_optimizer_step_pre_hook(lambda *_: None),
        ]

        def timed() -> None:
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)

        seconds: deque[float] = deque(maxlen=1)
        try:
            yield timed
        finally:
            engine.leave()
            for handle in handles:
                handle.remove()

    return variant


def metered(step: Step, model: torch.nn.Module) -> Variant:
    """Inside a Meter that has seen the step: its hooks are on the model only while this variant runs."""
    state: dict[str, Any] = {}

    @contextlib.contextmanager
    def variant() -> Iterator[Step]:
        with Meter(model, peak=1e12) as meter:
            if state:
                meter.load_state_dict(state)

            def metered_step() -> None:
                with meter.step():
                    step()

            for _ in range(0 if state else 5):
                metered_step()
            counted = sum("counted" in record.left_out for record in meter.records)
            yield metered_step
            assert sum("counted" in record.left_out for record in meter.records) == counted
            state.update(meter.state_dict())
            state["history"]["records"].clear()

    return variant


def with_mode(step: Step) -> Variant:
    """FlopCounterMode left on."""

    @contextlib.contextmanager
    def variant() -> Iterator[Step]:
        with FlopCounterMode(display=False):
            yield step

    return variant


def with_profiler(step: Step) -> Variant:
    """torch.profiler(with_flops=True) left on."""

    @contextlib.contextmanager
    def variant() -> Iterator[Step]:
        with profile(activities=[ProfilerActivity.CPU], with_flops=True, acc_events=True):
            yield step

    return variant


def with_lightning(step: Step, model: torch.nn.Module, batch: torch.Tensor) -> Variant | None:
    """Lightning's measure_flops once, and its Throughput updated and read every step; None where it is not installed.

    It wants the model on the meta device to count, and the loop to tell it everything.
    """
    try:
        from lightning.fabric.utilities.throughput import Throughput, measure_flops
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meta, fake = deepcopy(model).to("meta"), batch.to("meta")
        flops = measure_flops(meta, lambda: meta(fake), lambda y: y.float().sum())

    @contextlib.contextmanager
    def variant() -> Iterator[Step]:
        throughput = Throughput(available_flops=1e12, world_size=1)
        start, done = time.perf_counter(), 0

        def step_and_tell() -> None:
            nonlocal done
            step()
            done += 1
            throughput.update(time=time.perf_counter() - start, batches=done, samples=done * len(batch), flops=flops)
            throughput.compute()

        yield step_and_tell

    return variant


Times = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True, kw_only=True)
class Variants:
    """bare: steps of both copies; pairs: on either copy, beside the other's bare step; blocks: every fourth round."""

    bare: tuple[Step, Step]
    pairs: dict[str, tuple[Variant, Variant]]
    blocks: dict[str, Variant]


def measure(variants: Variants, rounds: int, steps: int) -> Times:
    """Per variant and round, median seconds of a step, and of a bare one."""
    times: Times = {"bare": [], **{name: [] for name in (*variants.pairs, *variants.blocks)}}
    for i in range(rounds):
        medians: dict[str, float] = {}
        for name in random.sample([*variants.pairs], len(variants.pairs)):
            both = []
            for variant, other in zip(variants.pairs[name], reversed(variants.bare), strict=True):
                with variant() as step:
                    both.append(paired(step, within(other), steps))
            seconds, bare_seconds = map(statistics.mean, zip(*both, strict=True))
            times[name].append((seconds, bare_seconds))
        names = ["bare", *variants.blocks] if i % 4 == 0 else ["bare"]
        blocks = {"bare": bare(variants.bare[0]), **variants.blocks}
        for name in random.sample(names, len(names)):
            with blocks[name]() as step:
                for _ in range(3):
                    step()
                each = []
                for _ in range(steps):
                    start = time.perf_counter()
                    step()
                    each.append(time.perf_counter() - start)
            medians[name] = statistics.median(each)
        for name, seconds in medians.items():
            times[name].append((seconds, medians["bare"]))
    return times


def paired(step: Step, other: Step, steps: int) -> tuple[float, float]:
    """Median seconds of the other step and the median difference to it; and of the other alone."""
    for _ in range(WARM_UP):
        step()
        other()
    differences, others = [], []
    for i in range(-(-steps // TURN)):
        order = (step, other) if i % 2 else (other, step)
        first, second = map(turn, order)
        those, these = (first, second) if i % 2 else (second, first)
        differences += [one - bare for one, bare in zip(those, these, strict=True)]
        others += these
    seconds = statistics.median(others)
    return seconds + statistics.median(differences), seconds


def turn(step: Step) -> list[float]:
    """Seconds of some steps in a row."""
    step()
    marks = [time.perf_counter()]
    for _ in range(TURN):
        step()
        marks.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(marks)]


def report(name: str, times: Times) -> None:
    """One table."""
    print(name)
    for variant, pairs in times.items():
        milliseconds = 1e3 * statistics.median(seconds for seconds, _ in pairs)
        ratios = [seconds / bare for seconds, bare in pairs]
        low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        error = 0.93 * (high - low) / len(ratios) ** 0.5  # of a median, where ratios are spread as errors are
        spread = "" if variant == "bare" else f" +-{error:.4f}  ({low:.3f} to {high:.3f})"
        print(f"  {variant:<28}{milliseconds:9.3f} ms {ratio:9.4f}x bare{spread}")


def perceptron() -> torch.nn.Module:
    """Three layers."""
    return torch.nn.Sequential(
        torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)
    )


def main() -> None:
    """Print the ratios for steps of about 0.5 ms, 1 ms, 5 ms and more, and for a compiled model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="rounds per table (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="order of the variants (default 0)")
    parser.add_argument("--compile", default="inductor", help="backend of the compiled model; '' for none")
    options = parser.parse_args()
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    for name, model, batch, steps in (
        ("perceptron, 48 rows", perceptron(), torch.randn(48, 256), 40),
        ("perceptron, 96 rows", perceptron(), torch.randn(96, 256), 40),
        ("transformer d_model 64, 4 x 48 tokens", Transformer(), torch.randint(0, 256, (4, 48)), 40),
        ("transformer d_model 64, 32 x 64 tokens", Transformer(), torch.randint(0, 256, (32, 64)), 8),
    ):
        step = training_step(model, batch)
        blocks = {"FlopCounterMode left on": with_mode(step)}
        lightning = with_lightning(step, model, batch)
        if lightning is not None:
            blocks["Lightning's Throughput"] = lightning
        blocks["torch.profiler(with_flops)"] = with_profiler(step)
        copy = deepcopy(model)
        other = training_step(copy, batch)
        variants = Variants(
            bare=(step, other),
            pairs={
                "nothing": (bare(within(step)), bare(within(other))),
                "empty hooks": (empty_hooks(step, model), empty_hooks(other, copy)),
                "Meter": (metered(step, model), metered(other, copy)),
            },
            blocks=blocks,
        )
        report(f"{name}: training step", measure(variants, options.rounds, steps))
    if options.compile:
        compiled(options)


def compiled(options: argparse.Namespace) -> None:
    """A compiled model, and how often it was compiled."""
    from torch._dynamo.utils import counters

    model, other = Transformer(), Transformer()
    batch = torch.randint(0, 256, (4, 48))
    step = training_step(torch.compile(model, backend=options.compile), batch)
    bare_step = training_step(torch.compile(other, backend=options.compile), batch)
    for _ in range(3):
        step()
        bare_step()
    graphs = counters["stats"]["unique_graphs"]
    pairs = {"Meter": (metered(step, model), metered(bare_step, other))}
    variants = Variants(bare=(step, bare_step), pairs=pairs, blocks={})
    report(f"the transformer compiled ({options.compile}): training step", measure(variants, options.rounds, 40))
    print(f"  compiled again while metered: {counters['stats']['unique_graphs'] - graphs} graphs")


if __name__ == "__main__":
    main()
