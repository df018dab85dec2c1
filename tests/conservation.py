"""Laws that hold of every profile, checked by every test that makes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flopprof import FlopCounter
from flopprof.profile import PHASES, Phase, Profile


def conserved(profile: Profile) -> Profile:
    """The profile, found to add up: by module, operator, phase and dtype, and through its JSON."""
    total, own = profile.by_module(), profile.by_module(own=True)
    for fqn, flops in total.items():
        children = [name for name in total if name and name.rpartition(".")[0] == fqn]
        assert flops == own[fqn] + sum(total[child] for child in children), fqn
    for table in (profile.by_operator(), own, profile.by_phase(), profile.by_dtype()):
        assert sum(table.values()) == profile.hardware_flops
    assert total[""] == profile.hardware_flops
    for phase in PHASES:
        assert sum(profile.by_operator(phase).values()) == profile.by_phase()[phase]
        assert sum(profile.by_module(phase, own=True).values()) == profile.by_phase()[phase]
    assert Profile.from_json(profile.to_json()) == profile
    return profile


def counted(run: Callable[..., Any], *args: Any, model: torch.nn.Module | None = None) -> Profile:
    """The conserved profile of `run(*args)` under a counter of `model`."""
    with FlopCounter(model) as counter:
        run(*args)
    return conserved(counter.profile)


def own(profile: Profile, phase: Phase) -> dict[str, int]:
    """FLOPs of each module's own operators in one phase, zeros left out."""
    return {fqn: flops for fqn, flops in profile.by_module(phase, own=True).items() if flops}


def where(profile: Profile) -> dict[str, dict[str, int]]:
    """phase -> module -> FLOPs of its own operators, zeros left out: all that attribution says."""
    table = {phase: own(profile, phase) for phase in PHASES}
    return {phase: modules for phase, modules in table.items() if modules}
