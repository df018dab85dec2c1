"""Several counters on one model: their readings, and differences whose parts are worked out here."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import flopprof
from flopprof.cli.main import app
from flopprof.crosscheck import check, flop_counter_mode
from flopprof.crosscheck.check import crosscheck
from flopprof.crosscheck.result import Crosscheck, Gap, Reading
from flopprof.models import Workload
from releases import WRITTEN_FOR_THIS
from zoo import ZOO

NETS = Path(__file__).parent / "sample_models" / "nets.py"
EXPORTED = NETS.with_name("exported.py")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
]


def checked(
    model: nn.Module, *args: torch.Tensor, backward: bool = False, device: str = "cpu", **kwargs: Any
) -> Crosscheck:
    workload = Workload(model=model, args=args, kwargs=kwargs, name="net", device=device)
    result = crosscheck(workload, backward=backward)
    first, *others = result.readings
    for reading in others:
        if reading.absent:
            assert reading.difference is None
            assert reading.forward_flops is None
            continue
        assert reading.forward_flops is not None
        assert reading.difference == sum(gap.flops for gap in reading.gaps) + reading.unexplained
        if reading.counter == "FlopCounterMode":
            assert reading.unexplained == 0
        expected = first.forward_flops or 0
        if reading.backward_flops is not None:
            expected += (first.backward_flops or 0) + (0 if reading.own else first.recompute_flops or 0)
        assert reading.difference == reading.forward_flops + (reading.backward_flops or 0) - expected
    return result


def reading(result: Crosscheck, counter: str) -> Reading:
    return next(reading for reading in result.readings if reading.counter == counter)


def reasons(result: Crosscheck, counter: str) -> dict[str, int]:
    return {gap.reason or gap.operator: gap.flops for gap in reading(result, counter).gaps}


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 16, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, self.weight, offs=torch.tensor([2, 6], dtype=torch.int32))


class Differentiates(nn.Module):
    """Its output is a gradient: FlopCounterMode cannot run it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.second(self.first(x)).sum(), x, create_graph=True)[0]


# --- reasons -------------------------------------------------------------------------------------
def test_a_plain_model_is_equal_everywhere() -> None:
    result = checked(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(3, 8), backward=True)
    assert result.agree
    assert [item.counter for item in result.readings] == [
        "flopprof count", "flopprof trace, fx", "flopprof trace, export", "FlopCounterMode", "fvcore"
    ]  # fmt: skip
    for item in result.readings:
        assert item.forward_flops == 2 * 3 * (8 * 16 + 16 * 4)
        assert item.difference == 0
        assert item.gaps == ()


