"""Many devices: ranks of real runs over gloo add up to the run of one process; and the arithmetic over ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from flopprof import Meter
from flopprof.errors import FlopprofError, UsageError
from flopprof.meter import records
from flopprof.meter.figures import StepRecord, figures
from flopprof.meter.ranks import path_of_rank
from flopprof.meter.runs import run_of, world_of_runs
from flopprof.meter.world import RankReport, World, world_of

pytestmark = pytest.mark.filterwarnings("ignore")
needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)

BATCH, WIDTH, HIDDEN, STEPS, RANKS = 4, 8, 16, 4, 2
EACH = 2 * BATCH * WIDTH * HIDDEN  # one of the two layers, forward
STEP = 2 * EACH + 3 * EACH  # two layers; backward: two weights, and the input of the second


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, HIDDEN)
        self.b = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


def run(model: nn.Module, rows: int, *, steps: int = STEPS, **options: Any) -> Meter:
    """A loop of `steps` steps on a batch of `rows`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Meter(model, peak=1e12, **options) as meter:
        for batch in meter.track([torch.randn(rows, WIDTH) for _ in range(steps)], progress=False):
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return meter


def data_parallel(folder: Path) -> World:
    model = nn.parallel.DistributedDataParallel(Two())
    return run(model, BATCH // RANKS, records=folder / "data_parallel.jsonl").world()


def fully_sharded(folder: Path, **options: Any) -> World:
    from torch.distributed.fsdp import fully_shard

    model = Two()
    for part in (model.a, model.b, model):
        fully_shard(part, **options)
    name = "hybrid_sharded" if options else "fully_sharded"
    return run(model, BATCH // RANKS, records=folder / f"{name}.jsonl").world()


def hybrid_sharded(folder: Path) -> World:
    """Copies on both ranks, each of them sharded over one: every rank has rows of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    return fully_sharded(folder, mesh=init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("copies", "shards")))


def sharded_in_two_ways(folder: Path) -> World:
    """FSDP over one rank around tensor parallelism over two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(Two(), mesh["tensor"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
    for part in (model.a, model.b, model):
        fully_shard(part, mesh=mesh["data"])
    return run(model, BATCH, records=folder / "sharded_in_two_ways.jsonl").world()


def tensor_parallel(folder: Path) -> World:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(Two(), mesh, {"a": ColwiseParallel(), "b": RowwiseParallel()})
    return run(model, BATCH, records=folder / "tensor_parallel.jsonl").world()


def pipelined(folder: Path) -> World:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank = dist.get_rank()
    whole = Two()
    part = nn.Sequential(whole.a, nn.ReLU()) if rank == 0 else whole.b
    stage = PipelineStage(part, rank, RANKS, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda output, target: (output - target).sum())
    x, target = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    with Meter(part, peak=1e12, records=folder / "pipelined.jsonl") as meter:
        for _ in range(STEPS):
            with meter.step():
                schedule.step(*([x] if rank == 0 else []), **({} if rank == 0 else {"target": target}))
    return meter.world()


def uneven(_folder: Path) -> World:
    """Ranks with different work: one has three times the rows of the other."""
    return run(Two(), BATCH * (1 + 2 * dist.get_rank())).world()


def one_dies(folder: Path) -> str:
    """The second rank dies in its third step; the first goes on alone and cannot gather."""
    if dist.get_rank() == 0:
        meter = run(Two(), BATCH, records=folder / "run.jsonl")
        try:
            meter.world()
        except FlopprofError as error:
            return str(error)
        return "gathered"
    done = 0

    class Dying(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal done
            done += 1
            if done == 3:
                os._exit(1)
            return super().forward(x)

    run(Dying(), BATCH, records=folder / "run.jsonl")
    return "alive"


def worker(rank: int, job: Callable[[Path], Any], port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    torch.save(job(Path(folder)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def on_ranks(job: Callable[[Path], Any], folder: Path, *, join: bool = True) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.spawn(worker, (job, port, str(folder)), nprocs=RANKS, join=join)
    if not join:
        for process in context.processes:
            process.join(60)
    found = [folder / f"rank{rank}.pt" for rank in range(RANKS)]
    return [torch.load(file, weights_only=False) for file in found if file.exists()]


ONE_RUN = [data_parallel, fully_sharded, hybrid_sharded, sharded_in_two_ways, tensor_parallel, pipelined]
SHARE = {sharded_in_two_ways, tensor_parallel, pipelined}
JOBS = [*ONE_RUN, uneven]


def every_job(folder: Path) -> dict[str, World]:
    return {job.__name__: job(folder) for job in JOBS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks write."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def worlds(folder: Path) -> list[dict[str, World]]:
    """Of each rank, what it knows of all after each job."""
    return on_ranks(every_job, folder)


@needs_gloo
@pytest.mark.parametrize("job", ONE_RUN)
def test_ranks_add_up_to_one_process(job: Callable[[Path], World], worlds: list[dict[str, World]]) -> None:
    assert run(Two(), BATCH).world().model_flops == STEPS * STEP
    first, second = (found[job.__name__] for found in worlds)
    assert first == second
    assert [rank.rank for rank in first.ranks] == [0, 1]
    assert sum(rank.timed.model_flops // rank.timed.steps for rank in first.ranks) == STEP
    assert 0 < first.mfu < 1
    assert first.data_parallel == (None if job in SHARE else RANKS)
    assert (first.samples_per_s is None) == (job in SHARE)
    if job is not pipelined:  # whose first step also tries each stage on a micro-batch, to learn shapes
        assert first.model_flops == STEPS * STEP
        assert all(rank.steps == STEPS for rank in first.ranks)


@needs_gloo
@pytest.mark.parametrize("job", ONE_RUN)
def test_records_tell_the_same_of_all_ranks(
    job: Callable[[Path], World], worlds: list[dict[str, World]], folder: Path
) -> None:
    told = worlds[0][job.__name__]
    world = world_of_runs([run_of(folder / f"{job.__name__}.rank{rank}.jsonl") for rank in range(RANKS)])
    assert world is not None
    assert world.model_flops == told.model_flops
    assert world.data_parallel == told.data_parallel
    assert world.samples_per_s == (None if job in SHARE else pytest.approx(told.samples_per_s))


@needs_gloo
def test_ranks_with_different_work(worlds: list[dict[str, World]]) -> None:
    world = worlds[0]["uneven"]
    assert [rank.model_flops for rank in world.ranks] == [STEPS * STEP, 3 * STEPS * STEP]


@needs_gloo
def test_a_rank_that_dies_leaves_the_others_records(tmp_path: Path) -> None:
    (said,) = on_ranks(one_dies, tmp_path, join=False)
    assert "a rank died" in said
    (whole,) = records.read(tmp_path / "run.rank0.jsonl")
    (torn,) = records.read(tmp_path / "run.rank1.jsonl")
    assert (whole.start.rank, whole.start.world_size) == (0, 2)
    assert [record.step for record in whole.records] == [0, 1, 2, 3]
    assert [record.step for record in torn.records] == [0, 1]
    assert [record.model_flops for record in torn.records] == [STEP, STEP]
    runs = [run_of(tmp_path / f"run.rank{rank}.jsonl") for rank in range(RANKS)]
    world = world_of_runs(runs)
    assert world is not None
    assert world.model_flops == 6 * STEP
    assert world_of_runs(runs[:1]) is None
    assert world_of_runs([runs[0], runs[0]]) is None


# --- arithmetic over ranks ----------------------------------------------------------------------------------------
def report(
    rank: int, count: int, seconds: float, flops: int, *, peak: float | None, tokens: int = 0, shared: bool = False
) -> RankReport:
    """A rank that did `count` steps of `seconds`, each with `flops` model FLOPs and twice as many executed ones."""
    steps = [
        StepRecord(step=i, ended_at=0.0, step_time_s=seconds, flops={"bfloat16": (flops, 2 * flops)}, tokens=tokens)
        for i in range(count)
    ]
    timed = figures(steps, lambda rate: peak)
    flops_of_all = {"bfloat16": (count * flops, 2 * count * flops)}
    return RankReport(
        rank=rank,
        steps=count,
        model_flops=flops_of_all["bfloat16"][0],
        hardware_flops=flops_of_all["bfloat16"][1],
        timed=timed,
        shared_data=shared,
        reason="" if peak else "no MFU: no peak for 'X'.",
    )


def two_ranks() -> list[RankReport]:
    """Ten steps of 100 FLOPs in 2 s at a peak of 100 FLOP/s; ten of 300 in 3 s at 200 FLOP/s."""
    return [report(0, 10, 2.0, 100, peak=100.0, tokens=8), report(1, 10, 3.0, 300, peak=200.0, tokens=8)]


def test_the_mfu_of_the_world_is_ideal_over_passed_device_seconds() -> None:
    world = world_of(two_ranks())
    assert world.mfu == pytest.approx((10 * 1.0 + 10 * 1.5) / (10 * 2.0 + 10 * 3.0), rel=1e-12)
    assert world.hfu == pytest.approx(2 * world.mfu, rel=1e-12)
    assert world.model_flops_per_s == pytest.approx(100 / 2 + 300 / 3, rel=1e-12)
    assert (world.model_flops, world.hardware_flops) == (4000, 8000)
    assert world.slowest is not None
    assert world.slowest.rank == 1
    assert world.spread == pytest.approx(0.5)
    assert world.tokens_per_s == pytest.approx(8 / 2 + 8 / 3)
    assert world_of(two_ranks(), data_parallel=1).tokens_per_s == pytest.approx((8 / 2 + 8 / 3) / 2)


def test_one_unknown_peak_leaves_the_mfu_unknown() -> None:
    known = two_ranks()[0]
    unknown = report(1, 10, 3.0, 300, peak=None)
    world = world_of([known, unknown])
    assert world.mfu is None
    assert ("MFU", "not known: no peak for 'X'.") in world.facts()
    assert world.model_flops_per_s == pytest.approx(150)


def test_ranks_that_share_data_have_no_throughput_until_one_says_how() -> None:
    ranks = [report(r, 2, 1.0, 1, peak=1.0, tokens=8, shared=True) for r in range(4)]
    assert world_of(ranks).tokens_per_s is None
    assert world_of(ranks, data_parallel=2).tokens_per_s == pytest.approx(16)
    for wrong in (0, 3):
        with pytest.raises(UsageError, match="divisor of the 4 ranks"):
            world_of(ranks, data_parallel=wrong)


def test_missing_ranks_are_named() -> None:
    world = world_of(two_ranks()[1:], size=3)
    assert world.missing == (0, 2)
    assert ("missing", "nothing is known of rank 0, 2") in world.facts()


def test_steps_without_time_are_in_the_flops_alone() -> None:
    world = world_of([RankReport(rank=0, steps=1, model_flops=7, hardware_flops=7)])
    assert (world.model_flops, world.mfu, world.slowest, world.spread) == (7, None, None, None)
    assert "no step is timed" in str(world)


def test_many_ranks_print_their_slowest() -> None:
    ranks = [report(r, 1, 1.0 + r, 1, peak=1.0) for r in range(64)]
    text = str(world_of(ranks))
    assert "rank 63  " in text
    assert "rank 0  " not in text
    assert "and 56 ranks more" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("path", "rank", "size", "expected"),
    [("a/run.jsonl", 0, 1, "a/run.jsonl"), ("a/run.jsonl", 3, 8, "a/run.rank3.jsonl"), ("run", 0, 2, "run.rank0")],
)
def test_each_rank_has_a_file_of_its_own(path: str, rank: int, size: int, expected: str) -> None:
    assert path_of_rank(path, rank, size) == Path(expected)
