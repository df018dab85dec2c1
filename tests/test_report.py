"""What the reports print, on profiles made by hand: every number below is in the profile's own rows."""

from __future__ import annotations

import csv
import io
from fractions import Fraction

import pytest
from rich.console import Console

from flopprof.profile import ElementwiseRow, ModuleRow, OperatorRow, Phase, Profile, UncountedRow
from flopprof.report.console import render
from flopprof.report.csv import COLUMNS, to_csv
from flopprof.report.grid import elide
from flopprof.report.tree import module_tree

LONG = "aten::_scaled_dot_product_fused_attention_overrideable_backward"


def row(fqn: str, phase: Phase, flops: int, op: str = "aten::mm", causal: int | None = None) -> OperatorRow:
    return OperatorRow(
        op=op,
        fqn=fqn,
        phase=phase,
        dtype="float32",
        operands=(),
        outputs=(),
        calls=1,
        flops=flops,
        flops_full=flops,
        flops_causal=flops if causal is None else causal,
        mask_known=causal is not None,
    )


def module(fqn: str, cls: str = "Linear", parameters: int = 0) -> ModuleRow:
    return ModuleRow(fqn=fqn, cls=cls, calls=1, parameters=parameters, output_shape=(1, 128, 768))


def stack(blocks: int = 4, **changes: object) -> Profile:
    """`blocks` equal blocks of one linear (3 G forward, 6 G backward), and 1 G in the root itself."""
    names = [f"layers.{i}" for i in range(blocks)]
    modules = [module("", "Net", 10**6 * blocks)]
    operators = [row("", "forward", 10**9)]
    for name in names:
        modules += [module(name, "Block", 10**6), module(f"{name}.fc", "Linear", 10**6)]
        operators += [row(f"{name}.fc", "forward", 3 * 10**9), row(f"{name}.fc", "backward", 6 * 10**9)]
    fields = {"modules": tuple(modules), "operators": tuple(operators), "n_params": 10**6 * blocks, "target": "net"}
    return Profile(**{**fields, **changes})  # type: ignore[arg-type]


def printed(profile: Profile, width: int = 80, **options: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, markup=False, highlight=False, emoji=False)
    console.print(render(profile, **options), crop=False)  # type: ignore[arg-type]
    return file.getvalue()


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def numbers(line: str) -> list[Fraction]:
    """The FLOP columns of a table row: what stands before the share, at most `phases` of them."""
    return [Fraction(0) if cell == "-" else Fraction(cell.lstrip("<>=")) for cell in line.split()[-3:-1]]


def test_repeated_blocks_fold_and_carry_their_container_name() -> None:
    text = printed(stack(32))
    assert "layers.0..31 (32x)" in text
    assert numbers(line_of(text, "layers.0..31")) == [96, 192]
    assert "(Nx): N identical modules in a row, their figures added up." in text
    assert "layers.1 " not in text


@pytest.mark.parametrize(
    "odd",
    [
        {"cls": "Other"},
        {"parameters": 7},
        {"output_shape": (1, 1)},
        {"calls": 2},
    ],
)
def test_a_block_that_differs_is_not_folded(odd: dict[str, object]) -> None:
    profile = stack(4)
    fields = {"fqn": "layers.2", "cls": "Block", "calls": 1, "parameters": 10**6, "output_shape": (1, 128, 768)}
    modules = tuple(ModuleRow(**{**fields, **odd}) if m.fqn == "layers.2" else m for m in profile.modules)  # type: ignore[arg-type]
    names = [child.name for child in module_tree(stack(4, modules=modules)).children]
    assert names == ["layers.0..1", "layers.2", "layers.3"]


def test_a_difference_deep_inside_a_block_keeps_it_apart() -> None:
    profile = stack(4, operators=(row("layers.3.fc", "forward", 2),))
    assert [child.name for child in module_tree(profile).children] == ["layers.0..2", "layers.3"]


def test_names_that_do_not_follow_each_other_stay_apart() -> None:
    profile = Profile(modules=(module(""), module("a"), module("b"), module("c1"), module("c3")))
    assert [child.name for child in module_tree(profile).children] == ["a", "b", "c1", "c3"]


