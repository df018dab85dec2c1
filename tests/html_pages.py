"""Profiles and pages that the tests of the HTML report share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

import flopprof
from flopprof.compare.comparison import Accuracy, Comparison, Ideal, Row, side_by_side
from flopprof.meter.figures import StepRecord
from flopprof.meter.records import SCHEMA, RecordWriter, RunStart, read
from flopprof.meter.runs import run_of
from flopprof.profile import ElementwiseRow, ModuleRow, Operand, OperatorRow, ParameterRow, Profile, UncountedRow
from flopprof.report.html import meter

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "<b>bold</b>",
    "&lt;&amp;",
    "%{label}$\\alpha$",
    "\"'><!--",
)
BATCH, INSIDE, OUTSIDE = 2, 8, 4
NAME = "<b>small</b>"
SMALL, LARGE = 3_628_146_688, 2**60 + 1
STEP_S, WAIT_S, FLOPS, PEAK = 0.5, 0.125, 10**14, 4 * 10**14


class Hostile(torch.nn.Module):
    """A chain of layers whose names are markup: 8 -> 8 each, then 8 -> 4."""

    def __init__(self) -> None:
        super().__init__()
        for name in HOSTILE:
            self.add_module(name, torch.nn.Linear(INSIDE, INSIDE))
        self.head = torch.nn.Linear(INSIDE, OUTSIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in HOSTILE:
            x = self.get_submodule(name)(x)
        return self.head(x)


def hostile() -> Profile:
    profile = flopprof.count(Hostile(), torch.zeros(BATCH, INSIDE), backward=True)
    return rebuilt(profile, target='<script>target</script> & "co"', samples=BATCH)


def rebuilt(profile: Profile, **fields: Any) -> Profile:
    builtins = json.loads(profile.to_json()) | fields
    return Profile.from_json(json.dumps(builtins))


def synthetic(modules: int, *, scale: int = 1) -> Profile:
    """So many modules with the root, no two alike: blocks of 24 layers, (16384, d) @ (d, 4096) forward, twice backward.

    scale: multiplies every count.
    """
    rows = [ModuleRow(fqn="", cls="Net", calls=1)]
    operators: list[OperatorRow] = []
    parameters: list[ParameterRow] = []
    number = 0
    while len(rows) < modules:
        block, place = divmod(number, 25)
        name = f"encoder.stages.{block // 20}.blocks.{block % 20}"
        number += 1
        if place == 0:
            rows.append(ModuleRow(fqn=name, cls="TransformerBlock", calls=1))
            continue
        half = "self_attention.projection" if place <= 12 else "feed_forward.intermediate_dense"
        fqn, width = f"{name}.{half}_{place}", 64 + number
        rows.append(
            ModuleRow(
                fqn=fqn,
                cls="Linear",
                calls=1,
                parameters=width * 4096,
                own_parameters=width * 4096,
                output_shape=(8, 2048, 4096),
            )
        )
        parameters.append(ParameterRow(name=f"{fqn}.weight", shape=(width, 4096)))
        operators += _products(fqn, width, scale, site=str(number))
    return Profile(
        modules=tuple(rows),
        operators=tuple(operators),
        elementwise=(ElementwiseRow(op="aten::add", fqn=rows[-1].fqn, phase="forward", calls=1, flops=7),),
        parameters=tuple(parameters),
        target="synthetic",
        tokens=16384,
        samples=8,
        n_params=sum(row.numel for row in parameters),
        n_params_trainable=sum(row.numel for row in parameters),
    )


def _products(fqn: str, width: int, scale: int, site: str) -> Iterator[OperatorRow]:
    flops = 2 * 16384 * width * 4096 * scale
    operands = (
        Operand(shape=(16384, width), dtype="bfloat16", factor=True),
        Operand(shape=(width, 4096), dtype="bfloat16", kind="parameter", name=f"{fqn}.weight", factor=True),
    )
    for phase, times in (("forward", 1), ("backward", 2)):
        yield OperatorRow(
            op="aten::mm",
            fqn=fqn,
            phase=phase,  # type: ignore[arg-type]
            dtype="bfloat16",
            operands=operands,
            outputs=((16384, 4096),),
            calls=times,
            flops=times * flops,
            flops_full=times * flops,
            flops_causal=times * flops,
            bytes=times * 2 * (16384 * width + width * 4096 + 16384 * 4096),
            parameter=f"{fqn}.weight",
            site=site if phase == "forward" else "",
            joined_to="" if phase == "forward" else site,
        )


def with_hole(profile: Profile) -> Profile:
    """The same with an operator of no formula in the last module."""
    hole = UncountedRow(op="mine::odd", fqn=profile.modules[-1].fqn, phase="forward", calls=3, reason="no formula.")
    return rebuilt(profile, uncounted_rows=json.loads(Profile(uncounted_rows=(hole,)).to_json())["uncounted_rows"])


def compared() -> Comparison:
    def row(name: str, flops: int, accuracy: float | None, **more: object) -> Row:
        published = None if accuracy is None else Accuracy(metric="acc@1", value=accuracy, dataset="d", weights="w")
        return Row(
            name=name,
            inputs="1x3",
            samples=1,
            n_params=10,
            forward_flops=flops,
            accuracy=published,
            ideal=Ideal(compute_s=0.25, memory_s=0.5, device="H100"),
            **more,  # type: ignore[arg-type]
        )

    rows = [
        row(NAME, SMALL, 70.0),
        row("large", LARGE, 80.0),
        row("worse", LARGE + 2, 60.0, uncounted={"mine::odd": 1}),
        Row(name="broken", failed="it raised <it>."),
    ]
    return side_by_side(rows, hardware="H100")


def records(folder: Path, *steps: int, rank: int = 0, world: int = 1, peak: float | None = PEAK) -> str:
    """A file of records: of each process so many steps of half a second and 10^14 FLOPs, the first one left out.

    At a peak of 4 x 10^14 FLOP/s that is an MFU of a half. A second process does the last step of the first again.
    """
    path = folder / f"<b>run<b>.rank{rank}.{len(steps)}.jsonl".replace("/", "∕")
    path.unlink(missing_ok=True)
    done = 0
    for number in steps:
        peaks = {} if peak is None else {"bfloat16": peak}
        start = RunStart(
            started_at=done * (STEP_S + WAIT_S),
            schema=SCHEMA,
            device="cuda:0",
            peak="<H100>",
            peaks=peaks,
            reason="" if peaks else "no table peak.",
            rank=rank,
            world_size=world,
        )
        writer = RecordWriter(path, start)
        for step in range(done, done + number):
            writer.write(
                StepRecord(
                    step=step,
                    ended_at=(step + 1) * (STEP_S + WAIT_S),
                    step_time_s=STEP_S,
                    flops={"bfloat16": (FLOPS, 2 * FLOPS)},
                    tokens=1000,
                    left_out=() if step else ("first",),
                    data_wait_s=WAIT_S,
                )
            )
        writer.close()
        done += number - 1
    return str(path)


def run_page(*files: str) -> str:
    return meter.render([(file, run_of(file), read(file)) for file in files], title="<b>run</b>")


class Page(HTMLParser):
    """What a browser makes of a page: its tags with attributes, scripts, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        """All text that a person can read, spaces as one."""
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> Any:
        """The JSON that the scripts read."""
        place = next(i for i, (_, attrs) in enumerate(self._script_tags()) if attrs.get("id") == "data")
        return json.loads(self.scripts[place])

    def _script_tags(self) -> list[tuple[str, dict[str, str | None]]]:
        return [(tag, attrs) for tag, attrs in self.tags if tag == "script"]
