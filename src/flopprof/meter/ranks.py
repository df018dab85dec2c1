"""This process among the ranks of a run: which it is, what it shares with others, and their figures gathered."""

from __future__ import annotations

import gc
import math
import os
import socket
import sys
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
    """Do several ranks read the same data: is a model, or what it is a stage of, split by more than its batches?"""
    import torch.distributed as dist

    if not dist.is_available():
        return False
    modules = list(modules)
    try:
        return _staged(modules) or any(_split(model) for model in modules)
    except AttributeError:  # a torch whose FSDP is another one does not say
        return True


def _staged(modules: Iterable[Any]) -> bool:
    """Is a part of these in a stage of one of torch's pipelines? Only stages know that; a module does not."""
    stage: Any = getattr(sys.modules.get("torch.distributed.pipelining.stage"), "_PipelineStageBase", None)
    if stage is None:
        return False
    parts = {id(part) for model in modules for part in model.modules()}
    return any(
        found.num_stages > 1 and any(id(part) in parts for part in found.submod.modules())
        for found in gc.get_objects()
        if issubclass(type(found), stage) and {"num_stages", "submod"} <= vars(found).keys()
    )


def _split(model: Any) -> bool:
    """Does it have parameters split over more ranks than those that FSDP gives batches of their own?"""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    managed: set[int] = set()
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and vars(module).get("_fsdp_extension") is not None:
            return True  # a slice of a larger mesh
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            for sharded in () if group is None else group.fsdp_params:
                if sharded.sharded_param.device_mesh.size() > _data_parallel(group.mesh_info):
                    return True
                managed |= {id(getattr(sharded, name, None)) for name in _FORMS}
    return any(
        isinstance(parameter, DTensor) and parameter.device_mesh.size() > 1 and id(parameter) not in managed
        for parameter in model.parameters()
    )


# What a parameter is in a module of FSDP, as the step goes on.
_FORMS = ("sharded_param", "_unsharded_param", "_sharded_post_forward_param")


def _data_parallel(mesh: Any) -> int:
    """How many ranks FSDP shards or replicates over."""
    dimensions = (getattr(mesh, "shard_mesh_dim", None), getattr(mesh, "replicate_mesh_dim", None))
    return math.prod(mesh.mesh.size(i) for i in dimensions if i is not None)