def test_a_container_with_work_of_its_own_stays() -> None:
    profile = stack(2, operators=(row("layers", "forward", 4),))
    assert [child.name for child in module_tree(profile).children] == ["layers"]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_printed_columns_add_up_to_the_printed_total(width: int) -> None:
    text = printed(stack(4), width)
    root, own, blocks = (numbers(line_of(text, name)) for name in ("net ", "(own)", "layers."))
    assert root == [13, 24]
    assert [a + b for a, b in zip(own, blocks, strict=True)] == root
    assert "forward      13.00 GFLOPs  (= 6.500 GMACs)" in text
    assert "backward     24.00 GFLOPs  (= 12.00 GMACs)" in text
    assert "model        37.00 GFLOPs  (= 18.50 GMACs)" in text


def test_operator_columns_add_up_too() -> None:
    text = printed(stack(4), by="operator")
    assert "layers" not in text
    assert numbers(line_of(text, "aten::mm")) == [13, 24]
    assert line_of(text, "aten::mm").split()[1] == "9"


def test_macs_everywhere() -> None:
    text = printed(stack(4), unit="mac")
    assert numbers(line_of(text, "net ")) == [Fraction("6.5"), 12]
    assert "forward      6.500 GMACs  (= 13.00 GFLOPs)" in text
    assert "GMACs" in text.splitlines()[3]
    assert "GFLOPs" not in text.splitlines()[3]


def test_depth_cuts_the_tree_and_zero_leaves_the_root() -> None:
    assert "fc" not in printed(stack(4), depth=1)
    top = printed(stack(4), depth=0, by="module")
    assert "layers" not in top
    assert "(own)" not in top


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_is_cut_and_no_line_is_too_long(width: int) -> None:
    name = "a_module_with_a_very_long_name_indeed_" * 3
    profile = Profile(
        modules=(module("", "Net", 123_456_789), module(name, "AClassWithALongName" * 4, 123_456_789)),
        operators=tuple(row(name, phase, 987_654_321_000, LONG) for phase in ("forward", "backward", "recompute")),
        n_params=123_456_789,
    )
    text = printed(profile, width)
    assert text.count("987.654") == 3 * 3  # root, module and operator row, three phases each
    assert "123.457" in text or width == 40
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\x1b" not in text
    if width == 200:
        assert LONG in text


def test_what_does_not_fit_is_named() -> None:
    text = printed(stack(4, operators=(*stack(4).operators, row("", "recompute", 1), row("", "optimizer", 1))), 80)
    assert "Output shape" not in text.splitlines()[2]
    assert "(not shown for want of width: " in text


def test_an_ascii_terminal_gets_ascii() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    Console(file=stream, width=50).print(render(stack(2, operators=(row("", "forward", 8, LONG),))), crop=False)
    stream.flush()


def test_markup_in_names_is_text() -> None:
    profile = Profile(modules=(module("", "[red]Net[/]"), module("[bold]x[/bold]")), target="[link=x]t[/link]")
    text = printed(profile)
    assert "[bold]x[/bold]" in text
    assert "[red]Net[/]" in text
    assert "[link=x]t[/link]" in text


def test_uncounted_makes_every_total_above_it_a_lower_bound() -> None:
    holes = (UncountedRow(op="my::op", fqn="layers.1.fc", phase="forward", calls=3, reason="no formula"),)
    text = printed(stack(4, uncounted_rows=holes))
    assert "forward      >= 13.00 GFLOPs" in text
    assert "backward     24.00 GFLOPs" in text
    assert "model        >= 37.00 GFLOPs" in text
    assert "hardware     >= 37.00 GFLOPs" in text
    assert ">=13.000" in line_of(text, "net ")
    assert ">=" in line_of(text, "layers.1 ")
    assert ">=" not in line_of(text, "layers.2..3")
    assert "my::op, 3 calls: no formula" in text


def test_a_module_that_only_holds_uncounted_work_is_a_bound_not_a_dash() -> None:
    holes = (UncountedRow(op="my::op", fqn="only", phase="forward", calls=1),)
    assert ">=0" in line_of(printed(Profile(modules=(module(""), module("only")), uncounted_rows=holes)), "only")


