"""Models side by side: figures derived by hand, ratios, the Pareto front, variants of one model."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import flopprof
from flopprof.compare.comparison import FIGURES, Accuracy, Comparison, Density, Latency, Row, side_by_side
from flopprof.compare.latency import measure_latency, summarised
from flopprof.compare.memory import training_memory
from flopprof.compare.run import compare, ideal
from flopprof.errors import InvalidProfile, UnknownDevice, UsageError
from flopprof.hardware import device
from flopprof.report.comparison import render, tables
from flopprof.report.comparison_files import COLUMNS, to_csv, to_html, to_markdown

ROWS = 5


def net(hidden: int = 8) -> nn.Sequential:
    """4 -> hidden -> 2."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 2))


def row(name: str, flops: int, accuracy: float | None = None, **more: object) -> Row:
    published = None if accuracy is None else Accuracy(metric="acc@1", value=accuracy, dataset="D", weights="W")
    return Row(name=name, forward_flops=flops, accuracy=published, **more)  # type: ignore[arg-type]


# --- one row, by hand ---------------------------------------------------------------------------
def test_every_figure_of_a_small_net() -> None:
    (found,) = compare([(net(), torch.zeros(ROWS, 4))], hardware="H100")
    first, second, biases = ROWS * 4 * 8, ROWS * 8 * 2, 8 + 2
    assert found.name == "Sequential"
    assert found.n_params == found.n_params_trainable == 4 * 8 + 8 * 2 + biases
    assert found.forward_flops == 2 * (first + second)
    # two gradients of weights, and that of the hidden layer; the input wants none
    assert found.backward_flops == 2 * (first + second) + 2 * second
    assert found.training_flops == found.forward_flops + found.backward_flops
    assert found.macs == first + second
    assert found.elementwise_flops == 8 * ROWS
    # operands read once, results written once, float32; addmm reads the bias too
    moved = (ROWS * 4 + 4 * 8 + 8 + ROWS * 8) + (ROWS * 8 + 8 * 2 + 2 + ROWS * 2)
    assert found.bytes_moved == 4 * moved
    assert found.arithmetic_intensity == found.forward_flops / (4 * moved)
    assert found.memory is not None
    assert found.memory.activations == 4 * (ROWS * 4 + ROWS * 8)  # the input, and what ReLU gives, once
    assert found.memory.weights == found.memory.gradients == 4 * found.n_params
    assert found.memory.optimizer == 8 * found.n_params
    assert found.memory.peak == found.memory.activations + 16 * found.n_params
    weights = 4 * 8 + 8 * 2
    assert found.size_bytes == {
        "stored": 4 * (weights + biases),
        "float32": 4 * (weights + biases),
        "bfloat16": 2 * (weights + biases),
        "int8": weights + 2 * (8 + 2) + 2 * biases,  # a 16-bit scale for each of 8 + 2 rows
        "int4": weights // 2 + 2 * (8 + 2) + 2 * biases,  # a row is shorter than a group
    }
    peak = device("H100").peak("float32")
    assert found.ideal is not None
    assert found.ideal.compute_s == pytest.approx(found.forward_flops / peak.flops_per_s)
    assert found.ideal.memory_s == pytest.approx(4 * moved / peak.bytes_per_s)
    assert found.ideal.seconds == max(found.ideal.compute_s, found.ideal.memory_s)
    assert found.ideal.bound == "memory"


def test_groups_of_four_bit_weights_have_a_scale_each() -> None:
    (found,) = compare([(nn.Linear(300, 7, bias=False), torch.zeros(1, 300))])
    assert found.size_bytes["int4"] == 7 * 300 // 2 + 2 * 7 * 3  # 300 = 128 + 128 + 44
    assert found.size_bytes["int8"] == 7 * 300 + 2 * 7


