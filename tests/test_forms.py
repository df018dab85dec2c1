"""Forms are exact: what they evaluate to is what Python's own integers and fractions give."""

from __future__ import annotations

import pickle
from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopprof.errors import FlopprofError, InvalidProfile, NoForm, UsageError
from flopprof.forms import Condition, Floor, Form
from flopprof.profile import ElementwiseRow, ModuleRow, Operand, OperatorRow, Profile
from flopprof.symbolic import Deferred, Forms

NAMES = ("batch", "h", "w")
SIZES = st.fixed_dictionaries({name: st.integers(1, 300) for name in NAMES})


def expressions() -> st.SearchStrategy[str]:
    """Python expressions in sizes: with integers alone, so that eval is exact."""
    leaves = st.sampled_from(NAMES) | st.integers(-9, 9).map(lambda n: f"({n})")
    return st.recursive(
        leaves,
        lambda inner: (
            st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner)
            | st.builds("({}//{})".format, inner, st.integers(1, 9))
            | st.builds("({}**{})".format, inner, st.integers(0, 2))
        ),
        max_leaves=6,
    )


@given(expressions(), SIZES)
def test_a_form_evaluates_as_python_does(text: str, sizes: dict[str, int]) -> None:
    form = Form.parse(text)
    expected = eval(text, {}, dict(sizes))
    assert form.at(sizes) == expected
    if form.denominator == 1:
        assert eval(str(form), {}, dict(sizes)) == expected


@given(expressions())
def test_printed_and_read_again_a_form_is_the_same(text: str) -> None:
    form = Form.parse(text)
    assert Form.parse(str(form)) == form
    assert msgspec.json.decode(msgspec.json.encode(form), type=Form) == form


