"""A budget for continuous integration: what a model may cost, and which modules are to blame where it costs more."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import floor, inf

import msgspec

from flopprof.errors import UsageError
from flopprof.profile import Profile
from flopprof.units import format_si

_NAMED = 5


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of a profile and the most it may be."""

    figure: str  # model_flops (FLOPs), n_params, uncounted (calls)
    limit: int
    found: int
    against: str = ""  # where the limit comes from, if not from the caller: the baseline's own figure


class Excess(Limit, frozen=True, kw_only=True):
    """A limit that is broken, and the modules (or operators) that weigh most in it, or grew most."""

    blamed: tuple[tuple[str, int], ...]

    @property
    def sentence(self) -> str:
        """What is wrong, in one sentence with the modules named."""
        unit = "FLOPs" if self.figure.endswith("flops") else ""
        names = ", ".join(f"{name or '(root)'} {format_si(value, unit)}" for name, value in self.blamed)
        if self.figure == "uncounted":
            return f"{self.found} calls of operators without a formula, which prove nothing: {names}."
        beyond = f"{self.figure} is {format_si(self.found - self.limit, unit)} over its limit"
        return f"{beyond}; {'grown most' if self.against else 'largest'}: {names}."


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Every limit with what was found, and those that are broken."""

    target: str
    limits: tuple[Limit, ...]
    excesses: tuple[Excess, ...]
    schema: str = "flopprof.verdict/1"

    def to_json(self) -> str:
        """The whole verdict as JSON, schema `flopprof.verdict/1`."""
        return msgspec.json.encode(self).decode()


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What a model may cost. None: no limit.

    max_flops   model_flops: forward, and backward where that was counted; one multiply-add is 2
    max_params  parameters, tied ones once
    baseline    a profile that neither figure may exceed by more than `tolerance` (0.005: half a percent)
    """

    max_flops: int | None = None
    max_params: int | None = None
    baseline: Profile | None = None
    tolerance: Fraction | float = 0

    def __post_init__(self) -> None:
        if self.max_flops is None and self.max_params is None and self.baseline is None:
            raise UsageError("a budget needs a limit: give --max-flops, --max-params or --baseline.")
        for name, limit in (("most FLOPs", self.max_flops), ("most parameters", self.max_params)):
            if limit is not None and limit < 0:
                raise UsageError(f"the {name} are {limit}: give a number that is not negative.")
        if not 0 <= self.tolerance < inf:
            raise UsageError(f"the tolerance is {self.tolerance}: give a share such as 0.5%.")

    def judge(self, profile: Profile) -> Verdict:
        """Which limits the profile keeps, and which it breaks.

        What is uncounted breaks a limit of FLOPs: a lower bound proves nothing. Raises UsageError where the baseline
        was counted by another convention, in other phases, or on another number of samples or tokens.
        """
        flops, params = _own_flops(profile), _own_parameters(profile)
        pairs: list[tuple[Limit, Mapping[str, int]]] = []
        if self.max_flops is not None:
            pairs.append((_limit(profile, "model_flops", self.max_flops), flops))
        if self.max_params is not None:
            pairs.append((_limit(profile, "n_params", self.max_params), params))
        if self.baseline is not None:
            _comparable(self.baseline, profile)
            for figure, now, then in (
                ("model_flops", flops, _own_flops(self.baseline)),
                ("n_params", params, _own_parameters(self.baseline)),
            ):
                was = getattr(self.baseline, figure)
                limit = _limit(profile, figure, allowance(was, self.tolerance), f"the baseline has {was:,}")
                pairs.append((limit, {name: value - then.get(name, 0) for name, value in now.items()}))
        if self.max_flops is not None or self.baseline is not None:
            allowed = sum(self.baseline.uncounted.values()) if self.baseline is not None else 0
            found = sum(profile.uncounted.values())
            if found > allowed:
                pairs.append((Limit(figure="uncounted", limit=allowed, found=found), profile.uncounted))
        return Verdict(
            target=profile.target,
            limits=tuple(limit for limit, _weights in pairs),
            excesses=tuple(
                Excess(**msgspec.structs.asdict(limit), blamed=_heaviest(weights))
                for limit, weights in pairs
                if limit.found > limit.limit
            ),
        )


def _limit(profile: Profile, figure: str, limit: int, against: str = "") -> Limit:
    return Limit(figure=figure, limit=limit, found=getattr(profile, figure), against=against)


def _comparable(baseline: Profile, profile: Profile) -> None:
    if baseline.attention != profile.attention:
        raise UsageError(
            f"the baseline counts {baseline.attention} attention, this count {profile.attention}: "
            f"give --attention {baseline.attention}."
        )
    if bool(baseline.backward_flops) != bool(profile.backward_flops):
        has = (
            "has a backward pass, this count none"
            if baseline.backward_flops
            else "has no backward pass, this count one"
        )
        raise UsageError(f"the baseline {has}: count both with --backward, or neither.")
    for what, then, now in (
        ("samples", baseline.samples, profile.samples),
        ("tokens", baseline.tokens, profile.tokens),
    ):
        if then is not None and now is not None and then != now:
            raise UsageError(
                f"the baseline was counted on {then} {what}, this count on {now}: count both on the same inputs "
                "(--batch, --seq or --input)."
            )


def allowance(value: int, tolerance: Fraction | float) -> int:
    """The largest integer that exceeds `value` by no more than the share `tolerance`: 0.005 is 5/1000 exactly."""
    return value + floor(value * Fraction(str(tolerance)))


def _own_flops(profile: Profile) -> dict[str, int]:
    """model_flops per module, without its children."""
    table = dict(profile.by_module("forward", own=True))
    for name, flops in profile.by_module("backward", own=True).items():
        table[name] = table.get(name, 0) + flops
    return table


def _own_parameters(profile: Profile) -> dict[str, int]:
    return {row.fqn: row.own_parameters for row in profile.modules}


def _heaviest(table: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    ranked = sorted((item for item in table.items() if item[1] > 0), key=lambda item: (-item[1], item[0]))
    return tuple(ranked[:_NAMED])