def test_an_embedding_that_is_only_looked_up_stays_in_16_bit_and_a_tied_one_does_not() -> None:
    class Words(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.words = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            if tied:
                self.head.weight = self.words.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(ids))

    ids = torch.zeros(1, 3, dtype=torch.long)
    untied, tied = compare({"untied": (Words(False), ids), "tied": (Words(True), ids)})
    assert untied.size_bytes["int8"] == (66 + 2 * 11) + 2 * 66
    assert tied.size_bytes["int8"] == 66 + 2 * 11
    assert (untied.size_bytes["stored"], tied.size_bytes["stored"]) == (2 * 4 * 66, 4 * 66)


def test_buffers_that_are_not_saved_take_no_disk_but_memory() -> None:
    model = nn.Linear(4, 4, bias=False)
    model.register_buffer("kept", torch.zeros(3))
    model.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
    model.register_buffer("scratch", torch.zeros(100), persistent=False)
    (found,) = compare([(model, torch.zeros(1, 4))])
    assert found.size_bytes["stored"] == 4 * 16 + 4 * 3 + 8 * 2
    assert found.size_bytes["bfloat16"] == 2 * 16 + 2 * 3 + 8 * 2
    assert found.memory is not None
    assert found.memory.weights == 4 * 16 + 4 * 3 + 8 * 2 + 4 * 100


