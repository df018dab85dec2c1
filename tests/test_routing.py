"""Tokens per expert: seen on real numbers, told on meta, and the same counts of both; what cannot be followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from flopprof import FlopCounter, Profile, count, load
from flopprof.cli.main import app
from flopprof.counting.routing import TOLD, checked, laid_out
from flopprof.errors import FlopprofError, UsageError
from flopprof.models.routing import read_routing, to_json

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

TOKENS, D, FF, EXPERTS, K = 12, 8, 16, 4, 2


class Block(nn.Module):
    """A router over a list of modules, each called with the tokens that chose it."""

    def __init__(self, *, top: int = K) -> None:
        super().__init__()
        self.gate, self.top = nn.Linear(D, EXPERTS, bias=False), top
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, FF, bias=False), nn.ReLU(), nn.Linear(FF, D, bias=False)) for _ in range(EXPERTS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.gate(x).topk(self.top, dim=-1).indices if self.top > 1 else self.gate(x).argmax(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).any(dim=-1).nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(x[rows]))
        return x + out


class Net(nn.Module):
    def __init__(self, *, top: int = K) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(top=top) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


ONE = 2 * 2 * D * FF  # one token through one expert
GATE = 2 * TOKENS * D * EXPERTS


def on_meta(routing: dict[str, tuple[int, ...]] | None, *, top: int = K, backward: bool = False) -> Profile:
    with torch.device("meta"):
        net, x = Net(top=top), torch.empty(TOKENS, D)
    return count(net, x, routing=routing, backward=backward)


def real(*, top: int = K, backward: bool = False) -> Profile:
    torch.manual_seed(1)
    return count(Net(top=top), torch.randn(TOKENS, D), backward=backward)


# --- what is seen -------------------------------------------------------------------------------
def test_a_real_run_reports_its_load() -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(TOKENS, D)
    wanted = torch.bincount(block.gate(x).topk(K).indices.flatten(), minlength=EXPERTS).tolist()
    (row,) = count(block, x).routing
    assert (row.fqn, row.tokens, row.calls) == ("", tuple(wanted), 1)
    assert row.load == max(wanted) * EXPERTS / (K * TOKENS)
    profile = count(block, x)
    assert Profile.from_json(profile.to_json()) == profile


def test_loads_add_up_over_calls_and_not_over_replays() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(TOKENS, D, requires_grad=True)
    with FlopCounter(net) as counter:
        for _ in range(3):
            torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).sum().backward()
    first, second = counter.profile.routing
    assert (first.fqn, first.calls, sum(first.tokens)) == ("layers.0", 3, 3 * K * TOKENS)
    assert (second.fqn, second.calls, sum(second.tokens)) == ("layers.1", 3, 3 * K * TOKENS)
    assert first.tokens == tuple(3 * number for number in count(net, x).routing[0].tokens)


def test_a_choice_beside_no_experts_is_no_routing() -> None:
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes = nn.Linear(D, EXPERTS)

        def forward(self, x: torch.Tensor) -> Any:
            return self.classes(x).topk(K)

    assert count(Best(), torch.randn(TOKENS, D)).routing == ()


def test_on_meta_nothing_is_seen() -> None:
    assert on_meta(None).routing == ()


# --- what is told -------------------------------------------------------------------------------
def test_each_expert_gets_what_it_is_told() -> None:
    profile = on_meta({"layers.0": (12, 0, 7, 5), "layers.*": (1, 12, 10, 1)})
    own = profile.by_module()
    assert [own.get(f"layers.0.experts.{i}", 0) for i in range(EXPERTS)] == [ONE * n for n in (12, 0, 7, 5)]
    assert [own.get(f"layers.1.experts.{i}", 0) for i in range(EXPERTS)] == [ONE * n for n in (1, 12, 10, 1)]
    assert profile.forward_flops == 2 * (GATE + ONE * K * TOKENS)
    assert profile.assumptions == (TOLD,)


@pytest.mark.parametrize("top", [1, 2])
def test_told_what_was_seen_meta_counts_what_ran(top: int, tmp_path: Path) -> None:
    ran = real(top=top, backward=True)
    file = tmp_path / "routing.json"
    file.write_text(to_json(ran))
    again = on_meta(read_routing(str(file)), top=top, backward=True)
    for phase in ("forward", "backward"):
        assert {k: v for k, v in again.by_module(phase).items() if v} == {
            k: v for k, v in ran.by_module(phase).items() if v
        }
    assert again.by_module("forward") != on_meta(None, top=top).by_module("forward")


def test_tokens_are_dealt_so_that_no_row_meets_an_expert_twice() -> None:
    for tokens, rows, width in [((5, 5, 0, 0), 5, 2), ((4, 3, 3, 5), 5, 3), ((1, 2, 3, 4), 5, 2), ((7,) * 3, 7, 3)]:
        dealt = laid_out(tokens, rows, width)
        assert dealt.shape == (rows, width)
        assert torch.bincount(dealt.flatten(), minlength=len(tokens)).tolist() == list(tokens)
        assert all(len(set(row)) == width for row in dealt.tolist())


@pytest.mark.parametrize(
    ("routing", "reason"),
    [
        ({"layers.*": (8, 8, 8)}, "it lists 3 experts, and layers.0 chooses among 4"),
        ({"layers.*": (8, 8, 8, 8)}, "add up to 32, and layers.0 sends 12 tokens to 2 experts each: 24"),
        ({"layers.*": (13, 11, 0, 0)}, "gives one expert 13 of 12 tokens"),
        ({"layers.*": (6, 6, 6, 6), "blocks.*": (6, 6, 6, 6)}, "no router of this run: there are layers.0, layers.1"),
    ],
)
def test_routing_that_does_not_fit_is_refused(routing: dict[str, tuple[int, ...]], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        on_meta(routing)


def test_models_without_routers_and_real_ones_are_not_told() -> None:
    with torch.device("meta"):
        net, x = nn.Linear(D, D), torch.empty(3, D)
    with pytest.raises(UsageError, match="nothing in this run chooses among experts"):
        count(net, x, routing={"*": (1, 2)})
    with pytest.raises(UsageError, match="on meta alone"):
        count(Net(), torch.randn(TOKENS, D), routing={"*": (6, 6, 6, 6)})
    with pytest.raises(FlopprofError, match="choose among no experts"):
        to_json(count(nn.Linear(D, D), torch.randn(3, D)))
    with pytest.raises(FlopprofError, match="counted on meta"):
        to_json(on_meta(None))


@pytest.mark.parametrize("times", [2, 9])
def test_the_choices_of_a_router_that_runs_again_are_told_apart(times: int) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(times):
                x = self.block(x) * -2
            return x

    torch.manual_seed(3)
    ran = count(Again(), torch.randn(TOKENS, D), backward=True)
    (row,) = ran.routing
    assert (row.calls, sum(row.tokens)) == (times, times * K * TOKENS)
    if times > 8:
        with pytest.raises(FlopprofError, match="chose 9 times"):
            to_json(ran)
        return
    assert len(set(row.each)) == times
    with torch.device("meta"):
        again, x = Again(), torch.empty(TOKENS, D)
    told = count(again, x, routing=json.loads(to_json(ran)), backward=True)
    for phase in ("forward", "backward"):
        assert told.by_module(phase) == ran.by_module(phase)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is not JSON"),
        ("[1]", "holds no routing"),
        ("{}", "holds no routing"),
        ('{"a": 3}', "takes a list"),
        ('{"a": [1]}', "takes a list"),
        ('{"a": [1, -2]}', "gives expert 1 -2 tokens"),
        ('{"a": [1, 2.5]}', "gives expert 1 2.5 tokens"),
        ('{"a": [1, true]}', "gives expert 1 True tokens"),
        ('{"a": [1, "2"]}', "gives expert 1 2 tokens"),
        ('{"a": [[1, 2], [3]]}', "takes a list"),
        ('{"a": [[1, 2], 3]}', "takes a list"),
        ("[" * 100_000, "is not JSON"),
        (" " * 10_000_001, "more than 10,000,000 bytes"),
    ],
)
def test_files_that_hold_no_routing(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "routing.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=reason):
        read_routing(str(file))


def test_routing_from_python_is_checked_too() -> None:
    with pytest.raises(UsageError, match="3 is no pattern"):
        checked({3: [1, 2]}, "routing")
    with pytest.raises(UsageError, match=r"no file 'absent\.json'"):
        read_routing("absent.json")


# --- models of transformers ---------------------------------------------------------------------
SEQ = 24
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    "intermediate_size": 48, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8},
    "DeepseekV3": {
        "num_key_value_heads": 4, "n_routed_experts": 8, "moe_intermediate_size": 16, "n_group": 4, "topk_group": 2,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
    "SwitchTransformers": {
        "d_kv": 8, "d_ff": 48, "num_decoder_layers": 2, "num_experts": 4, "expert_capacity": 64,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    },
    "NllbMoe": {
        "encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
    },
    "JetMoe": {"num_local_experts": 4, "kv_channels": 8},  # queries are routed too
    "Phimoe": {"num_local_experts": 4},  # the best one by max, then the best of the rest
}  # fmt: skip


def test_experts_may_have_company_in_their_container() -> None:
    """NLLB-MoE keeps an activation beside its experts."""

    class Company(Block):
        def __init__(self) -> None:
            super().__init__()
            self.experts.append(nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[-1](self.gate(x).topk(K).values)

    assert [sum(row.tokens) for row in count(Company(), torch.randn(TOKENS, D)).routing] == [K * TOKENS]


LONG = ("JetMoe", "NllbMoe")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.nightly if k in LONG else ()) for k in MODELS])
def test_told_what_a_transformers_model_did_meta_counts_it(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **MODELS[kind]})
    task = "ForConditionalGeneration" if kind in ("SwitchTransformers", "NllbMoe") else "ForCausalLM"
    facts = {**config.to_dict(), "architectures": [kind + task], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    ran = load(str(tmp_path), seq=SEQ, device="cpu").count(backward=True)
    routers = {"DeepseekV3": 1, "JetMoe": 4}.get(kind, 2)
    width = 1 if kind == "SwitchTransformers" else 2
    assert [sum(row.tokens) for row in ran.routing] == [width * SEQ] * routers
    again = load(str(tmp_path), seq=SEQ, routing=json.loads(to_json(ran)), device="meta").count(backward=True)
    for phase in ("forward", "backward"):
        assert again.by_module(phase) == ran.by_module(phase)


def test_a_maximum_is_a_choice_where_its_place_is_looked_up() -> None:
    class Best(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = self.gate(x)
            scores = scores - scores.max(dim=-1, keepdim=True).values  # no choice
            place = scores.max(dim=-1, keepdim=True)[1]
            if self.training:  # as sparse mixers do: another one is chosen, and a third looked at
                place = (scores + torch.rand_like(scores)).max(dim=-1, keepdim=True)[1]
            weight = scores.gather(-1, place) * (place == scores.max(-1, keepdim=True)[1])
            self.chosen = place.detach()
            return weight * x

    torch.manual_seed(0)
    block, x = Best(), torch.randn(TOKENS, D)
    for train in (False, True):
        (row,) = count(block.train(train), x, backward=True).routing
        with torch.random.fork_rng(), FlopCounter(block) as counter:
            block(x)
            (seen,) = counter.profile.routing
        assert seen.tokens == tuple(torch.bincount(block.chosen.flatten(), minlength=EXPERTS).tolist())
        assert (row.calls, sum(row.tokens)) == (1, TOKENS)


def test_the_command_saves_what_it_reads(tmp_path: Path) -> None:
    source = tmp_path / "net.py"
    source.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_routing import Net\n")
    file = tmp_path / "routing.json"
    target = [f"{source}:Net", "--input", f"{TOKENS}x{D}", "--json", "-"]
    saved = CliRunner().invoke(app, ["count", *target, "--device", "cpu", "--save-routing", str(file)])
    assert saved.exit_code == 0, saved.output
    again = CliRunner().invoke(app, ["count", *target, "--routing", str(file)])
    assert again.exit_code == 0, again.output
    ran, told = (Profile.from_json(result.stdout) for result in (saved, again))
    assert {k: v for k, v in told.by_module().items() if v} == {k: v for k, v in ran.by_module().items() if v}
    assert {row.fqn: list(row.tokens) for row in ran.routing} == json.loads(file.read_text())
    shown = CliRunner().invoke(app, ["count", *target[:-2], "--device", "cpu"])
    worst = max(row.load for row in ran.routing)
    assert f"expert load  max/mean {worst:.2f} in layers." in shown.stdout
    refused = CliRunner().invoke(app, ["count", *target, "--device", "cpu", "--routing", str(file)])
    assert refused.exit_code == 2
    assert "chooses its experts itself" in refused.output
