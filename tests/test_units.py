"""Quantities print with the right prefix, and columns in one unit lose nothing but digits."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopprof.errors import UsageError
from flopprof.units import (
    common_step,
    format_bytes,
    format_fixed,
    format_flops,
    format_share,
    format_si,
    parse_count,
    unit_name,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.000 k"),
        (999_949, "999.9 k"),
        (999_950, "1.000 M"),
        (25_557_032, "25.56 M"),
        (8_178_000_000, "8.178 G"),
        (10**27, "1000 Y"),
        (-1500, "-1.500 k"),
        (12.5, "12.50"),
    ],
)
def test_si(value: int | float, text: str) -> None:
    assert format_si(value) == text


def test_flops_and_macs_are_named() -> None:
    assert format_flops(8_178_000_000) == "8.178 GFLOPs"
    assert format_flops(8_178_000_000, "mac") == "4.089 GMACs"


def test_bytes_and_share() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(102_228_128) == "97.49 MiB"
    assert format_share(1, 3) == "33.3%"
    assert format_share(0, 0) == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [("4.2G", 4_200_000_000), ("26M", 26_000_000), ("7e9", 7_000_000_000), ("1,000", 1000), ("70B", 70 * 10**9)],
)
def test_parse_count(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "G", "1.2.3", "-4", "four", "4 GiB"])
def test_parse_count_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="write it as"):
        parse_count(text)


@pytest.mark.parametrize("text", ["1e37", "1e400", "2e12Y", "9" * 5000])
def test_counts_beyond_every_float_are_refused(text: str) -> None:
    assert parse_count("1e36") == int(1e36)
    with pytest.raises(UsageError, match="more than the 1e\\+36"):
        parse_count(text)


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (0, 3, "-"),
        (17, 0, "17"),
        (118_013_952, 3, "0.118"),
        (400_000, 3, "<0.001"),
        (500_000, 3, "0.001"),
        (8_178_499_999, 3, "8.178"),
        (8_178_500_000, 3, "8.179"),
        (999_999_999, 2, "1000.000"),
    ],
)
def test_fixed(value: int, step: int, text: str) -> None:
    assert format_fixed(value, step) == text


def test_common_step_leaves_three_digits_before_the_point() -> None:
    assert [common_step([n]) for n in (0, 999, 1000, 999_999, 10**6, 10**9, 10**15)] == [0, 0, 1, 1, 2, 3, 5]
    assert common_step([]) == 0
    assert unit_name(3, "FLOPs") == "GFLOPs"


@given(st.integers(0, 10**24))
def test_a_column_never_overflows_its_digits(value: int) -> None:
    text = format_fixed(value, common_step([value]))
    assert len(text.partition(".")[0]) <= 3


@given(st.lists(st.integers(0, 10**18), min_size=1, max_size=30))
def test_a_printed_column_adds_up_to_half_a_digit_a_row(values: list[int]) -> None:
    step = common_step([sum(values)])
    printed = [format_fixed(value, step) for value in values]
    total = sum(Fraction(0) if text == "-" else Fraction(text.lstrip("<")) for text in printed) * 1000**step
    small = sum(text.startswith("<") for text in printed)
    tick = Fraction(1000**step, 1000) if step else 0
    assert abs(total - sum(values)) <= tick * (Fraction(len(values), 2) + small)