def test_grouped_convolutions_and_by_how_much() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=32), nn.ConvTranspose2d(64, 32, 3, groups=4))
    result = checked(model, torch.randn(1, 3, 8, 8), backward=True)
    # a weight's gradient costs what the forward does: 2 x pixels x taps x channels out x channels in / groups
    grouped, transposed = 2 * 4 * 4 * 9 * 64 * 2, 2 * 4 * 4 * 9 * 64 * 8
    (gap,) = reading(result, "FlopCounterMode").gaps
    assert gap == Gap(
        operator="aten::convolution_backward",
        side="backward",
        flops=31 * grouped + 3 * transposed,
        reason="takes the weight gradient of a grouped convolution for that of an ungrouped one",
        multiples=(4, 32),
        modules=("1", "2"),
    )
    assert reading(result, "fvcore").difference == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_missing_from_fvcore(device: str) -> None:
    model, x = Attend().to(device), torch.randn(2, 5, 8, device=device)
    workload = Workload(
        model=model, args=(x,), kwargs={}, name="net", device=device,
        on_cpu=lambda: Workload(model=Attend(), args=(torch.randn(2, 5, 8),), kwargs={}, name="net", device="cpu"),
    )  # fmt: skip
    result = crosscheck(workload, backward=True)
    products = 2 * 2 * 2 * 2 * 5 * 5 * 4  # QK^T and PV, batch 2, 2 heads of 4
    assert reasons(result, "fvcore") == {"no scaled_dot_product_attention": -products}
    if WRITTEN_FOR_THIS:  # before, it did not know the CPU's fused attention
        assert reading(result, "FlopCounterMode").difference == 0
    assert reading(result, "flopprof count").recompute_flops == (products // 2 if device == "cpu" else 0)


def test_recurrences_are_missing_from_both() -> None:
    with torch.no_grad():
        result = checked(nn.LSTM(8, 16), torch.randn(5, 2, 8))
    flops = 2 * 10 * 64 * (8 + 16)
    assert reasons(result, "FlopCounterMode") == {"no aten::mkldnn_rnn_layer": -flops}
    assert reasons(result, "fvcore") == {"no lstm": -flops}


def test_experts_are_missing_from_both() -> None:
    result = checked(Experts(), torch.randn(6, 8, dtype=torch.bfloat16), backward=True)
    flops = 2 * 6 * 8 * 16
    gaps = reading(result, "FlopCounterMode").gaps
    assert {(gap.reason, gap.side, gap.flops) for gap in gaps} == {
        ("no aten::_grouped_mm", "forward", -flops), ("no aten::_grouped_mm", "backward", -flops)
    }  # fmt: skip
    assert reasons(result, "fvcore") == {"no _grouped_mm": -flops}


def test_what_a_fused_layer_hides() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with torch.no_grad():
        result = checked(model, torch.randn(2, 5, 16))
    flops = 2 * (2 * 5) * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 2 * 5 * 5 * 16
    assert reading(result, "flopprof count").forward_flops == flops
    assert reasons(result, "FlopCounterMode") == {"no aten::_transformer_encoder_layer_fwd": -flops}


def test_norms_are_elementwise_here_and_counted_by_fvcore() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)).eval()
    result = checked(model, torch.randn(2, 3, 5, 5))
    # two an element, and one an element of the input of the pool: multiply-adds, by fvcore's word
    assert reasons(result, "fvcore") == {
        "counts batch_norm, which is elementwise and apart in flopprof": 2 * 2 * (2 * 4 * 25),
        "counts adaptive_avg_pool2d, which is elementwise and apart in flopprof": 2 * (2 * 4 * 25),
    }


class Broadcast(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b


def test_the_batch_that_fvcores_matmul_leaves_out() -> None:
    result = checked(Broadcast(), torch.randn(4, 5), torch.randn(3, 5, 6))
    assert reasons(result, "fvcore") == {
        "leaves out of matmul the batch that only its second factor has": -2 * (3 - 1) * 4 * 5 * 6
    }


def test_complex_products() -> None:
    a = torch.randn(2, 3, dtype=torch.complex64)
    result = checked(Broadcast(), a, torch.randn(3, 4, dtype=torch.complex64))
    missing = -(8 - 2) * 2 * 3 * 4
    assert reasons(result, "FlopCounterMode") == {"counts a complex multiply-add as a real one": missing}
    assert reasons(result, "fvcore") == {"counts a complex multiply-add as a real one": missing}


@pytest.mark.skipif(not WRITTEN_FOR_THIS, reason="before, it did not know the CPU's attention")
def test_gradients_that_nobody_asked_for() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 2, 5, 4))

        def forward(self, keys: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(self.query, keys, keys)

    result = checked(Frozen(), torch.randn(1, 2, 5, 4), backward=True)
    product = 2 * 2 * 5 * 5 * 4
    extra = reading(result, "FlopCounterMode").difference
    ours = reading(result, "flopprof count")
    # five products in all, of which ours are those that the query's gradient needs, and the scores again
    assert extra == 5 * product - (ours.backward_flops or 0) - (ours.recompute_flops or 0)
    assert extra > 0
    assert reasons(result, "FlopCounterMode") == {
        "counts the gradients of query, key and value also where they are not asked for": extra
    }


def test_a_reason_is_given_only_where_the_numbers_bear_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    true = flop_counter_mode.sheet

    def changed(*args: Any, **kwargs: Any) -> Any:
        sheet = true(*args, **kwargs)
        sheet.counts["1", "backward"]["aten::convolution_backward"] += 2
        return sheet

    monkeypatch.setattr(flop_counter_mode, "sheet", changed)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    workload = Workload(model=model, args=(torch.randn(1, 4, 3, 3),), kwargs={}, name="net", device="cpu")
    result = reading(crosscheck(workload, backward=True), "FlopCounterMode")
    (gap,) = result.gaps
    assert gap.reason == ""
    # what its parts hold and its total does not
    assert result.unexplained == -2
    assert gap.flops + result.unexplained == result.difference == 2 * 9 * 4 * 2


# --- counters that have no number ----------------------------------------------------------------
def test_a_counter_that_crashes_says_so_in_one_line_and_the_model_is_as_it_was() -> None:
    model = Differentiates()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    result = checked(model, torch.randn(2, 4))
    crashed = reading(result, "FlopCounterMode")
    if WRITTEN_FOR_THIS:
        assert crashed.absent.startswith("RuntimeError: ")
        assert "\n" not in crashed.absent
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Questions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) if x.nonzero().shape[0] > 3 else x


