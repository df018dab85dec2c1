"""Variants of a model as people train it: parts frozen, low-rank adapters, blocks checkpointed. Models are changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flopprof.errors import UsageError
from flopprof.models.workload import Workload

Checkpointing = Literal["non-reentrant", "reentrant"]


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


def add_lora(model: nn.Module, rank: int, pattern: str) -> None:
    """Low-rank adapters (Hu 2021, arXiv 2106.09685) on the linear layers whose name matches; all else is frozen.

    Raises UsageError where no nn.Linear matches.
    """
    if rank < 1:
        raise UsageError(f"--lora: the rank is a positive whole number, got {rank}.")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in linears if fnmatchcase(name, pattern)]
    if not chosen:
        raise UsageError(
            f"--lora {pattern!r} matches no linear layer; the first are {', '.join(linears[:3]) or '(none)'}."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in chosen:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, LoraLinear(getattr(owner, child), rank))


class LoraLinear(nn.Module):
    """base(x) + B A x / rank: A (rank, in) and B (out, rank) train, the base does not."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        at = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **at)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **at)
        self.scale = 1 / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        out: torch.Tensor = self.base(x) + self.lora_B(self.lora_A(x)) * self.scale
        return out


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

        return checkpoint(named, *given, use_reentrant=reentrant)

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
