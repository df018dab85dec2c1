"""Ledger -> the waterfall from 2 N T and 6 N T to the measured count, and what it means."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.ledger import Ledger, ParameterUse, Term
from flopprof.report.facts import Facts
from flopprof.report.grid import Column, Grid
from flopprof.units import common_step, format_fixed, format_flops, format_share, format_si, unit_name

_ITEMS = 3


def render(ledger: Ledger, *, heading: str = "") -> RenderableType:
    """The whole report as one renderable; width, colour and file are its printer's."""
    parts: list[RenderableType] = [Text(heading, style="bold", overflow="fold"), Text()] if heading else []
    parts += [_waterfall(ledger), Text(), Facts(list(_reasons(ledger))), Text(), Facts(list(verdict(ledger)))]
    return Group(*parts)


def _waterfall(ledger: Ledger) -> RenderableType:
    step = common_step([_largest(part) for part in stages(ledger)])
    rows: list[list[str]] = []
    for part in stages(ledger):
        if part is not ledger:
            rows.append([""])
        shown = [term for term in part.terms if term.flops or term.flops_full]
        rows.append([part.estimate, format_fixed(part.estimate_flops, step), "100.0%"])
        for term in shown:
            sign = "" if term.flops < 0 else "+"
            amount = f"{sign}{format_fixed(term.flops, step)}"
            rows.append([f"  {words(term)}", amount, _signed_share(term.flops, part.estimate_flops)])
        share = format_share(part.measured_flops, part.estimate_flops)
        rows.append([f"= {part.measured}", format_fixed(part.measured_flops, step), share])
    columns = [Column("Step", number=False, elastic=True), Column(unit_name(step, "FLOPs")), Column("Of the estimate")]
    return Grid(columns, rows)


def stages(ledger: Ledger) -> list[Ledger]:
    """The ledgers worth showing: hardware only where something was executed beyond the model's FLOPs."""
    parts = [ledger]
    if ledger.backward is not None:
        parts.append(ledger.backward)
    if ledger.hardware is not None and any(term.flops for term in ledger.hardware.terms):
        parts.append(ledger.hardware)
    return parts


def _largest(ledger: Ledger) -> int:
    return max(abs(ledger.estimate_flops), abs(ledger.measured_flops), *(abs(term.flops) for term in ledger.terms))


def words(term: Term) -> str:
    """The term's name as one reads it: `activation x activation`."""
    return term.name.replace("_x_", " x ").replace("_", " ")


def _signed_share(part: int, whole: int) -> str:
    share = format_share(part, whole)
    return share if part < 0 or not share else f"+{share}"


def _reasons(ledger: Ledger) -> Iterator[tuple[str, str]]:
    """Each term's sentence, and the largest parts of it."""
    for part in stages(ledger):
        for term in part.terms:
            if not (term.flops or term.flops_full):
                continue
            names = [f"{item.name or '(root)'} {format_si(item.flops, 'FLOPs')}" for item in term.items[:_ITEMS]]
            more = f", {len(term.items) - _ITEMS} more" if len(term.items) > _ITEMS else ""
            yield words(term), f"{term.sentence} {', '.join(names)}{more}."
            if term.flops_full != term.flops_causal:
                full, causal = format_si(term.flops_full, "FLOPs"), format_si(term.flops_causal, "FLOPs")
                yield "", f"Over every query-key pair {full}; over those that the mask lets through {causal}."


def verdict(ledger: Ledger) -> Iterator[tuple[str, str]]:
    """What N, T and the simple formula are here, and what other tools' conventions make of the same run."""
    trained = ledger.backward is not None
    factor, tokens, n = (6 if trained else 2), ledger.tokens, ledger.n_params
    yield "N", f"{n:,} parameters, tied ones once; {ledger.n_params_active:,} of them active in this run, as measured"
    yield "T", f"{tokens:,} {ledger.unit}{'' if tokens == 1 else 's'}"
    if ledger.unit == "sample":
        yield "", "The model has no tokens: 2 N T is per sample, and reuse says how often weights are used in one."
    simple = factor * n * tokens
    kind = "training" if trained else "forward"
    if not ledger.model_flops:
        yield f"{factor} N T", format_flops(simple)
        yield "this run", f"0 FLOPs of {kind}: nothing is multiplied, so there is nothing to reconcile"
        return
    off = 100 * (simple / ledger.model_flops - 1)
    direction = "high" if off >= 0 else "low"
    yield f"{factor} N T", f"{format_flops(simple)}: {abs(off):.1f} % too {direction} here"
    found = f"{ledger.factor:.3f} N T, not {factor} N T" if simple else f"all beyond {factor} N T, since N is 0"
    yield "this run", f"{format_flops(ledger.model_flops)} of {kind}: {found}"
    if trained:
        yield from _others(ledger)


def _others(ledger: Ledger) -> Iterator[tuple[str, str]]:
    """What other tools' conventions make of the same run."""
    tokens, n = ledger.tokens, ledger.n_params
    embeddings = sorted((use for use in ledger.parameters if use.embedding), key=lambda use: -use.n)
    every = sum(use.n for use in embeddings)
    # The largest holds the tokens; a tied one is multiplied as the head.
    untied = embeddings[0].n if embeddings and not embeddings[0].forward_flops else 0
    attention = next(term for term in ledger.terms if term.name == "activation_x_activation")
    if ledger.unit == "token":  # these are formulas for tokens
        trainer = 6 * (n - every) * tokens
        yield "HF Trainer", f"{format_flops(trainer)} as total_flos: 6 (N - embeddings) T, no attention"
        palm = 6 * n * tokens + 3 * attention.flops_full
        yield (
            "nanoGPT, PaLM",
            f"{format_flops(palm)}: 6 N T + 3 x full attention; nanoGPT leaves position embeddings out",
        )
        idle = sum(_idle(use, tokens) for use in ledger.parameters if "expert" in use.name)
        titan = 6 * (n - untied - idle) * tokens + 3 * attention.flops_full
        without = "untied embeddings - idle experts" if idle else "untied embeddings"
        yield "torchtitan", f"{format_flops(titan)}: 6 (N - {without}) T + 3 x full attention"
    yield "FlopCounterMode", f"{format_flops(_full(ledger))} where it knows every operator: recompute is in its total"


def _idle(use: ParameterUse, tokens: int) -> int:
    """Elements of a multiplied parameter that not every token meets."""
    return max(use.n - use.forward_flops // (2 * tokens), 0) if use.forward_flops else 0


def _full(ledger: Ledger) -> int:
    """Everything but the optimizer's step, over every query-key pair, whatever the profile's convention is."""
    assert ledger.backward is not None
    assert ledger.hardware is not None
    forward = ledger.estimate_flops + sum(term.flops_full for term in ledger.terms)
    backward = 2 * forward + sum(term.flops_full for term in ledger.backward.terms)
    return forward + backward + sum(term.flops_full for term in ledger.hardware.terms if term.name != "optimizer")