def test_recompute_and_optimizer_are_in_hardware_not_in_model() -> None:
    extra = (row("", "recompute", 5 * 10**9), row("", "optimizer", 7 * 10**9))
    text = printed(stack(4, operators=(*stack(4).operators, *extra)), 120)
    assert "model        37.00 GFLOPs" in text
    assert "hardware     49.00 GFLOPs" in text
    assert "Recompute" in text
    assert "Optimizer" in text


def test_forward_alone_prints_one_total() -> None:
    text = printed(stack(2, operators=(row("", "forward", 2_000_000),)))
    assert "forward      2.000 MFLOPs  (= 1.000 MMACs)" in text
    assert "backward" not in text.lower()
    assert "hardware" not in text


def test_attention_shows_both_conventions() -> None:
    profile = stack(1, operators=(row("layers.0", "forward", 8 * 10**9, LONG, causal=5 * 10**9),))
    text = printed(profile, 120)
    assert "counted as full" in text
    assert "model with full attention 8.000 GFLOPs, causal 5.000 GFLOPs" in text
    causal = printed(profile.with_attention("causal"), 120)
    assert "counted as causal" in causal
    assert "forward      5.000 GFLOPs" in causal


def test_attention_without_a_known_mask_says_so() -> None:
    text = printed(stack(1, operators=(row("layers.0", "forward", 8, LONG),)), 120)
    assert "the mask is not known to 1 of 1 calls" in text
    assert "the mask is not known" not in printed(stack(1))


def test_the_attention_convention_is_always_printed() -> None:
    assert "attention    counted as full: every query-key pair counted" in printed(stack(1))


def test_elementwise_stays_apart_and_assumptions_are_listed() -> None:
    extra = (ElementwiseRow(op="aten::relu", fqn="", phase="forward", calls=1, flops=5_000_000),)
    text = printed(stack(2, elementwise=extra, assumptions=("routing is balanced", "all lengths full")), 120)
    assert "elementwise  5.000 MFLOPs  apart" in text
    assert "forward      7.000 GFLOPs" in text
    assert "routing is balanced" in text
    assert "all lengths full" in text


def test_nothing_at_all_still_prints() -> None:
    text = printed(Profile())
    assert "forward      0 FLOPs  (= 0 MACs)" in text
    assert "No counted operator ran." in text


def test_elide_keeps_both_ends_and_the_indentation() -> None:
    assert elide("short", 10) == "short"
    assert elide("abcdefghijklmnop", 7) == "abc…nop"
    assert elide("  abcdefghijklmnopqrstuvwxyz", 15, "...") == "  abcde...vwxyz"


def test_csv_holds_every_row_and_sums_to_hardware_flops() -> None:
    holes = (UncountedRow(op="my::op", fqn="layers.1.fc", phase="forward", calls=3, shapes=((2, 8), ())),)
    extra = (ElementwiseRow(op="aten::relu", fqn="", phase="forward", calls=1, flops=5),)
    profile = stack(2, uncounted_rows=holes, elementwise=extra)
    rows = list(csv.DictReader(io.StringIO(to_csv(profile))))
    assert tuple(rows[0]) == COLUMNS
    counted = [r for r in rows if r["kind"] == "counted"]
    assert sum(int(r["flops"]) for r in counted) == profile.hardware_flops == 19 * 10**9
    assert all(int(r["macs"]) * 2 == int(r["flops"]) for r in counted)
    assert {r["class"] for r in counted} == {"Net", "Linear"}
    (hole,) = [r for r in rows if r["kind"] == "uncounted"]
    assert (hole["operator"], hole["calls"], hole["flops"], hole["shapes"]) == ("my::op", "3", "", "2x8 scalar")
    (relu,) = [r for r in rows if r["kind"] == "elementwise"]
    assert (relu["operator"], relu["flops"]) == ("aten::relu", "5")


def test_csv_quotes_what_needs_it() -> None:
    text = to_csv(Profile(operators=(row('a,"b"', "forward", 2),)))
    assert next(csv.DictReader(io.StringIO(text)))["module"] == 'a,"b"'
