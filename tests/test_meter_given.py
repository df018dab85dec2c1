"""What a meter cannot take is one sentence, before anything runs; and what it can, of whatever make."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flopprof import Meter
from flopprof.analytic import TransformerShape, korthikanti_training, megatron_training
from flopprof.errors import UsageError
from flopprof.meter.peaks import Peaks


# --- what a meter cannot take -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("peak", "said"),
    [
        (0, "peak is FLOP/s above 0, got 0."),
        (-1e12, "peak is FLOP/s above 0, got -1000000000000.0."),
        (float("nan"), "peak is FLOP/s above 0, got nan."),
        (float("inf"), "peak is FLOP/s above 0, got inf."),
        (10**400, "peak is FLOP/s above 0, got 1000"),
        ({"fp32": 0}, "peak of 'fp32' is FLOP/s above 0, got 0."),
        ({"fp32": 0.3}, "peak of 'fp32' is FLOP/s above 0, got 0.3."),
        ({"fp32": float("nan")}, "peak of 'fp32' is FLOP/s above 0, got nan."),
        ({"fp32": float("inf")}, "peak of 'fp32' is FLOP/s above 0, got inf."),
        ({"fp32": "1e12"}, "peak of 'fp32' is FLOP/s above 0, got '1e12'."),
        ({"fp32": True}, "peak of 'fp32' is FLOP/s above 0, got True."),
        ({"foo": 1}, "peak is by dtype (float32, tf32, bf16 ...), got 'foo'."),
        ({1: 1}, "peak is by dtype (float32, tf32, bf16 ...), got 1."),
        ({}, "peak is a Peak, FLOP/s, a device's name or peaks by dtype, got {}."),
        ([], "peak is a Peak, FLOP/s, a device's name or peaks by dtype, got []."),
        (["H100"], "peak is a Peak, FLOP/s, a device's name or peaks by dtype, got ['H100']."),
        (True, "peak is a Peak, FLOP/s, a device's name or peaks by dtype, got True."),
        (torch.float32, "peak is a Peak, FLOP/s, a device's name or peaks by dtype, got torch.float32."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_peaks_that_are_none(peak: Any, said: str) -> None:
    with pytest.raises(UsageError) as error:
        Meter(nn.Linear(2, 2), peak=peak)
    assert str(error.value).startswith(said)


def test_peaks_as_people_type_them() -> None:
    assert Peaks(np.float32(2.0), "cpu").flops_per_s("float32") == 2.0
    assert Peaks({torch.bfloat16: np.int64(3)}, "cpu").flops_per_s("bfloat16") == 3
    eight = Peaks({"fp8": 5}, "cpu")
    assert (eight.flops_per_s("float8_e4m3fn"), eight.flops_per_s("float8_e5m2")) == (5, 5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tokens": 8.0}, "tokens is a whole number of at least 0, or a function of the batch, got 8.0."),
        ({"tokens": "x"}, "tokens is a whole number of at least 0, or a function of the batch, got 'x'."),
        ({"tokens": -3}, "tokens is a whole number of at least 0, or a function of the batch, got -3."),
        ({"samples": True}, "samples is a whole number of at least 0, or a function of the batch, got True."),
        ({"log": 5}, "log is a function, got 5."),
        ({"clock": 5}, "clock is a function, got 5."),
        ({"wall_clock": None}, "wall_clock is a function, got None."),
        ({"records": 5}, "records is the path of a file, got 5."),
        ({"records": "."}, "records is the path of a file, got '.', which is a directory."),
        ({"skip": 2.0}, "skip is a whole number of at least 0, got 2.0."),
        ({"skip": True}, "skip is a whole number of at least 0, got True."),
        ({"window": 0}, "window is a whole number of at least 1, got 0."),
        ({"log_every": "2"}, "log_every is a whole number of at least 1, got '2'."),
        ({"recount_every": -1}, "recount_every is a whole number of at least 1, got -1."),
        ({"convention": ["palm"]}, "convention ['palm'] is none of nanogpt, palm, megatron, torchtitan."),
        ({"attention": ["full"]}, "attention ['full'] is neither 'full' nor 'causal'."),
    ],
    ids=str,
)
def test_what_a_meter_cannot_take(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        Meter(nn.Linear(2, 2), **wrong)
    assert str(error.value) == said


def test_whole_numbers_of_numpy(tmp_path: Path) -> None:
    model = nn.Linear(8, 4)
    file = tmp_path / "run.jsonl"
    eight: Any = np.int64(8)
    with Meter(model, tokens=eight, samples=np.int32(2), skip=np.int64(1), log_every=eight, records=file) as meter:  # type: ignore[arg-type]
        for _ in range(3):
            with meter.step():
                model(torch.randn(2, 8)).sum().backward()
        assert [(record.tokens, record.samples) for record in meter.records] == [(8, 2)] * 3


@pytest.mark.parametrize(
    "state",
    [
        None, 5, {}, {"version": 1}, {"version": 1, "attention": "full"},
        {"version": 1, "attention": "full", "begun": 1, "trained": [], "history": {}, "counted": {}},
    ],
    ids=str,
)  # fmt: skip
def test_states_that_are_none(state: Any) -> None:
    """What is there already stays."""
    model = nn.Linear(8, 4)

    def step(meter: Meter) -> None:
        with meter.step():
            model(torch.randn(2, 8)).sum().backward()

    with Meter(model) as meter:
        step(meter)
        with pytest.raises(UsageError, match=r"this is no state of a Meter"):
            meter.load_state_dict(state)
        step(meter)
        assert [(record.step, record.model_flops, record.left_out) for record in meter.records] == [
            (0, 256, ("first", "counted")),
            (1, 256, ("first",)),
        ]


@pytest.mark.parametrize(
    "spoilt",
    [
        {"begun": "x"}, {"begun": -1}, {"trained": 5}, {"history": None}, {"counted": {"places": [1]}},
        {"counted": {"blind": False, "corrections": 0, "places": [(9, (), [])]}},
        {"history": {"records": [{"step": "x"}], "signatures": [], "uncounted": {}, "rows": {}}},
    ],
    ids=str,
)  # fmt: skip
def test_states_that_are_spoilt(spoilt: dict[str, Any]) -> None:
    model = nn.Linear(8, 4)
    with Meter(model) as meter:
        for _ in range(3):
            with meter.step():
                model(torch.randn(2, 8)).sum().backward()
        before = meter.state_dict()
        with pytest.raises(UsageError, match=r"this is no state of a Meter"):
            meter.load_state_dict({**before, **spoilt})
        assert meter.state_dict() == before


# --- what a script that follows Megatron-LM prints -------------------------------------------------------------------
def test_megatron_by_hand() -> None:
    """A layer of width 8, four heads of 2 of which two of keys and values, gated feed-forwards of 6, 5 tokens, V = 10.

    Products of a token's forward pass: queries and output 2 x 64, keys and values 2 x 8 x 4, attention 2 x 5 x 8, three
    of 8 x 6, logits 8 x 10: 128 + 64 + 80 + 144 + 80 = 496, each 2 FLOPs, and twice that in the backward pass.
    """
    sizes: dict[str, Any] = {"layers": 1, "d_model": 8, "heads": 4, "kv_heads": 2, "d_ff": 6, "vocab": 10, "seq": 5}
    dense = TransformerShape(**sizes, gated=True)
    assert megatron_training(dense, 1) == 3 * 2 * 5 * 496
    assert megatron_training(dense, 7) == 7 * megatron_training(dense, 1)
    # Two of four experts, and a shared one: three feed-forwards instead of one.
    experts = TransformerShape(**sizes, gated=True, experts=4, experts_per_token=2, shared_experts=1)
    assert megatron_training(experts, 1) == 3 * 2 * 5 * (496 + 2 * 144)
    # Not gated: two matrices instead of three. Two layers: everything but the logits twice.
    assert megatron_training(TransformerShape(**sizes), 1) == 3 * 2 * 5 * (496 - 48)
    assert megatron_training(TransformerShape(**{**sizes, "layers": 2}, gated=True), 1) == 3 * 2 * 5 * (2 * 416 + 80)
    # Heads of another size than width / heads: queries, output and attention are as wide as they are.
    wide = TransformerShape(**sizes, gated=True, d_head=3)
    assert megatron_training(wide, 1) == 3 * 2 * 5 * (2 * 96 + 2 * 8 * 6 + 2 * 5 * 12 + 144 + 80)


def test_megatron_of_a_gpt_is_the_papers() -> None:
    gpt = TransformerShape(layers=96, d_model=12288, heads=96, vocab=51200, seq=2048)
    assert megatron_training(gpt, 1536) == korthikanti_training(gpt, 1536)


def test_what_megatron_does_not_cover() -> None:
    sizes: dict[str, Any] = {"layers": 2, "d_model": 8, "heads": 4, "vocab": 10, "seq": 5}
    for more, said in (
        ({"encoder_layers": 2}, "an encoder beside the decoder"),
        ({"attention_parameters": 100}, "attention in a latent space"),
        ({"experts": 4, "experts_per_token": 2, "dense_layers": 1}, "experts in some of the layers only"),
    ):
        with pytest.raises(ValueError, match=said):
            megatron_training(TransformerShape(**sizes, **more), 1)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 10,
    "num_key_value_heads": 2,
    "intermediate_size": 6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(("config", "products"), [(LLAMA, 496), (MIXTRAL, 496 + 144)], ids=["llama", "mixtral"])
def test_megatron_of_a_metered_loop(config: dict[str, Any], products: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.layer = nn.Embedding(4, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.layer(ids)

    ticks = itertools.count()
    with Meter(Model(), peak=1e9, convention="megatron", clock=lambda: float(next(ticks))) as meter:
        for _ in range(4):
            with meter.step():
                meter.models[0](torch.zeros(3, 5, dtype=torch.long)).sum().backward()
        told, whole = meter.summary().convention, meter.summary().whole
    assert told is not None
    assert whole is not None
    assert told.flops_per_s == 3 * 3 * 2 * 5 * products / whole.step_time_s.median
