"""This process among the ranks of a run: which it is, what it shares with others, and their figures gathered."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flopprof.errors import FlopprofError
from flopprof.meter.world import RankReport, World, world_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gather(report: RankReport, *, group: ProcessGroup | None = None, data_parallel: int | None = None) -> World:
    """The reports of every rank of `group` (None: all), to each of them: one collective, which all must join.

    Raises FlopprofError where a rank does not answer: it died, or does not call this.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return world_of([report], data_parallel=data_parallel)
    found: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, report, group=group)
    except RuntimeError as error:
        raise FlopprofError(
            f"rank {report.rank} could not gather the other ranks' figures: a rank died, or did not call "
            f"Meter.world() ({str(error).splitlines()[0]}). Each rank's own records=FILE holds its finished steps."
        ) from error
    return world_of(found, data_parallel=data_parallel)


def place_of_process() -> tuple[int, int]:
    """(rank, number of ranks) of this process: of torch.distributed, or as torchrun tells; (0, 1) alone."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1
    return (rank, size) if 0 <= rank < size else (0, 1)


def path_of_rank(path: str | os.PathLike[str], rank: int, size: int) -> Path:
    """`run.jsonl` of one process; of several each writes its own: `run.rank3.jsonl`."""
    file = Path(path)
    return file if size == 1 else file.with_name(f"{file.stem}.rank{rank}{file.suffix}")


def host() -> str:
    """The name of this machine."""
    return socket.gethostname()


def shares_data(modules: Iterable[Any]) -> bool:
    """Do several ranks multiply the same batch: are there DTensor parameters that are not FSDP's alone?"""
    import torch.distributed as dist

    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for model in modules:
        sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
        managed = any(isinstance(module, FSDPModule) for module in model.modules())
        if any(not managed or parameter.device_mesh.ndim > 1 for parameter in sharded):
            return True
    return False
