"""Experts that are multiplied and not chosen: told beside the count, from what ran, and only where it is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from flopprof import FlopCounter, Profile, count, load, trace
from flopprof.cli.main import app

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

TOKENS, D, FF, EXPERTS, K = 12, 8, 16, 4, 2
GATE = 2 * TOKENS * D * EXPERTS
ALL = 2 * TOKENS * EXPERTS * 2 * D * FF  # every expert, two weights of D x FF each, for every token


def choose(scores: torch.Tensor, how: str) -> torch.Tensor:
    """(tokens, experts) of weights, zero where an expert was not chosen."""
    if how == "topk":
        best = scores.topk(K, dim=-1).indices
    elif how == "argmax":
        best = scores.argmax(-1, keepdim=True)
    else:  # the best, then the best of the rest, as sparse mixers do
        shifted = scores - scores.max(dim=-1, keepdim=True).values  # no choice
        first = shifted.max(dim=-1, keepdim=True).indices
        weight = shifted.gather(-1, first)
        second = shifted.scatter(-1, first, float("-inf")).max(dim=-1, keepdim=True).indices
        best = torch.cat([first, second], -1)
        weight = torch.cat([weight, shifted.gather(-1, second)], -1)
    return torch.zeros_like(scores).scatter(-1, best, 1.0)


class Listed(nn.Module):
    """Every module of a list takes every token."""

    def __init__(self, how: str = "topk") -> None:
        super().__init__()
        self.gate, self.how = nn.Linear(D, EXPERTS, bias=False), how
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, FF), nn.ReLU(), nn.Linear(FF, D, bias=False)) for _ in range(EXPERTS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = choose(self.gate(x), self.how)
        return sum((weights[:, i, None] * expert(x) for i, expert in enumerate(self.experts)), x)


class Stacked(nn.Module):
    """One product for all of them."""

    def __init__(self, how: str = "topk") -> None:
        super().__init__()
        self.gate, self.how = nn.Linear(D, EXPERTS, bias=False), how
        self.up, self.down = nn.Parameter(torch.randn(EXPERTS, D, FF)), nn.Parameter(torch.randn(EXPERTS, FF, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = choose(self.gate(x), self.how)
        return x + ((x.expand(EXPERTS, -1, -1) @ self.up).relu() @ self.down * weights.t().unsqueeze(-1)).sum(0)


class Sent(Listed):
    """Only the tokens that chose an expert go through it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, out = choose(self.gate(x), self.how), x
        for number, expert in enumerate(self.experts):
            rows = weights[:, number].nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(x[rows]))
        return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("how", "chosen"), [("topk", 2), ("argmax", 1), ("max", 2)])
@pytest.mark.parametrize("kind", [Listed, Stacked])
def test_all_experts_run_and_the_chosen_ones_are_told(kind: Any, how: str, chosen: int, device: str) -> None:
    with torch.device(device):
        net = nn.Sequential(kind(how), kind(how))
        x = torch.zeros(TOKENS, D)
    profile = count(net, x, backward=True)
    assert profile.forward_flops == 2 * (GATE + ALL)
    for block in ("0", "1"):
        forward, backward = (row for row in profile.experts if row.fqn == block)
        assert (forward.experts, forward.chosen, forward.phase) == (EXPERTS, chosen, "forward")
        assert (forward.flops, forward.active_flops) == (ALL, ALL * chosen // EXPERTS)
        # Gradients of the weights, and of each expert's input: the first block's reach no further than its weights.
        first = ALL // 2 if block == "0" else 0
        assert (backward.phase, backward.flops) == ("backward", 2 * ALL - first)
        assert backward.active_flops == backward.flops * chosen // EXPERTS
    idle = sum(row.flops for row in profile.experts) * (EXPERTS - chosen) // EXPERTS
    assert profile.active_flops == profile.model_flops - idle
    assert Profile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize("how", ["topk", "argmax"])
def test_where_only_chosen_experts_run_nothing_is_told(how: str) -> None:
    torch.manual_seed(0)
    net, x = Sent(how), torch.randn(TOKENS, D)
    with torch.no_grad():
        net.gate.weight.zero_()  # every token chooses the same ones: each of those gets them all
    for given in (x, x[:1]):
        profile = count(net, given, backward=True)
        assert profile.experts == ()
        assert profile.active_flops == profile.model_flops
    assert count(net.to("meta"), x.to("meta")).experts == ()


@pytest.mark.parametrize("kind", [Listed, Stacked])
def test_at_other_sizes_the_chosen_ones_take_what_a_count_says(kind: Any) -> None:
    net = kind()
    profile = trace(net, torch.zeros(TOKENS, D), backward=True, dynamic={"tokens": (0, 0)})
    for other in (5, 40):
        counted = count(net, torch.zeros(other, D, device="cpu"), backward=True)
        found = profile.at(tokens=other)
        assert found.model_flops == counted.model_flops == profile.model_flops * other // TOKENS
        assert found.active_flops == counted.active_flops == profile.active_flops * other // TOKENS
        assert Profile.from_json(found.to_json()).experts == counted.experts


@pytest.mark.parametrize("kind", ["topk", "max", "best of all"])
def test_layers_that_are_as_many_as_the_classes_are_no_experts(kind: str) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(EXPERTS))
            self.head = nn.Linear(D, EXPERTS)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if kind == "best of all":  # of no row in particular; here before the layers
                x = x + self.head(x).argmax()
            for layer in self.layers:
                x = layer(x)
            scores = self.head(x)
            if kind == "topk":
                return scores.topk(K).values
            return scores.gather(-1, scores.max(-1, keepdim=True).indices)

    torch.manual_seed(0)
    profile = count(Classifier(), torch.randn(TOKENS, D))
    assert profile.experts == ()
    assert profile.active_flops == profile.forward_flops > 0


