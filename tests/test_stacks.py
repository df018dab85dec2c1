"""Flame graphs and Markdown: every FLOP is in them, and no name breaks their format."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import flopprof
from flopprof.profile import ModuleRow, OperatorRow, Profile
from flopprof.report.markdown import to_markdown
from flopprof.report.stacks import to_folded, to_speedscope


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.fc(x)) @ torch.ones(2, 3)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return flopprof.count(Block(), torch.zeros(5, 4), backward=True)


def row(fqn: str, op: str = "aten::mm", flops: int = 7) -> OperatorRow:
    return OperatorRow(
        op=op, fqn=fqn, phase="forward", dtype="float32", operands=(), outputs=(), calls=1,
        flops=flops, flops_full=flops, flops_causal=flops,
    )  # fmt: skip


def test_folded_stacks_hold_every_flop(profile: Profile) -> None:
    lines = [line.rsplit(" ", 1) for line in to_folded(profile).splitlines()]
    assert sum(int(flops) for _stack, flops in lines) == profile.hardware_flops
    table = {stack: int(flops) for stack, flops in lines}
    assert table["forward;Block;fc;aten::addmm"] == 2 * 5 * 4 * 6
    assert table["forward;Block;out;aten::addmm"] == 2 * 5 * 6 * 2
    assert table["forward;Block;aten::mm"] == 2 * 5 * 2 * 3
    assert {stack.split(";")[0] for stack in table} == {"forward", "backward"}


def test_a_name_cannot_split_a_stack() -> None:
    text = to_folded(Profile(modules=(ModuleRow(fqn="", cls="A;B"),), operators=(row("x;y\nz"),)))
    assert text == "forward;A_B;x_y_z;aten::mm 7\n"


def test_speedscope_holds_every_flop(profile: Profile) -> None:
    data = json.loads(to_speedscope(profile))
    assert [each["name"] for each in data["profiles"]] == ["forward (FLOPs)", "backward (FLOPs)"]
    names = [frame["name"] for frame in data["shared"]["frames"]]
    for each, phase in zip(data["profiles"], ("forward", "backward"), strict=True):
        assert each["type"] == "sampled"
        assert sum(each["weights"]) == each["endValue"] == profile.by_phase()[phase]
        assert len(each["samples"]) == len(each["weights"])
    stacks = {
        tuple(names[i] for i in sample): weight
        for sample, weight in zip(data["profiles"][0]["samples"], data["profiles"][0]["weights"], strict=True)
    }
    assert stacks["Block", "fc (Linear)", "aten::addmm"] == 240


def test_a_module_that_is_named_as_an_operator_is_another_frame() -> None:
    data = json.loads(to_speedscope(Profile(operators=(row("aten::mm"), row("")))))
    assert len(data["shared"]["frames"]) == 3  # the root, the module, the operator


def test_markdown_shows_totals_exactly(profile: Profile) -> None:
    text = to_markdown(profile)
    assert f"| forward | 420 FLOPs | {profile.forward_flops:,} |" in text
    assert profile.forward_flops == 240 + 120 + 60
    assert "| aten::addmm | 2 | 360 FLOPs |" in text
    width = {line.count("|") for line in text.splitlines() if line.startswith("| Module")}
    rows = [line for line in text.split("## Modules")[1].split("## Operators")[0].splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == width


def test_a_name_is_no_markup() -> None:
    text = to_markdown(Profile(modules=(ModuleRow(fqn="", cls="<script>|`x`"),), operators=(row("a_b|c", "lab::*x*"),)))
    assert r"\<script\>\|\`x\`" in text
    assert r"a\_b\|c" in text
    assert r"lab::\*x\*" in text
