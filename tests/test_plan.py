"""Plans: the figures that circulate, the relations between them, and where they contradict each other."""

from __future__ import annotations

import math
import subprocess
import sys

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import flopprof
from flopprof.errors import NoPeak, UnknownDevice, UsageError
from flopprof.plan.make import plan
from flopprof.plan.optima import optima
from flopprof.plan.published import runs
from flopprof.plan.relations import EQUATIONS, solve
from flopprof.plan.result import Plan

B, T = 10**9, 10**12


# --- figures that circulate --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("params", "tokens", "flops", "days"),
    [
        (110 * 10**6, 137 * 10**8, 9.04e18, 0.34),  # BERT-base, as it circulates
        (109 * 10**6, 250 * B, 1.64e20, 6.06),  # as GPT-3's table has it
        (15 * 10**8, 40 * B, 3.6e20, 13.4),  # GPT-2
        (175 * B, 300 * B, 3.15e23, 11685),  # GPT-3
        (70 * B, 14 * 10**11, 5.88e23, 21813),  # Chinchilla
    ],
)
def test_training_runs_in_days_of_an_a100(params: int, tokens: int, flops: float, days: float) -> None:
    found = plan(params=params, tokens=tokens, hardware="A100")
    assert found.flops == 6 * params * tokens == pytest.approx(flops, rel=4e-3)
    assert found.device_days == pytest.approx(days, rel=0.015)
    assert found.mfu_assumed
    assert "MFU 100 %" in found.assumptions[0]


def test_gpt3_by_its_papers_flops() -> None:
    assert round(plan(flops=314 * 10**21, hardware="A100", params=175 * B).device_days or 0) == 11_648


def test_seven_billion_on_a_trillion() -> None:
    found = plan(params=7 * B, tokens=T, hardware="H100", mfu=0.5, price=2.0)
    assert found.flops == 42 * 10**21
    assert round(found.device_hours or 0) == 23_583  # "about 500 H100-hours"
    assert round(found.cost_usd or 0) == 47_167  # "about $1,000"
    assert found.energy_j == pytest.approx(23_583.3 * 3600 * 700, rel=1e-5)
    assert (found.assumptions, found.warnings) == ((), ())


def test_a_thousand_tokens_of_175_billion() -> None:
    found = plan(params=175 * B, tokens=300 * B)
    assert found.serving is not None
    assert 1000 * found.serving.flops_per_token == 35 * 10**13
    assert (found.flops or 0) / (1000 * found.serving.flops_per_token) == pytest.approx(9e8)


def test_the_memory_wall() -> None:
    found = plan(params=70 * B, peak=1000e12, bandwidth=3e12).serving
    assert found is not None
    assert found.flops_per_token == 14 * 10**10
    assert found.compute_s == pytest.approx(0.14e-3)
    assert found.weight_bytes == 140 * B
    assert found.memory_s == pytest.approx(140 / 3000)  # 47 ms
    assert found.bound == "memory"
    assert found.tokens_per_s == pytest.approx(3000 / 140)
    assert found.compute_bound_from == math.ceil((140 / 3000) / 0.14e-3)


def test_hardware_of_the_background() -> None:
    with pytest.raises(NoPeak):
        plan(params=7 * B, tokens=T, hardware="V100", dtype="bf16")
    assert plan(params=7 * B, tokens=T, hardware="V100").peak_flops_per_s == 125 * T
    assert plan(params=7 * B, tokens=T, hardware="H100").peak_flops_per_s == 9894 * 10**11
    assert plan(params=7 * B, tokens=T, hardware="A100 40GB").bytes_per_s == 1555e9


# --- published runs ----------------------------------------------------------------------------------
IMPLIED = {
    "GPT-3 175B": 0.197,
    "OPT-175B": 0.208,
    "BLOOM-176B": 0.318,
    "LLaMA-7B": 0.434,
    "LLaMA-13B": 0.514,
    "LLaMA-33B": 0.458,
    "LLaMA-65B": 0.477,
    "Llama 2 7B": 0.391,
    "Llama 2 13B": 0.377,
    "Llama 2 70B": 0.429,
    "Llama 3.1 405B": 0.346,
    "DeepSeek-V3": 0.346,
    "DeepSeek-V3 fp8": 0.173,
}


