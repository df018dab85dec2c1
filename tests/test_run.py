"""The steps of a script that knows nothing of a meter: what one is, whatever the loop looks like."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers
from torch.utils.data import DataLoader, TensorDataset

from flopprof.meter.contiguous import Contiguous
from flopprof.meter.script import Script

# A linear layer without a bias, n rows, a inputs, b outputs: 2nab forward, as much again for its weight's gradient.
N, A, B = 4, 8, 16
FORWARD = 2 * N * A * B
STEPS = 18


@contextmanager
def script(**options: Any) -> Iterator[Script]:
    found = Script(lambda: Contiguous(**{"peak": 1e12, "skip": 0, **options}))
    found.install()
    try:
        yield found
    finally:
        found.remove()


def linear(inputs: int = A, outputs: int = B) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for module in modules for parameter in module.parameters()], lr=1e-3)


def flops(found: Script) -> list[int | None]:
    assert found.meter is not None
    return [record.model_flops for record in found.meter.records]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: int = N) -> None:
    model(torch.randn(rows, A)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_step_is_what_an_optimizer_steps_after() -> None:
    with script() as found:
        model = linear()
        optimizer = sgd(model)
        for _ in range(6):
            train(model, optimizer)
    assert flops(found) == [2 * FORWARD] * 6
    records = found.meter.records
    assert [record.step for record in records] == list(range(6))
    assert {record.optimizer_steps for record in records} == {1} == {record.calls for record in records}
    assert {record.samples for record in records} == {N}
    assert [("counted" in record.left_out) for record in records] == [True, True, False, False, False, False]


def test_accumulation_is_one_step() -> None:
    with script() as found:
        model = linear()
        optimizer = sgd(model)
        for micro in range(12):
            model(torch.randn(N, A)).sum().backward()
            if micro % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
    assert flops(found) == [4 * 2 * FORWARD] * 3
    assert [record.samples for record in found.meter.records] == [4 * N] * 3


def test_samples_are_those_of_what_is_trained_in_most_steps() -> None:
    tried, frozen, model = linear(3, 3), linear(), linear()
    with script() as found:
        tried(torch.randn(7, 3)).sum().backward()
        optimizer = sgd(model)
        for _ in range(6):
            with torch.no_grad():
                frozen(torch.randn(2, A))
            train(model, optimizer)
    assert [record.samples for record in found.meter.records[2:]] == [N] * 4
    each = 2 * FORWARD + 2 * 2 * A * B
    assert flops(found) == [each + 2 * 2 * 7 * 3 * 3, *[each] * 5]  # what was tried: forward, its weight's gradient


def test_rows_that_vary_are_told_apart() -> None:
    rows = [3, 5, 3, 8, 5, 3, 8, 4, 7]
    with script() as found:
        model = linear()
        optimizer = sgd(model)
        for each in rows:
            train(model, optimizer, each)
    assert flops(found) == [4 * each * A * B for each in rows]


@pytest.mark.parametrize("every", [1, 3])
def test_optimizers_in_turn_are_one_step(every: int) -> None:
    generator, critic = linear(A, A), linear(A, 1)
    with script() as found:
        first, second = sgd(critic), sgd(generator)
        for number in range(STEPS):
            critic(generator(torch.randn(N, A)).detach()).sum().backward()
            first.step()
            if number % every == every - 1:
                critic(generator(torch.randn(N, A))).sum().backward()
                second.step()
    made, judged = 2 * N * A * A, 2 * N * A
    assert {record.samples for record in found.meter.records if record.optimizer_steps == 2} == {2 * N}
    # The generator's own graph of the first half is never differentiated: forward of both, the critic's weight.
    alone = made + 2 * judged
    both = alone + 2 * made + 3 * judged
    assert flops(found) == [both if number % every == every - 1 else alone for number in range(STEPS)]
    assert sum(record.optimizer_steps for record in found.meter.records) == STEPS + STEPS // every


def test_optimizers_beside_each_other_are_one_step() -> None:
    model, other = linear(), linear(B, A)
    with script() as found:
        optimizers = [sgd(model), torch.optim.AdamW(other.parameters())]
        for _ in range(5):
            other(model(torch.randn(N, A))).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    # The second layer also gives its input's gradient: 2 + 3 products of the same size.
    assert flops(found) == [5 * FORWARD] * 5


def test_an_optimizer_made_anew_takes_the_place_of_the_one_before() -> None:
    model = linear()
    with script() as found:
        for _ in range(4):
            train(model, sgd(model))
    assert flops(found) == [2 * FORWARD] * 4


def test_closures_are_counted_as_often_as_they_run() -> None:
    model, data = linear(), torch.randn(N, A)
    calls = []
    with script() as found:
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            calls[-1] += 1
            optimizer.zero_grad()
            loss = model(data).square().sum()
            loss.backward()
            return loss

        for _ in range(4):
            calls.append(0)
            optimizer.step(closure)
    assert flops(found) == [2 * FORWARD * count for count in calls]


def test_a_step_that_a_scaler_skips_is_a_step() -> None:
    model = linear()
    with script() as found:
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for number in range(5):
            loss = model(torch.randn(N, A)).sum() * (float("inf") if number in (1, 2) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert flops(found) == [2 * FORWARD] * 5
    assert [record.optimizer_steps for record in found.meter.records] == [1, 0, 0, 1, 1]


def test_evaluation_in_between_is_in_no_step() -> None:
    model = linear()
    with script() as found:
        optimizer = sgd(model)
        for _ in range(5):
            train(model, optimizer)
            model.eval()
            with torch.no_grad():
                for _ in range(3):
                    model(torch.randn(32, A))
            model.train()
        assert model.training
    assert flops(found) == [2 * FORWARD] * 5
    # The last one comes after the last step.
    assert [record.evaluation_s > 0 for record in found.meter.records] == [False, True, True, True, True]


def test_a_teacher_and_a_metric_in_an_evaluation_are_in_no_step() -> None:
    """A metric is in training mode, as most are, and a teacher comes before its student in training."""
    model, teacher, metric = linear(), linear().eval(), torch.nn.Flatten()
    with script() as found:
        optimizer = sgd(model)
        for _ in range(5):
            model.train()
            for _ in range(3):
                with torch.no_grad():
                    teacher(torch.randn(N, A))
                train(model, optimizer)
            model.eval()
            with torch.no_grad():
                for _ in range(4):
                    metric(model(torch.randn(32, A)) - teacher(torch.randn(32, A)))
    assert flops(found)[1:] == [3 * FORWARD] * 14  # what runs before the first call in training is in no step
    evaluated = [i for i, record in enumerate(found.meter.records) if record.evaluation_s > 0]
    assert evaluated == [3, 6, 9, 12]  # the last one comes after the last step


def test_what_runs_before_training_is_in_no_step() -> None:
    model = linear()
    with script() as found:
        with torch.no_grad():
            model(torch.randn(32, A))
        assert found.meter is None
        optimizer = sgd(model)
        for _ in range(3):
            train(model, optimizer)
    assert flops(found) == [2 * FORWARD] * 3


def test_products_outside_of_modules_are_counted() -> None:
    model, mixing = linear(), torch.randn(A, A)
    with script() as found:
        optimizer = sgd(model)
        for _ in range(5):
            x = torch.randn(N, A) @ mixing
            (model(x) @ torch.randn(B, 2)).sum().backward()
            optimizer.step()
    # Before the first call of a module nothing tells that a step is under way.
    mixed, after = 2 * N * A * A, 2 * (2 * N * B * 2)
    assert flops(found) == [2 * FORWARD + after] + [2 * FORWARD + after + mixed] * 4


def test_a_script_without_modules_is_metered_from_its_second_step_on() -> None:
    weight = torch.randn(A, B, requires_grad=True)
    with script() as found:
        optimizer = torch.optim.SGD([weight], lr=1e-3)
        for _ in range(6):
            (torch.randn(N, A) @ weight).sum().backward()
            optimizer.step()
    assert flops(found) == [2 * FORWARD] * 5
    summary = found.summary()
    assert summary is not None
    assert "5 steps call no module" in summary.notes[-1]


def test_parts_of_a_model_may_be_called_by_themselves() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = linear(), linear(B, 1)

        def loss(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(x)).sum()

    net = Net()
    with script() as found:
        optimizer = sgd(net)
        for rows in (N, N, 2 * N, N):
            net.loss(torch.randn(rows, A)).backward()
            optimizer.step()
    each = 2 * FORWARD + 3 * (2 * N * B)
    assert flops(found) == [each, each, 2 * each, each]
    assert [record.calls for record in found.meter.records] == [2] * 4


def test_keywords_are_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()

        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    net = Net()
    with script() as found:
        optimizer = sgd(net)
        for rows in (N, N, 3 * N, N):
            net(x=torch.randn(rows, A)).sum().backward()
            optimizer.step()
    assert flops(found) == [2 * FORWARD, 2 * FORWARD, 6 * FORWARD, 2 * FORWARD]
    assert [record.samples for record in found.meter.records] == [N, N, 3 * N, N]


def test_a_module_that_raises_is_seen_again() -> None:
    class Net(nn.Module):
        fails = False

        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fails:
                raise ValueError("no")
            return self.layer(x)

    net = Net()
    with script() as found:
        optimizer = sgd(net)
        for _ in range(4):
            net.fails = True
            with pytest.raises(ValueError, match="no"):
                net(torch.randn(N, A))
            net.fails = False
            train(net, optimizer)
    assert flops(found) == [2 * FORWARD] * 4
    assert not net._forward_hooks


def test_modules_made_in_every_step_are_counted_once() -> None:
    class Distance(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x @ y.T).sum()

    model = linear()
    with script() as found:
        optimizer = sgd(model)
        for _ in range(6):
            Distance()(model(torch.randn(N, A)), torch.randn(3, B)).backward()
            optimizer.step()
    assert flops(found) == [2 * FORWARD + 2 * (2 * N * B * 3)] * 6
    assert sum("counted" in record.left_out for record in found.meter.records) == 2


def test_models_are_not_kept_alive_nor_changed() -> None:
    model = linear()
    with script() as found:
        optimizer = sgd(model)
        for _ in range(3):
            train(model, optimizer)
        hooks = [dict(model._forward_hooks), dict(model._forward_pre_hooks)]
        pickled, copied = pickle.dumps(model), copy.deepcopy(model)
        train(model, optimizer)
        gone = weakref.ref(model)
        del model, optimizer
        gc.collect()
        left = gone()
    assert hooks == [{}, {}]
    assert b"flopprof" not in pickled
    assert vars(copied).keys() == vars(linear()).keys()
    assert left is None
    assert flops(found) == [2 * FORWARD] * 4


def test_each_parameters_own_optimizer_may_step_in_the_backward() -> None:
    model = nn.Sequential(linear(), linear(B, A))
    with script() as found:
        own = {parameter: torch.optim.SGD([parameter], lr=1e-3) for parameter in model.parameters()}

        def step(parameter: torch.Tensor) -> None:
            own[parameter].step()
            own[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for _ in range(5):
            model(torch.randn(N, A)).sum().backward()
    # That the last step is over would be told by the next call.
    assert flops(found) == [5 * FORWARD] * 4


def test_waiting_for_data_and_saving_are_no_part_of_a_step(tmp_path: Any) -> None:
    class Mixed(TensorDataset):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.randn(A, A) @ super().__getitem__(index)[0]

    model = linear()
    with script() as found:
        optimizer = sgd(model)
        for number, x in enumerate(DataLoader(Mixed(torch.randn(6 * N, A)), batch_size=N)):
            model(x).sum().backward()
            optimizer.step()
            if number == 2:
                torch.save(model.state_dict(), tmp_path / "model.pt")
    records = found.meter.records
    assert flops(found) == [2 * FORWARD] * 6
    assert [record.data_wait_s > 0 for record in records] == [False] + [True] * 5
    assert ["saving" in record.paused_s for record in records] == [False] * 3 + [True] + [False] * 2
    assert "saving" in found.summary().rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_that_turns_to_another_device_begins_anew() -> None:
    model = linear()
    with script() as found:
        model(torch.randn(1, A))  # a try, before the model goes where it trains
        optimizer = sgd(model.cuda())
        for _ in range(4):
            model(torch.randn(N, A, device="cuda")).sum().backward()
            optimizer.step()
    assert found.meter.device == "cuda:0"
    assert flops(found) == [2 * FORWARD] * 3


def test_a_counter_of_the_scripts_own_may_end_in_mid_step() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = linear()
    with script() as found:
        optimizer = sgd(model)
        for number in range(8):
            with FlopCounterMode(display=False) if number in (0, 3, 4) else nullcontext() as counter:
                train(model, optimizer, N + (number == 4))
            if counter is not None:
                assert counter.get_total_flops() == 2 * FORWARD * (N + (number == 4)) // N
            model(torch.randn(N, A)).sum().backward()
    # From the second step on there is one more forward and backward; the one with other rows is never counted.
    assert flops(found)[1:4] == [4 * FORWARD] * 3
    assert flops(found)[6:] == [4 * FORWARD] * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tracing_and_exporting_in_between_are_no_part_of_a_step() -> None:
    model = linear()
    with script() as found:
        optimizer = sgd(model)
        for number in range(6):
            train(model, optimizer)
            if number == 1:
                traced = torch.jit.trace(model, torch.randn(N, A))
                exported = torch.export.export(model, (torch.randn(N, A),))
        scripted = torch.jit.script(nn.Sequential(linear()))
        optimizer = sgd(scripted)
        for _ in range(3):
            train(scripted, optimizer)
    # Where one optimizer takes over from another, their two steps could be a pair in turn: they are one.
    assert flops(found) == [2 * FORWARD] * 5 + [4 * FORWARD] + [2 * FORWARD] * 2
    x = torch.randn(N, A)
    assert torch.equal(traced(x), model(x))
    assert torch.equal(exported.module()(x), model(x))
    assert "tracing" in found.summary().rows


def test_another_thread_is_left_alone() -> None:
    import threading

    model = linear()
    with script() as found:
        optimizer = sgd(model)
        other = linear()

        def elsewhere() -> None:
            train(other, sgd(other))

        for _ in range(3):
            train(model, optimizer)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
    assert flops(found) == [2 * FORWARD] * 3


Change = Callable[[], object]


def test_everything_is_as_it_was() -> None:
    import torch.utils.data.dataloader as loaders

    places: list[tuple[Any, str]] = [
        *((torch, name) for name in ("compile", "save")),
        (torch.jit, "trace"),
        (torch.amp.GradScaler, "step"),
        (loaders.DataLoader, "__iter__"),
        (loaders._BaseDataLoaderIter, "__next__"),
        *((optimizers, f"_global_optimizer_{kind}_hooks") for kind in ("pre", "post")),
    ]
    before = [vars(owner).get(name) for owner, name in places]
    with script():
        model = linear()
        train(model, sgd(model))
        assert all(vars(owner).get(name) is not was for (owner, name), was in zip(places, before, strict=True))
    assert [vars(owner).get(name) for owner, name in places] == before


def test_a_hook_that_a_script_gives_torch_stays() -> None:
    seen: list[str] = []
    with script():
        handle = optimizers.register_optimizer_step_post_hook(lambda *_: seen.append("step"))
        model = linear()
        train(model, sgd(model))
    train(model, sgd(model))
    assert seen == ["step", "step"]
    optimizers._global_optimizer_post_hooks.pop(handle.id)
