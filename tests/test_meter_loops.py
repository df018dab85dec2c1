"""The meter in every awkward loop: each step multiplied what a count of the same work says, to the last FLOP."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.variable import Variable
from torch.utils.checkpoint import checkpoint

from flopprof import FlopCounter, Meter, count
from flopprof.errors import UsageError
from flopprof.meter import StepRecord

WIDTH, HIDDEN = 8, 16
EACH = 2 * WIDTH * HIDDEN  # one of the two layers, forward, for one row
TRAINED = 5 * EACH  # both forward, the first one's weight gradient, both of the second's


class Two(nn.Module):
    """Two layers; the input wants no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, HIDDEN)
        self.b = nn.Linear(HIDDEN, WIDTH)
        self.checkpointed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointed:
            return self.b(checkpoint(lambda x: self.a(x).tanh(), x, use_reentrant=False))
        return self.b(self.a(x).tanh())


class Clock:
    """Stands still but where a test moves it on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def model() -> Two:
    torch.manual_seed(0)
    return Two()


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, WIDTH)


def flops(meter: Meter) -> list[int | None]:
    return [record.model_flops for record in meter.records]


def counted(meter: Meter) -> list[int]:
    """The steps that ran under a counter."""
    return [record.step for record in meter.records if "counted" in record.left_out]


def trained(model: nn.Module, n: int) -> int:
    return count(model, rows(n), backward=True).model_flops


# --- what a record says ---------------------------------------------------------------------------------------------
def test_a_whole_record(model: Two, clock: Clock) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wall = iter([1000.0] * 3)
    with Meter(model, peak=1e9, skip=0, clock=clock, wall_clock=lambda: next(wall)) as meter:
        for _ in range(2):
            with meter.step():
                clock.passes(0.25)
                model(rows(3)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                clock.passes(0.5)
        assert meter.records == [
            StepRecord(
                step=number,
                ended_at=1000.0 + 0.75 * (number + 1),
                step_time_s=0.75,
                signature=0,
                flops={"float32": (3 * TRAINED, 3 * TRAINED)},
                bytes_moved=meter.records[0].bytes_moved,
                samples=3,
                calls=1,
                optimizer_steps=1,
                left_out=("counted",) if number == 0 else (),
            )
            for number in range(2)
        ]
        assert meter.records[0].bytes_moved == count(model, rows(3), backward=True).bytes_moved
        summary = meter.summary()
    assert summary.whole is not None
    assert summary.whole.mfu == 3 * TRAINED / 1e9 / 0.75
    assert summary.rows == {"steps": 0.75, "left_out": 0.75, "data_wait": 0.0, "evaluation": 0.0}
    assert summary.left_out == {"counted": 1}


def test_track_waits_for_data_and_wrap_and_step_are_the_same(model: Two, clock: Clock) -> None:
    def loader() -> Iterator[torch.Tensor]:
        for n in (3, 3, 3):
            clock.passes(2.0)
            yield rows(n)

    def train(x: torch.Tensor) -> torch.Tensor:
        """Train."""
        loss = model(x).sum()
        loss.backward()
        clock.passes(1.0)
        return loss

    with Meter(model, clock=clock) as meter:
        for x in meter.track(loader(), progress=False):
            train(x)
        tracked = meter.records
    assert [(r.data_wait_s, r.step_time_s) for r in tracked] == [(2.0, 1.0)] * 3
    with Meter(model, clock=clock) as meter:
        step = meter.wrap(train)
        assert (step.__name__, step.__doc__) == ("train", "Train.")
        assert [type(step(rows(3))) for _ in range(3)] == [torch.Tensor] * 3
        wrapped = meter.records
    assert [r.flops for r in wrapped] == [r.flops for r in tracked] == [{"float32": (3 * TRAINED, 3 * TRAINED)}] * 3


def test_steps_do_not_nest(model: Two) -> None:
    with Meter(model) as meter, meter.step():
        with pytest.raises(UsageError, match="do not nest"):
            meter.start_step()
    with Meter(model) as meter, pytest.raises(UsageError, match="no step"):
        meter.end_step()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"attention": "half"}, "neither"),
        ({"skip": -1}, "skip is a whole number of at least 0"),
        ({"window": 0}, "window"),
        ({"recount_every": 0}, "recount_every"),
        ({"convention": "chinchilla"}, "none of nanogpt, palm, megatron, torchtitan"),
        ({"peak": 0}, "peak"),
    ],
)
def test_wrong_arguments(model: Two, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Meter(model, **wrong)
    with pytest.raises(UsageError, match="Meter takes modules, got int"):
        Meter(3)  # type: ignore[arg-type]


# --- loops ----------------------------------------------------------------------------------------------------------
def test_accumulation(model: Two) -> None:
    """Micro-batches of one step, each of another length."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Meter(model) as meter:
        for sizes in ((2, 3, 4), (2, 3, 4), (4, 4, 2), (3, 2, 2, 2)):
            with meter.step():
                for n in sizes:
                    model(rows(n)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert flops(meter) == [9 * TRAINED, 9 * TRAINED, 10 * TRAINED, 9 * TRAINED]
        assert counted(meter) == [0]  # another order, another number: nothing new in them
        assert [r.samples for r in meter.records] == [9, 9, 10, 9]
        assert [r.calls for r in meter.records] == [3, 3, 3, 4]


def test_one_backward_over_several_forwards(model: Two) -> None:
    with Meter(model) as meter:
        for _ in range(3):
            with meter.step():
                (model(rows(2)).sum() + model(rows(3)).sum()).backward()
        assert flops(meter) == [5 * TRAINED] * 3
        assert counted(meter) == [0]


def test_a_loss_is_differentiated_or_not(model: Two) -> None:
    """The same calls, and a backward in every second step only."""
    with Meter(model) as meter:
        for i in range(16):
            with meter.step():
                loss = model(rows(2)).sum()
                if i % 2:
                    loss.backward()
        assert flops(meter) == [2 * 2 * EACH, 2 * TRAINED] * 8
        assert counted(meter)[-1] <= 5  # sooner where nothing in this process was compiled


def test_gan() -> None:
    """Two models, two optimizers, a frozen discriminator while the generator learns."""
    torch.manual_seed(0)
    generator, discriminator = Two(), Two()
    first, second = (torch.optim.Adam(m.parameters()) for m in (generator, discriminator))
    noise, real = rows(2), rows(2)

    def step() -> None:
        discriminator.requires_grad_(True)
        (discriminator(generator(noise).detach()).mean() - discriminator(real).mean()).backward()
        second.step()
        second.zero_grad()
        discriminator.requires_grad_(False)
        (-discriminator(generator(noise)).mean()).backward()
        first.step()
        first.zero_grad()

    with Meter([generator, discriminator]) as meter:
        for _ in range(4):
            with meter.step():
                step()
        # D's step: G forward; D twice trained. G's: G trained; D forward and both input gradients.
        expected = 2 * EACH + 2 * TRAINED + TRAINED + 2 * EACH + 2 * EACH
        assert flops(meter) == [2 * expected] * 4
        assert counted(meter) == [0]
        assert {r.optimizer_steps for r in meter.records} == {2}
        assert {r.samples for r in meter.records} == {4}  # the generator's


def test_teacher_and_student() -> None:
    torch.manual_seed(0)
    student, teacher = Two(), Two().eval()
    with Meter(student, teacher) as meter:
        for n in (3, 3, 5, 3, 5):
            with meter.step():
                x = rows(n)
                y = student(x)
                with torch.no_grad():
                    target = teacher(x)
                (y - target).square().mean().backward()
        assert flops(meter) == [n * (TRAINED + 2 * EACH) for n in (3, 3, 5, 3, 5)]
        assert counted(meter) == [0, 2]
        assert [r.samples for r in meter.records] == [3, 3, 5, 3, 5]


def test_evaluation_in_between(model: Two, clock: Clock) -> None:
    """Inside a tracked step, as it is written in most scripts, and between steps."""
    with Meter(model, clock=clock, skip=0) as meter:
        for i, x in enumerate(meter.track([rows(3)] * 4, progress=False)):
            clock.passes(1.0)
            model(x).sum().backward()
            clock.passes(1.0)
            if i % 2:
                model.eval()
                with torch.no_grad():
                    for _ in range(3):
                        model(rows(7))
                        clock.passes(5.0)
                model.train()
        assert flops(meter) == [3 * TRAINED] * 4
        assert [r.step_time_s for r in meter.records] == [2.0] * 4
        assert [r.evaluation_s for r in meter.records] == [0.0, 15.0, 0.0, 15.0]
        assert {r.samples for r in meter.records} == {3}
        model.eval()
        with torch.no_grad():
            model(rows(2))
            clock.passes(4.0)
        model.train()
        with meter.step():
            clock.passes(1.0)
            model(rows(3)).sum().backward()
        assert meter.records[-1].step_time_s == 1.0
        assert meter.summary().rows == {"steps": 7.0, "left_out": 2.0, "data_wait": 0.0, "evaluation": 34.0}


def test_a_teacher_and_a_metric_in_an_evaluation_do_not_end_it(model: Two, clock: Clock) -> None:
    """They are in the step where they are called in training: the teacher before its student, too."""
    teacher, metric = Two().eval(), nn.Flatten()
    with Meter(model, teacher, metric, clock=clock, skip=0) as meter:
        for i, x in enumerate(meter.track([rows(3)] * 6, progress=False)):
            with torch.no_grad():
                teacher(x)
            clock.passes(1.0)
            metric(model(x)).sum().backward()
            if i % 3:
                model.eval()
                with torch.no_grad():
                    for _ in range(2):
                        model(rows(7)) - teacher(rows(7))
                        clock.passes(5.0)
                metric(rows(7))
                clock.passes(2.0)
                model.train()
            with torch.no_grad():
                teacher(x)
            clock.passes(0.5)
        assert flops(meter) == [3 * (TRAINED + 2 * 2 * EACH)] * 6
        assert [r.step_time_s for r in meter.records] == [1.5] * 6
        assert [r.evaluation_s for r in meter.records] == [0.0, 12.0, 12.0] * 2
        assert {r.samples for r in meter.records} == {3}


def test_evaluation_before_training_in_one_step(model: Two, clock: Clock) -> None:
    with Meter(model, clock=clock, skip=0) as meter:
        for evaluates in (False, True, False):
            with meter.step():
                if evaluates:
                    model.eval()
                    with torch.no_grad():
                        model(rows(4))
                    clock.passes(3.0)
                    model.train()
                clock.passes(0.5)
                model(rows(3)).sum().backward()
                clock.passes(1.0)
        assert flops(meter) == [3 * TRAINED] * 3
        # It ends where the next training call begins.
        assert [(r.step_time_s, r.evaluation_s) for r in meter.records] == [(1.5, 0.0), (1.0, 3.5), (1.5, 0.0)]


def test_a_loop_of_nothing_but_inference_is_counted(model: Two) -> None:
    model.eval()
    with Meter(model) as meter, torch.no_grad():
        for _ in range(3):
            with meter.step():
                model(rows(3))
        assert flops(meter) == [3 * 2 * EACH] * 3
        assert [r.samples for r in meter.records] == [3] * 3


def test_pauses(model: Two, clock: Clock) -> None:
    with Meter(model, clock=clock, skip=0) as meter:
        for _ in range(3):
            with meter.step():
                clock.passes(1.0)
                model(rows(3)).sum().backward()
                with meter.pause("checkpoint"):
                    model(rows(9))  # no part of the step
                    clock.passes(10.0)
        with meter.pause("upload"):
            clock.passes(20.0)
        assert flops(meter) == [3 * TRAINED] * 3
        assert [(r.step_time_s, r.paused_s) for r in meter.records] == [(1.0, {"checkpoint": 10.0})] * 3
        assert meter.summary().rows == {
            "steps": 2.0, "left_out": 1.0, "data_wait": 0.0, "evaluation": 0.0, "checkpoint": 30.0, "upload": 20.0,
        }  # fmt: skip


def test_skipped_optimizer_steps(model: Two) -> None:
    """A GradScaler that finds infinities, and a loop that steps every second time."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with Meter(model) as meter:
        for i in range(5):
            with meter.step():
                loss = model(rows(3)).sum() * (float("inf") if i == 3 else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert flops(meter) == [3 * TRAINED] * 5
        assert [r.optimizer_steps for r in meter.records] == [1, 1, 1, 0, 1]
        assert counted(meter) == [0]


def test_an_exception_in_a_step(model: Two, clock: Clock) -> None:
    with Meter(model, clock=clock, skip=0) as meter:
        for i in range(4):
            try:
                with meter.step():
                    clock.passes(1.0)
                    model(rows(3)).sum()
                    if i in (0, 2):
                        raise RuntimeError("out of memory")
            except RuntimeError:
                pass
        assert [r.left_out for r in meter.records] == [("failed", "counted"), ("counted",), ("failed",), ()]
        assert flops(meter) == [None, 3 * 2 * EACH, None, 3 * 2 * EACH]
        assert meter.summary().left_out == {"failed": 2, "counted": 1}


def test_an_exception_in_the_model(model: Two) -> None:
    """Under the counter, and not: nothing of either is left behind."""
    with Meter(model) as meter:
        for n in (3, None, 3, None, 3):
            try:
                with meter.step():
                    model(rows(n) if n else torch.randn(3, 5)).sum().backward()
            except RuntimeError:
                assert n is None
            assert torch._C._len_torch_dispatch_stack() == 0
        assert flops(meter) == [3 * TRAINED, None, 3 * TRAINED, None, 3 * TRAINED]


@pytest.mark.parametrize("where", ["at the end", "before anything", "after the forward"])
def test_a_loop_that_is_left_early(model: Two, where: str) -> None:
    with Meter(model, skip=0) as meter:
        for i, x in enumerate(meter.track([rows(3)] * 9, progress=False)):
            if i == 3 and where == "before anything":
                break
            loss = model(x).sum()
            if i == 3 and where == "after the forward":
                break
            loss.backward()
            if i == 3:
                break
        left_out = [r.left_out for r in meter.records]
        assert left_out[:3] == [("counted",), (), ()]
        expected = {"at the end": [()], "before anything": [], "after the forward": [("interrupted",)]}
        assert left_out[3:] == expected[where]
        with meter.step():
            model(rows(3)).sum().backward()
        assert meter.records[-1].step == len(meter.records) - 1


def test_no_sync(model: Two) -> None:
    """As DistributedDataParallel's: a context that changes what is sent, not what is multiplied."""
    with Meter(model) as meter:
        for _ in range(3):
            with meter.step():
                with contextlib.nullcontext():
                    model(rows(2)).sum().backward()
                model(rows(2)).sum().backward()
        assert flops(meter) == [4 * TRAINED] * 3


def test_autocast(model: Two) -> None:
    """Each dtype is held against its own peak; another one is another signature."""
    peaks = {"float32": 1e9, "bfloat16": 4e9}
    clock = Clock()
    with Meter(model, peak=peaks, clock=clock, skip=0) as meter:
        for enabled in (True, True, False, False):
            with meter.step():
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                    loss = model(rows(4)).float().sum()
                loss.backward()
                clock.passes(1.0)
        dtypes = [set(r.flops or {}) for r in meter.records]
        assert dtypes == [{"bfloat16"}] * 2 + [{"float32"}] * 2
        assert flops(meter) == [4 * TRAINED] * 4
        whole = meter.summary().whole
        assert whole is not None
        assert whole.mfu == (4 * TRAINED / 4e9 + 4 * TRAINED / 1e9) / 2.0


@pytest.mark.parametrize("after", [2, 7])
def test_checkpointing_on_and_off(model: Two, after: int) -> None:
    """The inputs are the same: only what autograd recorded tells, in the backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Meter(model) as meter:
        for i in range(6 * after):
            model.checkpointed = i // after % 2 == 1
            with meter.step():
                model(rows(3)).sum().backward()
                optimizer.step()
        meter.summary()
        assert flops(meter) == [3 * TRAINED] * 6 * after
        recompute = [(r.hardware_flops or 0) - (r.model_flops or 0) for r in meter.records]
        assert recompute == ([0] * after + [3 * EACH] * after) * 3
        assert counted(meter) == [0, after + 1]  # the first checkpointed one told that it was another kind


def test_frozen_then_unfrozen(model: Two) -> None:
    with Meter(model) as meter:
        for frozen in (True, True, False, False, True, False):
            model.a.requires_grad_(not frozen)
            with meter.step():
                model(rows(3)).sum().backward()
        frozen_step = count(_frozen(model), rows(3), backward=True).model_flops
        assert frozen_step == 3 * 3 * EACH
        assert flops(meter) == [frozen_step] * 2 + [3 * TRAINED] * 2 + [frozen_step, 3 * TRAINED]
        assert counted(meter) == [0, 2]


def _frozen(model: Two) -> Two:
    other = copy.deepcopy(model)
    other.a.requires_grad_(False)
    return other


def test_a_head_that_is_replaced_is_another_signature(model: Two) -> None:
    wide = 5
    with Meter(model) as meter:
        for new in (None, None, nn.Linear(HIDDEN, wide), None, None):
            model.b = new or model.b
            with meter.step():
                model(rows(4)).sum().backward()
        after = 4 * (2 * EACH + 3 * 2 * HIDDEN * wide)
        assert flops(meter) == [4 * TRAINED] * 2 + [after] * 3


def test_closures(model: Two) -> None:
    """LBFGS calls back as often as it likes: each evaluation is forward and backward."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, lr=0.01)
    x, target = rows(3), rows(3)
    evaluations: list[int] = []

    def closure() -> torch.Tensor:
        evaluations[-1] += 1
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        return loss

    with Meter(model) as meter:
        for _ in range(4):
            evaluations.append(0)
            with meter.step():
                optimizer.step(closure)
        assert min(evaluations) > 1
        assert flops(meter) == [n * 3 * TRAINED for n in evaluations]
        assert [r.calls for r in meter.records] == evaluations
        assert [r.hardware_flops for r in meter.records] == flops(meter)
        assert "closure" in meter.summary().notes[0]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_optimizers_that_multiply(model: Two) -> None:
    """Muon's products are hardware FLOPs; a step without them has none."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(matrices, lr=0.01)
    with Meter(model) as meter:
        for i in range(12):
            with meter.step():
                model(rows(3)).sum().backward()
                if i % 2:
                    muon.step()
                muon.zero_grad()
        profile = count(model, rows(3), optimizer=torch.optim.Muon(matrices, lr=0.01))
        assert flops(meter) == [3 * TRAINED] * 12
        extra = [(r.hardware_flops or 0) - (r.model_flops or 0) for r in meter.records]
        assert extra == [0, profile.optimizer_flops] * 6
        assert counted(meter)[-1] == 5  # it came back after two steps: that many later it was waited for


def test_gradient_penalty(model: Two) -> None:
    """A gradient of a gradient, in every second step."""

    def loss(penalised: bool) -> torch.Tensor:
        x = rows(3).requires_grad_()
        value = model(x).tanh().sum()
        if not penalised:
            return value
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return value + slope.square().sum()

    expected = [count(lambda: loss(p), loss=lambda v: v).model_flops for p in (True, False)]
    expected = []
    for penalised in (False, True):
        expected.append(count(loss, penalised, backward=True).model_flops)
    assert expected[1] > expected[0]
    with Meter(model) as meter:
        for i in range(12):
            with meter.step():
                loss(bool(i % 2)).backward()
        assert flops(meter) == expected * 6
        assert counted(meter)[-1] <= 6


def test_another_thread_and_other_models_are_not_seen(model: Two) -> None:
    other = Two()
    with Meter(model) as meter:
        for _ in range(3):
            with meter.step():
                model(rows(3)).sum().backward()
                thread = threading.Thread(target=lambda: model(rows(5)))
                thread.start()
                thread.join()
        assert flops(meter) == [3 * TRAINED] * 3
        assert [r.calls for r in meter.records] == [1] * 3
    assert other is not None


@pytest.mark.parametrize("order", ["meter outlives counter", "counter outlives meter"])
def test_a_meter_and_a_counter_end_in_any_order(model: Two, order: str) -> None:
    engine = Variable._execution_engine
    counter, meter = FlopCounter(), Meter(model)

    def steps() -> None:
        for _ in range(2):
            with meter.step():
                model(rows(3)).sum().backward()

    with counter:
        steps()
        if order == "counter outlives meter":
            meter.close()
    if order == "meter outlives counter":
        steps()
        steps()
        meter.close()
    assert set(flops(meter)) == {3 * TRAINED}
    assert counter.profile.model_flops == 2 * 3 * TRAINED
    assert Variable._execution_engine is engine


def test_meters_beside_each_other_of_which_one_is_dropped(model: Two) -> None:
    engine, other = Variable._execution_engine, Two()
    first, second = Meter(model), Meter(other)
    for _ in range(3):
        with first.step(), second.step():
            (model(rows(3)).sum() + other(rows(2)).sum()).backward()
    del first
    gc.collect()
    for _ in range(2):
        model(rows(3)).sum().backward()
        with second.step():
            other(rows(2)).sum().backward()
    assert "_compiled_call_impl" not in vars(model)
    assert set(flops(second)[3:]) == {2 * TRAINED}
    del second
    gc.collect()
    assert Variable._execution_engine is engine


# --- lengths --------------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """One layer whose cost is quadratic in the length, linear in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(32, 16), nn.Linear(16, 48), nn.Linear(16, 32)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.embed(input_ids)).chunk(3, -1))
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 32, (batch, length))


