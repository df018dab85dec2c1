"""Steps that do what the one before them did are only held against it: nobody must see that but by the clock."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flopprof import Meter, count
from flopprof.errors import UsageError
from flopprof.meter.timing import CudaTimer

WIDTH, HIDDEN = 4, 8


class Net(nn.Module):
    """Two layers, of which one may be skipped, checkpointed or replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, HIDDEN)
        self.b = nn.Linear(HIDDEN, WIDTH)
        self.skips = self.checkpointed = False

    def forward(self, x: torch.Tensor, times: int = 1, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        for _ in range(times):
            h = checkpoint(self.a, x, use_reentrant=False) if self.checkpointed else self.a(x)
            x = self.b(h.tanh()) if not self.skips else h[..., :WIDTH]
        return x if mask is None else x * mask[:, None]


class Ticks:
    """A clock that is one tick later whenever a loop says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Calls(torch.autograd.Function):
    """Calls a model in the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, model: nn.Module) -> torch.Tensor:
        ctx.model = model
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] + ctx.model(torch.ones(2, WIDTH)), None


class Loop:
    """A training loop that does one of many things in a step."""

    def __init__(self, clock: Ticks) -> None:
        torch.manual_seed(0)
        self.clock = clock
        self.net, self.other = Net(), Net()
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "sgd": torch.optim.SGD(self.net.parameters(), lr=1e-3),
            "adam": torch.optim.AdamW([*self.net.parameters(), *self.other.parameters()], lr=1e-3),
        }
        self.meter = Meter(self.net, self.other, peak=1e9, clock=clock, wall_clock=lambda: 0.0, skip=1)

    def tick(self) -> None:
        self.clock.now += 1

    def train(self, rows: int = 2, optimizer: str | None = "sgd", **options: Any) -> None:
        self.tick()
        self.net(torch.randn(rows, WIDTH), **options).sum().backward()
        self.finish(optimizer)

    def finish(self, optimizer: str | None = "sgd") -> None:
        self.tick()
        if optimizer is not None:
            self.optimizers[optimizer].step()
            self.optimizers[optimizer].zero_grad()

    # --- steps -------------------------------------------------------------------------------------------------------
    def plain(self) -> None:
        self.train()

    def longer(self) -> None:
        self.train(3)

    def twice(self) -> None:
        self.train(times=2)

    def masked(self) -> None:
        self.train(mask=torch.ones(2))

    def adam(self) -> None:
        self.train(optimizer="adam")

    def skipped_optimizer(self) -> None:
        self.train(optimizer=None)

    def accumulated(self) -> None:
        self.train(optimizer=None)
        self.train()

    def differentiated_twice(self) -> None:
        y = self.net(torch.randn(2, WIDTH)).sum()
        y.backward(retain_graph=True)
        y.backward()
        self.finish()

    def two_losses(self) -> None:
        y = self.net(torch.randn(2, WIDTH))
        torch.autograd.backward([y.sum(), y.square().sum()])
        self.finish()

    def input_gradient(self) -> None:
        x = torch.randn(2, WIDTH, requires_grad=True)
        self.net(x).sum().backward()
        self.finish()

    def both_models(self) -> None:
        fake = self.net(torch.randn(2, WIDTH))
        self.other(fake.detach()).sum().backward()
        self.other(fake).sum().backward()
        self.finish("adam")

    def layer_skipped(self) -> None:
        self.net.skips = True
        self.train()
        self.net.skips = False

    def checkpointed(self) -> None:
        self.net.checkpointed = True
        self.train()
        self.net.checkpointed = False

    def checkpointed_whole(self) -> None:
        x = torch.randn(2, WIDTH, requires_grad=True)
        y = checkpoint(self.net, x, use_reentrant=False) + checkpoint(self.other, x, use_reentrant=True)
        y.sum().backward()
        self.finish("adam")

    def checkpointed_losses(self) -> None:
        x = torch.randn(2, WIDTH, requires_grad=True)
        losses = [checkpoint(net, x, use_reentrant=True).sum() for net in (self.net, self.other)]
        for loss in losses:
            loss.backward()
        self.finish("adam")

    def called_in_backward(self) -> None:
        Calls.apply(self.net(torch.randn(2, WIDTH)), self.other).sum().backward()
        with torch.no_grad():
            self.other(torch.ones(2, WIDTH))
        self.finish()

    def a_copy(self) -> None:
        twin = Net()
        twin.__dict__ = self.net.__dict__.copy()
        self.net(torch.randn(2, WIDTH)).sum().backward()
        twin(torch.randn(2, WIDTH)).sum().backward()
        self.finish()

    def half_frozen(self) -> None:
        self.net.a.requires_grad_(False)
        self.train()
        self.net.a.requires_grad_(True)

    def frozen_after_forward(self) -> None:
        y = self.net(torch.randn(2, WIDTH)).sum()
        self.net.a.requires_grad_(False)
        y.backward()
        self.net.a.requires_grad_(True)
        self.finish()

    def in_eval_mode(self) -> None:
        self.net.eval()
        self.train()
        self.net.train()

    def evaluates_inside(self) -> None:
        self.train(optimizer=None)
        self.net.eval()
        with torch.no_grad():
            self.net(torch.randn(5, WIDTH))
            self.tick()
        self.net.train()
        self.finish()

    def cast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.net(torch.randn(2, WIDTH))
        y.float().sum().backward()
        self.finish()

    def paused(self) -> None:
        self.train(optimizer=None)
        with self.meter.pause("saving"):
            self.tick()
        self.finish()

    def fails(self) -> None:
        self.net(torch.randn(2, WIDTH))
        self.tick()
        raise KeyError("in the middle of a step")

    def nothing(self) -> None:
        self.tick()

    def head_replaced(self) -> None:
        self.net.b = nn.Linear(HIDDEN, WIDTH)
        self.train(optimizer=None)

    def reads_figures(self) -> None:
        self.train(optimizer=None)
        self.meter.figures()
        self.finish()

    # --- between steps -----------------------------------------------------------------------------------------------
    def evaluation_between(self) -> None:
        self.net.eval()
        with torch.no_grad():
            self.net(torch.randn(5, WIDTH))
            self.tick()
        self.net.train()

    def saving_between(self) -> None:
        with self.meter.pause("saving"):
            self.tick()

    def resumed_between(self) -> None:
        self.meter.load_state_dict(self.meter.state_dict())


