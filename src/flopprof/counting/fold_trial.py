"""Around a template's run: may a count fold at all, and which numbers and lists tell what the block does with them?"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from flopprof.counting.fold_call import Call
from flopprof.counting.fold_groups import Group
from flopprof.counting.fold_likeness import Description, Signature, Unlike
from flopprof.counting.fold_numbers import Watched, telling


def foldable(model: Any, inputs: Any) -> bool:
    """May a count of this model fold at all? It lives on meta, nobody else watches, and it can be run twice alike."""
    if not isinstance(model, nn.Module) or torch._C._len_torch_dispatch_stack() or not _replayable(inputs):
        return False
    parameters = list(model.parameters())
    return bool(parameters) and all(parameter.is_meta and not is_lazy(parameter) for parameter in parameters)


def _replayable(inputs: Any) -> bool:
    """Are the inputs tensors and plain values only? A cache of the caller's would be another after a first run."""
    if type(inputs) in (list, tuple):
        return all(map(_replayable, inputs))
    if type(inputs) is dict:
        return all(map(_replayable, inputs.values()))
    return isinstance(inputs, torch.Tensor | bool | int | float | str | torch.dtype | torch.device | type(None))


def swap(call: Call, group: Group, description: Description, signature: Signature) -> list[Watched]:
    """Let the numbers by which siblings differ, and the lists with a place for each, tell how they are used."""
    for number, position in enumerate(group.varying or ()):
        for holder, attribute in description.holders(position):
            holder[attribute] = telling(holder[attribute], call.log, itemgetter(number))
    index = group.index_number(description)
    if index is None:
        return []
    watched = [Watched(holder[attribute], itemgetter(index)) for holder, attribute, _place in signature.places]
    for (holder, attribute, _place), each in zip(signature.places, watched, strict=True):
        holder[attribute] = each
    return watched


def swap_back(description: Description, signature: Signature) -> None:
    """Put the plain numbers and lists back."""
    for position, holder, attribute in description.numbers:
        if type(holder.get(attribute)) is not type(description.facts[position]):
            holder[attribute] = description.facts[position]
    for (holder, attribute, _place), original in zip(signature.places, signature.lists, strict=True):
        if type(holder.get(attribute)) is Watched:
            holder[attribute] = original


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What was set anew. Raises Unlike where something was taken away."""
    if before.keys() - after.keys():
        raise Unlike("an attribute that was removed")
    return {key: value for key, value in after.items() if key not in before or value is not before[key]}