def test_variable_lengths_are_counted_a_few_times_and_then_evaluated() -> None:
    torch.manual_seed(0)
    model = Attention()
    lengths = [4, 90, 33, 57, 8, 71, 60, 12, 88, 41, 5, 33, 29, 66, 77, 81, 19]
    with Meter(model) as meter:
        for length in lengths:
            with meter.step():
                model(tokens(2, length)).sum().backward()
        assert flops(meter) == [count(model, tokens(2, n), backward=True).model_flops for n in lengths]
        hardware = [count(model, tokens(2, n), backward=True).hardware_flops for n in lengths]
        assert [r.hardware_flops for r in meter.records] == hardware
        assert [r.bytes_moved for r in meter.records] == [
            count(model, tokens(2, n), backward=True).bytes_moved for n in lengths
        ]
        assert len(counted(meter)) <= 6
        assert counted(meter)[-1] < 8
        assert [r.tokens for r in meter.records] == [2 * n for n in lengths]


def test_batch_and_length_vary_together() -> None:
    torch.manual_seed(0)
    model = Attention()
    generator = torch.Generator().manual_seed(1)
    sizes = [tuple(torch.randint(1, 12, (2,), generator=generator).tolist()) for _ in range(60)]
    sizes = [(batch, 4 * length) for batch, length in sizes]
    with Meter(model) as meter:
        for batch, length in sizes:
            with meter.step():
                model(tokens(batch, length)).sum().backward()
        assert flops(meter) == [count(model, tokens(b, n), backward=True).model_flops for b, n in sizes]
        assert len(counted(meter)) < 20
        assert counted(meter)[-1] < 40