STEPS = (
    *("plain", "longer", "twice", "masked", "adam", "skipped_optimizer", "accumulated", "differentiated_twice"),
    *("two_losses", "input_gradient", "both_models", "layer_skipped", "checkpointed", "half_frozen", "cast", "paused"),
    *("checkpointed_whole", "checkpointed_losses", "called_in_backward", "a_copy"),
    *("frozen_after_forward", "in_eval_mode", "evaluates_inside", "fails", "nothing", "head_replaced", "reads_figures"),
)
BETWEEN = ("evaluation_between", "saving_between", "resumed_between")
Program = list[tuple[str, int]]
programs = st.lists(st.tuples(st.sampled_from(STEPS + BETWEEN), st.integers(1, 9)), min_size=1, max_size=8)


def run(program: Program) -> tuple[list[Any], Any, int]:
    """Records and summary of a run, and how many of its steps were only held against the one before."""
    loop = Loop(Ticks())
    repeated = 0
    with loop.meter as meter:
        for name, times in program:
            for _ in range(times):
                if name in BETWEEN:
                    getattr(loop, name)()
                    continue
                with contextlib.suppress(KeyError), meter.step():
                    getattr(loop, name)()
                    repeated += meter._repeat.on
        summary = meter.summary()
        return [msgspec.to_builtins(record) for record in meter.records], msgspec.to_builtins(summary), repeated