def test_an_engine_that_cannot_trace_says_why_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    result = checked(Questions(), torch.ones(2, 4))
    for engine in ("fx", "export"):
        absent = reading(result, f"flopprof trace, {engine}").absent
        assert f"torch.{engine} cannot trace Questions" in absent
        assert len(absent) <= 400
    assert result.agree
    assert reading(result, "FlopCounterMode").forward_flops == 2 * 2 * 16
    assert capfd.readouterr() == ("", "")


def test_fvcore_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "fvcore" else find(name, *rest)
    )
    result = checked(nn.Linear(2, 3), torch.randn(1, 2))
    assert reading(result, "fvcore").absent == "not installed: pip install fvcore"


def test_fvcore_needs_values_and_a_model_of_a_size() -> None:
    meta = checked(nn.Linear(2, 3, device="meta"), torch.ones(1, 2, device="meta"), device="meta")
    assert "--device" in reading(meta, "fvcore").absent
    large = checked(nn.Linear(40_000, 40_000, device="meta"), torch.ones(1, 40_000, device="meta"), device="meta")
    assert "too large" in reading(large, "fvcore").absent


def test_keyword_inputs_and_mappings_as_output() -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 5)

        def forward(self, *, x: torch.Tensor, times: int) -> dict[str, torch.Tensor]:
            return {"y": self.net(x) * times}

    result = checked(Keyed(), x=torch.randn(3, 4), times=2)
    assert reading(result, "fvcore").forward_flops == reading(result, "FlopCounterMode").forward_flops == 2 * 3 * 20


# --- our own engines -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gpt", "experts", "lora", "recurrent", "unet", "bert"])
def test_every_difference_in_the_zoo_has_a_reason(name: str) -> None:
    model, inputs = ZOO[name]()
    result = checked(model, *inputs, backward=True)
    assert result.agree
    for item in result.readings:
        assert item.unexplained == 0
        assert all(gap.reason for gap in item.gaps), item


def doctored(trace: Any) -> Any:
    def changed(*args: Any, **kwargs: Any) -> Any:
        profile = trace(*args, **kwargs)
        rows = [
            msgspec.structs.replace(row, flops=row.flops + 6) if row.fqn == "down" else row for row in profile.operators
        ]
        return msgspec.structs.replace(profile, operators=tuple(rows))

    return changed


def test_engines_that_disagree_are_told_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "trace", doctored(Workload.trace))
    result = run("crosscheck", f"{NETS}:Mlp", "--input", "2x8")
    assert result.exit_code == 1
    assert "flopprof's own engines disagree on" in result.stderr
    assert " in down: please report it." in result.stderr
    assert re.search(r"^ +down, forward: flopprof trace, fx 262, count 256$", result.stdout, re.MULTILINE)


def test_a_model_that_runs_other_code_where_it_is_exported() -> None:
    result = run("crosscheck", f"{EXPORTED}:Asks", "--input", "2x8")
    assert result.exit_code == 1
    assert " in down: one of them had to assume something, see there." in result.stderr
    told = " ".join(result.stdout.split())
    assert "assumed: exported.py asks whether it is exported, and may run other code then: that is" in told
    assert re.search(r"^ +down, forward: flopprof trace, export 256, count 128$", result.stdout, re.MULTILINE)


def test_folded_blocks_are_another_way_to_the_same_counts() -> None:
    result = crosscheck(flopprof.load(f"{NETS}:Stack", inputs=["1x8"], device="meta"), backward=True)
    folded = reading(result, "flopprof count, blocks folded")
    assert folded.forward_flops == result.readings[0].forward_flops == 2 * 7 * 64
    assert result.agree


def test_a_graph_is_not_checked_against_itself(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 3), (torch.ones(1, 2),)), tmp_path / "net.pt2")
    result = run("crosscheck", f"{tmp_path}/net.pt2")
    assert result.exit_code == 2
    assert "cross-check the model that it was exported from" in result.stderr


