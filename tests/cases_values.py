"""Questions that models ask tensors: each a function of a device that builds its tensors there and returns numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch.nn import functional as F

Question = Callable[[str], Any]


def _mask(device: str) -> torch.Tensor:
    mask = torch.ones(2, 3, dtype=torch.bool, device=device)
    mask[0, 1] = False
    return mask


def _ids(device: str) -> torch.Tensor:
    return torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]], device=device)


def _aliased(device: str) -> Any:
    base = torch.zeros(4, 3, dtype=torch.long, device=device)
    row, column = base[1], base.t()[2]
    row += 1
    column.fill_(7)
    base[:, 0].copy_(torch.arange(4, device=device))
    base.view(-1)[[0, -1]] = -5
    return base.tolist(), row.tolist(), column.tolist()


def _shifted(device: str) -> Any:
    ids = _ids(device)
    shifted = ids.new_zeros(ids.shape)
    shifted[:, 1:] = ids[:, :-1].clone()
    shifted[:, 0] = 2
    shifted.masked_fill_(shifted == 1, 0)
    return shifted.tolist()


def _packed(device: str) -> Any:
    grid = torch.tensor([[1, 4, 6], [2, 2, 2]], device=device)
    lengths = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
    ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0), value=0)
    parts = torch.split(torch.arange(int(ends[-1]), device=device), lengths.tolist())
    return grid.tolist(), ends.tolist(), [part[0].item() for part in parts]


def _buckets(device: str) -> Any:
    ruler = torch.linspace(0, 1, 5, device=device)
    scaled = (ruler * 7).floor().long()
    return scaled.tolist(), torch.bucketize(ruler, torch.tensor([0.3, 0.6], device=device)).tolist()


def _scattered(device: str) -> Any:
    chosen = torch.tensor([[0, 2], [1, 2]], device=device)
    gates = torch.zeros(2, 4, dtype=torch.long, device=device).scatter_(1, chosen, 1)
    order, places = chosen.flatten().sort()
    return gates.sum(0).tolist(), order.tolist(), places.tolist(), torch.bincount(order, minlength=4).tolist()


def _looped(device: str) -> Any:
    visited = []
    for row in torch.nonzero(F.one_hot(_ids(device), 10).sum((0, 1)) > 0):
        where, _ = torch.where(_ids(device).t() == row)
        visited.append((int(row), where.tolist()))
    return visited


QUESTIONS: dict[str, Question] = {
    "all": lambda d: (bool(_mask(d).all()), bool(_mask(d)[1].all()), bool(_mask(d).any())),
    "in": lambda d: (9 in _ids(d), 7 in _ids(d), 1 in _ids(d)[:, [-1, 0]]),
    "item, int, float": lambda d: (_ids(d).sum().item(), int(_ids(d)[1, 2]), float(_ids(d)[0, 0])),
    "tolist": lambda d: _ids(d).tolist(),
    "cpu": lambda d: _ids(d).cpu().numpy().sum().item(),
    "index": lambda d: list(range(10))[: _ids(d)[0, 0]],
    "arange up to": lambda d: torch.arange(_ids(d).max().item(), device=d).tolist(),
    "nonzero": lambda d: (torch.nonzero(_mask(d)).tolist(), _mask(d).nonzero(as_tuple=True)[1].tolist()),
    "where": lambda d: [places.tolist() for places in torch.where(_ids(d) > 2)],
    "select by mask": lambda d: (_ids(d)[:, :3][_mask(d)].tolist(), _ids(d)[_mask(d)[:, 1]].tolist()),
    "masked_select": lambda d: _ids(d).masked_select(torch.tensor([True, False, True, False], device=d)).tolist(),
    "write by mask": lambda d: _ids(d).index_put_((_ids(d) > 4,), torch.tensor([10, 20, 30], device=d)).tolist(),
    "masked_scatter": lambda d: _ids(d).masked_scatter(_ids(d) > 4, _ids(d)).tolist(),
    "unique": lambda d: [part.tolist() for part in torch.unique(_ids(d), return_inverse=True, return_counts=True)],
    "unique_consecutive": lambda d: torch.unique_consecutive(_ids(d) > 3).tolist(),
    "unique along a dimension": lambda d: torch.unique(_ids(d), dim=1).tolist(),
    "repeat_interleave": lambda d: _ids(d).repeat_interleave(torch.tensor([2, 0], device=d), dim=0).tolist(),
    "bincount": lambda d: torch.bincount(_ids(d).flatten(), minlength=12).tolist(),
    "equal": lambda d: (torch.equal(_ids(d), _ids(d)), torch.equal(_ids(d), _ids(d) + 1)),
    "allclose": lambda d: torch.allclose(torch.ones(2, device=d), torch.full((2,), 1.0, device=d)),
    "isin": lambda d: torch.isin(_ids(d), torch.tensor([1, 2], device=d)).tolist(),
    "searchsorted": lambda d: torch.searchsorted(torch.tensor([1, 4, 6], device=d), _ids(d)).tolist(),
    "sorted": lambda d: [part.tolist() for part in (*_ids(d).topk(2), *_ids(d).sort(), _ids(d).argmax(-1))],
    "triangle": lambda d: torch.ones(3, 3, dtype=torch.bool, device=d).tril().logical_not().tolist(),
    "indices of a triangle": lambda d: torch.tril_indices(3, 3, device=d).tolist(),
    "meshgrid": lambda d: [g.tolist() for g in torch.meshgrid(*[torch.arange(2, device=d)] * 2, indexing="ij")],
    "stack, cat, flip, roll": lambda d: torch.stack([_ids(d), torch.cat([_ids(d)]).flip(1).roll(1, 0)]).tolist(),
    "gather, take": lambda d: (_ids(d).gather(1, _ids(d) % 4).tolist(), _ids(d).take(_ids(d) % 8).tolist()),
    "new": lambda d: (_ids(d).new_tensor([1, 2]).tolist(), _ids(d).new_full((2,), 3).tolist()),
    "like": lambda d: (torch.zeros_like(_ids(d)).tolist(), torch.full_like(_ids(d), 2).tolist()),
    "like an unknown one": lambda d: torch.ones_like(torch.rand(2, device=d), dtype=torch.long).tolist(),
    "as_tensor": lambda d: torch.as_tensor(numpy.array([1, 2]), device=d).tolist(),
    "tensor of tensors": lambda d: torch.tensor([_ids(d)[0, 0], 8], device=d).tolist(),
    "tensor of nothing": lambda d: torch.tensor([], dtype=torch.long, device=d).tolist(),
    "moved": lambda d: torch.tensor([[1], [2]]).to(d).expand(2, 3).contiguous().tolist(),
    "copied": lambda d: torch.empty(2, dtype=torch.long, device=d).copy_(torch.tensor([1, 2])).tolist(),
    "copied out": lambda d: torch.empty(2, 4, dtype=torch.long).copy_(_ids(d)).tolist(),
    "cast": lambda d: (_ids(d).float().mean().item(), (_ids(d) / 2).int().tolist(), _ids(d).bool().tolist()),
    "bits": lambda d: torch.tensor([1.0], device=d).view(torch.int32).item(),
    "half": lambda d: torch.arange(3, device=d, dtype=torch.bfloat16).tolist(),
    "einsum": lambda d: torch.einsum("ij,kj->ik", _ids(d), _ids(d)).tolist(),
    "out=": lambda d: torch.add(_ids(d), 1, out=torch.empty_like(_ids(d))).tolist(),
    "foreach": lambda d: [part.tolist() for part in torch._foreach_add([_ids(d)], 1)],
    "index by many numbers": lambda d: (_ids(d)[tuple(_mask(d)[0].long()), tuple(_ids(d)[1, [2, 2, 2]] % 4)]).tolist(),
    "as_strided": lambda d: torch.arange(6, device=d).as_strided((3, 2), (1, 2), 1).tolist(),
    "aliases": _aliased,
    "shifted right": _shifted,
    "packed lengths": _packed,
    "buckets": _buckets,
    "scattered": _scattered,
    "looped over": _looped,
}  # fmt: skip


# --- random programs ------------------------------------------------------------------------------------------------
# Each step takes a random source and tensors of shape (4, 4), and gives one more (or writes in place).
Step = Callable[[random.Random, list[torch.Tensor]], "torch.Tensor | None"]


def _in_place(change: Callable[..., Any]) -> Step:
    def step(chance: random.Random, tensors: list[torch.Tensor]) -> None:
        target, source = chance.choice(tensors), chance.choice(tensors)
        row = chance.randrange(4)
        change(chance.choice([target, target[row], target[:, row], target.t()[1:, ::2]]), source, row)

    return step


STEPS: list[Step] = [
    lambda c, ts: c.choice(ts) + c.choice(ts),
    lambda c, ts: c.choice(ts) * c.randrange(-2, 3),
    lambda c, ts: c.choice(ts).t(),
    lambda c, ts: c.choice(ts).clone().reshape(2, 8).view(4, 4),
    lambda c, ts: c.choice(ts)[c.randrange(4)].expand(4, 4).clone(),
    lambda c, ts: c.choice(ts)[[3, 0, 1, 1]],
    lambda c, ts: torch.where(c.choice(ts) > c.choice(ts), c.choice(ts), c.choice(ts)),
    lambda c, ts: c.choice(ts).cumsum(c.randrange(2)) % 11,
    lambda c, ts: torch.cat([c.choice(ts)[:2], c.choice(ts)[2:]]),
    lambda c, ts: c.choice(ts).sort(dim=c.randrange(2))[c.randrange(2)],
    lambda c, ts: c.choice(ts).detach(),
    lambda c, ts: c.choice(ts).gather(1, c.choice(ts) % 4),
    lambda c, ts: c.choice(ts).to(torch.int32).long(),
    lambda c, ts: c.choice(ts).flip(0).contiguous(),
    _in_place(lambda view, source, row: view.fill_(row)),
    _in_place(lambda view, source, row: view.add_(1)),
    _in_place(lambda view, source, row: view.masked_fill_(view > 2, row)),
    _in_place(lambda view, source, row: view.copy_(source.flatten()[: view.numel()].clone().view(view.shape))),
    _in_place(lambda view, source, row: view.__setitem__(view == row, -row)),
    _in_place(lambda view, source, row: view.remainder_(5)),
]  # fmt: skip


def program(seed: int, device: str) -> list[Any]:
    """The numbers in every tensor after thirty random steps."""
    chance = random.Random(seed)
    tensors = [torch.arange(16, device=device).view(4, 4), torch.ones(4, 4, dtype=torch.long, device=device)]
    for _ in range(30):
        made = chance.choice(STEPS)(chance, tensors)
        if made is not None:
            tensors.append(made)
    return [tensor.tolist() for tensor in tensors]
