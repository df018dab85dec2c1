"""trace(): engines, what they accept and refuse, where FLOPs are charged, and that nothing is left behind."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from typer.testing import CliRunner

from conservation import conserved, own
from flopprof import FlopCounter, count, load, trace
from flopprof.cli.main import app
from flopprof.errors import ModelFailed, Untraceable, UsageError
from flopprof.profile import Profile
from modules import MODELS, L, both, leaf, linear

ENGINES: list[Any] = ["fx", "export", "auto"]


def mlp() -> nn.Module:
    """340 FLOPs on 2 rows, input without gradient: forward 2*2*4*5 + 2*2*5*3, backward 80 + 2 * 60."""
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def program(model: nn.Module, *inputs: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, inputs)


# --- attribution -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_each_module_has_its_own(name: str, engine: Any) -> None:
    make, forward = MODELS[name]
    model, batch = make(), leaf()
    profile = conserved(trace(model, batch, backward=True, engine=engine))
    assert {phase: own(profile, phase) for phase in ("forward", "backward")} == both(forward)  # type: ignore[arg-type]
    counted = count(model, batch, backward=True, fold=False)
    assert {row.fqn: row for row in profile.modules} == {row.fqn: row for row in counted.modules}
    assert profile.by_parameter() == counted.by_parameter()


@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_belong_to_their_module(engine: Any) -> None:
    model = nn.Sequential(linear(), linear())
    model[0].register_forward_hook(lambda module, args, output: output @ module.weight)
    assert own(trace(model, leaf(), engine=engine), "forward") == {"0": 2 * L, "1": L}


@pytest.mark.parametrize("engine", ENGINES)
def test_modules_that_run_nothing_are_there(engine: Any) -> None:
    model = nn.Sequential(linear(), nn.Sequential(), nn.Identity())
    assert trace(model, leaf(), engine=engine).by_module() == {"": L, "0": L, "1": 0, "2": 0}


@pytest.mark.parametrize("engine", ENGINES)
def test_what_may_be_a_choice_takes_elementwise_flops_all_the_same(engine: Any) -> None:
    class Best(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.max(dim=-1).values + x.amax(-1)

    profile = trace(Best(), torch.randn(4, 8), engine=engine)
    assert profile.elementwise_flops == 4 * 8 + 4 * 8 + 4  # a comparison for each element, twice, and a sum


@fx.wrap
def hidden(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if x.shape[0] > 1:  # a question that no stand-in could answer
        return x @ weight
    return x


class Wraps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return hidden(x, self.weight)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_behind_a_wrapped_function_is_lost(engine: Any) -> None:
    assert (
        trace(Wraps(), leaf(), backward=True, engine=engine).by_phase()
        == count(Wraps(), leaf(), backward=True).by_phase()
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_say_what_each_operand_is(engine: Any) -> None:
    profile = trace(mlp(), torch.randn(2, 4), backward=True, engine=engine)
    assert profile.by_parameter() == {"0.weight": 160, "2.weight": 180}
    sites = {row.site: row.fqn for row in profile.operators if row.phase == "forward"}
    assert sorted(sites.values()) == ["0", "2"]
    assert all(sites[row.joined_to] == row.fqn for row in profile.operators if row.phase == "backward")
    weights = [item for row in profile.operators for item in row.operands if item.name == "2.weight"]
    assert weights
    assert all(item.kind == "parameter" and item.factor for item in weights)
    assert (profile.device, profile.n_params, profile.n_params_trainable) == ("meta", 43, 43)


@pytest.mark.parametrize("engine", ENGINES)
def test_lines_add_up(engine: Any) -> None:
    model, _forward = MODELS["own products around a child's"]
    profile = trace(model(), leaf(), backward=True, engine=engine, lines=True)
    source, first = inspect.getsourcelines(type(model()).forward)
    products = {first + number for number, text in enumerate(source) if "@" in text or "self.layer" in text}
    lines = profile.by_line()
    assert {int(line.rpartition(":")[2]) for line in lines} == products
    assert set(lines.values()) == {3 * L}
    assert all("modules.py:" in line for line in lines)


# --- conventions -----------------------------------------------------------------------------------------------------
class Causal(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_causal_attention(engine: Any) -> None:
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    # 4 queries and 4 keys of 2 heads: 16 pairs each, 10 of them visible, 2 (8 + 8) FLOPs a pair.
    profile = trace(Causal(), q, backward=True, engine=engine, attention="causal")
    assert (profile.forward_flops, profile.backward_flops) == (2 * 10 * 32, 2 * 2 * 10 * 32)
    assert trace(Causal(), q, backward=True, engine=engine).model_flops == 3 * 2 * 16 * 32
    assert all(row.mask_known for row in profile.operators)


class Einsum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,kj->ik", x, x)


def test_what_has_no_formula_is_counted_by_what_it_runs() -> None:
    profile = trace(Einsum(), torch.randn(3, 4), engine="export")
    assert profile.by_operator() == {"aten::bmm": 2 * 3 * 3 * 4}
    assert profile.exact


def test_what_cannot_be_counted_is_named() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(x)

    for engine in ENGINES:
        profile = trace(Spectrum(), torch.randn(4, 4), engine=engine)
        assert profile.uncounted == {"aten::_linalg_eigh": 1}
        assert not profile.exact


# --- control flow ----------------------------------------------------------------------------------------------------
class Cond(nn.Module):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.layer, self.twice = linear(), twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def more(x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x)) if self.twice else self.layer(x)

        return torch.cond(x.sum() > 0, more, lambda x: self.layer(x) + 1, (x,))


@pytest.mark.filterwarnings("ignore")  # what torch's compiler says of itself
@pytest.mark.parametrize(("twice", "flops"), [(False, L), (True, 2 * L)])
def test_the_dearer_branch_is_counted_and_said_where_they_differ(twice: bool, flops: int) -> None:
    profile = trace(Cond(twice), torch.randn(2, 3), engine="export")
    assert profile.forward_flops == flops
    assert bool(profile.assumptions) is twice
    assert (
        trace(Cond(twice), torch.randn(2, 3), engine="export", backward=True).backward_flops == (3 if twice else 1) * L
    )


class Scan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def step(carry: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            carry = torch.tanh(carry @ self.weight + row)
            return carry, carry.clone()

        return scan(step, torch.zeros(2, 3), x)[1]


@pytest.mark.filterwarnings("ignore")
def test_a_scanned_body_runs_once_for_each_element() -> None:
    profile = trace(Scan(), torch.randn(7, 2, 3), engine="export")
    assert profile.forward_flops == 7 * L
    assert profile.exact


class Map(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return map_over(lambda row, weight: row @ weight, x, self.weight)


@pytest.mark.filterwarnings("ignore")
def test_a_mapped_body_runs_once_for_each_element() -> None:
    assert trace(Map(), torch.randn(7, 2, 3), engine="export").forward_flops == 7 * L


class While(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return while_loop(lambda x: x.sum() < 9, lambda x: (self.layer(x),), (x,))[0]


@pytest.mark.filterwarnings("ignore")
def test_of_a_loop_one_round_is_counted_and_said() -> None:
    profile = trace(While().requires_grad_(False), torch.randn(2, 3), engine="export")
    assert profile.forward_flops == L
    assert [sentence for sentence in profile.assumptions if "one round" in sentence]


# --- what is accepted ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ENGINES)
def test_a_graph_module(engine: Any) -> None:
    traced = fx.symbolic_trace(mlp())
    assert trace(traced, torch.randn(2, 4), backward=True, engine=engine).by_module() == {
        "": 340,
        "0": 160,
        "1": 0,
        "2": 180,
    }


def test_an_exported_program() -> None:
    profile = conserved(trace(program(mlp(), torch.randn(2, 4)), backward=True))
    assert profile.by_module() == {"": 340, "0": 160, "1": 0, "2": 180}
    assert [(row.fqn, row.cls, row.parameters) for row in profile.modules] == [
        ("", "Sequential", 43), ("0", "Linear", 25), ("1", "ReLU", 0), ("2", "Linear", 18),
    ]  # fmt: skip
    assert (profile.n_params, sum(row.numel for row in profile.parameters)) == (43, 43)


def test_a_decomposed_program_counts_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    exported = program(model, torch.randn(2, 3, 8, 8))
    whole, parts = trace(exported, backward=True), trace(exported.run_decompositions(), backward=True)
    assert parts.by_module("forward") == whole.by_module("forward")
    assert parts.by_module("backward") == whole.by_module("backward")
    assert whole.by_phase() == count(model, torch.randn(2, 3, 8, 8), backward=True).by_phase()


def test_a_saved_program_is_a_target(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    torch.export.save(program(mlp(), torch.randn(2, 4)), file)
    workload = load(str(file))
    assert workload.describe() == "input 2x4 float32, exported"
    assert workload.count(backward=True).by_phase() == workload.trace(backward=True).by_phase()
    assert workload.count(backward=True).model_flops == 340
    shown = CliRunner().invoke(app, ["count", str(file), "--backward"])
    assert shown.exit_code == 0, shown.output
    assert "340 FLOPs" in shown.output
    with pytest.raises(UsageError, match="leave --batch out"):
        load(str(file), batch=2)
    file.write_bytes(b"nothing")
    with pytest.raises(ModelFailed, match=r"model\.pt2 could not be loaded"):
        load(str(file))


@pytest.mark.parametrize("engine", ENGINES)
def test_keywords_and_nested_inputs(engine: Any) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()

        def forward(
            self, pair: tuple[torch.Tensor, dict[str, torch.Tensor]], *, scale: float, flag: bool = False
        ) -> Any:
            x, named = pair
            y = self.layer(x) + scale
            return {"out": self.layer(named["y"]) if flag else y}

    x = torch.randn(2, 3)
    assert trace(Nested(), (x, {"y": x}), scale=2.0, flag=True, engine=engine).forward_flops == 2 * L
    assert trace(Nested(), (x, {"y": x}), scale=2.0, engine=engine).forward_flops == L


def test_workloads_trace() -> None:
    workload = load("resnet18", image_size=64)
    assert workload.trace(backward=True).by_phase() == workload.count(backward=True).by_phase()
    assert workload.trace().target == "resnet18"


# --- closed forms ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ENGINES)
def test_forms_in_named_sizes(engine: Any) -> None:
    profile = trace(mlp(), torch.randn(2, 4), backward=True, dynamic={"batch": (0, 0)}, engine=engine)
    assert profile.formula() == "FLOPs = 170*batch"
    assert profile.at(batch=100).model_flops == 17000


# --- what is refused -------------------------------------------------------------------------------------------------
class Asks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.t() if x.sum() > 0 else x  # asks


@pytest.mark.parametrize("engine", ENGINES)
def test_the_error_names_the_line_that_stopped_it(engine: Any) -> None:
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("# asks"))
    with pytest.raises(
        Untraceable, match=rf"test_graph\.py:{line} \(return x @ x\.t\(\) if x\.sum\(\) > 0 else x"
    ) as caught:
        trace(Asks(), torch.randn(3, 4), engine=engine)
    assert "flopprof.count" in str(caught.value)


class Routes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = (x[:, 0] > 0).nonzero().squeeze(-1)  # chosen
        return self.layer(x[chosen])


def test_shapes_that_depend_on_values_are_named() -> None:
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("# chosen"))
    with pytest.raises(Untraceable, match=rf"test_graph\.py:{line} \(chosen = .* depends on values"):
        trace(Routes(), torch.randn(3, 3), engine="export")


class Shifts(nn.Module):
    """Multiplies at trace time only: its graph would say less than it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = [torch.randn(3, 3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.table[0] @ self.table[0])[:2]


def test_a_graph_that_does_not_run_what_the_model_runs_is_no_graph() -> None:
    x = torch.randn(2, 3)
    expected = count(Shifts(), x).forward_flops
    assert expected == 2 * 3 * 3 * 3
    with pytest.raises(Untraceable, match="does not run what the model runs"):
        trace(Shifts(), x, engine="fx")
    assert trace(Shifts(), x).forward_flops == expected


def test_wrong_usage() -> None:
    x = torch.randn(2, 4)
    exported = program(mlp(), x)
    for call, said in (
        (lambda: trace(mlp(), x, engine="jit"), "engine 'jit' is none of auto, fx, export"),  # type: ignore[arg-type]
        (lambda: trace(mlp(), x, attention="some"), "neither 'full' nor 'causal'"),  # type: ignore[arg-type]
        (lambda: trace(F.relu, x), "takes a module"),  # type: ignore[arg-type]
        (lambda: trace(exported, engine="fx"), "engine='fx'"),
        (lambda: trace(exported, loss=torch.sum), "give trace the module"),
        (lambda: trace(exported, dynamic={"b": (0, 0)}), "give trace the module"),
    ):
        with pytest.raises(UsageError, match=said):
            call()


def test_a_program_with_dynamic_shapes_is_refused() -> None:
    exported = torch.export.export(mlp(), (torch.randn(2, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with pytest.raises(UsageError, match="not fixed"):
        trace(exported)


# --- nothing is left behind ------------------------------------------------------------------------------------------
class Keeps(nn.Module):
    """Writes to a buffer, counts its calls, and holds a module and a tensor that it does not register."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.hidden, self.calls = nn.BatchNorm1d(3), [linear()], 0
        self.loose = torch.randn(3, 3, requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.hidden[0](self.norm(x)) @ self.loose


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_and_its_inputs_are_as_they_were(engine: Any) -> None:
    model, x = Keeps(), leaf()
    hidden_weight, loose = model.hidden[0].weight, model.loose
    state, attributes, seed = copy.deepcopy(model.state_dict()), set(vars(model)), torch.get_rng_state()
    profile = trace(model, x, backward=True, engine=engine)
    assert own(profile, "backward") == own(count(model, x, backward=True), "backward")
    assert (model.calls, model.training, x.grad) == (0, True, None)
    assert set(vars(model)) == attributes
    assert model.hidden[0].weight is hidden_weight
    assert model.loose is loose
    assert hidden_weight.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in [*model.parameters(), hidden_weight, loose])
    assert list(dict(model.named_parameters())) == ["norm.weight", "norm.bias"]


def test_an_open_counter_counts_what_runs_and_no_trace() -> None:
    model, x = mlp(), torch.randn(2, 4)
    with FlopCounter(model) as counter:
        model(x)
    profile: Profile = trace(model, x)
    assert counter.profile.forward_flops == profile.forward_flops
