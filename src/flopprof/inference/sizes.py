"""How many tokens of what: the sizes of a call of inference(), checked before any model is built. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from flopprof.errors import UsageError
from flopprof.inference.result import MODES, Mode


@dataclass(frozen=True)
class Sizes:
    """What was asked for; None: not said."""

    mode: Mode
    context: int | None
    prompt: int | None
    new: int | None
    batch: int


def check_sizes(
    mode: Mode, *, context: int | None, prompt: int | None, new: int | None, batch: int, seq: int | None
) -> Sizes:
    """The sizes of a call. Raises UsageError where they contradict each other or the mode, whatever the model is."""
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} is none of {', '.join(MODES)}.")
    if prompt is not None and seq is not None:
        raise UsageError("--prompt and --seq both give the prompt's tokens: leave one of them out.")
    prompt = seq if prompt is None else prompt
    for option, size in {"--context": context, "--prompt": prompt, "--new": new, "--batch": batch}.items():
        if size is not None and size < 1:
            raise UsageError(f"{option} is {size}: give a whole number of at least 1.")
    if context is not None and mode != "decode":
        raise UsageError(f"--context is for --mode decode; --mode {mode} takes --prompt.")
    if new is not None and mode != "generate":
        raise UsageError(f"--new is for --mode generate, not for --mode {mode}.")
    if new is None and mode == "generate":
        raise UsageError("--mode generate needs --new M: how many tokens are to be made.")
    return Sizes(mode, context, prompt, new, batch)
