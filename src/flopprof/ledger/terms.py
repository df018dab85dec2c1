"""Reconcile a Profile with 2 N T and 6 N T, term by term: estimate + terms = measured, residual 0.

forward   2 N T, minus parameters that are never multiplied, plus or minus what each parameter is multiplied more or
          less than once per token, plus products in which no stored parameter is
backward  twice the forward, minus each gradient that is not computed, and why
hardware  what the mathematics requires, plus what is executed besides

Every term is a sum over rows of the profile. A backward row is held against the forward row that it differentiates,
not against a total: a gradient that was wanted and not computed, or computed and not expected, is a term of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import msgspec

from flopprof.analytic import two_n
from flopprof.errors import UsageError
from flopprof.ledger.joints import Joint, joints
from flopprof.profile import OperatorRow, ParameterRow, Profile

_SENTENCES = {
    "never_multiplied": "Parameters that are looked up or added, never multiplied: embeddings, biases, norms.",
    "under_use": "Parameters multiplied less than once per {unit}: idle experts, heads on some of the tokens.",
    "reuse": "Parameters multiplied more than once per {unit}: convolutions, shared layers, several token streams.",
    "activation_x_activation": "Products of two activations, such as QK^T and PV, or with computed weights.",
    "buffer_x_activation": "Products with a buffer, which is no parameter.",
    "no_graph": "Forward work that autograd did not record: no gradient of it is wanted.",
    "no_input_gradient": "Inputs of a layer that want no gradient, as the first layer's.",
    "frozen_weights": "Weights and buffers that want no gradient.",
    "frozen_activations": "Factors of a product of two activations that want no gradient.",
    "unreached": "Gradients that autograd could have computed, in a branch or for an input that was not asked for.",
    "repeated": "Gradients computed more than once: several backward passes over one forward.",
    "not_bilinear": "Operators whose gradients do not cost twice the forward: of three factors, and distances.",
    "higher_order": "Gradients of gradients.",
    "unjoined": "Backward work whose forward has no count or was not seen: custom functions, control flow, torch.func.",
    "kernel_recompute": "Scores that a fused attention kernel computes again in its backward.",
    "checkpoint_recompute": "Forward work that activation checkpointing runs again.",
    "optimizer": "Matrix products inside the optimizer's step.",
}
FORWARD = ("never_multiplied", "under_use", "reuse", "activation_x_activation", "buffer_x_activation")
BACKWARD = (
    *("no_graph", "no_input_gradient", "frozen_weights", "frozen_activations", "unreached", "repeated"),
    *("not_bilinear", "higher_order", "unjoined"),
)
HARDWARE = ("kernel_recompute", "checkpoint_recompute", "optimizer")


class Item(msgspec.Struct, frozen=True):
    """The part of a term that one parameter or module has, in both attention conventions."""

    name: str
    flops: int
    flops_full: int
    flops_causal: int


class Term(msgspec.Struct, frozen=True, kw_only=True):
    """One reason why a measured count differs from the estimate; negative where it lowers the count."""

    name: str
    flops: int
    flops_full: int
    flops_causal: int
    sentence: str
    items: tuple[Item, ...]


class ParameterUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one parameter is multiplied: `reuse` is 1 where that is once per token, forward_flops = 2 n T.

    embedding: of an nn.Embedding, also where a head is tied to it.
    Parameters that appear in one operator together (the weights of a recurrent layer) share its FLOPs by size.
    """

    name: str
    n: int
    trainable: bool
    embedding: bool
    forward_flops: int
    reuse: float


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """estimate_flops + the sum of terms = measured_flops. The ledger of the forward holds those of the rest.

    tokens           T: tokens (a decoder's, of an encoder-decoder), or samples where the model has no tokens; `unit`
                     says which
    n_params         N: all parameters, tied ones once; n_params_active: of those, multiplied in this run, each by the
                     share of T that it saw
    backward         against 2 x forward; None where no backward ran. hardware: against model FLOPs
    """

    measured: str
    estimate: str
    estimate_flops: int
    measured_flops: int
    terms: tuple[Term, ...]
    unit: str = "token"
    tokens: int = 0
    n_params: int = 0
    n_params_active: int = 0
    parameters: tuple[ParameterUse, ...] = ()
    joints: tuple[Joint, ...] = ()
    backward: Ledger | None = None
    hardware: Ledger | None = None

    @property
    def residual(self) -> int:
        """measured_flops - estimate_flops - all terms: 0."""
        return self.measured_flops - self.estimate_flops - sum(term.flops for term in self.terms)

    def term_flops(self) -> dict[str, int]:
        """Term -> FLOPs; a term that does not occur is 0."""
        return {term.name: term.flops for term in self.terms}

    def by_parameter(self) -> dict[str, ParameterUse]:
        """Parameter -> what it is multiplied."""
        return {use.name: use for use in self.parameters}

    @property
    def model_flops(self) -> int:
        """Forward and backward that the mathematics requires."""
        return self.measured_flops + (self.backward.measured_flops if self.backward is not None else 0)

    @property
    def factor(self) -> float:
        """model FLOPs / (N T): what stands in the place of 6 (of 2, without a backward) in this very run."""
        return self.model_flops / (self.n_params * self.tokens) if self.n_params else float("nan")

    def _repr_html_(self) -> str:
        """A small table for a notebook."""
        from flopprof.report.notebook import ledger_html

        return ledger_html(self)

    def to_json(self) -> str:
        """Everything as JSON; of what follows from it `residual`, `model_flops` and `factor` too."""
        derived = {"residual": self.residual, "model_flops": self.model_flops, "factor": self.factor}
        return msgspec.json.format(msgspec.json.encode(msgspec.to_builtins(self) | derived), indent=2).decode()