@contextlib.contextmanager
def at_length() -> Iterator[None]:
    """Each step is followed at length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meter, "_ahead", lambda _: 0)
        yield


@settings(deadline=None, max_examples=40)
@given(programs)
@example([("plain", 9), ("half_frozen", 9), ("plain", 9)])
@example([("accumulated", 9), ("plain", 9), ("accumulated", 9)])
@example([("plain", 9), ("head_replaced", 2), ("plain", 9)])
@example([("plain", 9), ("fails", 1), ("evaluation_between", 1), ("paused", 1), ("plain", 9)])
def test_nobody_sees_that_steps_are_only_compared(program: Program) -> None:
    records, summary, _ = run(program)
    with at_length():
        expected, expected_summary, repeated = run(program)
    assert repeated == 0
    assert records == expected
    assert summary == expected_summary


@pytest.mark.parametrize(
    "name",
    [name for name in STEPS if name not in ("fails", "paused", "evaluates_inside", "head_replaced", "reads_figures")],
)
def test_every_kind_of_step_is_repeated(name: str) -> None:
    _records, _summary, repeated = run([(name, 40)])
    assert repeated > 30


# --- what else may happen in a step that began like the one before --------------------------------------------------
@pytest.fixture
def loop() -> Iterator[Loop]:
    """One whose next steps are held against those before."""
    made = Loop(Ticks())
    for _ in range(9):
        with made.meter.step():
            made.plain()
    assert made.meter._repeat.left > 0
    yield made
    made.meter.close()


def flops(rows: int = 2) -> int:
    return count(Net(), torch.randn(rows, WIDTH), backward=True).model_flops


def test_steps_do_not_nest(loop: Loop) -> None:
    with loop.meter.step():
        with pytest.raises(UsageError, match="do not nest"), loop.meter.step():
            pass
        loop.plain()
    assert loop.meter.records[-1].model_flops == flops()


def test_a_block_that_was_asked_for_before_its_time(loop: Loop) -> None:
    waiting = loop.meter.step()
    with loop.meter.step():
        loop.longer()  # like none before
    with waiting:
        loop.plain()
    assert [record.model_flops for record in loop.meter.records[-2:]] == [flops(3), flops()]


def test_a_function_compiled_in_the_step(loop: Loop) -> None:
    with loop.meter.step():
        loop.plain()
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    with loop.meter.step():
        loop.plain()
    assert ["compiled" in record.left_out for record in loop.meter.records[-2:]] == [True, False]
    assert loop.meter.records[-2].model_flops == flops()


def test_another_thread_is_not_seen(loop: Loop) -> None:
    def elsewhere() -> None:
        loop.net(torch.randn(5, WIDTH)).sum().backward()
        loop.optimizers["sgd"].step()

    with loop.meter.step():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        loop.plain()
    record = loop.meter.records[-1]
    assert (record.calls, record.optimizer_steps, record.model_flops) == (1, 1, flops())


def test_a_loop_that_goes_on_in_another_thread(loop: Loop) -> None:
    def go_on() -> None:
        for _ in range(5):
            with loop.meter.step():
                loop.plain()

    thread = threading.Thread(target=go_on)
    thread.start()
    thread.join()
    assert [record.model_flops for record in loop.meter.records[-5:]] == [flops()] * 5


def nested() -> tuple[Any, Any]:
    loop = Loop(Ticks())
    with loop.meter as outer, Meter(loop.net, peak=1e9, clock=loop.clock, wall_clock=lambda: 0.0) as inner:
        for kind in (loop.plain,) * 9 + (loop.longer,) * 9 + (loop.plain,) * 9:
            with outer.step(), inner.step():
                kind()
        return outer.records, inner.records


def test_two_meters_in_one_another() -> None:
    outer, inner = nested()
    with at_length():
        assert (outer, inner) == nested()
    assert [record.model_flops for record in outer] == [flops()] * 9 + [flops(3)] * 9 + [flops()] * 9
    assert [record.model_flops for record in inner] == [record.model_flops for record in outer]


def test_a_step_of_an_optimizer_inside_the_backward(loop: Loop) -> None:
    own = torch.optim.SGD([loop.net.a.bias], lr=1e-3)
    loop.net.a.bias.register_post_accumulate_grad_hook(lambda _: own.step())
    for _ in range(9):
        with loop.meter.step():
            loop.plain()
    assert loop.meter._repeat.left > 0
    assert {record.optimizer_steps for record in loop.meter.records[1:]} == {1}
    assert [record.step for record in loop.meter.records[9:] if record.left_out] == []


def test_a_call_inside_the_backward_is_not_taken_for_the_one_after_it(loop: Loop) -> None:
    for _ in range(9):
        with loop.meter.step():
            loop.called_in_backward()
    assert loop.meter._repeat.left > 0
    forward = 2 * 2 * 2 * WIDTH * HIDDEN  # two rows through two layers
    assert [record.model_flops for record in loop.meter.records[-9:]] == [flops() + 2 * forward] * 9


def test_a_backward_inside_another_is_not_taken_for_the_one_after_it(loop: Loop) -> None:
    for _ in range(9):
        with loop.meter.step():
            loop.checkpointed_losses()
    assert loop.meter._repeat.left > 0
    forward = 2 * 2 * 2 * WIDTH * HIDDEN  # two rows through two layers
    records = loop.meter.records[-8:]
    assert {(record.model_flops, record.hardware_flops) for record in records} == {(6 * forward, 8 * forward)}
    assert [record.left_out for record in records[-5:]] == [()] * 5


def test_a_meter_that_is_gone_leaves_its_model_alone(loop: Loop) -> None:
    model, meter = loop.net, weakref.ref(loop.meter)
    block = loop.meter.step()
    loop.meter = Meter()
    gc.collect()
    assert meter() is None
    assert "_compiled_call_impl" not in vars(model)
    with block:
        model(torch.randn(2, WIDTH)).sum().backward()


def test_each_record_is_written_when_its_step_ends(tmp_path: Path) -> None:
    net, path = Net(), tmp_path / "run.jsonl"
    with Meter(net, peak=1e9, records=path) as meter:
        for number in range(12):
            with meter.step():
                net(torch.randn(2, WIDTH)).sum().backward()
            assert f'"step":{number}' in path.read_text()
        assert meter._repeat.left > 0


def test_logging_and_counting_again_keep_their_pace() -> None:
    net, logged = Net(), []
    with Meter(net, peak=1e9, log=logged.append, log_every=7, recount_every=10) as meter:
        for number in range(1, 51):
            with meter.step():
                net(torch.randn(2, WIDTH)).sum().backward()
            assert len(logged) == number // 7
        assert [record.step for record in meter.records if "counted" in record.left_out] == [0, 10, 20, 30, 40]


def test_a_loader_that_is_waited_for(loop: Loop) -> None:
    def batches() -> Iterator[torch.Tensor]:
        for i in range(9):
            loop.clock.now += i
            yield torch.randn(2, WIDTH)

    for _ in loop.meter.track(batches(), progress=False):
        loop.plain()
    assert [record.data_wait_s for record in loop.meter.records[-9:]] == [*range(9)]


def test_a_model_cast_between_two_steps(loop: Loop) -> None:
    loop.net.bfloat16()
    with loop.meter.step():
        loop.net(torch.randn(2, WIDTH, dtype=torch.bfloat16)).sum().backward()
    assert [*(loop.meter.records[-1].flops or {})] == ["bfloat16"]


def at_length_too(runs: Callable[[], Any]) -> Any:
    """What a run gives, whose steps may be followed at length."""
    with at_length():
        expected = runs()
    found = runs()
    assert found == expected
    return found


@pytest.mark.parametrize("log_every", [1, 10, 100])
def test_a_head_that_grows_in_the_step(log_every: int) -> None:
    def runs() -> list[int | None]:
        net = Net()
        with Meter(net, peak=1e9, log=lambda _: None, log_every=log_every) as meter:
            for number in range(40):
                with meter.step():
                    net(torch.randn(2, WIDTH)).sum().backward()
                    if number % 10 == 2:
                        net.b = nn.Linear(HIDDEN, WIDTH + number)
            return [record.model_flops for record in meter.records]

    found = at_length_too(runs)
    assert len(set(found)) == 5


def test_models_that_make_modules_as_they_run_repeat_all_the_same() -> None:
    class Slicing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers[:2]:
                x = layer(x)
            return x

    net = Slicing()
    with Meter(net, peak=1e9) as meter:
        repeated = 0
        for _ in range(40):
            with meter.step():
                net(torch.randn(2, WIDTH)).sum().backward()
                repeated += meter._repeat.on
    assert repeated > 30


def test_what_a_logger_does_is_not_overlooked() -> None:
    def runs() -> tuple[list[Any], float]:
        clock, net, other = Ticks(), Net(), Net()

        def log(_: Any) -> None:
            net.eval()
            with torch.no_grad():
                net(torch.randn(5, WIDTH))
            net.train()
            clock.now += 3
            if clock.now > 60:
                net.b = nn.Linear(HIDDEN, WIDTH + int(clock.now))
            if clock.now > 90:
                meter.watch(other)

        with Meter(net, peak=1e9, log=log, log_every=10, clock=clock, wall_clock=lambda: 0.0) as meter:
            for _ in range(100):
                with meter.step():
                    net(torch.randn(2, WIDTH)).sum().backward()
                    clock.now += 1
            return meter.records, meter.summary().rows["evaluation"]

    _records, evaluation = at_length_too(runs)
    assert evaluation == 10 * 3


def test_parameters_that_change_unseen_are_looked_up_again_in_time() -> None:
    def runs() -> list[int | None]:
        net = nn.Sequential(nn.LazyLinear(HIDDEN), nn.Tanh(), nn.LazyLinear(WIDTH))
        with Meter(net, peak=1e9) as meter:
            for number in range(300):
                with meter.step():
                    net(torch.randn(2, WIDTH)).sum().backward()
                if number == 200:
                    net[2].weight.data = torch.randn(2 * WIDTH, HIDDEN)
                    net[2].bias.data = torch.randn(2 * WIDTH)
                    net[2].weight.grad = net[2].bias.grad = None
            return [record.model_flops for record in meter.records]

    at_length_too(runs)


def test_a_clock_that_knows_the_trainer_keeps_nothing_alive() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.now = 0.0
            self.net = Net()
            self.meter = Meter(self.net, peak=1e9, clock=self.clock)

        def clock(self) -> float:
            return self.now

    trainer = Trainer()
    for _ in range(10):
        with trainer.meter.step():
            trainer.net(torch.randn(2, WIDTH)).sum().backward()
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None


def test_a_mode_of_the_users_around_it_all() -> None:
    def runs() -> list[int | None]:
        net = Net()
        with FlopCounterMode(display=False), Meter(net, peak=1e9) as meter:
            for number in range(30):
                with meter.step():
                    net(torch.randn(2, WIDTH)).sum().backward()
                    if number == 20:
                        net(torch.randn(5, WIDTH)).sum().backward()
            return [record.model_flops for record in meter.records]

    assert at_length_too(runs)[20] == flops() + flops(5)


def test_a_model_that_is_watched_from_the_middle_of_a_step() -> None:
    def runs() -> list[Any]:
        loop = Loop(Ticks())
        with loop.meter as meter:
            for number in range(20):
                with meter.step():
                    loop.train(optimizer=None)
                    if number == 10:
                        meter.watch(nn.Linear(2, 2))
                    loop.finish()
            return meter.records

    at_length_too(runs)


def test_ending_a_step_twice(loop: Loop) -> None:
    with pytest.raises(UsageError, match="no step of this meter is open"), loop.meter.step():
        loop.plain()
        loop.meter.end_step()
    with pytest.raises(UsageError, match="no step of this meter is open"), loop.meter.step():
        loop.plain()
        loop.meter.close()


def test_compilations_are_seen_after_a_reset(loop: Loop) -> None:
    torch._dynamo.reset()
    with loop.meter.step():
        loop.plain()
        torch.compile(lambda x: x + 2, backend="eager")(torch.ones(2))
    assert "compiled" in loop.meter.records[-1].left_out


def test_jagged_batches_of_every_length() -> None:
    layer = nn.Linear(WIDTH, HIDDEN)
    with Meter(layer, peak=1e9) as meter:
        for lengths in ((2, 3), (4, 1), (5, 2), (2, 2), (6, 6), (1, 3)):
            batch = torch.nested.nested_tensor([torch.randn(n, WIDTH) for n in lengths], layout=torch.jagged)
            with meter.step():
                layer(batch).values().sum().backward()
        assert [record.model_flops for record in meter.records] == [
            2 * 2 * sum(lengths) * WIDTH * HIDDEN for lengths in ((2, 3), (4, 1), (5, 2), (2, 2), (6, 6), (1, 3))
        ]


# --- a device that is behind ----------------------------------------------------------------------------------------
class Device:
    """So many seconds of work were given to it, and so many it has done."""

    given = done = 0.0
    waited_for = 0

    def event(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    """As torch.cuda.Event."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.given

    def query(self) -> bool:
        return self.device.done >= self.at

    def synchronize(self) -> None:
        self.device.waited_for += 1
        self.device.done = max(self.device.done, self.at)

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def test_events_of_a_device_are_read_once_they_are_past(monkeypatch: pytest.MonkeyPatch) -> None:
    device, net = Device(), Net()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    with Meter(net, peak=1e9) as meter:
        meter._recorder.timer = CudaTimer()
        for number in range(100):
            with meter.step():
                net(torch.randn(2, WIDTH)).sum().backward()
                device.given += 1 + number
        assert meter._repeat.left > 0
        assert meter.records == []
        device.done = 1275.0  # the first fifty
        assert [record.step_time_s for record in meter.records] == [*range(1, 51)]
        assert device.waited_for == 0
        assert meter.summary().steps == 100
        assert [record.step_time_s for record in meter.records] == [*range(1, 101)]
        assert {record.model_flops for record in meter.records} == {flops()}
        hosts = [record.ended_at for record in meter.records]
        assert hosts == sorted(hosts)