def test_published_runs_imply_their_utilisation() -> None:
    assert {run.name: pytest.approx(run.utilisation, abs=1e-3) for run in runs()} == IMPLIED


@pytest.mark.parametrize("run", [run for run in runs() if run.device_hours is not None], ids=lambda run: run.name)
def test_a_plan_finds_the_same_utilisation(run: object) -> None:
    assert isinstance(run, type(runs()[0]))
    found = plan(
        params=run.params, tokens=run.tokens, hardware=run.device, dtype=run.dtype, device_hours=run.device_hours
    )
    assert found.mfu == pytest.approx(run.utilisation)
    assert not found.mfu_assumed


def test_deepseeks_bill() -> None:
    """2.788 million hours of an H800 at $2: $5.576 million."""
    assert plan(hardware="H800", device_hours=2_788_000, price=2.0, mfu=0.3).cost_usd == 5_576_000


def test_llamas_energy() -> None:
    """Device-hours x 400 W x PUE 1.1, and 0.385 kg a kWh: 36 MWh and 14 t for 7B, 449 MWh and 173 t for 65B."""
    for params, tokens, hours, mwh, tonnes in ((67, 1.0, 82_432, 36, 14), (652, 1.4, 1_022_362, 449, 173)):
        found = plan(
            params=params * B // 10,
            tokens=round(tokens * T),
            hardware="A100",
            device_hours=hours,
            pue=1.1,
            co2_kg_per_kwh=0.385,
        )
        assert (found.energy_j or 0) / 3.6e9 == pytest.approx(mwh, rel=0.01)
        assert (found.co2_kg or 0) / 1000 == pytest.approx(tonnes, rel=0.01)
    assert found.power_is == "TDP"
    assert plan(params=B, tokens=T, hardware="A100", device_hours=10, power_w=350).power_w == 350
    assert plan(params=B, tokens=T, hardware="TPU v4").energy_j is None


# --- from some, the rest -----------------------------------------------------------------------------
def test_days_on_devices() -> None:
    found = plan(params=7 * B, tokens=T, hardware="H100", mfu=0.5, devices=256)
    assert found.days == pytest.approx(23_583.316 / 24 / 256, rel=1e-6)
    devices = plan(params=7 * B, tokens=T, hardware="H100", mfu=0.5, days=30).devices
    assert devices == pytest.approx(23_583.316 / 24 / 30, rel=1e-6)


def test_money_buys_hours_buy_flops() -> None:
    found = plan(hardware="H100", mfu=0.4, price=2.5, cost=1e6)
    assert found.device_hours == 400_000
    assert found.flops == pytest.approx(400_000 * 3600 * 0.4 * 989.4e12, rel=1e-12)
    assert found.params == pytest.approx(math.sqrt((found.flops or 0) / 120), rel=1e-6)  # 20 tokens each
    assert "20 tokens a parameter" in found.assumptions[0]


def test_a_budget_and_a_model_give_tokens() -> None:
    assert plan(params=7 * B, flops=42 * 10**21).tokens == T
    assert plan(tokens=T, flops=42 * 10**21).params == 7 * B


def test_experts_count_by_those_that_are_visited() -> None:
    found = plan(params=671 * B, active_params=37 * B, tokens=148 * 10**11)
    assert found.flops == 6 * 37 * B * 148 * 10**11
    assert found.memory is not None
    assert found.memory.weights_bytes == 2 * 671 * B


def test_the_detailed_form() -> None:
    """Three forwards; a forward of Llama 3.1 8B is 15,009,316,864 b s + 524,288 b s^2."""
    found = plan("llama-3.1-8b", seq=8192, tokens=15 * T, hardware="H100", devices=1024, mfu=0.4)
    assert found.flops_detailed == found.flops == 3 * (15_009_316_864 + 524_288 * 8192) * 15 * T
    assert found.flops_6nd == 6 * 8_030_261_248 * 15 * T
    by_n = plan("llama-3.1-8b", tokens=15 * T, count_by="6nd")
    assert by_n.flops == by_n.flops_6nd
    assert plan("Llama-3.1-8B", tokens=T).seq == 4096


