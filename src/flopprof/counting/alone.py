"""One operator of a graph, run by itself on meta with the counter looking inside: for what no table says.

An operator without a formula is decomposed so into those that it runs; one whose backward is not written down is
differentiated so. Calls that look alike are run once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from flopprof.counting.gradients import Step, tensors_of
from flopprof.counting.operands import Source
from flopprof.counting.runtime import FlopCounter
from flopprof.profile import Profile


class Found(NamedTuple):
    """What a call ran; or why it could not be run."""

    profile: Profile
    problem: str = ""
    severed: bool = False  # gradients were wanted, and its results have none


class Alone:
    """Calls that were run by themselves."""

    def __init__(self) -> None:
        self._found: dict[Any, Found] = {}

    def run(self, step: Step) -> Found:
        """What a call like this one runs, with the backward that it is due; names are the graph's."""
        leaves, spec = tree_flatten((step.args, step.kwargs))
        facts = [_facts(leaf) for leaf in leaves]
        wants = step.wants if step.live else (False,) * len(step.wants)
        sources = tuple(value.source for _position, _tensor, value in step.operands)
        kinds = tuple(source and source.kind for source in sources)
        results = step.differentiated()
        key: Any = (step.entry.func, spec, tuple(facts), wants, kinds, results)
        try:
            found = self._found.get(key)
        except TypeError:  # an argument that cannot be hashed
            found, key = None, None
        if found is None:
            found = _run(step.entry.func, leaves, spec, (wants, sources, results))
            if key is not None:
                self._found[key] = found
        return found._replace(profile=_renamed(found.profile, sources))


def _facts(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype
    return type(leaf), leaf


def _run(func: Any, leaves: list[Any], spec: Any, told: tuple[Any, Any, tuple[int, ...]]) -> Found:
    wants, sources, results = told
    holder = nn.Module()
    made: list[Any] = []
    number = 0
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            made.append(_stand_in(holder, leaf, number, wants[number], sources[number]))
            number += 1
        else:
            made.append(torch.device("meta") if isinstance(leaf, torch.device) else leaf)
    args, kwargs = tree_unflatten(made, spec)
    counter = FlopCounter(holder)
    with torch.enable_grad():
        if func._schema.is_mutable:  # a leaf must not be written to
            args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        try:
            with counter:
                out = tensors_of(func(*args, **kwargs))
                severed = any(wants) and not any(tensor.requires_grad for tensor in out)
                _differentiate([out[i] for i in results], holder)
        except Exception as error:  # whatever an operator raises on tensors without values
            return Found(counter.profile, f"it cannot be run by itself: {type(error).__name__}")
    return Found(counter.profile, severed=severed)


def _differentiate(results: list[torch.Tensor], holder: nn.Module) -> None:
    inputs = [tensor for tensor in vars(holder)["tensors"] if tensor.requires_grad]
    outputs = [tensor for tensor in results if tensor.requires_grad]
    if inputs and outputs:
        ones = [torch.ones_like(tensor) for tensor in outputs]
        torch.autograd.grad(outputs, inputs, ones, allow_unused=True)


def _stand_in(holder: nn.Module, leaf: torch.Tensor, number: int, wants: bool, source: Source | None) -> torch.Tensor:
    tensor = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    if source is not None and source.kind == "parameter":
        tensor = nn.Parameter(tensor, requires_grad=wants)
        holder.register_parameter(f"p{number}", tensor)
    elif source is not None:
        holder.register_buffer(f"p{number}", tensor)
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.requires_grad_(wants)
    vars(holder).setdefault("tensors", []).append(tensor)
    return tensor


def _renamed(profile: Profile, sources: tuple[Source | None, ...]) -> Profile:
    names = {f"p{number}": source.name for number, source in enumerate(sources) if source is not None}
    if not names:
        return profile

    def name(text: str) -> str:
        return " + ".join(names.get(part, part) for part in text.split(" + ")) if text else text

    rows = tuple(
        msgspec.structs.replace(
            row,
            parameter=name(row.parameter),
            operands=tuple(msgspec.structs.replace(item, name=name(item.name)) for item in row.operands),
        )
        for row in profile.operators
    )
    return msgspec.structs.replace(profile, operators=rows)
