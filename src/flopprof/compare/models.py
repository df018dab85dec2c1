"""One target -> one row: loaded, counted with its backward, its memory, sizes and zeros looked at."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from flopprof.compare.comparison import Accuracy, Memory, Row
from flopprof.compare.memory import training_memory
from flopprof.compare.sizes import density, masked, sizes
from flopprof.errors import FlopprofError, UnknownTarget, UsageError
from flopprof.models import Workload, catalogue, load, vision
from flopprof.models.inputs import first_line
from flopprof.profile import Attention, Profile

logger = logging.getLogger(__name__)

_METRICS = ("acc@1", "box_map", "kp_map", "miou", "epe", "per_image_epe")
_TORCHVISION = "torchvision:"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A target by name, and what `flopprof.load` is to be told of it: all of it plain values, for other processes."""

    name: str
    target: str
    options: dict[str, Any]  # JSON values
    attention: Attention = "full"

    def load(self, device: str | None = None) -> Workload:
        """The workload; device: another one than the options say."""
        chosen = dict(self.options) if device is None else {**self.options, "device": device}
        target = self.target.removeprefix(_TORCHVISION)
        if target != self.target and not vision.knows(target):
            raise UnknownTarget(f"torchvision has no model {target!r}.")
        return load(target, **chosen)

    def row(self) -> Row:
        """The row of it. A model that fails makes a row that says why; nothing is raised but Ctrl-C."""
        try:
            return row_of(self.load(), self.name, attention=self.attention, accuracy=published(self))
        except (Exception, SystemExit) as error:  # a model's own code: one model that fails must not end the others
            logger.debug("%s failed", self.name, exc_info=True)
            return failed(self.name, error)


def failed(name: str, error: BaseException) -> Row:
    """The row of a model that raised: one sentence."""
    text = str(error) if isinstance(error, FlopprofError) else f"{type(error).__name__}: {first_line(error)}"
    return Row(name=name, failed=text or type(error).__name__)


def row_of(workload: Workload, name: str, *, attention: Attention = "full", accuracy: Accuracy | None = None) -> Row:
    """The row of a workload: counted forward and backward, or forward alone with a note where the backward fails.

    Raises what the forward raises.
    """
    notes: list[str] = []
    try:
        profile = workload.count(backward=True, attention=attention)
    except UsageError:
        raise
    except FlopprofError as error:
        profile = workload.count(attention=attention)
        notes.append(f"no training figures, since its backward fails: {error}")
    row = row_of_profile(profile, name)
    memory = None
    if row.backward_flops is not None:
        memory = _memory(workload, notes)
    elif not notes:
        notes.append("no training figures: nothing in it wants a gradient")
    zeros = None
    if profile.device != "meta" and profile.device == workload.device:
        zeros = density(workload.model, profile)
    if zeros is None and masked(workload.model):
        notes.append("its pruning masks have no values on meta: --device cpu tells the density")
    return msgspec.structs.replace(
        row,
        inputs=workload.describe(),
        memory=memory,
        size_bytes=sizes(workload, profile),
        density=None if zeros is None else zeros[0],
        sparse_forward_flops=None if zeros is None else zeros[1],
        accuracy=accuracy,
        notes=tuple(notes),
    )


def row_of_profile(profile: Profile, name: str = "") -> Row:
    """What a profile alone tells: no memory, sizes, zeros, accuracy."""
    forward = profile.by_dtype("forward")
    trained = any(row.phase == "backward" for rows in (profile.operators, profile.elementwise) for row in rows)
    return Row(
        name=name or profile.target or next((row.cls for row in profile.modules if not row.fqn), "") or "profile",
        inputs="saved profile",
        dtype=next(iter(forward), ""),
        device=profile.device,
        samples=profile.samples,
        tokens=profile.tokens,
        attention=profile.attention,
        n_params=profile.n_params,
        n_params_trainable=profile.n_params_trainable,
        forward_flops=profile.forward_flops,
        backward_flops=profile.backward_flops if trained else None,
        recompute_flops=profile.recompute_flops,
        elementwise_flops=sum(row.flops for row in profile.elementwise if row.phase == "forward"),
        flops_by_dtype=forward,
        bytes_moved=sum(row.bytes for row in profile.operators if row.phase == "forward"),
        uncounted=profile.uncounted,
        assumptions=profile.assumptions,
    )


def _memory(workload: Workload, notes: list[str]) -> Memory | None:
    try:
        try:
            return training_memory(workload.model, workload.args, workload.kwargs)
        except (Exception, SystemExit):  # whatever a model raises without values
            if workload.on_cpu is None:
                raise
            again = workload.on_cpu()
            return training_memory(again.model, again.args, again.kwargs)
    except (Exception, SystemExit) as error:
        notes.append(f"no training memory: {type(error).__name__}: {first_line(error)}")
        return None


def published(job: Job) -> Accuracy | None:
    """What torchvision states of the default weights, where the job is that model on the size they were tested at.

    timm's own metadata states no accuracies.
    """
    name = job.target.removeprefix(_TORCHVISION).lower()
    if catalogue.knows(job.target) or name not in vision.names():
        return None
    weights = vision.default_weights(name)
    if not _as_published(job.options, weights):
        return None
    for dataset, metrics in (weights.meta.get("_metrics") or {}).items():
        for metric in _METRICS:
            if metric in metrics:
                return Accuracy(metric=metric, value=float(metrics[metric]), dataset=dataset, weights=str(weights))
    return None


def _as_published(options: Mapping[str, Any], weights: Any) -> bool:
    if options.get("model_args") or options.get("lora"):
        return False
    sides = getattr(weights.transforms(), "crop_size", None)
    shapes = [tuple(text.partition(":")[0].split("x")[-2:]) for text in options.get("inputs") or ()]
    wanted = [(str(options["image_size"]),) * 2] if options.get("image_size") else shapes
    return all(sides is not None and side == (str(sides[0]),) * 2 for side in wanted)
