"""diff and budgets: what changed, exactly, and who is to blame."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from fractions import Fraction

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import flopprof
from flopprof.compare import Budget, diff
from flopprof.compare.assertion import assert_flops
from flopprof.compare.budget import allowance
from flopprof.errors import UsageError
from flopprof.profile import ModuleRow, OperatorRow, Profile, UncountedRow
from flopprof.units import parse_share


def net(hidden: int, *, extra: bool = False) -> Profile:
    layers = {"a": nn.Linear(4, hidden), "b": nn.Linear(hidden, 2)}
    if extra:
        layers["c"] = nn.Linear(2, 3)
    return flopprof.count(nn.Sequential(OrderedDict(layers)), torch.zeros(5, 4))


def test_diff_tells_each_change_exactly() -> None:
    found = diff(net(3), net(6, extra=True))
    # 5 rows: a 2*5*4*h, b 2*5*h*2, c 2*5*2*3
    assert {change.name: (change.before, change.after) for change in found.own} == {
        "a": (120, 240),
        "b": (60, 120),
        "c": (None, 60),
    }
    assert [change.name for change in found.own] == ["a", "b", "c"]
    assert {change.name: change.kind for change in found.own}["c"] == "added"
    assert {c.name: c.delta for c in found.totals}["model_flops"] == 240
    assert {c.name: (c.before, c.after) for c in found.parameters}[""] == (15 + 8, 30 + 14 + 9)
    assert sum(change.delta for change in found.own) == sum(change.delta for change in found.operators) == 240
    assert not found.same


def test_diff_of_a_profile_with_itself_is_nothing() -> None:
    found = diff(net(3), net(3))
    assert found.same
    assert found.own == found.operators == found.modules == found.parameters == ()


def test_diff_backwards_has_the_opposite_deltas() -> None:
    there, back = diff(net(3), net(6, extra=True)), diff(net(6, extra=True), net(3))
    assert {c.name: c.delta for c in there.own} == {c.name: -c.delta for c in back.own}
    assert {c.kind for c in back.own} == {"changed", "removed"}


def test_diff_refuses_two_conventions() -> None:
    with pytest.raises(UsageError, match="causal"):
        diff(net(3), net(3).with_attention("causal"))


def test_a_phase_that_neither_has_is_refused() -> None:
    with pytest.raises(UsageError, match=r"neither profile has FLOPs in the phase backward: .* they have forward"):
        diff(net(3), net(6), phase="backward")
    assert diff(net(3), net(6), phase="forward").operators


@given(st.integers(0, 10**15), st.integers(0, 10_000))
def test_a_tolerance_is_exact(value: int, ten_thousandths: int) -> None:
    share = Fraction(ten_thousandths, 10_000)
    limit = allowance(value, share)
    assert (limit - value) * 10_000 <= value * ten_thousandths < (limit + 1 - value) * 10_000
    assert allowance(value, ten_thousandths / 10_000) == limit


@pytest.mark.parametrize(
    ("text", "share"), [("0.5%", Fraction(1, 200)), ("0.005", Fraction(1, 200)), ("2%", Fraction(1, 50))]
)
def test_shares(text: str, share: Fraction) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["", "half", "-1%", "5 percent", "nan", "1e-3%"])
def test_shares_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError):
        parse_share(text)


def test_a_budget_breaks_at_one_flop_more() -> None:
    profile = net(3)  # 180 FLOPs, 23 parameters
    assert not Budget(max_flops=180, max_params=23).judge(profile).excesses
    (flops, params) = Budget(max_flops=179, max_params=22).judge(profile).excesses
    assert (flops.figure, flops.limit, flops.found, flops.blamed) == ("model_flops", 179, 180, (("a", 120), ("b", 60)))
    assert (params.figure, params.limit, params.found) == ("n_params", 22, 23)
    assert params.blamed == (("a", 15), ("b", 8))
    assert "a 120 FLOPs" in flops.sentence


def test_a_baseline_names_what_grew() -> None:
    small, large = net(3), net(6)
    (flops, params) = Budget(baseline=small).judge(large).excesses
    assert flops.blamed == (("a", 120), ("b", 60))  # the growth, not the size
    assert params.blamed == (("a", 15), ("b", 6))
    assert not Budget(baseline=small, tolerance=1).judge(large).excesses  # twice the FLOPs, to the last one
    assert [e.figure for e in Budget(baseline=small, tolerance=0.99).judge(large).excesses] == ["model_flops"]
    assert not Budget(baseline=large).judge(small).excesses


def test_an_uncounted_operator_breaks_a_limit() -> None:
    profile = Profile(
        modules=(ModuleRow(fqn="", cls="Net"),),
        uncounted_rows=(UncountedRow(op="lab::mystery", fqn="", phase="forward", calls=2),),
    )
    (excess,) = Budget(max_flops=10).judge(profile).excesses
    assert (excess.figure, excess.found, excess.blamed) == ("uncounted", 2, (("lab::mystery", 2),))
    assert not Budget(max_params=0).judge(profile).excesses
    assert not Budget(baseline=profile).judge(profile).excesses


@pytest.mark.parametrize("limits", [{}, {"max_flops": -1}, {"max_params": -1}, {"max_flops": 1, "tolerance": -0.1}])
def test_budgets_that_mean_nothing(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Budget(**limits)


def test_a_baseline_of_other_phases_is_refused() -> None:
    model, inputs = nn.Linear(4, 3), torch.zeros(5, 4)
    trained = flopprof.count(model, inputs, backward=True)
    with pytest.raises(UsageError, match="--backward"):
        Budget(baseline=trained).judge(flopprof.count(model, inputs))
    with pytest.raises(UsageError, match="--attention full"):
        Budget(baseline=net(3)).judge(net(3).with_attention("causal"))


@pytest.mark.parametrize("what", ["samples", "tokens"])
def test_a_baseline_of_other_inputs_is_refused(what: str) -> None:
    eight, one = (msgspec.structs.replace(net(3), **{what: number}) for number in (8, 1))
    with pytest.raises(UsageError, match=f"on 8 {what}, this count on 1"):
        Budget(baseline=eight).judge(one)
    assert not Budget(baseline=eight).judge(eight).excesses
    assert not Budget(baseline=net(3)).judge(one).excesses  # made where neither was known


def test_assert_flops() -> None:
    model = nn.Linear(4, 3)
    assert assert_flops(model, torch.zeros(5, 4), at_most=120).model_flops == 120
    assert assert_flops(model, {"input": torch.zeros(5, 4)}, at_most=120).model_flops == 120
    assert assert_flops(model, (torch.zeros(5, 4),), at_most=240, backward=True).model_flops == 240
    with pytest.raises(AssertionError, match=r"is 1 FLOPs over its limit; largest: \(root\) 120 FLOPs"):
        flopprof.assert_flops(model, torch.zeros(5, 4), at_most=119)


# --- the commands ---------------------------------------------------------------------------------
def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flopprof", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("profiles")
    for name, profile in (("small", net(3)), ("large", net(6, extra=True))):
        (folder / f"{name}.json").write_text(profile.to_json())
    (folder / "bad.json").write_text('{"schema": "flopprof.profile/1", "n_params": "many"}')
    (folder / "net.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(4, 3), torch.zeros(5, 4)\n")
    return {path.name: str(path) for path in folder.iterdir()}


def test_the_diff_command(saved: dict[str, str]) -> None:
    done = run("diff", saved["small.json"], saved["large.json"], "--json", "-")
    assert done.returncode == 0, done.stderr
    own = {row["name"]: (row["before"], row["after"]) for row in json.loads(done.stdout)["own"]}
    assert own == {"a": (120, 240), "b": (60, 120), "c": (None, 60)}
    text = run("diff", saved["small.json"], saved["large.json"]).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "absent" in text


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("small.json", "bad.json"), "bad.json: not a flopprof profile: Expected `int`, got `str` - at `$.n_params`"),
        (("small.json", "none.json"), "No such file"),
    ],
)
def test_diff_of_what_is_no_profile(saved: dict[str, str], words: tuple[str, str], complaint: str) -> None:
    done = run("diff", *(saved.get(word, word) for word in words))
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_diff_imports_no_torch(saved: dict[str, str]) -> None:
    code = (
        "import sys\nfrom flopprof.cli.main import app\n"
        f"app(['diff', {saved['small.json']!r}, {saved['large.json']!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_check_command(saved: dict[str, str]) -> None:
    target = f"{saved['net.py']}:build"
    kept = run("check", target, "--max-flops", "120", "--max-params", "15")
    assert kept.returncode == 0, kept.stderr
    broken = run("check", target, "--max-flops", "0.119k", "--json", "-")
    assert broken.returncode == 1
    (excess,) = json.loads(broken.stdout)["excesses"]
    assert (excess["figure"], excess["limit"], excess["found"]) == ("model_flops", 119, 120)
    assert "over its budget: model_flops" in broken.stderr
    assert run("check", target).returncode == 2


def test_profiles_of_ten_thousand_modules_compare_at_once() -> None:
    def large(scale: int) -> Profile:
        names = [f"layers.{i}.{part}" for i in range(2500) for part in ("q", "k", "v", "o")]
        rows = tuple(
            OperatorRow(
                op="aten::mm", fqn=name, phase="forward", dtype="float32", operands=(), outputs=(), calls=1,
                flops=scale * i, flops_full=scale * i, flops_causal=scale * i,
            )
            for i, name in enumerate(names)
        )  # fmt: skip
        return Profile(modules=tuple(ModuleRow(fqn=name, cls="Linear") for name in ["", *names]), operators=rows)

    found = diff(large(1), large(3))
    assert found.own[0].name == "layers.2499.o"
    assert len(found.own) == 9_999  # all but the one whose count is 0 in both
