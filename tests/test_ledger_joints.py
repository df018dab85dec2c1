"""Where a backward is not what the forward's shape alone says: recurrences, replays of replays, packed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flopprof import count, trace
from flopprof.ledger import reconcile
from flopprof.profile import Profile
from test_ledger import closed, joined, linear, nonzero

pytestmark = pytest.mark.filterwarnings("ignore")


class Runs(nn.Module):
    """A forward that is given, and what it uses as attributes."""

    def __init__(self, run: Any, **held: Any) -> None:
        super().__init__()
        self.run = run
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self, *inputs)


# --- recurrences ------------------------------------------------------------------------------------
def lstm_terms(frozen: str, *, wants_input: bool) -> dict[str, int]:
    """An LSTM 4 -> 6 over 3 steps of 2 sequences: gates are 24 wide, the first step's state is no one's gradient."""
    rows, first, w_ih, w_hh = 6, 2, 24 * 4, 24 * 6
    terms = {"no_input_gradient": -2 * first * w_hh - (0 if wants_input else 2 * rows * w_ih)}
    weights = {"": 0, "ih": 2 * rows * w_ih, "hh": 2 * rows * w_hh}[frozen]
    return terms | ({"frozen_weights": -weights} if weights else {})


@pytest.mark.parametrize("engine", ["run", "fx", "export"])
@pytest.mark.parametrize("wants_input", [False, True])
@pytest.mark.parametrize("frozen", ["", "ih", "hh"])
def test_a_recurrent_layer_by_hand(frozen: str, wants_input: bool, engine: Any) -> None:
    model, x = nn.LSTM(4, 6), torch.randn(3, 2, 4, requires_grad=wants_input)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(f"weight_{frozen}"))
    made = count if engine == "run" else trace
    options = {} if engine == "run" else {"engine": engine}
    ledger = joined(made(model, x, backward=True, **options), tokens=6)
    assert nonzero(ledger.backward) == lstm_terms(frozen, wants_input=wants_input)
    assert nonzero(ledger) == {"never_multiplied": -2 * 48 * 6}


RECURRENT = {
    "lstm, two layers": lambda: nn.LSTM(4, 6, 2),
    "lstm, both ways": lambda: nn.LSTM(4, 6, 2, bidirectional=True),
    "lstm, projected": lambda: nn.LSTM(4, 6, 2, proj_size=2),
    "lstm, no biases": lambda: nn.LSTM(4, 6, bias=False),
    "gru": lambda: nn.GRU(4, 6, 2, bidirectional=True),
    "rnn": lambda: nn.RNN(4, 6, 2),
}


@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_traced_recurrences_have_the_terms_of_those_that_ran(name: str, wants: bool) -> None:
    """One engine runs a fused kernel or single steps, the other reads one operator: the same terms."""
    model, x = RECURRENT[name](), torch.randn(3, 2, 4, requires_grad=wants)
    ran = joined(count(model, x, backward=True), tokens=6)
    traced = joined(trace(model, x, backward=True, engine="export"), tokens=6)
    assert nonzero(traced) == nonzero(ran)
    assert nonzero(traced.backward) == nonzero(ran.backward)


# --- checkpoints ------------------------------------------------------------------------------------
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_a_checkpoint_within_a_checkpoint(outer: bool, inner: bool) -> None:
    """What is replayed twice is differentiated once: of three products of 96, everything is wanted."""

    def within(m: Any, y: torch.Tensor) -> torch.Tensor:
        return m.c(checkpoint(lambda z: m.b(m.a(z).relu()), y, use_reentrant=inner))

    model = Runs(
        lambda m, x: checkpoint(lambda y: within(m, y), x, use_reentrant=outer),
        a=linear(4, 4), b=linear(4, 4), c=linear(4, 4),
    )  # fmt: skip
    ledger = joined(count(model, torch.randn(3, 4, requires_grad=True), backward=True), tokens=3)
    assert ledger.measured_flops == 3 * 96
    assert nonzero(ledger.backward) == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_replays_at_two_lines_are_not_taken_twice(reentrant: bool) -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x @ m.a.weight)
        return torch.relu(x @ m.a.weight)

    model = Runs(lambda m, x: checkpoint(lambda y: body(m, y), x, use_reentrant=reentrant), a=linear(4, 4))
    ledger = joined(count(model, torch.randn(3, 4, requires_grad=True), backward=True, lines=True), tokens=3)
    assert nonzero(ledger.backward) == {}
    assert sum(joint.forward[0] for joint in ledger.joints) == 2 * 96


@pytest.mark.parametrize("reentrant", [False, True])
def test_masked_weights_are_known_in_a_replay(reentrant: bool) -> None:
    """In a replay, as in the forward, weight * mask is the weight."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, m.a.weight * m.mask).relu()

    model = Runs(lambda m, x: checkpoint(lambda y: body(m, y), x, use_reentrant=reentrant), a=linear(4, 4))
    model.register_buffer("mask", torch.ones(4, 4))
    ledger = joined(count(model, torch.randn(3, 4, requires_grad=True), backward=True), tokens=3)
    assert (nonzero(ledger), nonzero(ledger.backward)) == ({}, {})


