"""Models of transformers, without their weights: a directory with a config.json, or `hf:ORG/NAME[@revision]`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flopprof.counting.values import holds_numbers, needs_values, remembering
from flopprof.errors import FlopprofError, InvalidCheckpoint, ModelFailed, UsageError
from flopprof.models import hf_flash, hf_hub
from flopprof.models.checkpoint import compare
from flopprof.models.hf_config import (
    CONFIG,
    MOST_BYTES,
    Architecture,
    architecture,
    load_transformers,
    read_config,
    reason,
)
from flopprof.models.hf_inputs import make_inputs
from flopprof.models.hf_maker import Inputs
from flopprof.models.hf_quantised import quantise
from flopprof.models.hf_schemes import scheme_of
from flopprof.models.inputs import TooLarge, samples_in, tokens_in
from flopprof.models.request import Request, undisturbed_random_state
from flopprof.models.safetensors_headers import Stored, read_directory
from flopprof.models.workload import Workload

# What is built on a device other than meta is built of real numbers; so is the second try of a model that needs them.
_MOST_REAL_BYTES = 16 * 1024**3


def names_directory(target: str) -> bool:
    """Whether the target is a folder: one with a config.json, or anything written as a path."""
    folder = Path(target)
    return folder.is_dir() and ((folder / CONFIG).exists() or "/" in target or "\\" in target)


def load_directory(target: str, request: Request) -> Workload:
    """The model that a folder's config.json describes, as save_pretrained or the hub leaves it; no weight is read."""
    folder = Path(target)
    if not (folder / CONFIG).exists():
        raise InvalidCheckpoint(f"{target} has no {CONFIG}: give a folder as save_pretrained leaves it.")
    facts = read_config(folder / CONFIG)
    return _load(target, folder, facts, read_directory(folder), request)


def load_hub(name: str, request: Request) -> Workload:
    """The model of a repository on the hub: its config and its safetensors headers are fetched, never the weights."""
    repository = hf_hub.Repository.parse(name)
    file = repository.fetch(CONFIG, MOST_BYTES)
    facts = read_config(file)
    stored = read_directory(file.parent) or repository.headers()
    return _load(f"hf:{name}", file.parent, facts, stored, request)


def load_config(name: str, facts: Mapping[str, Any], request: Request) -> Workload:
    """The model that the fields of a config.json describe; `name` is what it is called in reports and errors."""
    with _alone(trusted=False):
        found = architecture(facts, name)
    return _on(request.device or "meta", name, found, None, facts, request)


def _load(target: str, folder: Path, facts: Mapping[str, Any], stored: Stored | None, request: Request) -> Workload:
    with _alone(trusted=request.trust_remote_code):
        if request.trust_remote_code and "auto_map" in facts:
            found = _own_code(folder, facts, target)
        else:
            found = architecture(facts, f"{target}/{CONFIG}")
    return _on(request.device or "meta", target, found, stored, facts, request)


