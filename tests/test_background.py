"""The figures that this field passes around come out of the program; the wrong ones come out right."""

from __future__ import annotations

import pytest
import torch

from flopprof import count
from flopprof.analytic import six_n, two_n

A100, DAY, HOUR = 312e12, 86400, 3600


# --- one encoder layer, d_model 512, sequence 512, d_ff 2048, 8 heads of 64, forward -----------------
@pytest.mark.parametrize("layers", [1, 6])
def test_the_encoder_layer_part_by_part(layers: int) -> None:
    with torch.device("meta"):
        layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
        model = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    ledger = count(model, torch.empty(1, 512, 512, device="meta")).reconcile(tokens=512)
    uses = {name: use.forward_flops for name, use in ledger.by_parameter().items()}
    for i in range(layers):
        assert uses[f"layers.{i}.self_attn.in_proj_weight"] == 3 * 2 * 512**2 * 512 == 805_306_368
        assert uses[f"layers.{i}.self_attn.out_proj.weight"] == 2 * 512**2 * 512 == 268_435_456
        assert uses[f"layers.{i}.linear1.weight"] + uses[f"layers.{i}.linear2.weight"] == 2_147_483_648
    assert ledger.term_flops()["activation_x_activation"] == layers * 4 * 512**2 * 64 * 8 == layers * 536_870_912
    assert ledger.measured_flops == layers * 3_758_096_384


# --- training runs, 6 N D ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("n", "tokens", "flops", "days"),
    [
        (110e6, 13.7e9, 9.04e18, 0.34),  # BERT-base, with the token count in circulation
        (1.5e9, 40e9, 3.6e20, 13.4),  # GPT-2: 40 GB of text taken for tokens
        (175e9, 300e9, 3.15e23, 11685),  # GPT-3
        (70e9, 1.4e12, 5.88e23, 21813),  # Chinchilla
    ],
)
def test_training_runs(n: float, tokens: float, flops: float, days: float) -> None:
    ours = six_n(int(n), int(tokens))
    assert ours == pytest.approx(flops, rel=2e-3)
    assert ours / A100 / DAY == pytest.approx(days, rel=0.015)  # two digits, at the least


def test_bert_saw_more_than_its_table_says() -> None:
    """A million steps of 256 sequences: of 512 all along 131 G positions, 42.6 G with 90 % of the steps at 128."""
    assert pytest.approx(131e9, rel=1e-3) == 10**6 * 256 * 512
    assert pytest.approx(42.6e9, rel=1e-3) == 256 * (900_000 * 128 + 100_000 * 512)


def test_gpt3_in_its_own_paper() -> None:
    """174.6 G parameters, not 175: 3.14e23, and 11,648 days of an A100 from that rounded figure."""
    assert six_n(174_600_000_000, 300 * 10**9) == pytest.approx(3.14e23, rel=2e-3)
    assert round(3.14e23 / A100 / DAY) == 11_648


def test_seven_billion_on_a_trillion_is_not_five_hundred_hours() -> None:
    flops = six_n(7 * 10**9, 10**12)
    assert flops == 42 * 10**21
    hours = flops / (0.5 * 989.4e12) / HOUR
    assert round(hours) == 23_583
    assert round(2 * hours) == pytest.approx(47_167, abs=1)


def test_inference_of_175_billion() -> None:
    """A thousand generated tokens are 3.5e14; the training was about 9e8 times that."""
    assert two_n(175 * 10**9, 1000) == 35 * 10**13
    assert six_n(175 * 10**9, 300 * 10**9) / two_n(175 * 10**9, 1000) == pytest.approx(9e8, rel=1e-3)


def test_seventy_billion_per_token_is_bound_by_memory() -> None:
    assert two_n(70 * 10**9, 1) == 14 * 10**10
    assert two_n(70 * 10**9, 1) / 1000e12 == pytest.approx(0.14e-3)
    assert pytest.approx(47e-3, rel=0.01) == 70e9 * 2 / 3e12  # reading the weights in bf16


# --- vision models at 224 x 224: multiply-adds passed off as FLOPs -------------------------------------
@pytest.mark.parametrize(
    ("name", "gmacs", "gflops", "circulating"),
    [
        ("resnet18", 1.814, 3.628, 11.7),  # its 11.7 million parameters
        ("resnet50", 4.089, 8.178, 4.0),
        ("mobilenet_v3_large", 0.2166, 0.4332, 0.2),
        ("vit_b_16", 17.564, 35.127, 81.9),
    ],
)
def test_vision_models(name: str, gmacs: float, gflops: float, circulating: float) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.get_model(name).eval()
    profile = count(model, torch.empty(1, 3, 224, 224, device="meta"))
    assert profile.macs / 1e9 == pytest.approx(gmacs, rel=5e-4)
    assert profile.forward_flops / 1e9 == pytest.approx(gflops, rel=5e-4)
    assert profile.forward_flops / 1e9 != pytest.approx(circulating, rel=0.05)
