"""What a caller of `load` asked for, checked once, and how a model is built and placed for it."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from flopprof.errors import FlopprofError, ModelFailed, UsageError
from flopprof.models.inputs import LARGEST, InputSpec, first_line, make_input

logger = logging.getLogger(__name__)

_LONGEST_SOUND_S = 86_400

Attn = Literal["sdpa", "eager", "flash"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """How a target is to be loaded. `device` None: meta where that works, else the CPU."""

    batch: int
    image_size: int | None
    inputs: tuple[InputSpec, ...]
    device: str | None
    dtype: torch.dtype | None
    train: bool
    model_args: Mapping[str, Any]
    seq: int | None = None
    audio_seconds: float | None = None
    images: int = 1
    trust_remote_code: bool = False
    attn: Attn | None = None

    def check(self) -> None:
        """Raises UsageError where the wishes contradict each other or the machine."""
        if self.batch < 1:
            raise UsageError(f"batch is {self.batch}: give a whole number of at least 1.")
        if self.image_size is not None and self.image_size < 1:
            raise UsageError(f"image size is {self.image_size}: give the side in pixels, at least 1.")
        if self.seq is not None and self.seq < 1:
            raise UsageError(f"seq is {self.seq}: give a whole number of tokens, at least 1.")
        if self.audio_seconds is not None and not 0 <= self.audio_seconds <= _LONGEST_SOUND_S:
            raise UsageError(f"audio seconds are {self.audio_seconds}: give 0 (no sound) to {_LONGEST_SOUND_S}.")
        if self.images < 0:
            raise UsageError(f"images is {self.images}: give a whole number, 0 for none.")
        if self.inputs and (self.seq is not None or self.audio_seconds is not None or self.images != 1):
            raise UsageError("--input gives the shapes: leave --seq, --audio-seconds and --images out.")
        if self.inputs and self.batch != 1:
            raise UsageError("both --batch and --input were given: write the batch size into the shape of --input.")
        if self.inputs and self.image_size is not None:
            raise UsageError("both --image-size and --input were given: write the size into the shape of --input.")
        if self.attn not in (None, "sdpa", "eager", "flash"):
            raise UsageError(f"attn {self.attn!r} is none of sdpa, eager, flash.")
        for option, size in (("--batch", self.batch), ("--image-size", self.image_size), ("--seq", self.seq)):
            if size is not None and size > LARGEST:
                raise UsageError(f"{option} {size} is larger than any tensor: give a smaller one.")
        kind = (self.device or "cpu").partition(":")[0]
        if kind not in ("meta", "cpu", "cuda"):
            raise UsageError(f"device {self.device!r} is none of meta, cpu, cuda.")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UsageError("device cuda was asked for, but torch sees no CUDA device: use --device meta or cpu.")

    def refuse_sizes_of_text(self, target: str) -> None:
        """Raises UsageError where sizes were given that only Hugging Face models take."""
        given = {
            "--seq": self.seq is not None,
            "--audio-seconds": self.audio_seconds is not None,
            "--images": self.images != 1,
            "--trust-remote-code": self.trust_remote_code,
            "--attn": self.attn is not None,
        }
        for option in (option for option, wanted in given.items() if wanted):
            raise UsageError(f"{option} is for Hugging Face models; {target} does not take it.")

    def tensors(self, device: str) -> tuple[torch.Tensor, ...]:
        """The inputs that the caller described, one tensor each."""
        return tuple(make_input(spec, device, self.dtype) for spec in self.inputs)


def construct(build: Callable[[], nn.Module], *, name: str, device: str, request: Request) -> nn.Module:
    """The module that `build` makes, on `device`, in the dtype and mode that were asked for.

    On meta no memory is taken; a model that cannot be built there is built on the CPU and then stripped of its
    values. Raises ModelFailed when the model's own code raises.
    """
    model = _built_on_meta(build, name) if device == "meta" else None
    with _blamed_on(name):
        if model is None:
            with undisturbed_random_state():
                model = build()
        return model.to(device=device, dtype=request.dtype).train(request.train)


def _built_on_meta(build: Callable[[], nn.Module], name: str) -> nn.Module | None:
    try:
        with undisturbed_random_state(), torch.device("meta"):
            return build()
    except FlopprofError:
        raise
    except (Exception, SystemExit) as error:  # for want of values, perhaps; the CPU build tells real faults apart
        logger.debug("%s cannot be built on the meta device: %s", name, first_line(error))
        return None


@contextmanager
def _blamed_on(name: str) -> Iterator[None]:
    """Turns what the model's own code raises into ModelFailed, the cause chained."""
    try:
        yield
    except FlopprofError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelFailed(
            f"{name} could not be built: {type(error).__name__}: {first_line(error)} "
            "Check its arguments (--model-arg name=value), or see the whole error with --traceback."
        ) from error


@contextmanager
def undisturbed_random_state() -> Iterator[None]:
    """Python's, numpy's and torch's CPU random states are afterwards what they were; inside, they are seeded.

    Seeded, because the work of a detection model depends on its (random) weights: a count must repeat.
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    torch_state = torch.get_rng_state()
    try:
        random.seed(0)
        # torch.manual_seed would also reseed every accelerator
        torch.default_generator.manual_seed(0)
        if numpy is not None:
            numpy.random.seed(0)
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