def _on(
    device: str, target: str, found: Architecture, stored: Stored | None, facts: Mapping[str, Any], request: Request
) -> Workload:
    with _alone(trusted=request.trust_remote_code):
        model = _built(found, target, device, request)
        notes, quantised = [], None
        scheme = scheme_of(facts, f"{target}/{CONFIG}")
        if scheme is not None:
            quantised = quantise(model, scheme, stored)
            notes += [f"{scheme.label}: {scheme.note}" if scheme.note else scheme.label, *quantised.notes]
        if request.attn == "flash":
            hf_flash.require_half(_dtype(model), target)
            if not hf_flash.installed():
                hf_flash.complete(model)
                notes.append(hf_flash.NOTE)
        if request.inputs:
            args = request.tensors(device)
            inputs = Inputs({}, tokens_in(args, {}), samples_in(args[0]) or 1)
        else:
            args = ()
            try:
                inputs = make_inputs(model, request, device)
            except ModelFailed as error:
                if device != "meta" or request.device or not needs_values(error) or _bytes(model) > _MOST_REAL_BYTES:
                    raise
                return _on("cpu", target, found, stored, facts, request)
            except FlopprofError as error:
                if not isinstance(error, TooLarge) or request.image_size or request.seq or (request.batch or 1) > 1:
                    raise
                raise ModelFailed(f"{target}: its config asks for inputs that cannot be made: {error}") from error
            except (RuntimeError, OverflowError, MemoryError) as error:  # sizes that no tensor has
                raise ModelFailed(
                    f"{target}: its config asks for inputs that cannot be made: {reason(error)}"
                ) from error
    checkpoint = None if stored is None else compare(stored, model, scheme)
    return Workload(
        model=model,
        args=args,
        kwargs=inputs.kwargs,
        name=target,
        device=device,
        tokens=inputs.tokens,
        samples=inputs.samples,
        assumptions=(*found.assumptions, *inputs.assumptions, *notes),
        checkpoint=checkpoint,
        quantised=quantised,
        on_cpu=partial(_on, "cpu", target, found, stored, facts, request)
        if request.device is None and device == "meta" and _bytes(model) <= _MOST_REAL_BYTES
        else None,
    )


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _built(found: Architecture, target: str, device: str, request: Request) -> nn.Module:
    """The model, tied and in eval (or train) mode. On meta it is built there, or not at all: it may be of any size."""
    arguments: dict[str, Any] = {} if request.dtype is None else {"dtype": request.dtype}
    flash = request.attn == "flash"
    if request.attn is not None:
        arguments["attn_implementation"] = "flash_attention_2" if flash else request.attn
    make = partial(found.cls._from_config, found.config, **arguments)
    try:
        with (
            undisturbed_random_state(),
            hf_flash.standing_in() if flash and not hf_flash.installed() else nullcontext(),
        ):
            model = _on_meta(make) if device == "meta" else make()
            placed: nn.Module = model.to(device=device, dtype=request.dtype).train(request.train)
            return placed
    except FlopprofError:
        raise
    except ImportError as error:
        raise ModelFailed(f"{target} needs a package that is not installed: {reason(error)}") from error
    except Exception as error:  # whatever a model's constructor raises about its sizes
        if request.attn is not None and "ttention" in str(error) and isinstance(error, ValueError):
            sentence = reason(error).partition(" yet")[0]
            raise UsageError(f"{target} cannot be built with --attn {request.attn}: {sentence}.") from error
        raise ModelFailed(
            f"{target} could not be built as {found.cls.__name__}: {type(error).__name__}: {reason(error)}"
        ) from error


def _on_meta(make: Any) -> Any:
    initialization = getattr(load_transformers(), "initialization", None)
    bare = getattr(initialization, "no_init_weights", None)

    def build() -> Any:
        with torch.device("meta"):
            return make()

    try:
        with nullcontext() if bare is None else bare():
            model = build()
            return remembering(build) if holds_numbers(model) else model
    except Exception:  # a constructor that reads values, of torch.linspace(...) or the like
        return remembering(build)


def _own_code(folder: Path, facts: Mapping[str, Any], target: str) -> Architecture:
    """The class that the checkpoint's own Python files define: run only when that was asked for."""
    transformers = load_transformers()
    mapped = facts["auto_map"]
    names = [name for name in mapped if name.startswith("AutoModel")] if isinstance(mapped, Mapping) else []
    if not names:
        return architecture(facts, f"{target}/{CONFIG}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        chosen = next((name for name in names if name != "AutoModel"), names[0])
        dynamic = transformers.dynamic_module_utils.get_class_from_dynamic_module
        return Architecture(dynamic(mapped[chosen], str(folder)), config)
    except Exception as error:  # code that nobody has seen
        raise ModelFailed(f"{target} brings code that failed: {type(error).__name__}: {reason(error)}") from error


@contextmanager
def _alone(*, trusted: bool) -> Iterator[None]:
    """transformers builds without fetching anything more, and without a word."""
    transformers = load_transformers()
    verbosity = transformers.logging.get_verbosity()
    with warnings.catch_warnings(), hf_hub.offline(unless=trusted):
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(verbosity)