def reconcile(profile: Profile, tokens: int | None = None) -> Ledger:
    """Why the measured FLOPs of a profile differ from 2 N T (forward) and 6 N T (with backward), to the last FLOP.

    tokens: T; default: the tokens that the profile knows of, else its samples. Raises UsageError where neither is
    known, and where the profile does not say what its operators multiply (one that was written before it could).
    """
    unit, count = _tokens(profile, tokens)
    if any(row.phase == "forward" and not row.site for row in profile.operators):
        raise UsageError("this profile has no list of parameters: count the model again with this version of flopprof.")
    forward = [row for row in profile.operators if row.phase == "forward"]
    uses, groups = _uses(forward, profile, count)
    entries = [*_parameter_entries(groups, count), *_other_entries(forward)]
    unlisted = profile.n_params - sum(parameter.numel for parameter in profile.parameters)
    packed = sum(row.flops for row in forward if _is_packed(row))
    if unlisted or packed:
        entries.append(_packed(packed, two_n(unlisted, count)))
    found = joints(profile)
    multiplications = [*((use.n, use.forward_flops) for use in uses), (unlisted, packed)]
    return Ledger(
        measured="forward FLOPs",
        estimate="2 N T",
        estimate_flops=two_n(profile.n_params, count),
        measured_flops=profile.forward_flops,
        terms=_terms(FORWARD, entries, unit),
        unit=unit,
        tokens=count,
        n_params=profile.n_params,
        n_params_active=sum(min(n, flops // (2 * count)) for n, flops in multiplications),
        parameters=tuple(uses),
        joints=found,
        backward=_backward(profile, found),
        hardware=_hardware(profile),
    )


def _tokens(profile: Profile, tokens: int | None) -> tuple[str, int]:
    unit = "token" if tokens is not None or profile.tokens is not None else "sample"
    count = tokens if tokens is not None else profile.tokens if profile.tokens is not None else profile.samples
    if count is None:
        raise UsageError(
            "how many tokens is this profile of? Give reconcile(tokens=...), or samples where it has none."
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"tokens is a positive whole number, got {count!r}.")
    return unit, count


# --- forward ---------------------------------------------------------------------------------------
class _Group(msgspec.Struct):
    """Parameters that appear in one operator together, and the FLOPs of those operators."""

    parameters: list[ParameterRow]
    full: int = 0
    causal: int = 0
    flops: int = 0
    recurrent: bool = False

    def vectors(self) -> list[ParameterRow]:
        """The biases, which a recurrent layer takes among its weights and never multiplies."""
        return [member for member in self.parameters if self.recurrent and len(member.shape) == 1]

    def matrices(self) -> list[ParameterRow]:
        """The others."""
        vectors = self.vectors()
        return [member for member in self.parameters if member not in vectors]


def _uses(forward: Iterable[OperatorRow], profile: Profile, tokens: int) -> tuple[list[ParameterUse], list[_Group]]:
    known = {parameter.name: parameter for parameter in profile.parameters}
    group_of = {name: _Group([parameter]) for name, parameter in known.items()}
    for row in forward:
        names = [name for name in multiplied(row) if name in known]
        if not names:
            continue
        first = group_of[names[0]]
        for name in names[1:]:
            other = group_of[name]
            if other is not first:
                first.parameters += other.parameters
                first.flops += other.flops
                first.full += other.full
                first.causal += other.causal
                first.recurrent = first.recurrent or other.recurrent
                for parameter in other.parameters:
                    group_of[parameter.name] = first
        first.recurrent = first.recurrent or sum(operand.factor for operand in row.operands) > 3
        first.flops += row.flops
        first.full += row.flops_full
        first.causal += row.flops_causal
    uses = []
    for name, parameter in known.items():
        group = group_of[name]
        matrices = group.matrices()
        share = sum(member.numel for member in matrices)
        flops = group.flops * parameter.numel // share if parameter in matrices else 0
        uses.append(
            ParameterUse(
                name=name,
                n=parameter.numel,
                trainable=parameter.trainable,
                embedding=parameter.embedding,
                forward_flops=flops,
                reuse=flops / two_n(parameter.numel, tokens),
            )
        )
    return uses, list({id(group): group for group in group_of.values()}.values())


def multiplied(row: OperatorRow) -> list[str]:
    """Names of the parameters among a row's factors: one operand may be merged of several (`a + b`)."""
    names = [operand.name for operand in row.operands if operand.factor and operand.kind == "parameter"]
    return list(dict.fromkeys(part for name in names for part in name.split(" + ")))


def _parameter_entries(groups: Iterable[_Group], tokens: int) -> Iterator[tuple[str, Item]]:
    for group in groups:
        name = _common(parameter.name for parameter in group.matrices())
        once = two_n(sum(parameter.numel for parameter in group.parameters), tokens)
        if not group.full:
            yield "never_multiplied", Item(name, -once, -once, -once)
            continue
        for vector in group.vectors():
            yield "never_multiplied", Item(vector.name, *(-two_n(vector.numel, tokens),) * 3)
            once -= two_n(vector.numel, tokens)
        if group.flops != once:
            term = "reuse" if group.flops > once else "under_use"
            yield term, Item(name, group.flops - once, group.full - once, group.causal - once)


def _packed(flops: int, once: int) -> tuple[str, Item]:
    """Weights that a quantised operator holds packed: no tensor, no name of their own."""
    term = "never_multiplied" if not flops else "reuse" if flops > once else "under_use"
    return term, Item("packed weights", *(flops - once,) * 3)


def _is_packed(row: OperatorRow) -> bool:
    return row.op.startswith("quantized::") and sum(operand.factor for operand in row.operands) == 1


def _other_entries(forward: Iterable[OperatorRow]) -> Iterator[tuple[str, Item]]:
    for row in forward:
        if not multiplied(row) and not _is_packed(row):
            buffers = [o.name for o in row.operands if o.factor and o.kind == "buffer"]
            term = "buffer_x_activation" if buffers else "activation_x_activation"
            yield term, Item(buffers[0] if buffers else row.fqn, row.flops, row.flops_full, row.flops_causal)


def _common(names: Iterable[str]) -> str:
    """One name as it is; of several, the module that holds them all with their own names."""
    paths = [name.split(".") for name in names]
    if len(paths) == 1:
        return ".".join(paths[0])
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    rest = ", ".join(".".join(path[len(shared) :]) for path in paths)
    return ".".join((*shared, f"{{{rest}}}"))


# --- backward, hardware ------------------------------------------------------------------------------
def _backward(profile: Profile, found: Iterable[Joint]) -> Ledger | None:
    if not profile.backward_flops:
        return None
    entries: list[tuple[str, Item]] = []
    for joint in found:
        for name, amount in joint.missing.items():
            entries.append((name, Item(joint.name, *(-flops for flops in amount))))
        beyond = tuple(have - want for have, want in zip(joint.computed, joint.wanted, strict=True))
        if any(beyond):
            entries.append(("repeated" if beyond[0] > 0 else "unreached", Item(joint.name, *beyond)))
    sites = {site for joint in found for site in joint.sites}
    again = {row.site for row in profile.operators if row.phase == "backward" and row.site}
    for row in profile.operators:
        if row.phase == "backward" and row.joined_to not in sites:
            term = "higher_order" if row.joined_to in again else "unjoined"
            entries.append((term, Item(row.fqn, row.flops, row.flops_full, row.flops_causal)))
    return Ledger(
        measured="backward FLOPs",
        estimate="2 x forward",
        estimate_flops=2 * profile.forward_flops,
        measured_flops=profile.backward_flops,
        terms=_terms(BACKWARD, entries),
    )


def _hardware(profile: Profile) -> Ledger:
    entries = []
    for row in profile.operators:
        if row.phase in ("recompute", "optimizer"):
            kernel = bool(row.joined_to) or "backward" in row.op
            term = row.phase if row.phase == "optimizer" else f"{'kernel' if kernel else 'checkpoint'}_recompute"
            entries.append((term, Item(row.fqn, row.flops, row.flops_full, row.flops_causal)))
    return Ledger(
        measured="hardware FLOPs",
        estimate="model FLOPs",
        estimate_flops=profile.model_flops,
        measured_flops=profile.hardware_flops,
        terms=_terms(HARDWARE, entries),
    )


def _terms(names: Iterable[str], entries: Iterable[tuple[str, Item]], unit: str = "") -> tuple[Term, ...]:
    """Every term, also where it is 0; its items added up by name, the largest first."""
    sums: dict[str, dict[str, tuple[int, int, int]]] = defaultdict(dict)
    for term, item in entries:
        before = sums[term].get(item.name, (0, 0, 0))
        amounts = (item.flops, item.flops_full, item.flops_causal)
        sums[term][item.name] = (before[0] + amounts[0], before[1] + amounts[1], before[2] + amounts[2])
    terms = []
    for name in names:
        items = [Item(item, *amounts) for item, amounts in sums[name].items()]
        items.sort(key=lambda item: -abs(item.flops_full))
        terms.append(
            Term(
                name=name,
                flops=sum(item.flops for item in items),
                flops_full=sum(item.flops_full for item in items),
                flops_causal=sum(item.flops_causal for item in items),
                sentence=_SENTENCES[name].format(unit=unit),
                items=tuple(items),
            )
        )
    return tuple(terms)