@given(expressions(), expressions(), SIZES)
def test_sums_products_and_scales_are_those_of_the_values(first: str, second: str, sizes: dict[str, int]) -> None:
    a, b = Form.parse(first), Form.parse(second)
    x, y = a.at(sizes), b.at(sizes)
    assert (a + b).at(sizes) == x + y
    assert (a - b).at(sizes) == x - y
    assert (a * b).at(sizes) == x * y
    assert (a * 7).at(sizes) == 7 * x
    assert (a // 5).at(sizes) == x // 5
    assert a.with_one("h").at({"batch": sizes["batch"], "w": sizes["w"]}) == a.at({**sizes, "h": 1})
    assert a + b == b + a
    assert Form.total([a, b, a]) == b + a * 2


@given(st.integers(1, 64), st.integers(0, 70), st.integers(1, 64), st.integers(0, 70), st.integers(1, 5000))
def test_nested_strides_become_one_floor(a: int, p: int, b: int, q: int, size: int) -> None:
    form = ((Form.of("h") + p) // a + q) // b
    assert form.at({"h": size}) == ((size + p) // a + q) // b
    assert all(
        not isinstance(atom, Floor) or "//" not in str(atom.numerator) for _, powers in form.terms for atom, _ in powers
    )


def test_a_form_prints_as_one_writes_it() -> None:
    tokens = Form.of("batch") * Form.of("seq")
    assert str(tokens * Form.of("seq") * 524288 + tokens * 15009316864) == "15009316864*batch*seq + 524288*batch*seq**2"
    assert str(Form()) == "0"
    assert str(Form.of("h") - 1) == "h - 1"
    assert str(Form.of("h") * Fraction(-9, 16)) == "-9*h/16"
    # a convolution of kernel 7, padding 3, stride 2: (h + 6 - 7) // 2 + 1
    assert str((Form.of("h") - 1) // 2 + 1) == "((h + 1)//2)"
    assert str(Condition(Form.of("seq"), "<=", 512)) == "seq <= 512"


def test_rational_coefficients_are_exact_and_refuse_what_is_no_integer() -> None:
    form = Form.parse("9*b*h**2/16")
    assert form.at({"b": 2, "h": 4}) == 18
    with pytest.raises(UsageError, match="no whole number at b=1, h=3"):
        form.at({"b": 1, "h": 3})


def test_integers_have_no_bound() -> None:
    form = Form.of(2**80) * Form.of("b")
    assert msgspec.json.decode(msgspec.json.encode(form), type=Form).at({"b": 3}) == 3 * 2**80


@pytest.mark.parametrize("text", ["", "b +", "f(b)", "b**h", "b/h", "b//h", "b//0", "1.5*b", "b if h else w", "b**-1"])
def test_what_is_no_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="as a form"):
        Form.parse(text)


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (Condition(Form.of("h"), "<=", 8), [True, True, False]),
        (Condition(Form.of("h"), ">=", 8), [False, True, True]),
        (Condition(Form.of("h"), "==", 8), [False, True, False]),
        (Condition(Form.of("h"), "!=", 8), [True, False, True]),
    ],
)
def test_conditions(condition: Condition, holds: list[bool]) -> None:
    assert [condition.holds({"h": size}) for size in (7, 8, 9)] == holds


# --- in a profile: a linear layer (3 -> 5) on (batch, seq, 3), and attention-like work of 4 batch seq^2 ----------
def forms_by_hand(**changes: object) -> Forms:
    b, s = Form.of("batch"), Form.of("seq")
    # 2 * 3 * 5 FLOPs a token; bytes: 4 (3 + 5) a token and 4 * 15 of weights
    pool = (Form.of(0), Form.of(1), Form.of(3), Form.of(5), b * s, b * s * 30, b * s * 32 + 60, b * s * s * 4, b)
    zero, one, three, five, tokens, linear, moved, scores, batch = range(9)
    row = OperatorRow(
        op="aten::mm",
        fqn="fc",
        phase="forward",
        dtype="float32",
        operands=(Operand(shape=(tokens, three), dtype="float32"), Operand(shape=(three, five), dtype="float32")),
        outputs=((tokens, five),),
        calls=one,
        flops=linear,
        flops_full=linear,
        flops_causal=linear,
        bytes=moved,
    )
    other = msgspec.structs.replace(
        row, op="aten::bmm", fqn="", flops=scores, flops_full=scores, flops_causal=zero, bytes=zero, calls=batch
    )
    module = ModuleRow(fqn="fc", cls="Linear", calls=one, output_shape=(batch, five))
    extra = ElementwiseRow(op="aten::add", fqn="fc", phase="forward", calls=one, flops=tokens)
    made = Forms.summed(("batch", "seq"), (), pool, ((module,), (row, other), (extra,), (), ()))
    return msgspec.structs.replace(made, **changes)


def test_a_profile_prints_its_forms_of_everything_of_a_phase_an_operator_and_a_module() -> None:
    profile = Profile(forms=forms_by_hand())
    assert profile.formula() == "FLOPs = 30*batch*seq + 4*batch*seq**2"
    assert profile.formula("forward") == profile.formula()
    assert profile.formula("backward") == "FLOPs = 0"
    assert profile.formula(op="aten::bmm") == "FLOPs = 4*batch*seq**2"
    assert profile.formula(module="fc") == "FLOPs = 30*batch*seq"
    assert profile.formula(module="") == profile.formula()
    assert profile.formula(module="", own=True) == "FLOPs = 4*batch*seq**2"
    assert profile.formula(of="bytes") == "bytes = 32*batch*seq + 60"
    assert profile.formula(of="elementwise") == "elementwise FLOPs = batch*seq"
    assert profile.with_attention("causal").formula() == "FLOPs = 30*batch*seq"


def test_at_evaluates_totals_without_making_rows_and_rows_as_a_tuple_would() -> None:
    profile = Profile(forms=forms_by_hand(), n_params=15, tokens=7, samples=1).at(batch=2, seq=3)
    assert profile.forms is None
    assert profile.tokens is None
    assert profile.forward_flops == profile.model_flops == profile.hardware_flops == 2 * 3 * 30 + 4 * 2 * 9
    assert profile.by_phase() == {"forward": 252, "backward": 0, "recompute": 0, "optimizer": 0}
    assert profile.causal_flops == 180
    assert profile.elementwise_flops == 6
    assert profile.bytes_moved == 32 * 6 + 60
    assert isinstance(profile.operators, Deferred)
    assert profile.operators._rows is None
    assert profile.by_operator() == {"aten::mm": 180, "aten::bmm": 72}
    assert profile.by_module() == {"": 252, "fc": 180}
    assert profile.operators[0].shapes == ((6, 3), (3, 5))
    plain = Profile.from_json(profile.to_json())
    assert plain == profile
    assert profile == plain
    assert hash(plain) == hash(profile)
    assert isinstance(plain.operators, tuple)
    assert pickle.loads(pickle.dumps(profile)) == plain
    assert plain.bytes_moved == profile.bytes_moved


def test_rows_that_only_the_sizes_told_apart_are_one() -> None:
    # (batch, 3) @ (3, 5) and (seq, 3) @ (3, 5) are one row of two calls where batch == seq, as when it is counted
    b, s = Form.of("batch"), Form.of("seq")
    pool = (Form.of(1), Form.of(3), Form.of(5), b, s, b * 30, s * 30)

    def row(size: int, flops: int) -> OperatorRow:
        operands = (Operand(shape=(size, 1), dtype="float32"), Operand(shape=(1, 2), dtype="float32"))
        return OperatorRow(
            op="aten::mm", fqn="", phase="forward", dtype="float32", operands=operands, outputs=((size, 2),), calls=0,
            flops=flops, flops_full=flops, flops_causal=flops, bytes=0,
        )  # fmt: skip

    profile = Profile(forms=Forms.summed(("batch", "seq"), (), pool, ((), (row(3, 5), row(4, 6)), (), (), ())))
    assert len(profile.at(batch=2, seq=3).operators) == 2
    (merged,) = profile.at(batch=4, seq=4).operators
    assert (merged.calls, merged.flops, merged.shapes) == (2, 240, ((4, 3), (3, 5)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 2}, "no size given for 'seq': pass each of batch, seq"),
        ({"batch": 2, "seq": 3, "heads": 4}, "'heads' is no size of this profile: it has batch, seq"),
        ({"batch": 0, "seq": 3}, "batch is a positive integer, got 0"),
        ({"batch": 2.0, "seq": 3}, "batch is a positive integer, got 2.0"),
        ({"batch": True, "seq": 3}, "batch is a positive integer, got True"),
        ({"batch": 2, "seq": 513}, "holds only where seq <= 512, which batch=2, seq=513 is not"),
    ],
)
def test_sizes_that_are_wrong_are_named(sizes: dict[str, int], message: str) -> None:
    profile = Profile(forms=forms_by_hand(conditions=(Condition(Form.of("seq"), "<=", 512),)))
    with pytest.raises(UsageError, match=message):
        profile.at(**sizes)