def test_a_shape_is_as_good_as_a_name() -> None:
    sizes = {"layers": 32, "d_model": 4096, "heads": 32, "kv_heads": 8, "vocab": 128256, "d_ff": 14336}
    shaped = plan(shape={**sizes, "gated": True, "tied": False}, seq=8192, tokens=T)
    named = plan("llama-3.1-8b", seq=8192, tokens=T)
    assert shaped.flops == named.flops
    assert shaped.serving is not None
    assert named.serving is not None
    assert shaped.serving.flops_per_token == named.serving.flops_per_token
    assert shaped.serving.cache_bytes_per_token == named.serving.cache_bytes_per_token == 2 * 2 * 32 * 8 * 128
    assert shaped.params == (named.params or 0) - 65 * 4096  # norms


def test_a_model_without_a_closed_form_has_its_counted_cost() -> None:
    found = plan("mamba-130m", tokens=T, seq=512)
    assert found.flops_detailed is not None
    assert "no closed form is known" in found.assumptions[0]


def test_a_device_may_be_a_part_or_a_whole_chip() -> None:
    assert "a device of MI250X GCD is one GCD" in plan(params=B, tokens=T, hardware="MI250X", mfu=0.3).assumptions[0]
    assert "a device of TPU v4 is one chip" in plan(params=B, tokens=T, hardware="TPU v4", mfu=0.3).assumptions[0]


def test_two_stacks_have_no_detailed_form() -> None:
    shape = {"layers": 2, "encoder_layers": 2, "d_model": 8, "heads": 2, "vocab": 16}
    found = plan(shape=shape, tokens=T)
    assert (found.counted_by, found.flops_detailed, found.serving) == ("6nd", None, None)
    assert found.flops == 6 * (found.params or 0) * T


def test_an_encoder_decodes_nothing() -> None:
    assert plan("bert-base", tokens=T).serving is None
    assert plan("t5-base", tokens=T).serving is None


UNKNOWNS = sorted({term for _, left, right in EQUATIONS for term in (*left, *right)} - {"six", "hour_s", "day_h"})


@given(
    st.floats(1e6, 1e13),
    st.floats(1e6, 1e14),
    st.floats(1e12, 1e16),
    st.floats(0.05, 1),
    st.floats(1, 1e5),
    st.floats(0.1, 100),
    st.sets(st.sampled_from(UNKNOWNS), min_size=2),
)
def test_whatever_is_left_out_comes_back(
    n: float, tokens: float, peak: float, mfu: float, devices: float, price: float, kept: set[str]
) -> None:
    flops = 6 * n * tokens
    hours = flops / 3600 / peak / mfu
    world = {
        "active_params": n,
        "flops_per_token": 6 * n,
        "tokens": tokens,
        "flops": flops,
        "peak_flops_per_s": peak,
        "mfu": mfu,
        "device_hours": hours,
        "devices": devices,
        "days": hours / 24 / devices,
        "usd_per_device_hour": price,
        "cost_usd": price * hours,
    }
    assert world.keys() == set(UNKNOWNS)
    found = solve({name: world[name] for name in kept})
    assert {name: found[name] for name in UNKNOWNS if name in found} == {
        name: pytest.approx(world[name]) for name in UNKNOWNS if name in found
    }
    # nothing is left that an equation could still give
    for _, left, right in EQUATIONS:
        assert sum(term not in found for term in (*left, *right)) != 1


@given(st.sampled_from(["tokens", "flops", "mfu", "device_hours", "cost_usd"]), st.floats(1.02, 100))
def test_what_contradicts_itself_is_refused(name: str, factor: float) -> None:
    world = {"active_params": 7e9, "tokens": 1e12, "flops": 4.2e22, "peak_flops_per_s": 1e15, "mfu": 0.5}
    world |= {"device_hours": 4.2e22 / 3600 / 5e14, "usd_per_device_hour": 2.0}
    world["cost_usd"] = 2 * world["device_hours"]
    assume(name in world)
    solve(world)
    with pytest.raises(UsageError, match="these contradict each other"):
        solve({**world, name: world[name] * factor})


