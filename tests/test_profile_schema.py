"""The documented schema is the schema: every field of every row has its line in docs/profile.md, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from flopprof.errors import InvalidProfile
from flopprof.profile import Profile
from flopprof.rows import (
    ElementwiseRow,
    ExpertsRow,
    ModuleRow,
    Operand,
    OperatorRow,
    ParameterRow,
    RoutingRow,
    UncountedRow,
)

PAGE = (Path(__file__).parents[1] / "docs" / "profile.md").read_text()
TABLES = {
    head: [name for line in rows.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    for head, rows in re.findall(r"^\| (.*?) \| type \| meaning \|\n\|.*?\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
}


def fields(*structs: type[msgspec.Struct]) -> list[str]:
    return sorted({field.name for struct in structs for field in msgspec.structs.fields(struct)})


@pytest.mark.parametrize(
    ("head", "structs"),
    [
        ("field", [Profile]),
        ("of `operators`", [OperatorRow]),
        ("of `operands`", [Operand]),
        ("of `modules`", [ModuleRow]),
        ("of `elementwise`, `uncounted_rows`", [ElementwiseRow, UncountedRow]),
        ("of `parameters`", [ParameterRow]),
        ("of `routing`", [RoutingRow]),
        ("of `experts`", [ExpertsRow]),
    ],
)
def test_every_field_is_documented(head: str, structs: list[type[msgspec.Struct]]) -> None:
    assert sorted(TABLES[head]) == fields(*structs)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"n_params": "many"}', "$.n_params"),
        ('{"operators": [{"op": 3}]}', "$.operators[0].op"),
        ('{"modules": [{"fqn": "a", "cls": "B", "calls": 1.5}]}', "$.modules[0].calls"),
        ('{"attention": "half"}', "$.attention"),
        ('{"modules": [{"fqn": "a"}]}', "cls"),
        ("{}", "`schema`"),
        ('{"rows": []}', "`rows`"),
        ('{"schema": "flopprof.profile/1", "flops": 3}', "`flops`"),
        ("[]", "object"),
        ("", "truncated"),
    ],
)
def test_a_bad_file_names_the_field(text: str, field: str) -> None:
    with pytest.raises(InvalidProfile) as caught:
        Profile.from_json(text, name="run.json")
    assert str(caught.value).startswith("run.json: not a flopprof profile")
    assert field in str(caught.value)