def test_a_condition_is_printed_behind_the_form() -> None:
    profile = Profile(forms=forms_by_hand(conditions=(Condition(Form.of("seq"), "<=", 512),)))
    assert profile.formula(module="fc") == "FLOPs = 30*batch*seq  where seq <= 512"


def test_sizes_of_one_may_have_forms_of_their_own() -> None:
    row = ElementwiseRow(op="aten::sum", fqn="", phase="backward", calls=0, flops=1)
    alone = Forms.summed(("seq",), (), (), ((), (), (), (), ()))
    b, s = Form.of("batch"), Form.of("seq")
    forms = Forms.summed(("batch", "seq"), (Condition(b, ">=", 2),), (Form.of(1), b * s), ((), (), (row,), (), ()))
    with pytest.raises(UsageError, match="batch >= 2"):
        Profile(forms=forms).at(batch=1, seq=3)
    profile = Profile(forms=msgspec.structs.replace(forms, at_one=(("batch", alone),)))
    assert profile.at(batch=2, seq=3).elementwise_flops == 6
    assert profile.at(batch=1, seq=3).elementwise_flops == 0
    assert profile.at(batch=1, seq=3).elementwise == ()
    assert profile.formula(of="elementwise") == (
        "elementwise FLOPs = batch*seq; where batch == 1: elementwise FLOPs = 0"
    )
    assert profile.formula() == "FLOPs = 0"
    assert Profile.from_json(profile.to_json()) == profile


def test_a_profile_without_forms_says_so() -> None:
    with pytest.raises(NoForm, match="trace"):
        Profile().formula()
    with pytest.raises(NoForm, match=r"no closed form in h is proved: the model pads\."):
        Profile(forms=Forms(symbols=("h",), reason="the model pads.")).at(h=2)
    assert issubclass(NoForm, FlopprofError)


def test_what_did_not_run_has_no_formula() -> None:
    profile = Profile(forms=forms_by_hand())
    with pytest.raises(UsageError, match="'aten::addmm' did not run: there are 'aten::bmm', 'aten::mm'"):
        profile.formula(op="aten::addmm")
    with pytest.raises(UsageError, match="'head' did not run"):
        profile.formula(module="head")
    with pytest.raises(ValueError, match="phase 'fwd' is none of"):
        profile.formula("fwd")  # type: ignore[arg-type]


def test_json_holds_integers_over_exponents_and_is_validated() -> None:
    profile = Profile(forms=forms_by_hand())
    text = profile.to_json()
    assert '{"terms":[[30,[["batch",1],["seq",1]]],[4,[["batch",1],["seq",2]]]],"denominator":1}' in text
    assert Profile.from_json(text) == profile
    for before, after in [
        ('"symbols":["batch","seq"]', '"symbols":["batch"]'),
        ('[["batch",1],["seq",2]]', '[["batch",1],["seq",-2]]'),
        ('"calls":8', '"calls":9'),
        ('"denominator":1', '"denominator":0'),
    ]:
        assert before in text
        with pytest.raises(InvalidProfile, match="forms"):
            Profile.from_json(text.replace(before, after))