@given(st.integers(10**15, 10**27))
def test_optima_spend_the_budget(flops: int) -> None:
    rule, refit, _printed = optima(flops)
    assert rule.tokens / rule.params == pytest.approx(20, rel=1e-3)
    for found in (rule, refit):
        assert 6 * found.params * found.tokens == pytest.approx(flops, rel=1e-3)


def test_the_fits_optimum_is_one() -> None:
    """The minimum of A / N^a + B / D^b at 6 N D = C: a step to either side costs more."""
    flops = 576 * 10**21
    a, b, alpha, beta = 482.01, 2085.43, 0.3478, 0.3658
    best = optima(flops)[1].params

    def loss(n: float) -> float:
        return a / n**alpha + b / (flops / 6 / n) ** beta

    assert loss(best) < min(loss(best * 1.02), loss(best / 1.02))
    assert 60 * B < best < 80 * B  # Chinchilla's own 70 B


# --- what is wrong is said ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing follows from that: give a model"),
        ({"hardware": "H100"}, "nothing follows from that"),
        ({"params": 0}, "params must be positive, got 0"),
        ({"params": B, "active_params": 2 * B}, "active params must be between 1 and all 1,000,000,000"),
        ({"active_params": B}, "active params need params too"),
        ({"params": B, "tokens": -1}, "tokens must be positive, got -1"),
        ({"params": B, "mfu": 40}, "mfu is a fraction of the peak, at most 1, got 40: write 40 % as 0.4"),
        ({"params": B, "pue": 0.9}, "pue is at least 1"),
        ({"params": B, "pue": float("nan")}, "pue is at least 1, and finite .*, got nan"),
        ({"params": B, "pue": float("inf")}, "pue is at least 1, and finite .*, got inf"),
        ({"params": B, "co2_kg_per_kwh": -1.0}, "co2 is in kg a kWh, a number that is not negative, got -1"),
        ({"params": B, "co2_kg_per_kwh": float("nan")}, "co2 is in kg a kWh, a number that is not negative, got nan"),
        ({"params": B, "days": float("inf")}, "days must be positive, got inf"),
        ({"params": B, "seq": 0}, "seq must be 1 or more, got 0"),
        ({"params": B, "tokens": T, "flops": 10**22}, "these contradict each other: flops = flops per token x tokens"),
        ({"params": B, "count_by": "detailed"}, "the detailed form needs a model's name or shape"),
        ({"params": B, "count_by": "7nd"}, "counted by 6nd or detailed, got '7nd'"),
        ({"model": "gpt2", "params": B}, "'gpt2' says how large it is"),
        ({"model": "gpt5"}, "no model goes by 'gpt5': `flopprof models` lists them"),
        ({"model": "llama-3"}, "Near: .*llama-3-8b"),
        ({"model": "vit-base-patch16"}, "vit-base-patch16 is no text model .vision.: a plan is in tokens"),
        ({"shape": {"layers": 2}}, "not the shape of a transformer: .*d_model"),
        (
            {"shape": {"layers": 2, "d_model": 8, "heads": 2, "vocab": 9, "colour": 3}},
            "a shape has no colour",
        ),
        ({"shape": {"layers": 0, "d_model": 8, "heads": 2, "vocab": 9}}, "layers is a positive whole number"),
    ],
)
def test_wrong_use(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(**options)  # type: ignore[arg-type]


def test_an_unknown_device_is_not_another() -> None:
    with pytest.raises(UnknownDevice):
        plan(params=B, tokens=T, hardware="H1000")


def test_more_than_the_peak_is_told_and_kept() -> None:
    found = plan(params=7 * B, tokens=T, hardware="H100", device_hours=500)
    assert found.mfu == pytest.approx(23.583, rel=1e-4)
    assert "more than the peak allows" in found.warnings[0]


def test_json_comes_back() -> None:
    found = plan("llama-3.1-8b", tokens=T, hardware="H100", mfu=0.4, price=2.0)
    assert msgspec.json.decode(found.to_json(), type=Plan) == found


def test_a_plan_needs_no_torch_and_the_package_is_the_function() -> None:
    code = (
        "import sys, flopprof; from flopprof.plan import make; from flopprof.report import plan; "
        "assert flopprof.plan(params=7, tokens=9).flops == 378; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert flopprof.plan(params=7, tokens=9).flops == 378
