"""Every configuration that transformers registers for five Auto classes, counted on meta with its default sizes.

    python tests/zoo_huggingface.py [--auto CausalLM] [--only PATTERN] [--failures] [--narrow]

Reduced in depth, not in kind: fewer layers, all else as the class has it by default; forward and backward; nothing
runs on real numbers. A configuration whose default does not build in transformers either is told apart. With --narrow,
a version of each that is small enough for the CPU is counted on both, and the two compared.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any, Literal

import torch

from flopprof.counting.values import carried
from flopprof.errors import FlopprofError, ModelFailed, UsageError
from flopprof.models.hf_config import load_transformers
from flopprof.models.huggingface import load_config
from flopprof.models.request import Request
from flopprof.profile import Profile
from hf_reduced import consistent, narrowings, reduced

AUTO = {
    "CausalLM": "AutoModelForCausalLM",
    "MaskedLM": "AutoModelForMaskedLM",
    "Seq2SeqLM": "AutoModelForSeq2SeqLM",
    "ImageClassification": "AutoModelForImageClassification",
    "Model": "AutoModel",
}
LIMIT_S = 180  # of the processor's time
REQUEST = Request(batch=1, image_size=None, inputs=(), device="meta", dtype=None, train=False, model_args={})

SHORT = replace(REQUEST, seq=24, audio_seconds=1.0)
LONGER = (SHORT, replace(SHORT, seq=160), REQUEST)  # where so few tokens do not hold what is seen and heard
MOST_PARAMETERS = 300_000_000
MOST_FLOPS = 500 * 10**9
MOST_NARROW = 4
NARROW_LIMIT_S = 90

Verdict = Literal["clean", "uncounted", "failed", "unbuilt"]
Likeness = Literal["equal", "different", "apart", "unbuilt"]


@dataclass(frozen=True)
class Registered:
    """A model class that an Auto class builds of a kind of config."""

    auto: str
    kind: str
    cls: str

    def __str__(self) -> str:
        return f"{self.auto}/{self.kind}/{self.cls}"


@dataclass(frozen=True)
class Tried:
    """What became of one."""

    what: Registered
    verdict: Verdict
    reason: str
    flops: int
    seconds: float


class Late(BaseException):
    """It took too long."""


def registered(auto: str) -> Iterator[Registered]:
    """What transformers registers for one of the five, by the name of its kind."""
    transformers = load_transformers()
    names = getattr(transformers, AUTO[auto])._model_mapping._model_mapping
    for kind, classes in names.items():
        for cls in (classes,) if isinstance(classes, str) else classes:
            yield Registered(auto, kind, cls)


def default(kind: str) -> Any:
    """The default configuration of a kind."""
    return load_transformers().CONFIG_MAPPING[kind]()


def fault(what: Registered) -> str | None:
    """Why transformers itself does not build the default on meta; None where it does."""
    transformers = load_transformers()
    auto = getattr(transformers, AUTO[what.auto])
    try:
        config = default(what.kind)
        config.architectures = [what.cls]
        with torch.device("meta"), carried(lambda _: None):
            auto.from_config(config)
    except Late:
        raise
    except Exception as error:  # whatever a constructor raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


def attempt(what: Registered) -> Tried:
    """Build it, count it forward and backward, and say what came of it."""
    start = time.process_time()
    verdict, reason, flops = "failed", "", 0
    try:
        with limited(LIMIT_S):
            verdict, reason, flops = _attempt(what)
    except Late:
        reason = f"more than {LIMIT_S} s"
    return Tried(what, verdict, reason, flops, time.process_time() - start)


def _attempt(what: Registered) -> tuple[Verdict, str, int]:
    first = None
    try:
        sizes = list(reduced(default(what.kind)))
    except Exception as error:
        return "unbuilt", told(error), 0
    for facts, train in [*product(sizes, [False]), (sizes[0], True)]:
        if train and "model.train()" not in str(first):  # Reformer's backward is for training alone
            continue
        try:
            workload = load_config(what.kind, {**facts, "architectures": [what.cls]}, replace(REQUEST, train=train))
            profile = workload.count(backward=True)
        except Exception as error:
            first = first or error
            continue
        if profile.uncounted:
            return "uncounted", ", ".join(profile.uncounted), profile.model_flops
        return "clean", "", profile.model_flops
    assert first is not None
    why = fault(what)
    return ("failed", told(first), 0) if why is None else ("unbuilt", why, 0)


def disagreement(what: Registered) -> str | None:
    """How the model FLOPs of a narrow one on meta differ from those on the CPU; None where they are equal.

    Raises FlopprofError where no narrow one is found that runs on both and is small enough for the CPU.
    """
    problem: FlopprofError | None = None
    for narrow in islice(_narrow(what), MOST_NARROW):
        on_meta, cpu = narrow.profile, replace(narrow.request, device="cpu")
        try:
            real = load_config(what.kind, narrow.facts, cpu).count(backward=True)
        except FlopprofError as error:  # an id past the end of a table, which meta does not look at
            problem = problem or error
            continue
        if (on_meta.model_flops, on_meta.by_phase()) == (real.model_flops, {**real.by_phase(), **_same(on_meta)}):
            return None
        return f"{on_meta.model_flops} on meta, {real.model_flops} on the CPU"
    raise problem or ModelFailed(f"{what} stays too large for the CPU.")


def _same(profile: Profile) -> dict[str, int]:
    """What may differ: a fused kernel computes scores again."""
    return {"recompute": profile.recompute_flops}


@dataclass(frozen=True)
class Compared:
    """Whether a narrow one counts on meta as on the CPU; `apart` where it could not be compared, with the reason."""

    what: Registered
    verdict: Likeness
    reason: str
    seconds: float


def compare(what: Registered) -> Compared:
    """Run a narrow one on the CPU, within the limit of time, and compare it with meta."""
    start = time.process_time()
    verdict: Likeness = "apart"
    try:
        with limited(NARROW_LIMIT_S):
            difference = disagreement(what)
        verdict, reason = ("equal", "") if difference is None else ("different", difference)
    except Late:
        reason = f"more than {NARROW_LIMIT_S} s"
    except Exception as error:  # whatever a default configuration, and a model on the CPU, raise
        why = fault(what)
        verdict, reason = ("apart", told(error)) if why is None else ("unbuilt", why)
    return Compared(what, verdict, reason, time.process_time() - start)


def comparisons(autos: list[str], only: str = "") -> Iterator[Compared]:
    """All that is registered for these, each class once."""
    seen: set[tuple[str, str]] = set()
    for auto in autos:
        for what in registered(auto):
            if re.search(only, str(what)) and (what.kind, what.cls) not in seen:
                seen.add((what.kind, what.cls))
                yield compare(what)


@dataclass(frozen=True)
class Narrow:
    """A configuration of small widths, what its inputs were asked to be, and what it counts on meta."""

    facts: dict[str, Any]
    request: Request
    profile: Profile


def _narrow(what: Registered) -> Iterator[Narrow]:
    problem: FlopprofError | None = None
    found = False
    fewer, *others = reduced(default(what.kind))
    for facts in (*_agreeing(fewer), *(narrow for other in others for narrow in _agreeing(other))):
        for request in LONGER:
            try:
                workload = load_config(what.kind, {**facts, "architectures": [what.cls]}, request)
                if sum(parameter.numel() for parameter in workload.model.parameters()) > MOST_PARAMETERS:
                    break
                profile = workload.count(backward=True)
            except UsageError as error:  # too short for what is seen and heard
                problem = problem or error
                continue
            except FlopprofError as error:
                problem = problem or error
                break
            if profile.model_flops <= MOST_FLOPS:
                found = True
                yield Narrow({**facts, "architectures": [what.cls]}, request, profile)
            break
    if problem is not None and not found:
        raise problem


def _agreeing(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each narrowing as it is, and with what contradicts itself changed."""
    for narrow in narrowings(facts):
        yield narrow
        other = consistent(narrow)
        if other != narrow:
            yield other