# --- published figures ---------------------------------------------------------------------------
def test_torchvisions_figures_agree_to_their_rounding() -> None:
    pytest.importorskip("torchvision")
    result = crosscheck(flopprof.load("squeezenet1_1"))
    published = reading(result, "torchvision _ops")
    assert published.forward_flops == 2 * 349_000_000
    assert published.unexplained == 0
    assert abs(published.difference or 0) <= 1_000_000
    assert [gap.reason for gap in published.gaps] == ["torchvision rounds to three decimals of a GMAC"]


def test_torchvisions_figures_are_for_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    for name in ("_fvcore", "_flop_counter_mode"):
        monkeypatch.setattr(check, name, lambda *_, **__: Reading(counter="", absent="not now"))

    def absent(**options: Any) -> str:
        return reading(crosscheck(flopprof.load("squeezenet1_1", **options)), "torchvision _ops").absent

    assert absent(batch=2) == absent(image_size=128) == "published for input 1x3x224x224 float32"
    assert absent(train=True) == "published for evaluation"
    assert absent(model_args={"num_classes": 10}) == "published for the model's default arguments"


def test_a_published_figure_that_does_not_fit_is_unexplained(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    for name in ("_fvcore", "_flop_counter_mode"):
        monkeypatch.setattr(check, name, lambda *_, **__: Reading(counter="", absent="not now"))
    monkeypatch.setattr(check.published, "published_flops", lambda workload: 10**12)
    result = crosscheck(flopprof.load("squeezenet1_1"))
    published = reading(result, "torchvision _ops")
    assert published.unexplained == published.difference == 10**12 - (result.readings[0].forward_flops or 0)
    assert published.gaps == ()


# --- the command ---------------------------------------------------------------------------------
def run(*arguments: str, width: int = 80) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width), "NO_COLOR": "1"})


def test_the_command_prints_one_table_in_one_unit() -> None:
    result = run("crosscheck", f"{NETS}:Mlp", "--input", "2x8", "--backward")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= 80
    # (8 -> 16) and (16 -> 4) on 2 rows; backward: both weights' gradients, and one hidden gradient
    for counter in ("flopprof count", "flopprof trace, fx", "flopprof trace, export", "FlopCounterMode"):
        assert re.search(rf"^{counter} +0\.768 +1\.024 +equal$", result.stdout, re.MULTILINE), result.stdout
    assert re.search(r"^fvcore \(MACs x 2\) +0\.768 +equal$", result.stdout, re.MULTILINE)
    assert "1 MAC = 1 multiply-add = 2 FLOPs" in result.stdout
    assert "its engines agree, module by module" in result.stdout


def test_the_command_explains(tmp_path: Path) -> None:
    file = tmp_path / "grouped.py"
    file.write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(*(nn.Conv2d(8, 8, 3, groups=4, padding=1) for _ in range(3)))\n"
    )
    result = run("crosscheck", f"{file}:build", "--input", "1x8x6x6", "--backward")
    text = " ".join(result.stdout.split())
    extra = 3 * (4 - 1) * 2 * 8 * 36 * (2 * 9)
    assert (
        "FlopCounterMode takes the weight gradient of a grouped convolution for that of an ungrouped one (x4): "
        f"{extra / 1000:.3f} kFLOPs too many in backward, in 0..2 " in text
    )


def test_json_holds_everything(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    result = run("crosscheck", f"{NETS}:Mlp", "--input", "2x8", "--json", str(file))
    assert result.exit_code == 0, result.output
    written = msgspec.json.decode(file.read_bytes(), type=Crosscheck)
    assert written.to_json() == file.read_text()
    assert written.readings[0].forward_flops == 768
    assert "Counter" in result.stdout
    piped = run("crosscheck", f"{NETS}:Mlp", "--input", "2x8", "--json", "-")
    assert json.loads(piped.stdout)["schema"] == "flopprof.crosscheck/1"


def test_wrong_usage_and_a_model_that_fails() -> None:
    assert run("crosscheck", "resnet5").exit_code == 2
    failed = run("crosscheck", f"{NETS}:Fails", "--input", "2x8")
    assert failed.exit_code == 1
    assert failed.stderr.startswith("flopprof: ")
    assert failed.stdout == ""


def test_a_pipe_gets_plain_text_and_nothing_from_the_tools() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flopprof", "crosscheck", f"{NETS}:Mlp", "--input", "2x8"],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
