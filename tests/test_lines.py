"""Each count's line of source: exact in forward, backward through its forward operator, replays, hooks, optimizers."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import flopprof
from flopprof import FlopCounter
from flopprof.cli.main import app
from flopprof.counting.lines import line_in_trace, shorten, source_text
from flopprof.profile import OperatorRow, Phase, Profile
from flopprof.report.lines import fold_names, lines_table
from zoo import ZOO

SOURCE = Path(__file__).read_text().splitlines()


def line(mark: str) -> str:
    """The line of this file that ends in `# mark`."""
    found = [number for number, text in enumerate(SOURCE, 1) if text.endswith(f"# {mark}")]
    assert len(found) == 1, mark
    return shorten(f"{__file__}:{found[0]}")


def by_line(run: Callable[[], object], model: nn.Module | None = None) -> dict[tuple[str, str], int]:
    """(line, phase) -> FLOPs; the sums are checked against the counter without lines."""
    with FlopCounter(model, lines=True) as counter:
        run()
    profile = counter.profile
    assert sum(profile.by_line().values()) == profile.hardware_flops
    table: dict[tuple[str, str], int] = {}
    for row in profile.operators:
        table[row.line, row.phase] = table.get((row.line, row.phase), 0) + row.flops
    return table


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.out = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)  # qkv
        scores = q @ k.transpose(1, 2)  # scores
        return self.out(mix(scores.softmax(-1), v))  # out


def mix(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.bmm(weights, v)  # mix


# --- forward and backward ------------------------------------------------------------------------
def test_each_line_of_a_model_has_its_products_in_both_passes() -> None:
    model, x = Attention(), torch.randn(2, 5, 8, requires_grad=True)
    table = by_line(lambda: model(x).sum().backward(), model)
    forward = {"qkv": 2 * 2 * 5 * 8 * 24, "scores": 2 * 2 * 5 * 5 * 8, "mix": 2 * 2 * 5 * 5 * 8, "out": 2 * 2 * 5 * 64}
    assert table == {
        **{(line(mark), "forward"): flops for mark, flops in forward.items()},
        **{(line(mark), "backward"): 2 * flops for mark, flops in forward.items()},
    }


def test_rows_hold_module_and_line() -> None:
    model = Attention()
    profile = flopprof.count(model, torch.randn(2, 5, 8), backward=True, lines=True)
    places = {(row.fqn, row.line) for row in profile.operators}
    assert places == {("qkv", line("qkv")), ("", line("scores")), ("", line("mix")), ("out", line("out"))}
    assert profile.by_line("backward")[line("mix")] == 2 * profile.by_line("forward")[line("mix")]
    assert "" not in profile.by_line()


def test_the_line_of_a_call_into_torch_is_the_callers() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 6)))
    table = by_line(lambda: model(torch.ones(1, 4)))  # call
    assert table == {(line("call"), "forward"): 2 * (20 + 30)}


def test_without_being_asked_no_line_is_known() -> None:
    profile = flopprof.count(nn.Linear(4, 5), torch.ones(1, 4))
    assert profile.by_line() == {"": 40}
    with pytest.raises(ValueError, match="phase 'sideways'"):
        profile.by_line("sideways")  # type: ignore[arg-type]


def test_two_lines_in_one_module_are_two_rows_and_equal_calls_one() -> None:
    x = torch.ones(3, 4)
    with FlopCounter(lines=True) as counter:
        for _ in range(3):
            x @ x.T  # loop
        x @ x.T  # once
    assert [(row.line, row.calls) for row in counter.profile.operators] == [(line("loop"), 3), (line("once"), 1)]


# --- backward that is more than a chain ----------------------------------------------------------
def test_backward_of_a_forward_that_was_not_seen_has_no_line() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    loss = (torch.ones(2, 4) @ weight).sum()
    assert by_line(loss.backward) == {("", "backward"): 2 * 2 * 16}


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w  # custom forward

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return gradient @ w.T, x.T @ gradient  # custom backward


def test_a_custom_function_has_the_line_of_its_own_backward() -> None:
    x, w = torch.randn(2, 3, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    table = by_line(lambda: Custom.apply(x, w).sum().backward())
    assert table == {(line("custom forward"), "forward"): 48, (line("custom backward"), "backward"): 96}


def test_what_a_hook_multiplies_is_on_the_hooks_line() -> None:
    w = torch.randn(3, 3, requires_grad=True)

    def project(gradient: torch.Tensor) -> torch.Tensor:
        return gradient @ torch.eye(3)  # hook

    w.register_hook(project)
    table = by_line(lambda: (torch.ones(2, 3) @ w).sum().backward())  # hooked
    product = 2 * 2 * 9
    assert table == {
        (line("hooked"), "forward"): product,
        (line("hooked"), "backward"): product,
        (line("hook"), "backward"): 54,
    }


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).relu()  # block


class Replayed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = Block()
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return checkpoint(self.inner, y, use_reentrant=self.reentrant)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x.T).relu()  # replayed


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_replay_has_the_line_of_the_code_replayed(reentrant: bool) -> None:
    model, x = Replayed(reentrant), torch.randn(2, 4, requires_grad=True)
    table = by_line(lambda: model(x).sum().backward(), model)
    block, inner = 2 * 2 * 16, 2 * 2 * 2 * 4
    assert table == {
        (line("block"), "forward"): block,
        (line("block"), "recompute"): block,
        (line("block"), "backward"): 2 * block,
        (line("replayed"), "forward"): inner,
        (line("replayed"), "recompute"): inner,
        (line("replayed"), "backward"): 2 * inner,
    }


def test_second_derivatives_keep_the_line_of_the_forward() -> None:
    w, x = torch.randn(3, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)

    def run() -> None:
        y = (x @ w).pow(3).sum()  # twice
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        gradient.pow(2).sum().backward()

    table = by_line(run)
    assert {place for place, _phase in table} == {line("twice")}
    assert table[line("twice"), "forward"] == 2 * 2 * 9


def test_a_decomposition_multiplies_only_in_backward_and_has_its_line() -> None:
    a = (torch.eye(3) + torch.ones(3, 3)).requires_grad_()
    table = by_line(lambda: torch.linalg.inv(a).sum().backward())  # inverse
    assert table == {(line("inverse"), "backward"): 2 * 54}


def test_transforms_of_torch_func_keep_the_line() -> None:
    def product(a: torch.Tensor) -> torch.Tensor:
        return (a @ a).sum()  # transformed

    a = torch.randn(3, 3)
    assert by_line(lambda: torch.func.grad(product)(a)) == {
        (line("transformed"), "forward"): 54,
        (line("transformed"), "backward"): 108,
    }
    assert {place for place, _phase in by_line(lambda: torch.func.jacrev(product)(a))} == {line("transformed")}


def test_folded_blocks_have_the_lines_of_their_own() -> None:
    model, inputs = ZOO["llama"]()
    model, inputs = model.to("meta"), tuple(tensor.to("meta") for tensor in inputs)
    folded = flopprof.count(model, *inputs, backward=True, lines=True)
    every = flopprof.count(model, *inputs, backward=True, lines=True, fold=False)
    for phase in ("forward", "backward"):
        assert folded.by_line(phase) == every.by_line(phase)
        assert places(folded, phase) == places(every, phase)


def test_retained_graphs_and_two_losses() -> None:
    x, w = torch.randn(2, 3), torch.randn(3, 3, requires_grad=True)

    def run() -> None:
        hidden = x @ w  # shared
        hidden.sum().backward(retain_graph=True)
        (hidden @ w).sum().backward()  # second loss

    product = 2 * 2 * 9
    assert by_line(run) == {
        (line("shared"), "forward"): product,
        (line("shared"), "backward"): 2 * product,
        (line("second loss"), "forward"): product,
        (line("second loss"), "backward"): 2 * product,
    }


def test_many_steps_keep_no_more_lines_than_one() -> None:
    model, x = Attention(), torch.randn(2, 5, 8)
    with FlopCounter(model, lines=True) as counter:
        sizes = []
        for _ in range(40):
            model(x).sum().backward()
            sizes.append(len(counter.where._timeline._lines))
    assert sizes[-1] == sizes[0]


def test_a_replay_of_torchs_own_modules_has_the_line_of_the_checkpoint() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4)
    table = by_line(
        lambda: checkpoint(model, x, use_reentrant=False).sum().backward(),  # checkpointed
    )
    # The replay stops before the second product, whose input is the last that it must give back; backward makes the
    # first weight's gradient, and both of the second product.
    assert table == {
        (line("checkpointed"), "forward"): 2 * 64,
        (line("checkpointed"), "recompute"): 64,
        (line("checkpointed"), "backward"): 3 * 64,
    }


# --- optimizer and plain functions ---------------------------------------------------------------
class Whitened(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= parameter.grad @ torch.eye(3)  # whiten


def test_an_optimizer_has_its_own_lines() -> None:
    w = nn.Parameter(torch.randn(3, 3))
    w.grad = torch.ones(3, 3)
    optimizer = Whitened([w])
    assert by_line(optimizer.step) == {(line("whiten"), "optimizer"): 54}


def test_an_optimizer_of_torch_is_on_the_line_that_steps_it() -> None:
    w = nn.Parameter(torch.randn(3, 3))
    w.grad = torch.ones(3, 3)
    optimizer = torch.optim.Muon([w])
    table = by_line(lambda: [optimizer.step()])  # step
    assert {place for place, _phase in table} == {line("step")}
    assert {phase for _place, phase in table} == {"optimizer"}


def test_inside_a_module_its_own_file_wins_over_a_librarys() -> None:
    einops = pytest.importorskip("einops")

    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return einops.einsum(x, x, "a b, c b -> a c")  # library

    x = torch.ones(2, 3)
    model = Mixed()
    assert by_line(lambda: model(x), model) == {(line("library"), "forward"): 24}
    (outside,) = {place for place, _phase in by_line(lambda: einops.einsum(x, x, "a b, c b -> a c"))}
    assert outside.startswith("einops/")


def test_a_class_made_by_exec_and_a_graph_module() -> None:
    space: dict[str, Any] = {"nn": nn, "__name__": "made_up"}
    code = "class Made(nn.Module):\n    def forward(self, x):\n        return x @ x\n"
    exec(compile(code, "<cell 3>", "exec"), space)
    assert by_line(lambda: space["Made"]()(torch.ones(2, 2))) == {("<cell 3>:3", "forward"): 16}
    graph = torch.fx.symbolic_trace(space["Made"]())
    table = by_line(lambda: graph(torch.ones(2, 2)))  # graph
    assert table == {(line("graph"), "forward"): 16}


# --- every model ---------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", ["gpt", "gpt, checkpointed", "experts", "lora", "recurrent", "llama", "mamba"])
def test_lines_change_no_count_and_leave_nothing_out(name: str) -> None:
    model, inputs = ZOO[name]()
    plain = flopprof.count(model, *inputs, backward=True)
    lined = flopprof.count(model, *inputs, backward=True, lines=True)
    for phase in ("forward", "backward", "recompute"):
        assert lined.by_module(phase) == plain.by_module(phase)
        assert lined.by_operator(phase) == plain.by_operator(phase)
        assert sum(lined.by_line(phase).values()) == plain.by_phase()[phase]
    assert lined.by_parameter() == plain.by_parameter()
    assert "" not in lined.by_line()
    assert all(source_text(place) for place in lined.by_line())


# torch.export's stack traces hold the frames called `forward` and no others, and name no caller of the model; torch.fx
# traces no model of transformers.
FX = ["gpt", "gpt, checkpointed", "grouped-query attention", "experts", "lora", "unet", "recurrent", "resnet18"]
EXPORT = ["gpt", "grouped-query attention", "experts", "lora", "unet", "recurrent", "llama", "bert", "t5"]


@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:Initializing zero-element")
@pytest.mark.parametrize(("engine", "name"), [*(("fx", name) for name in FX), *(("export", name) for name in EXPORT)])
def test_engines_agree_on_every_line(engine: Literal["fx", "export"], name: str) -> None:
    model, inputs = ZOO[name]()
    ran = flopprof.count(model, *inputs, backward=True, lines=True)
    traced = flopprof.trace(model, *inputs, backward=True, lines=True, engine=engine)
    for phase in ("forward", "backward"):
        assert traced.by_line(phase) == ran.by_line(phase)
        assert places(traced, phase) == places(ran, phase)


def places(profile: Profile, phase: Phase) -> set[tuple[str, str]]:
    return {(row.fqn, row.line) for row in profile.operators if row.phase == phase}


def test_exports_coarser_traces_leave_nothing_out() -> None:
    model, inputs = ZOO["resnet18"]()
    ran = flopprof.count(model, *inputs, lines=True)
    traced = flopprof.trace(model, *inputs, lines=True, engine="export")
    # ResNet.forward only calls _forward_impl, whose own lines export does not tell
    assert sum(traced.by_line().values()) == ran.forward_flops
    assert "" not in traced.by_line()
    assert {line for line in traced.by_line() if line not in ran.by_line()} == {
        next(line for line in traced.by_line() if source_text(line) == "return self._forward_impl(x)")
    }


# --- paths and traces ----------------------------------------------------------------------------
def test_paths_are_written_as_one_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert shorten(f"{tmp_path}/nets/model.py:12") == "nets/model.py:12"
    assert shorten("/opt/lib/python3.11/site-packages/timm/models/x.py:3") == "timm/models/x.py:3"
    assert shorten("/elsewhere/model.py:7") == "/elsewhere/model.py:7"
    assert shorten("<stdin>:1") == "<stdin>:1"


def test_source_text_is_read_where_it_can_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("a = 1\n    b = a @ a  \n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert source_text("net.py:2") == "b = a @ a"
    assert source_text("net.py:9") == source_text("gone.py:1") == source_text("") == ""


def test_a_stack_trace_gives_the_line_by_the_same_rule() -> None:
    torch_file = os.path.join(os.path.dirname(torch.__file__), "nn", "modules", "linear.py")
    trace = (
        '  File "/home/me/train.py", line 5, in main\n    model(x)\n'
        f'  File "{__file__}", line 50, in forward\n    mix(a, b)\n'
        '  File "/opt/site-packages/lib/ops.py", line 9, in mix\n    return linear(a, b)\n'
        f'  File "{torch_file}", line 130, in forward\n    return F.linear(x)\n'
    )
    assert line_in_trace(trace, [Attention, nn.Linear]) == shorten(f"{__file__}:50")
    assert line_in_trace(trace, [f"{__name__}.Attention", "torch.nn.modules.linear.Linear"]) == shorten(
        f"{__file__}:50"
    )
    assert line_in_trace(trace) == "lib/ops.py:9"
    assert line_in_trace(None) == line_in_trace("no trace") == ""


# --- the table -----------------------------------------------------------------------------------
NETS = Path(__file__).parent / "sample_models" / "nets.py"


def printed(*arguments: str, width: int = 80) -> str:
    result = CliRunner().invoke(app, ["count", *arguments], env={"COLUMNS": str(width), "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= width
    return result.stdout


def test_the_command_prints_lines_modules_and_source() -> None:
    text = printed(f"{NETS}:Mlp", "--input", "2x8", "--backward", "--by", "line")
    number = NETS.read_text().splitlines().index("        return self.down(self.up(x).relu())") + 1
    # the first weight's gradient only; both gradients of the second product
    assert re.search(rf"^nets\.py:{number}  up +0\.512 +0\.512  57\.1%$", text, re.MULTILINE)
    assert re.search(r"^ +down +0\.256 +0\.512  42\.9%$", text, re.MULTILINE)
    assert re.search(r"^ +return self\.down\(self\.up\(x\)\.relu\(\)\)$", text, re.MULTILINE)
    assert "Operator" not in text


def test_repeated_blocks_are_one_row() -> None:
    text = printed(f"{NETS}:Stack", "--input", "1x8", "--by", "line", "--unit", "mac")
    numbers = {body.strip(): i for i, body in enumerate(NETS.read_text().splitlines(), 1)}
    assert re.search(rf"^nets\.py:{numbers['x = block(x)']}  blocks\.0\.\.5\.0 +384  85\.7%$", text, re.MULTILINE)
    assert re.search(rf"^nets\.py:{numbers['return x @ self.scale']}  \(root\) +64  14\.3%$", text, re.MULTILINE)


def test_torchs_own_modules_have_no_line_in_the_command(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(4, 5)\n")
    text = printed(f"{tmp_path}/plain.py:build", "--input", "2x4", "--by", "line")
    assert re.search(r"^\(unknown\)  \(root\) +80  100\.0%$", text, re.MULTILINE)


def test_names_fold_where_only_numbers_differ() -> None:
    assert fold_names(["a.0.b", "a.1.b", "a.2.b"]) == "a.0..2.b"
    assert fold_names(["a.0.b", "a.2.b"]) == "a.*.b"
    assert fold_names(["a.0.b.0", "a.0.b.1"]) == "a.0.b.0..1"
    assert fold_names(["a.0.b.0", "a.1.b.1"]) == "a.*.b.*"
    assert fold_names(["layer1.conv2"]) == "layer1.conv2"


def test_files_of_one_name_are_told_apart_and_what_is_unknown_is_said() -> None:
    def row(line: str, flops: int) -> OperatorRow:
        return OperatorRow(
            op="aten::mm", fqn="", phase="forward", dtype="float32", operands=(), outputs=(), calls=1, line=line,
            flops=flops, flops_full=flops, flops_causal=flops,
        )  # fmt: skip

    profile = Profile(operators=(row("a/net.py:1", 250), row("b/net.py:1", 150), row("", 100)))
    console = Console(width=80, file=io.StringIO())
    console.print(lines_table(profile))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [part.split() for part in text.splitlines() if part.endswith("%")] == [
        ["a/net.py:1", "(root)", "250", "50.0%"], ["b/net.py:1", "(root)", "150", "30.0%"],
        ["(unknown)", "(root)", "100", "20.0%"],
    ]  # fmt: skip
    assert lines_table(Profile()).plain == "No counted operator ran."  # type: ignore[union-attr]
