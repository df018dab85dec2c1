"""The test zoo: small models of every kind, each a function of no arguments that gives (module, inputs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Built = tuple[nn.Module, tuple[torch.Tensor, ...]]


class GPT(nn.Module):
    """Embedding, causal attention blocks, tied head."""

    def __init__(self, replay: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        self.replay = replay

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.replay else block(x)
        return self.head(x)


class Attention(nn.Module):
    """Grouped-query causal attention with a value head of its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, n) for n in (32, 16, 12, 0))
        self.out = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, n, -1).transpose(1, 2) for p, n in ((self.q, 4), (self.k, 2), (self.v, 2)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class Experts(nn.Module):
    """A dense mixture: every token through every expert, weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class LoRA(nn.Module):
    """A frozen linear layer with a trained low-rank path."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(16, 16), nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class UNet(nn.Module):
    """Down, up by a transposed convolution, a skip connection, and a shared block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 4, 2, 1, groups=4)
        self.shared = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16)
        self.up = nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = F.silu(self.norm(self.stem(x)))
        return self.up(self.shared(self.shared(self.down(skip)))) + skip


class Recurrent(nn.Module):
    """A bidirectional LSTM with projection, then a GRU and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=3, batch_first=True)
        self.gru, self.cell = nn.GRU(6, 5, batch_first=True), nn.LSTMCell(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.gru(self.lstm(x)[0])
        return self.cell(y[:, -1])[0]


def torchvision_model(name: str, size: int = 64) -> Callable[[], Built]:
    def build() -> Built:
        models = pytest.importorskip("torchvision.models")
        return models.get_model(name, weights=None), (torch.randn(1, 3, size, size),)

    return build


def transformers_model(kind: str, head: str, decoder: bool = False, **config: Any) -> Callable[[], Built]:
    def build() -> Built:
        transformers = pytest.importorskip("transformers")
        sizes: dict[str, Any] = {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
            "vocab_size": 60, "pad_token_id": 0, **config,
        }  # fmt: skip
        made = transformers.AutoConfig.for_model(kind, **sizes)
        ids = torch.randint(1, 50, (2, 12))
        return getattr(transformers, head).from_config(made), (ids,)

    return build


ZOO: dict[str, Callable[[], Built]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (torch.randn(3, 8),)),
    "gpt": lambda: (GPT(), (torch.randint(0, 50, (2, 7)),)),
    "gpt, checkpointed": lambda: (GPT(replay=True), (torch.randint(0, 50, (2, 7)),)),
    "grouped-query attention": lambda: (Attention(), (torch.randn(2, 6, 16),)),
    "encoder-decoder": lambda: (
        nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
        (torch.randn(2, 5, 16), torch.randn(2, 3, 16)),
    ),
    "experts": lambda: (Experts(), (torch.randn(2, 5, 8),)),
    "lora": lambda: (LoRA(), (torch.randn(3, 16),)),
    "unet": lambda: (UNet(), (torch.randn(2, 3, 12, 12),)),
    "recurrent": lambda: (Recurrent(), (torch.randn(2, 5, 6),)),
    "rnn": lambda: (nn.RNN(4, 5, 2), (torch.randn(3, 2, 4),)),
    "bilinear": lambda: (nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4))),
    "conv1d, conv3d": lambda: (
        nn.Sequential(nn.Conv1d(3, 4, 5, padding="same"), nn.Unflatten(1, (1, 4)), nn.Conv2d(1, 2, (2, 3))),
        (torch.randn(2, 3, 11),),
    ),
    "weight norm": lambda: (
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 7)),
        (torch.randn(2, 6),),
    ),
    "resnet18": torchvision_model("resnet18"),
    "mobilenet_v3_small": torchvision_model("mobilenet_v3_small"),
    "efficientnet_b0": torchvision_model("efficientnet_b0"),
    "regnet_y_400mf": torchvision_model("regnet_y_400mf"),
    "convnext_tiny": torchvision_model("convnext_tiny"),
    "swin_t": torchvision_model("swin_t"),
    "llama": transformers_model("llama", "AutoModelForCausalLM", num_key_value_heads=2),
    "mixtral": transformers_model("mixtral", "AutoModelForCausalLM", num_key_value_heads=2, num_local_experts=4),
    "bert": transformers_model("bert", "AutoModelForMaskedLM"),
    "t5": transformers_model("t5", "AutoModelForTextEncoding", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "mamba": transformers_model("mamba", "AutoModelForCausalLM", state_size=4),
}