# --- operands ---------------------------------------------------------------------------------------
def test_parameters_that_share_one_storage_keep_their_names() -> None:
    """As flattened weights do: two of three 4 x 4 are multiplied, one twice."""
    flat = torch.randn(48)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(flat[i : i + 16].view(4, 4)) for i in (0, 16, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.b + x.bfloat16() @ self.b.bfloat16() + x @ self.c.T

    ledger = joined(count(Flat(), torch.randn(3, 4), backward=True), tokens=3)
    assert nonzero(ledger) == {"never_multiplied": -96, "reuse": 96}
    assert {name: use.reuse for name, use in ledger.by_parameter().items()} == {"a": 0, "b": 2, "c": 1}


def test_a_vector_multiplied_by_a_matrix_is_multiplied() -> None:
    """(5, 4) @ (4): both are parameters, and none is left out as a bias would be."""
    model = Runs(lambda m, x: x * (m.w @ m.v), w=nn.Parameter(torch.randn(5, 4)), v=nn.Parameter(torch.randn(4)))
    ledger = joined(count(model, torch.randn(3, 5), backward=True), tokens=3)
    assert nonzero(ledger) == {"under_use": 2 * 20 - 2 * 24 * 3}


def test_distances_are_not_bilinear() -> None:
    """Torch takes both gradients of a distance, of width d, from a product of width d + 2."""
    points, centres, d = 40, 30, 4
    model = Runs(lambda m, x: torch.cdist(x, m.w), w=nn.Parameter(torch.randn(centres, d)))
    profile = count(model, torch.randn(points, d), backward=True)
    ledger = joined(profile, tokens=points)
    pairs = 2 * points * centres
    assert profile.backward_flops == 2 * pairs * d
    assert nonzero(ledger.backward) == {"not_bilinear": 2 * pairs * d - 2 * pairs * (d + 2)}


def test_weights_that_a_quantised_operator_holds() -> None:
    """No tensor and no name, but multiplied all the same: 20 and 30 of the 61 elements, once per row."""
    quantized = pytest.importorskip("torch.ao.quantization")
    if not {"fbgemm", "onednn", "qnnpack", "x86"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("torch has no quantised kernels here")
    model = quantized.quantize_dynamic(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)))
    ledger = closed(count(model, torch.randn(3, 4)), tokens=3)
    assert nonzero(ledger) == {"under_use": -2 * 11 * 3}
    assert ledger.n_params_active == 50


def test_a_profile_of_unnamed_rows_is_refused() -> None:
    profile = count(linear(4, 5), torch.randn(3, 4))
    text = profile.to_json().replace('"site":"#0"', '"site":""')
    with pytest.raises(Exception, match="count the model again"):
        reconcile(Profile.from_json(text), 3)
