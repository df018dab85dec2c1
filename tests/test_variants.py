"""Parts frozen, adapters added, blocks checkpointed: what was asked for, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flopprof import count
from flopprof.errors import MissingPackage, UsageError
from flopprof.models import adapters
from flopprof.models.adapters import Lora, add_adapters, parse_lora
from flopprof.models.variants import Checkpointing, checkpoint, checkpoint_blocks, freeze

pytest.importorskip("peft")


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
    add_adapters(net, Lora(r=2, targets=("up",)))
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"blocks.{i}.up.lora_{side}.default.weight" for i in range(3) for side in "AB"}
    adapters = 3 * 2 * 10 * (4 * 2 + 2 * 8)
    assert count(net, IDS).forward_flops == 3 * BLOCK + HEAD + adapters


def test_the_backward_of_adapters() -> None:
    """Of A and B their weights; of B its input, to reach A; of what lies behind the first A also every input."""
    net = Net()
    add_adapters(net, Lora(r=2, targets=("up",)))
    a, b = 2 * 10 * 4 * 2, 2 * 10 * 2 * 8
    weights, into_a = 3 * (a + 2 * b), 2 * a  # the first block's input wants no gradient
    up, down = 2 * BLOCK // 2, 3 * BLOCK // 2
    assert count(net, IDS, backward=True).backward_flops == weights + into_a + up + down + HEAD


def test_modules_to_save_train_beside_the_adapters() -> None:
    net = Net()
    add_adapters(net, Lora(r=1, targets=("blocks.2.down",), modules_to_save=("head",)))
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    adapters = {f"blocks.2.down.lora_{side}.default.weight" for side in "AB"}
    assert trainable == adapters | {f"head.modules_to_save.default.{kind}" for kind in ("weight", "bias")}


def test_every_linear_layer_is_adapted() -> None:
    net = Net()
    add_adapters(net, Lora(r=1, targets=()))
    assert sum(name.endswith("lora_A.default.weight") for name, _ in net.named_parameters()) == 7


def test_adapters_are_scaled_and_dropped_as_told() -> None:
    net = Net()
    add_adapters(net, Lora(r=4, targets=("head",), alpha=2, dropout=0.25))
    layer: Any = net.head
    assert (layer.scaling["default"], layer.lora_dropout["default"].p) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("r=16,targets=q_proj,v_proj", Lora(r=16, targets=("q_proj", "v_proj"))),
        ("targets=all-linear,r=8", Lora(r=8, targets=())),
        (
            "r=4, alpha=8, dropout=0.1, targets=up, modules_to_save=head,embed",
            Lora(r=4, targets=("up",), alpha=8.0, dropout=0.1, modules_to_save=("head", "embed")),
        ),
    ],
)
def test_parse_lora(text: str, lora: Lora) -> None:
    assert parse_lora(text) == lora


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("16:*.q_proj", "write it as r=16,targets=q_proj,v_proj"),
        ("r=16", "lacks targets"),
        ("targets=up", "lacks r"),
        ("r=0,targets=up", "positive whole number, got r=0"),
        ("r=1.5,targets=up", "positive whole number"),
        ("r=x,targets=up", "r is one number, got 'x'"),
        ("r=1,2,targets=up", "r is one number, got '1,2'"),
        ("r=inf,targets=up", "finite"),
        ("r=1,targets=", "empty name"),
        ("r=1,rank=1,targets=up", "has no 'rank'"),
        ("r=1,r=1,targets=up", "twice"),
        ("r=1,targets=up,dropout=1", "below 1"),
        ("r=1,targets=all-linear,up", "name no others"),
    ],
)
def test_adapters_that_cannot_be_read(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_lora(text)


def test_a_missing_peft_says_what_to_install(monkeypatch: Any) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(adapters.importlib, "import_module", absent)
    with pytest.raises(MissingPackage, match=r"pip install 'flopprof\[lora\]'"):
        add_adapters(Net(), Lora(r=1, targets=("up",)))


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
    add_adapters(net, Lora(r=2, targets=("up",)))
    checkpoint(net, "reentrant")
    profile = count(net, IDS, backward=True)
    assert profile.by_parameter("backward")["blocks.0.up.lora_A.default.weight"] > 0


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
    with pytest.raises(UsageError, match=r"no module called 'q_proj', in targets: there are down, head, up"):
        add_adapters(Net(), Lora(r=2, targets=("q_proj",)))
    with pytest.raises(UsageError, match=r"no module called 'uq', in targets: there are up"):
        add_adapters(Net(), Lora(r=2, targets=("uq",)))
    with pytest.raises(UsageError, match="peft cannot adapt Net"):
        add_adapters(Net(), Lora(r=2, targets=("blocks",)))
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
