"""What a notebook shows of a result: small, static, exact, and names stay text."""

from __future__ import annotations

import re

from flopprof.profile import Profile
from html_pages import HOSTILE, Page, hostile, synthetic, with_hole


def test_a_profile_shows_its_exact_totals() -> None:
    profile = hostile()
    read = Page(profile._repr_html_())
    for flops in (profile.forward_flops, profile.backward_flops, profile.model_flops, profile.hardware_flops):
        assert f"{flops:,}" in read.text
    for name in HOSTILE:
        assert name in read.text
    assert "1 multiply-add = 2 FLOPs" in read.text
    tags = {tag for tag, _ in read.tags}
    assert tags <= {"p", "b", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
    assert {name for _, attrs in read.tags for name in attrs} <= {"style", "open"}


def test_it_stays_small() -> None:
    shown = synthetic(5000)._repr_html_()
    assert len(shown) < 60_000
    assert re.search(r"\d+ more modules", shown)


def test_a_lower_bound_is_marked() -> None:
    profile = with_hole(synthetic(30))
    text = Page(profile._repr_html_()).text
    assert f">= {profile.forward_flops:,}" in text
    assert "No formula for mine::odd x3" in text


def test_a_ledger_adds_up_as_it_is_printed() -> None:
    ledger = hostile().reconcile()
    assert ledger.backward is not None
    rows = re.findall(r"<tr><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td>", ledger._repr_html_())
    total = 0
    closed = []
    for name, number in rows:
        flops = int(number.replace(",", ""))
        if name.startswith("= "):
            assert total == flops
            closed.append(flops)
        total = flops if not number.startswith(("+", "-")) else total + flops
    assert closed == [ledger.measured_flops, ledger.backward.measured_flops]


def test_an_empty_profile_is_shown() -> None:
    assert "forward" in Profile()._repr_html_()
