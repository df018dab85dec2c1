"""Distributed wrappers: DDP, FSDP2 and tensor parallelism over gloo. Each rank counts what it multiplies itself."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from flopprof import FlopCounter, Profile, count

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.filterwarnings("ignore"),
]

BATCH, WIDTH, HIDDEN = 4, 8, 16
EACH = 2 * BATCH * WIDTH * HIDDEN  # one of the two layers, forward
RANKS = 2


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, HIDDEN)
        self.b = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


def counted(run: Callable[[], Any], model: nn.Module) -> Profile:
    with FlopCounter(model) as counter:
        run()
    return counter.profile


def trained(model: nn.Module, steps: int = 1, optimizer: torch.optim.Optimizer | None = None) -> Profile:
    x = torch.randn(BATCH, WIDTH)

    def run() -> None:
        for _ in range(steps):
            model(x).sum().backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

    return counted(run, model)


def data_parallel() -> Profile:
    return trained(nn.parallel.DistributedDataParallel(Two()), steps=2)


def static_data_parallel() -> Profile:
    return trained(nn.parallel.DistributedDataParallel(Two(), static_graph=True), steps=2)


def fully_sharded() -> Profile:
    from torch.distributed.fsdp import fully_shard

    model = Two()
    for part in (model.a, model.b, model):
        fully_shard(part)
    return trained(model, steps=2, optimizer=torch.optim.AdamW(model.parameters()))


def _tensor_parallel() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(Two(), mesh, {"a": ColwiseParallel(), "b": RowwiseParallel()})


def tensor_parallel() -> Profile:
    return trained(_tensor_parallel())


def tensor_parallel_again() -> Profile:
    """The sharding of every operator is known from the first step: no step costs more than another."""
    model = _tensor_parallel()
    trained(model)
    return trained(model)


def tensor_parallel_once() -> Profile:
    """`count` leaves the shards and the optimizer as they were."""
    model = _tensor_parallel()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(BATCH, WIDTH)).sum().backward()
    optimizer.step()

    def state() -> list[torch.Tensor]:
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        return [tensor.full_tensor().clone() for tensor in (*model.parameters(), *moments)]

    before = state()
    profile = count(model, torch.randn(BATCH, WIDTH), backward=True, optimizer=optimizer)
    assert all(map(torch.equal, before, state()))
    return profile


def sharded_matmul() -> Profile:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = distribute_tensor(torch.randn(BATCH, WIDTH), mesh, [Shard(0)])
    whole = distribute_tensor(torch.randn(WIDTH, HIDDEN), mesh, [Replicate()])

    def run() -> torch.Tensor:
        return (rows @ whole).full_tensor()

    return counted(run, Two())


# What one rank of two counts: (forward, backward) by module. Modules are named as without the wrapper.
# The input wants no gradient: the first layer makes its weight's, the second both.
REPLICATED = ({"": 0, "a": 2 * EACH, "b": 2 * EACH}, {"": 0, "a": 2 * EACH, "b": 4 * EACH})
SHARED = ({"": 0, "a": EACH // RANKS, "b": EACH // RANKS}, {"": 0, "a": EACH // RANKS, "b": 2 * EACH // RANKS})
EXPECTED: dict[Callable[[], Profile], Any] = {
    data_parallel: REPLICATED,
    static_data_parallel: REPLICATED,
    fully_sharded: REPLICATED,
    tensor_parallel: SHARED,
    tensor_parallel_again: SHARED,
    tensor_parallel_once: SHARED,
    sharded_matmul: ({"": EACH // RANKS}, {"": 0}),
}


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        for run in EXPECTED:
            torch.manual_seed(0)
            Path(folder, f"{run.__name__}-{rank}.json").write_text(run().to_json())
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Profile]]:
    """The profiles of every rank, by the name of what ran."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (RANKS, _free_port(), str(folder)), nprocs=RANKS)
    return lambda name: [Profile.from_json((folder / f"{name}-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("run", EXPECTED, ids=lambda run: run.__name__)
def test_each_rank_counts_its_own_work(ranks: Callable[[str], list[Profile]], run: Callable[[], Profile]) -> None:
    forward, backward = EXPECTED[run]
    for profile in ranks(run.__name__):
        assert profile.by_module("forward", own=True) == forward
        assert profile.by_module("backward", own=True) == backward
        assert (profile.recompute_flops, profile.optimizer_flops) == (0, 0)
        assert profile.exact


@pytest.mark.parametrize("run", [tensor_parallel, tensor_parallel_again], ids=lambda run: run.__name__)
def test_ranks_of_tensor_parallelism_add_up_to_one_process(
    ranks: Callable[[str], list[Profile]], run: Callable[[], Profile]
) -> None:
    alone = trained(Two())
    assert alone.by_phase() == {"forward": 2 * EACH, "backward": 3 * EACH, "recompute": 0, "optimizer": 0}
    for phase in ("forward", "backward"):
        total = [profile.by_module(phase) for profile in ranks(run.__name__)]
        assert {name: sum(rank[name] for rank in total) for name in total[0]} == alone.by_module(phase)


def test_a_sharded_parameter_keeps_its_name(ranks: Callable[[str], list[Profile]]) -> None:
    for profile in ranks("tensor_parallel"):
        assert profile.by_parameter("forward") == {"a.weight": EACH // RANKS, "b.weight": EACH // RANKS}


def test_a_gathered_parameter_keeps_its_name_and_the_ledger_closes(ranks: Callable[[str], list[Profile]]) -> None:
    for profile in ranks("fully_sharded"):
        assert profile.by_parameter("forward") == {"a.weight": 2 * EACH, "b.weight": 2 * EACH}
        assert profile.by_parameter("backward") == {"b.weight": 4 * EACH, "a.weight": 2 * EACH}
        ledger = profile.reconcile(tokens=2 * BATCH)
        assert ledger.backward is not None
        assert (ledger.residual, ledger.backward.residual) == (0, 0)
        assert {use.reuse for use in ledger.parameters if use.forward_flops} == {1}
        assert all(joint.computed == joint.wanted for joint in ledger.joints)


def test_data_parallel_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch puts one of its own there, for good
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        profile = trained(nn.parallel.DistributedDataParallel(Two()))
    finally:
        dist.destroy_process_group()
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    assert profile.by_module("forward", own=True) == {"": 0, "a": EACH, "b": EACH}
    assert profile.by_module("backward", own=True) == {"": 0, "a": EACH, "b": 2 * EACH}
    assert profile.exact