def test_of_several_lists_as_long_only_the_experts_are_idle() -> None:
    class Towers(Listed):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleList(nn.Linear(D, D) for _ in range(EXPERTS))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            return sum((tower(x) for tower in self.towers), x)

    profile = count(Towers(), torch.randn(TOKENS, D))
    assert profile.forward_flops == GATE + ALL + 2 * TOKENS * EXPERTS * D * D
    assert profile.active_flops == profile.forward_flops - ALL * (EXPERTS - K) // EXPERTS


def test_experts_that_all_are_chosen_or_see_other_rows_than_the_router_are_not_told() -> None:
    class Soft(Listed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights = self.gate(x)
            weights = (weights - weights.max(dim=-1, keepdim=True).values).softmax(-1)
            return sum((weights[:, i, None] * expert(x) for i, expert in enumerate(self.experts)), x)

    class Padded(Stacked):
        """A capacity of half of the tokens for each expert."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _ = choose(self.gate(x), self.how)
            return (x[: TOKENS // 2].expand(EXPERTS, -1, -1) @ self.up).relu() @ self.down

    for net in (Soft(), Padded()):
        counter = FlopCounter(net)
        with counter:
            for _ in range(2):
                net(torch.randn(TOKENS, D))
        assert counter.profile.forward_flops > 0
        assert counter.profile.experts == ()


def test_several_calls_add_up_and_replays_do_not() -> None:
    net, x = Stacked("max"), torch.randn(TOKENS, D, requires_grad=True)
    with FlopCounter(net) as counter:
        for _ in range(3):
            net(x).sum().backward()
    forward, backward = counter.profile.experts
    assert (forward.chosen, forward.flops, forward.active_flops) == (2, 3 * ALL, 3 * ALL // 2)
    assert backward.flops == 6 * ALL


LLAMA4: dict[str, Any] = {
    "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100, "intermediate_size": 24,
    "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
}  # fmt: skip
SEQ = 24
EVERY = 2 * 2 * SEQ * 4 * 3 * 32 * 24  # two layers, four experts, gate and up and down
QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100, "intermediate_size": 48,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    def make(facts: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(facts))
        return str(tmp_path)

    return make


def test_the_active_figure_stands_beside_the_count(folder: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    target = folder(LLAMA4)
    on_meta, real = (load(target, seq=SEQ, device=device).count(backward=True) for device in ("meta", "cpu"))
    assert on_meta.experts == real.experts
    assert sum(row.flops for row in on_meta.experts) == 3 * EVERY
    assert on_meta.active_flops == real.active_flops == real.model_flops - 3 * EVERY * 3 // 4
    fewer = load(folder({**LLAMA4, "num_local_experts": 1}), seq=SEQ).count(backward=True)
    gates = 3 * 2 * 2 * SEQ * 32 * 3  # of the three routes that it lacks
    assert on_meta.active_flops == fewer.model_flops + gates
    folder(LLAMA4)
    file, csv, page = (tmp_path / name for name in ("profile.json", "rows.csv", "page.md"))
    args = ["count", target, "--seq", str(SEQ), "--depth", "0"]
    ran = CliRunner().invoke(app, [*args, "--json", str(file), "--csv", str(csv), "--markdown", str(page)])
    assert ran.exit_code == 0, ran.output
    line = next(line for line in ran.output.splitlines() if line.startswith("active"))
    assert "1 of 4 experts a token" in line
    found = Profile.from_json(file.read_text())
    assert found.active_flops == found.forward_flops - EVERY * 3 // 4
    assert f"{found.active_flops:,}" in page.read_text()
    assert "experts a token" not in csv.read_text()


def test_models_that_run_chosen_experts_alone_say_nothing(folder: Any) -> None:
    pytest.importorskip("transformers")
    target = folder(QWEN3)
    assert load(target, seq=SEQ, device="cpu").count().experts == ()
    ran = CliRunner().invoke(app, ["count", target, "--seq", str(SEQ)])
    assert ran.exit_code == 0, ran.output
    assert "experts a token" not in ran.output