class Halves(nn.Module):
    """A stride: the cost is no polynomial of the length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_what_no_form_fits_is_counted_each_time() -> None:
    """Even lengths look like a form; it says nothing of odd ones, which refute it."""
    model = Halves()
    lengths = [8, 20, 14, 32, 26, 9, 17, 31, 10, 22, 13, 27, 9, 22]
    with Meter(model) as meter:
        for length in lengths:
            with meter.step():
                model(torch.randn(1, 1, length)).sum().backward()
        assert flops(meter) == [count(model, torch.randn(1, 1, n), backward=True).model_flops for n in lengths]


class Padded(nn.Module):
    """Rounds up inside: constant between, a step from time to time."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = -(-x.shape[0] // 16) * 16
        return self.a(nn.functional.pad(x, (0, 0, 0, length - x.shape[0])))


def test_rounded_lengths() -> None:
    model = Padded()
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 100, (80,), generator=generator).tolist()
    with Meter(model) as meter:
        for length in lengths:
            with meter.step():
                model(torch.randn(length, 4)).sum().backward()
        wrong = [n for n, found in zip(lengths, flops(meter), strict=True) if found != 4 * 4 * 4 * -(-n // 16) * 16]
        assert wrong == []


def test_packed_batches_are_told_apart_by_their_boundaries() -> None:
    """The shapes are the same: what varies is where sequences begin."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            bounds = cu_seqlens.tolist()
            parts = [
                nn.functional.scaled_dot_product_attention(q[None, a:b], k[None, a:b], v[None, a:b])
                for a, b in itertools.pairwise(bounds)
            ]
            return torch.cat(parts, 1)

    torch.manual_seed(0)
    model = Packed()
    cuts = [(0, 8, 16), (0, 4, 16), (0, 8, 16), (0, 1, 16), (0, 12, 16), (0, 6, 16), (0, 3, 16), (0, 5, 16), (0, 2, 16)]
    with Meter(model) as meter:
        for cut in cuts:
            with meter.step():
                model(torch.randn(16, 8), cu_seqlens=torch.tensor(cut)).sum().backward()
        expected = [
            count(model, torch.randn(16, 8), cu_seqlens=torch.tensor(cut), backward=True).model_flops for cut in cuts
        ]
        assert len(set(expected)) > 3
        assert flops(meter) == expected
        assert counted(meter)[-1] < 7


def test_tokens_without_padding() -> None:
    model = Attention()
    clock = Clock()
    with Meter(model, clock=clock, skip=0) as meter:
        for padding in (0, 1, 3):
            mask = torch.ones(2, 6, dtype=torch.long)
            mask[0, 6 - padding :] = 0
            with meter.step():
                model(input_ids=tokens(2, 6), attention_mask=mask).sum().backward()
                clock.passes(1.0)
        assert [(r.tokens, r.effective_tokens) for r in meter.records] == [(12, 12), (12, 11), (12, 9)]
        whole = meter.summary().whole
        assert whole is not None
        assert (whole.tokens_per_s, whole.effective_tokens_per_s) == (12.0, 10.0)


def test_tokens_and_samples_as_told(model: Two) -> None:
    with Meter(model, tokens=lambda batch: 7 * len(batch), samples=5) as meter:
        for batch in meter.track([rows(3), rows(4)], progress=False):
            model(batch).sum().backward()
        assert [(r.tokens, r.samples) for r in meter.records] == [(21, 5), (28, 5)]


# --- what a signature does not tell -------------------------------------------------------------------------------
def test_a_skipped_layer_is_another_signature() -> None:
    """Stochastic depth: the inputs are the same, what runs is not."""

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.kept = 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers[: self.kept]:
                x = layer(x)
            return x

    model = Skips()
    kept = [4, 4, 2, 4, 3, 2, 4, 4, 3, 2, 2, 4, 1, 3]
    with Meter(model) as meter:
        for n in kept:
            model.kept = n
            with meter.step():
                model(rows(3)).sum().backward()
        meter.summary()
        each = 2 * 3 * WIDTH * WIDTH
        known = [(n, found) for n, found in zip(kept, flops(meter), strict=True) if found is not None]
        assert [found for _, found in known] == [each * (3 * n - 1) for n, _ in known]
        assert len(known) >= len(kept) - 1


def test_recount_every_finds_what_shapes_do_not_tell(caplog: pytest.LogCaptureFixture) -> None:
    """Under no_grad nothing is recorded: only a count tells."""

    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)
            self.times = 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.times):
                x = self.a(x)
            return x

    model = Grows().eval()
    with Meter(model, recount_every=4) as meter, torch.no_grad():
        for i in range(9):
            model.times = 1 + (i >= 3)
            with meter.step():
                model(rows(3))
        each = 2 * 3 * WIDTH * WIDTH
        assert flops(meter) == [each] * 4 + [2 * each] * 5
        assert counted(meter) == [0, 4, 8]
        assert "1 of the counts differed" in meter.summary().notes[0]
    assert "its signature does not tell all" in caplog.text


def test_an_operator_without_a_formula_that_comes_later_is_no_other_count(caplog: pytest.LogCaptureFixture) -> None:
    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)
            self.decomposes = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(self.a(x)).real if self.decomposes else self.a(x)

    model = Sorts().eval()
    with Meter(model, recount_every=4) as meter, torch.no_grad():
        for i in range(9):
            model.decomposes = i >= 3
            with meter.step():
                model(rows(WIDTH))
        assert flops(meter) == [2 * WIDTH**3] * 9
        assert counted(meter) == [0, 4, 8]
        summary = meter.summary()
        assert summary.uncounted and not any("differed" in note for note in summary.notes)
    assert not caplog.text


# --- copies and resuming --------------------------------------------------------------------------------------------
def test_copies_of_the_model_carry_no_meter(model: Two) -> None:
    """A moving average, a saved model: their calls are none of the meter's, and they save as before."""
    with Meter(model) as meter:
        average = copy.deepcopy(model)
        loaded = pickle.loads(pickle.dumps(model))
        for _ in range(3):
            with meter.step():
                model(rows(3)).sum().backward()
                with torch.no_grad():
                    average(rows(3))
                    loaded(rows(3))
        assert [r.calls for r in meter.records] == [1] * 3
    assert "_compiled_call_impl" not in vars(model)


@pytest.mark.parametrize("through", ["plain", "pickle", "torch.save"])
def test_resuming(model: Two, through: str, tmp_path: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(meter: Meter, steps: int) -> None:
        for _ in range(steps):
            with meter.step():
                for n in (2, 3):
                    model(rows(n)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()

    with Meter(model, skip=1) as meter:
        train(meter, 3)
        state = meter.state_dict()
        before = list(meter.records)
    if through == "pickle":
        state = pickle.loads(pickle.dumps(state))
    elif through == "torch.save":
        torch.save(state, tmp_path / "meter.pt")
        state = torch.load(tmp_path / "meter.pt")
    with Meter(model, skip=1) as meter:
        meter.load_state_dict(state)
        train(meter, 3)
        assert meter.records[:3] == before
        assert [r.step for r in meter.records] == list(range(6))
        assert flops(meter) == [5 * TRAINED] * 6
        assert [r.left_out for r in meter.records] == [("first", "counted"), (), (), ("first",), (), ()]
        assert {r.signature for r in meter.records} == {0}


def test_a_meter_itself_pickles(model: Two) -> None:
    with Meter(model, skip=0, peak=1e12) as meter:
        for _ in range(2):
            with meter.step():
                model(rows(3)).sum().backward()
        other = pickle.loads(pickle.dumps(meter))
        assert other.records == meter.records
        with other.step():
            other.models[0](rows(3)).sum().backward()
        assert other.records[-1].model_flops == 3 * TRAINED
        assert other.records[-1].left_out == ()
        other.close()


def test_a_state_of_another_kind(model: Two) -> None:
    with Meter(model) as meter:
        state = meter.state_dict()
        with pytest.raises(UsageError, match="version"):
            meter.load_state_dict({"version": 2})
    with Meter(model, attention="causal") as meter, pytest.raises(UsageError, match="attention"):
        meter.load_state_dict(state)


# --- compiled -------------------------------------------------------------------------------------------------------
@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["torch.compile", "module.compile", "block", "function", "whole step"])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_compiled_models_are_counted_eagerly_and_stay_compiled(how: str, fresh_dynamo: None) -> None:
    from torch._dynamo.testing import CompileCounter

    backend = CompileCounter()
    torch.manual_seed(0)
    model: Any = Two()
    meter = Meter(model)
    call: Callable[..., Any] = model
    if how == "torch.compile":
        call = torch.compile(model, backend=backend, fullgraph=True)
    elif how == "module.compile":
        model.compile(backend=backend, fullgraph=True)
    elif how == "block":
        model.a.compile(backend=backend)
    elif how == "function":
        call = torch.compile(lambda x: model(x) * 2, backend=backend, fullgraph=True)

    def train(x: torch.Tensor) -> None:
        call(x).sum().backward()

    with meter:
        for i in range(12):
            with meter.step(x := rows(3)):
                train(x)
            if i == 8:
                compiled_by_then = backend.frame_count
        meter.summary()
        assert set(flops(meter)) == {3 * TRAINED}
        assert len(counted(meter)) <= 4
        assert counted(meter)[-1] < 9
        if how != "whole step":
            assert backend.frame_count == compiled_by_then == 1
        assert "compiled" in {reason for r in meter.records for reason in r.left_out} or how == "whole step"


def test_shapes_in_a_compiled_function_are_told_by_the_batch(fresh_dynamo: None) -> None:
    model = Two()
    call = torch.compile(lambda x: model(x) * 2, backend="eager", dynamic=True)
    with Meter(model) as meter:
        for batch in meter.track([rows(n) for n in (3, 3, 5, 3, 5, 3, 5, 5)], progress=False):
            call(batch).sum().backward()
        meter.summary()
        assert flops(meter)[2:] == [n * TRAINED for n in (5, 3, 5, 3, 5, 5)]
    with Meter(model) as meter:
        for n in (3, 3, 5):
            with meter.step():  # not told: no figure is better than a wrong one
                call(rows(n)).sum().backward()
        assert flops(meter) == [3 * TRAINED, None, None]
        assert "inside a compiled function" in meter.summary().notes[0]
