"""Profile -> flame graphs weighted by FLOPs: speedscope's file format, and folded stacks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from flopprof.profile import PHASES, Phase, Profile, ancestors

_SCHEMA = "https://www.speedscope.app/file-format-schema.json"


def to_folded(profile: Profile) -> str:
    """One line per phase, module and operator: `forward;ResNet;layer1;0;conv1;aten::convolution 231211008`.

    The number is FLOPs. Lines are what flamegraph.pl, inferno and speedscope read; their sum is hardware_flops. A `;`
    or line break in a name becomes `_`, since it would split the stack.
    """
    lines = []
    for phase in PHASES:
        for fqn, op, flops in _leaves(profile, phase):
            names = [phase, *(name for _fqn, name in _stack(profile, fqn)), op]
            lines.append(f"{';'.join(map(_one_word, names))} {flops}")
    return "".join(f"{line}\n" for line in lines)


def to_speedscope(profile: Profile) -> str:
    """JSON for speedscope.app: one profile per phase that ran, weights in FLOPs (one multiply-add is 2)."""
    frames: dict[str, int] = {}
    shared: list[dict[str, str]] = []

    def frame(key: str, name: str) -> int:
        if key not in frames:
            frames[key] = len(shared)
            shared.append({"name": name})
        return frames[key]

    classes = {row.fqn: row.cls for row in profile.modules}
    profiles: list[dict[str, Any]] = []
    for phase in PHASES:
        samples, weights = [], []
        for fqn, op, flops in _leaves(profile, phase):
            path = [
                frame(f"module {part}", f"{name} ({classes[part]})" if part and classes.get(part) else name)
                for part, name in _stack(profile, fqn)
            ]
            samples.append([*path, frame(f"operator {op}", op)])
            weights.append(flops)
        if samples:
            profiles.append(
                {
                    "type": "sampled",
                    "name": f"{phase} (FLOPs)",
                    "unit": "none",
                    "startValue": 0,
                    "endValue": sum(weights),
                    "samples": samples,
                    "weights": weights,
                }
            )
    name = profile.target or classes.get("", "") or "flopprof"
    return json.dumps(
        {"$schema": _SCHEMA, "name": name, "exporter": "flopprof", "shared": {"frames": shared}, "profiles": profiles}
    )


def _leaves(profile: Profile, phase: Phase) -> Iterator[tuple[str, str, int]]:
    """(module, operator, FLOPs) of everything that was counted in a phase, in the order it ran."""
    sums: dict[tuple[str, str], int] = {}
    for row in profile.operators:
        if row.phase == phase and row.flops:
            sums[row.fqn, row.op] = sums.get((row.fqn, row.op), 0) + row.flops
    for (fqn, op), flops in sums.items():
        yield fqn, op, flops


def _stack(profile: Profile, fqn: str) -> list[tuple[str, str]]:
    """(fqn, own name) of the root, and of each module down to this one."""
    root = profile.target or next((row.cls for row in profile.modules if not row.fqn), "") or "(root)"
    return [(part, part.rpartition(".")[2] if part else root) for part in reversed(ancestors(fqn))]


def _one_word(name: str) -> str:
    return name.replace(";", "_").replace("\n", "_").replace("\r", "_")
