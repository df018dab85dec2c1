"""What the verdict says of other tools is what those tools say when they are run."""

from __future__ import annotations

import io
import json
from typing import Any, Literal

import msgspec
import pytest
import torch
import transformers
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flopprof import count
from flopprof.ledger import reconcile
from flopprof.report.ledger import render
from flopprof.units import format_flops
from releases import WRITTEN_FOR_THIS

pytestmark = pytest.mark.filterwarnings("ignore")


def text(ledger: Any, width: int = 200) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(render(ledger, heading="a model"), crop=False)
    return file.getvalue()


def gpt2(**options: Any) -> nn.Module:
    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64, "vocab_size": 99}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **options)).eval()


class Positions(nn.Embedding):
    """Transformers takes every kind of nn.Embedding for one, whatever its name."""


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.where, self.PatchEmbedding = nn.Embedding(50, 8), Positions(16, 8), PatchEmbedding()
        self.head = nn.Linear(8, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.embedding(ids, self.tokens.weight) + self.where(torch.arange(ids.shape[1]))
        return self.head(self.PatchEmbedding(x))


class PatchEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@pytest.mark.parametrize("build", [gpt2, lambda: gpt2(tie_word_embeddings=False), Tokens])
def test_the_trainers_total_is_what_transformers_computes(build: Any) -> None:
    """`Trainer.floating_point_ops`: 6 x elements of the input x num_parameters(exclude_embeddings=True)."""
    model, ids = build(), torch.zeros(2, 16, dtype=torch.int64)
    n = transformers.PreTrainedModel.num_parameters(model, exclude_embeddings=True)
    ledger = reconcile(count(model, ids, backward=True), 32)
    assert f"{format_flops(6 * ids.numel() * n)} as total_flos" in " ".join(text(ledger).split())


@pytest.mark.skipif(not WRITTEN_FOR_THIS, reason="before, it did not know the CPU's attention")
@pytest.mark.parametrize("attention", ["full", "causal"])
def test_flop_counter_mode_is_what_it_is_when_run(attention: Literal["full", "causal"]) -> None:
    """It counts every pair, in either convention, and the recompute."""
    model, ids = gpt2(), torch.zeros(2, 16, dtype=torch.int64)
    profile = count(model, ids, backward=True, attention=attention)
    with FlopCounterMode(display=False) as mode:
        model(ids).logits.sum().backward()
    line = next(line for line in text(reconcile(profile, 32)).splitlines() if line.startswith("FlopCounterMode"))
    assert f" {format_flops(mode.get_total_flops())} " in line


def test_formulas_for_tokens_are_not_quoted_for_samples() -> None:
    profile = count(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8), backward=True)
    ledger = reconcile(msgspec.structs.replace(profile, samples=2))
    assert ledger.unit == "sample"
    shown = text(ledger)
    assert "nanoGPT" not in shown
    assert "total_flos" not in shown
    assert "FlopCounterMode" in shown


def test_eighty_columns_are_enough() -> None:
    shown = text(reconcile(count(gpt2(), torch.zeros(2, 16, dtype=torch.int64), backward=True), 32), width=80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "\x1b" not in shown


def test_json_says_what_follows_too() -> None:
    ledger = reconcile(count(nn.Linear(4, 5, bias=False), torch.randn(3, 4), backward=True), 3)
    decoded = json.loads(ledger.to_json())
    # Twice the forward would be the backward; the input of the only layer wants no gradient.
    assert (decoded["residual"], decoded["model_flops"], decoded["factor"]) == (0, 2 * 2 * 3 * 20, 4)
    empty = reconcile(count(nn.ReLU(), torch.randn(3, 4)), 3)
    assert json.loads(empty.to_json())["factor"] is None


def test_torchtitan_counts_the_experts_that_a_token_visits() -> None:
    """Two of eight experts: 6 (N - embeddings - six experts a layer) T + 12 L H Q T^2."""
    layers, d, wide, vocab, tokens = 2, 32, 48, 97, 24
    config = transformers.MixtralConfig(
        hidden_size=d,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocab,
    )
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config).eval()
    n = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    ledger = reconcile(count(model, ids, backward=True, use_cache=False), tokens)
    idle = layers * 6 * 3 * d * wide
    expected = 6 * (n - vocab * d - idle) * tokens + 12 * layers * d * tokens**2
    assert f"torchtitan       {format_flops(expected)}: 6 (N - untied embeddings - idle experts) T" in text(ledger)