# --- memory -------------------------------------------------------------------------------------
class Attend(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(width, 3 * width), heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(*parts)


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_attention_keeps_what_a_fused_kernel_keeps_wherever_it_runs(place: str) -> None:
    held = training_memory(Attend().to(place), (torch.zeros(2, 7, 16, device=place),), {})
    # the input, q k v in one storage, the result, and a float32 for each of 2 x 2 x 7 queries: no 7 x 7 scores
    assert held.activations == 4 * (2 * 7 * 16 + 2 * 7 * 48 + 2 * 7 * 16 + 2 * 2 * 7)


class Blocks(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize(("reentrant", "elements"), [(None, 10 * (8 + 32)), (False, 10 * 8), (True, 10 * 8)])
def test_checkpointed_blocks_keep_their_inputs_alone(reentrant: bool | None, elements: int) -> None:
    held = training_memory(Blocks(reentrant), (torch.zeros(10, 8).requires_grad_(),), {})
    assert held.activations == 3 * 4 * elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("train", [False, True])
def test_meta_holds_what_the_cpu_holds(train: bool, dtype: torch.dtype) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.batch = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.layer, self.up = nn.LayerNorm([6, 8, 8]), nn.Linear(6 * 64, 10)
            self.last = nn.LayerNorm(10, elementwise_affine=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(self.batch(self.conv(x)).sigmoid())
            return self.last(self.up(x.flatten(1)))

    model = Normed().to(dtype).train(train)
    here = training_memory(model, (torch.zeros(2, 3, 8, 8, dtype=dtype),), {})
    there = training_memory(model.to("meta"), (torch.zeros(2, 3, 8, 8, dtype=dtype, device="meta"),), {})
    assert here == there
    # input, convolution, sigmoid, layer norm, its last product, statistics of each row and of each channel in training
    held = 2 * 3 * 64 + 3 * 2 * 6 * 64 + 2 * 10 + 2 * 2 * 2 + (2 * 6 if train else 0)
    assert here.activations == dtype.itemsize * held


def test_what_is_frozen_has_no_gradient_and_no_optimizer_state() -> None:
    model = net()
    model[0].requires_grad_(False)
    (found,) = compare([(model, torch.zeros(ROWS, 4))])
    assert found.memory is not None
    assert found.memory.gradients == 4 * (8 * 2 + 2) == found.memory.optimizer // 2
    assert found.memory.activations == 4 * ROWS * 8  # the second layer's input
    assert found.n_params_trainable == 18


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    compare([(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))], measure=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


# --- variants of one model ----------------------------------------------------------------------
def test_masks_leave_flops_and_tell_the_density() -> None:
    masked, inputs = net(), torch.zeros(ROWS, 4)
    prune.l1_unstructured(masked[0], "weight", amount=0.75)
    base, found = compare({"base": (net(), inputs), "masked": (masked, inputs)})
    assert found.forward_flops == base.forward_flops == base.sparse_forward_flops
    assert found.density == Density(nonzero=8 + 16, elements=32 + 16)
    assert found.sparse_forward_flops == 2 * ROWS * (8 + 16)
    assert base.density == Density(nonzero=48, elements=48)


def test_zeros_in_the_weights_of_a_convolution_are_told_without_masks() -> None:
    model = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    with torch.no_grad():
        model.weight[:3] = 0
    (found,) = compare([(model, torch.zeros(1, 2, 5, 5))])
    assert found.forward_flops == 2 * 25 * 4 * 18
    assert found.sparse_forward_flops == 2 * 25 * 1 * 18


def test_a_parametrization_is_applied_before_zeros_are_counted() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", (torch.arange(8) < 4).float()[:, None])

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * self.mask

    model = nn.Linear(4, 8, bias=False)
    nn.utils.parametrize.register_parametrization(model, "weight", Masked())
    (found,) = compare([(model, torch.zeros(ROWS, 4))])
    assert found.density == Density(nonzero=16, elements=32)


def test_meta_has_no_values_and_says_so() -> None:
    masked = net().to("meta")
    prune.l1_unstructured(masked[0], "weight", amount=0.5)
    found, plain = compare(
        {"masked": (masked, torch.zeros(1, 4, device="meta")), "plain": (net().to("meta"), torch.zeros(1, 4))}
    )
    assert found.density is found.sparse_forward_flops is plain.density is None
    assert any("--device cpu" in note for note in found.notes)
    assert plain.notes == ()


def test_structured_pruning_lora_sharing_and_a_student() -> None:
    class Shared(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            layers = [nn.Linear(4, 4, bias=False) for _ in range(3)]
            self.layers = nn.ModuleList(layers[:1] * 3 if shared else layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    inputs = torch.zeros(ROWS, 4)
    found = compare(
        {
            "teacher": (net(8), inputs),
            "channels removed": (net(4), inputs),
            "apart": (Shared(False), inputs),
            "shared": (Shared(True), inputs),
        }
    )
    assert found.ratios("flops")["channels removed"] == 0.5
    assert found["shared"].forward_flops == found["apart"].forward_flops
    assert 3 * (found["shared"].n_params or 0) == found["apart"].n_params
    assert found.reference == "teacher"


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_a_quantised_model_has_sizes_and_no_training() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(net().eval(), dtype=torch.qint8)
    (found,) = compare([(quantised, torch.zeros(ROWS, 4))])
    assert found.forward_flops == 2 * ROWS * 48
    assert found.training_flops is found.memory is found.density is None
    assert "wants a gradient" in found.notes[0]
    # 48 elements in int8, 10 biases in float32; per layer a float32 scale and an int64 zero point
    assert found.size_bytes["stored"] == 48 + 4 * 10 + 2 * (4 + 8)


# --- targets of many kinds ----------------------------------------------------------------------
def test_profiles_workloads_and_modules_compare() -> None:
    inputs = torch.zeros(ROWS, 4)
    profile = flopprof.count(net(), inputs, backward=True)
    workload = flopprof.load("alexnet")
    found = compare([profile, workload, net(16)], at=[f"input={ROWS}x4"])
    saved, alexnet, module = found
    assert [each.name for each in found] == ["Sequential", "alexnet", "Sequential #2"]
    assert (saved.forward_flops, saved.backward_flops) == (profile.forward_flops, profile.backward_flops)
    assert saved.memory is None
    assert saved.size_bytes == {}
    assert alexnet.forward_flops == workload.count().forward_flops
    assert alexnet.accuracy is None  # whose weights a workload has is not known
    assert module.forward_flops == 2 * ROWS * 16 * 6


def test_inputs_as_a_dictionary_and_as_a_tuple() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.up(x) + y

    x = torch.zeros(2, 4)
    first, second = compare([(Add(), (x, x)), (Add(), {"x": x, "y": x})])
    assert first.forward_flops == second.forward_flops == 2 * 2 * 16


def test_the_function_is_the_package_and_the_public_name() -> None:
    assert flopprof.compare([(net(), torch.zeros(1, 4))]).rows[0].forward_flops == 2 * 48
    assert flopprof.Comparison is Comparison


@pytest.mark.parametrize(
    ("targets", "options", "error"),
    [
        ([], {}, UsageError),
        ("resnet18", {}, UsageError),
        ([net()], {}, UsageError),
        ([net()], {"at": "batch=3"}, UsageError),
        ([object()], {}, UsageError),
        ([(net(), torch.zeros(1, 4))], {"sort": "beauty"}, UsageError),
        ([(net(), torch.zeros(1, 4))], {"hardware": "H1000"}, UnknownDevice),
        (["resnet18"], {"at": "depth=3"}, UsageError),
        (["resnet18"], {"colour": "red"}, UsageError),
        (["resnet18"], {"at": "batch=many"}, UsageError),
        (["resnet18"], {"at": "batch=1,batch=2"}, UsageError),
    ],
)
def test_wrong_requests(targets: object, options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        compare(targets, **options)  # type: ignore[arg-type]


def test_a_model_that_fails_has_a_row_that_says_why() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of ideas")

    found = compare({"broken": (Broken(), torch.zeros(1)), "net": (net(), torch.zeros(1, 4))})
    assert "out of ideas" in found["broken"].failed
    assert found["net"].forward_flops == 96
    assert found.reference == "net"
    assert found.ratios("flops") == {"broken": None, "net": 1.0}


def test_a_backward_that_fails_costs_the_training_figures_alone() -> None:
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no way back")

    class Forward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return OneWay.apply(self.up(x))

    (found,) = compare([(Forward(), torch.zeros(1, 4))])
    assert found.forward_flops == 32
    assert found.training_flops is found.memory is None
    assert "no way back" in found.notes[0]


# --- ratios, order, front -----------------------------------------------------------------------
def test_ratios_are_to_the_first_that_did_not_fail_also_when_sorted() -> None:
    found = side_by_side([Row(name="x", failed="no"), row("b", 300), row("a", 100), row("a", 200)]).sorted("flops")
    assert [each.name for each in found] == ["a", "a #2", "b", "x"]
    assert found.ratios("flops") == {"a": 100 / 300, "a #2": 200 / 300, "b": 1.0, "x": None}
    assert set(found.ratios("latency").values()) == {None}


def test_accuracy_sorts_the_best_first_and_unknown_last() -> None:
    found = side_by_side([row("a", 1), row("b", 1, 70.0), row("c", 1, 80.0)]).sorted("accuracy")
    assert [each.name for each in found] == ["c", "b", "a"]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=8))
def test_the_front_is_whom_nobody_beats(points: list[tuple[int, int, int]]) -> None:
    rows = [
        row(str(i), flops * samples, float(worth), samples=samples) for i, (flops, worth, samples) in enumerate(points)
    ]
    beaten = {
        str(i)
        for (i, (flops, worth, _)), (other, best, _) in itertools.product(enumerate(points), points)
        if other <= flops and best >= worth and (other, best) != (flops, worth)
    }
    assert side_by_side(rows).pareto() == {str(i) for i in range(len(points))} - beaten


def test_the_front_holds_only_like_against_like() -> None:
    errors = [
        Row(name=name, forward_flops=flops, accuracy=Accuracy(metric="epe", value=value, dataset="S", weights="W"))
        for name, flops, value in (("near", 2, 1.0), ("far", 2, 3.0))
    ]
    bound = row("bound", 1, 99.0, uncounted={"lab::op": 1})
    assert side_by_side([row("a", 100, 10.0), *errors, bound]).pareto() == {"a", "near"}


# --- ideal and real time ------------------------------------------------------------------------
def test_the_roofline_adds_dtypes_and_says_what_is_missing() -> None:
    h100 = device("H100")
    found = ideal(Row(name="m", flops_by_dtype={"float32": 67 * 10**9, "bfloat16": 10**9}, bytes_moved=10**6), h100)
    rates = {name: h100.peak(name).flops_per_s for name in ("float32", "bfloat16")}
    assert found.compute_s == pytest.approx(67e9 / rates["float32"] + 1e9 / rates["bfloat16"])
    assert found.bound == "compute"
    none = ideal(Row(name="m", flops_by_dtype={"quint4x2": 1}, bytes_moved=1), h100)
    assert none.seconds is None
    assert "quint4x2" in none.reason


def test_median_and_95th_percentile() -> None:
    times = [float(i) for i in range(1, 101)]
    assert summarised(times[::-1], device="d", samples=4) == Latency(
        median_s=50.5, p95_s=95.0, runs=100, device="d", samples=4
    )
    assert summarised([3.0, 1.0, 2.0], device="d", samples=None).median_s == 2.0
    assert summarised([3.0, 1.0, 2.0], device="d", samples=None).samples_per_s is None


def test_latency_by_a_clock_of_ones() -> None:
    workload = flopprof.Workload(
        model=net().eval(), args=(torch.zeros(1, 4),), kwargs={}, name="net", device="cpu", samples=1
    )
    ticks = itertools.count()
    found = measure_latency(workload, seconds=7, clock=lambda: float(next(ticks)))
    assert (found.median_s, found.p95_s, found.runs, found.samples_per_s) == (1.0, 1.0, 7, 1.0)
    with pytest.raises(UsageError, match="meta"):
        measure_latency(flopprof.load("alexnet"))


def test_a_model_that_does_not_fit_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flopprof.compare.run.free_bytes", lambda kind: 10**6)
    (found,) = compare(["squeezenet1_1"], measure=True, workers=0)  # 1,235,496 parameters
    assert found.forward_flops
    assert found.latency is None
    assert "4.713 MiB" in found.notes[0]


# --- files and pages ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def three() -> Comparison:
    inputs = torch.zeros(ROWS, 4)
    markup = "<script>|*"
    return compare({"base": (net(), inputs), markup: (net(16), inputs), "bad": (net(), torch.zeros(1, 3))})


def test_json_goes_there_and_back(three: Comparison) -> None:
    assert Comparison.from_json(three.to_json()) == three
    text = json.loads(three.to_json())
    assert text["ratios"]["flops"]["base"] == 1.0
    assert set(text["figures"]["base"]) == set(FIGURES)
    with pytest.raises(InvalidProfile, match=r"a\.json.*rows"):
        Comparison.from_json('{"rows": 3}', name="a.json")
    with pytest.raises(InvalidProfile, match="schema"):
        Comparison.from_json(three.to_json().replace("comparison/1", "comparison/9"))


def test_csv_holds_the_exact_integers(three: Comparison) -> None:
    first, second, bad = csv.DictReader(io.StringIO(to_csv(three)))
    assert tuple(first) == COLUMNS
    assert int(first["forward_flops"]) * 2 == int(second["forward_flops"]) == 2 * ROWS * 16 * 6
    assert float(second["flops_ratio"]) == 2.0
    assert bad["forward_flops"] == bad["recompute_flops"] == ""
    assert "3" in bad["failed"]
    assert int(first["training_bytes"]) == three["base"].memory.peak  # type: ignore[union-attr]


def test_names_are_text_in_markdown_and_html(three: Comparison) -> None:
    assert r"\<script\>\|\*" in to_markdown(three)
    assert "<script>" not in to_html(three) + to_markdown(three)
    assert "&lt;script&gt;" in three._repr_html_()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit_and_never_cut_a_number(three: Comparison, width: int) -> None:
    from rich.console import Console

    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(render(three), crop=False)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= max(width, 76)
    assert any("0.480" in line or "480" in line for line in lines)
    assert all(len(cells) == len(table.columns) for table in tables(three) for cells in table.rows)


def test_a_ratio_that_is_not_a_number_never_comes_out(three: Comparison) -> None:
    assert all(value is None or math.isfinite(value) for name in FIGURES for value in three.ratios(name).values())


def test_inputs_of_a_model_that_computes_nothing_keep_their_spaces() -> None:
    found = compare({"idle": (nn.Identity(), torch.zeros(2, 3)), "net": (nn.Linear(3, 4), torch.zeros(5, 3))})
    assert found["idle"].dtype == ""
    compute = next(iter(tables(found)))
    place = [column.head for column in compute.columns].index("Input")
    assert [cells[place] for cells in compute.rows] == ["2x3 float32", "5x3"]