def told(error: Exception) -> str:
    """An error in one line, named where it is no sentence of ours."""
    kind = "" if isinstance(error, FlopprofError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises Late inside after so long."""

    def late(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again each second: one in a finaliser is lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def sweep(autos: list[str], only: str = "") -> Iterator[Tried]:
    """Everything registered for these, one after the other; a class that two register is tried once."""
    seen: dict[tuple[str, str], Tried] = {}
    for auto in autos:
        for what in registered(auto):
            if re.search(only, str(what)):
                known = seen.get((what.kind, what.cls))
                if known is None:
                    known = seen[what.kind, what.cls] = attempt(what)
                yield Tried(what, known.verdict, known.reason, known.flops, known.seconds)


def summary(results: list[Tried]) -> list[str]:
    """For each Auto class and all together: registered, built, ran, counted with nothing uncounted, and the share."""
    lines = [f"{'':20}{'registered':>11}{'built':>7}{'ran':>6}{'clean':>7}{'share':>8}"]
    autos = [*dict.fromkeys(result.what.auto for result in results)]
    for auto in [*autos, "all"]:
        chosen = [result for result in results if auto in (result.what.auto, "all")]
        built = [result for result in chosen if result.verdict != "unbuilt"]
        ran = [result for result in built if result.verdict != "failed"]
        clean = [result for result in ran if result.verdict == "clean"]
        share = f"{100 * len(clean) / len(built):.1f} %" if built else "-"
        lines.append(f"{auto:20}{len(chosen):>11}{len(built):>7}{len(ran):>6}{len(clean):>7}{share:>8}")
    return lines


def _print_comparisons(compared: Iterator[Compared], *, failures: bool) -> None:
    found: Counter[Likeness] = Counter()
    for one in compared:
        found[one.verdict] += 1
        if one.verdict != "equal" or not failures:
            print(f"{one.verdict:10}{one.seconds:6.1f} s  {one.what} {one.reason}".rstrip(), flush=True)
    print(", ".join(f"{number} {verdict}" for verdict, number in found.items()))


def main() -> None:
    """Print a line for each, and how many there are of each verdict."""
    parser = argparse.ArgumentParser(description="Count every default configuration of transformers on meta.")
    parser.add_argument("--auto", choices=[*AUTO], action="append", help="only these Auto classes")
    parser.add_argument("--only", default="", help="only what this pattern finds, as in CausalLM/llama/")
    parser.add_argument("--failures", action="store_true", help="no lines for clean ones")
    parser.add_argument("--narrow", action="store_true", help="compare narrow ones on meta with the CPU instead")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    load_transformers().logging.set_verbosity_error()
    if given.narrow:
        _print_comparisons(comparisons(given.auto or [*AUTO], given.only), failures=given.failures)
        return
    results = []
    for result in sweep(given.auto or [*AUTO], given.only):
        results.append(result)
        if result.verdict != "clean" or not given.failures:
            note = f" {result.reason}" if result.reason else f" {result.flops}"
            print(f"{result.verdict:10}{result.seconds:6.1f} s  {result.what}{note}", flush=True)
    print("\n".join(summary(results)))
    sys.exit(0 if results else 2)


if __name__ == "__main__":
    main()
