"""Variants of a model as people train it: low-rank adapters, parts frozen, blocks checkpointed. Models are changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as replayed

from flopprof.errors import UsageError
from flopprof.models.adapters import Lora, add_adapters
from flopprof.models.inputs import first_line
from flopprof.models.workload import Workload

Checkpointing = Literal["non-reentrant", "reentrant"]

_FORMER, _ADAPTED = "gradient_checkpointing_enable", "_hf_peft_config_loaded"


@dataclass(frozen=True, kw_only=True)
class Variants:
    """What is changed of a model, in this order: adapters first, so that a pattern can freeze some of them."""

    lora: Lora | None = None
    frozen: tuple[str, ...] = ()
    checkpointing: Checkpointing | None = None

    def __bool__(self) -> bool:
        return bool(self.lora or self.frozen or self.checkpointing)

    def apply(self, model: nn.Module) -> None:
        """Change the model. Raises UsageError, MissingPackage."""
        if self.lora is not None:
            add_adapters(model, self.lora)
        for pattern in self.frozen:
            freeze(model, pattern)
        if self.checkpointing is not None:
            checkpoint(model, self.checkpointing, adapted=self.lora is not None)


def varied(workload: Workload, vary: Callable[[nn.Module], None]) -> Workload:
    """The workload with its model changed, also where it has to be built again on the CPU."""
    vary(workload.model)
    again = workload.on_cpu
    return replace(workload, on_cpu=None if again is None else lambda: varied(again(), vary))


def freeze(model: nn.Module, pattern: str) -> None:
    """Parameters whose name, or whose module's, matches the glob want no gradient. Raises UsageError where none does.

    `layers.0.*` and `layers.0` both freeze the whole module.
    """
    frozen = [
        parameter
        for name, parameter in model.named_parameters()
        if any(fnmatchcase(part, pattern) for part in _paths(name))
    ]
    if not frozen:
        names = [name for name, _ in model.named_parameters()]
        raise UsageError(f"--frozen {pattern!r} matches no parameter; the first are {', '.join(names[:3])}.")
    for parameter in frozen:
        parameter.requires_grad_(False)


def checkpoint(model: Any, kind: Checkpointing, *, adapted: bool = False) -> None:
    """What the backward needs is computed again in it: by a transformers model's own switch, else block by block.

    transformers checkpoints in training mode only, so that the model is put into it. adapted: the model has adapters,
    behind a first block whose input would want no gradient. Raises UsageError.
    """
    # gradient_checkpointing_enable is what it was called before 5.20
    own = getattr(model, "activation_checkpointing_enable", None) or getattr(model, _FORMER, None)
    if own is None:
        checkpoint_blocks(model, kind)
        return
    told = getattr(model, _ADAPTED, None)
    try:
        if adapted and told is not None:  # by this it lets that input want one, as in its own training
            setattr(model, _ADAPTED, True)
        own({"use_reentrant": kind == "reentrant"})
    except ValueError as error:
        raise UsageError(f"--checkpointing: {first_line(error)}") from error
    finally:
        if told is not None:
            setattr(model, _ADAPTED, told)
    model.train()


def checkpoint_blocks(model: nn.Module, kind: Checkpointing) -> None:
    """Every repeated block is run again in the backward instead of keeping what it computed.

    Blocks are the children of a ModuleList or Sequential that has two or more of one class, outermost first. Raises
    UsageError where there are none.
    """
    blocks = list(_blocks(model))
    if not blocks:
        raise UsageError("--checkpointing: the model has no repeated blocks (a ModuleList or Sequential of one class).")
    for block in blocks:
        block.forward = _checkpointed(block.forward, reentrant=kind == "reentrant")


def _checkpointed(forward: Callable[..., Any], *, reentrant: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The reentrant kind differentiates what it is given by position, and only if some of that wants a gradient.
        names, given = list(kwargs), [*args, *kwargs.values()]
        if reentrant and not any(isinstance(value, torch.Tensor) and value.requires_grad for value in given):
            given = _first_wanting(given)

        def named(*values: Any) -> Any:
            return forward(*values[: len(args)], **dict(zip(names, values[len(args) :], strict=True)))

        return replayed(named, *given, use_reentrant=reentrant)

    return run


def _first_wanting(values: list[Any]) -> list[Any]:
    """With a gradient wanted of the first floating tensor, as trainers of adapters let the embeddings' output want one.

    Only of that: a mask that wants one changes how attention runs.
    """
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return [*values[:index], value.detach().requires_grad_(), *values[index + 1 :]]
    return values


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    children = list(module.children())
    classes = [type(child) for child in children]
    for child in children:
        composed = any(True for _ in child.children())
        if isinstance(module, nn.ModuleList | nn.Sequential) and composed and classes.count(type(child)) > 1:
            yield child
        else:
            yield from _blocks(child)


def _paths(name: str) -> Iterator[str]:
    """The parameter's name and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
