"""Parts frozen, adapters added, blocks checkpointed: what was asked for, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flopprof import count
from flopprof.errors import UsageError
from flopprof.models.variants import Checkpointing, LoraLinear, add_lora, checkpoint_blocks, freeze


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return x + self.down(self.up(x).relu()) * scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Embedding(10, 4),
            nn.ModuleList(Block() for _ in range(3)),
            nn.Linear(4, 2),
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)


IDS = torch.zeros(2, 5, dtype=torch.int64)
BLOCK = 2 * 10 * 2 * 4 * 8  # one block's forward FLOPs over ten tokens
HEAD = 2 * 10 * 8


@pytest.mark.parametrize("pattern", ["blocks.1", "blocks.1.*"])
def test_freeze_takes_modules_and_parameters(pattern: str) -> None:
    net = Net()
    freeze(net, pattern)
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {
        f"blocks.1.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")
    }


def test_freeze_one_kind_of_parameter() -> None:
    net = Net()
    freeze(net, "*.bias")
    assert {p.dim() for p in net.parameters() if not p.requires_grad} == {1}


def test_lora_freezes_all_but_its_adapters() -> None:
    net = Net()
    add_lora(net, 2, "blocks.*.up")
    assert isinstance(net.blocks[0].up, LoraLinear)
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"blocks.{i}.up.lora_{side}.weight" for i in range(3) for side in "AB"}
    adapters = 3 * 2 * 10 * (4 * 2 + 2 * 8)
    assert count(net, IDS).forward_flops == 3 * BLOCK + HEAD + adapters


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpointed_blocks_are_replayed(kind: str) -> None:
    net = Net()
    checkpoint_blocks(net, kind)  # type: ignore[arg-type]
    profile = count(net, IDS, backward=True)
    assert profile.forward_flops == 3 * BLOCK + HEAD
    assert profile.backward_flops == 2 * profile.forward_flops
    assert profile.recompute_flops == 3 * (BLOCK if kind == "reentrant" else BLOCK // 2)


def test_reentrant_checkpoints_train_adapters_behind_a_frozen_embedding() -> None:
    net = Net()
    add_lora(net, 2, "*.up")
    checkpoint_blocks(net, "reentrant")
    profile = count(net, IDS, backward=True)
    assert profile.by_parameter("backward")["blocks.0.up.lora_A.weight"] > 0


def test_checkpoints_without_gradients_do_nothing() -> None:
    net = Net()
    checkpoint_blocks(net, "reentrant")
    with torch.no_grad():
        assert count(net, IDS).by_phase() == {
            "forward": 3 * BLOCK + HEAD,
            "backward": 0,
            "recompute": 0,
            "optimizer": 0,
        }


def test_what_matches_nothing_is_said() -> None:
    with pytest.raises(UsageError, match=r"matches no parameter; the first are embed.weight"):
        freeze(Net(), "layers.*")
    with pytest.raises(UsageError, match=r"matches no linear layer; the first are blocks.0.up"):
        add_lora(Net(), 2, "*.q_proj")
    with pytest.raises(UsageError, match="rank is a positive whole number"):
        add_lora(Net(), 0, "*")
    with pytest.raises(UsageError, match="no repeated blocks"):
        checkpoint_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "reentrant")


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_called_by_keyword_are_differentiated(kind: Checkpointing, frozen: bool) -> None:
    """Three blocks of 4 -> 4 given x and a mask by name; frozen, the layer before them wants no gradient."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)

        def forward(self, *, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            assert not mask.requires_grad
            return torch.tanh(self.inner(x)) * mask

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Linear(4, 4, bias=False), nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = block(x=x, mask=torch.ones(4))
            return x

    model = Stack()
    if frozen:
        freeze(model, "first")
    checkpoint_blocks(model, kind)
    profile = count(model, torch.randn(3, 4), backward=True)
    each = 2 * 3 * 16
    # Of the first block's input the reentrant kind computes a gradient that nobody below it wants.
    blocks = 6 * each - (each if frozen and kind == "non-reentrant" else 0)
    assert profile.backward_flops == blocks + (0 if frozen else each)
