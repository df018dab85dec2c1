"""A plan on a page: the run, its budget's best use, its memory and what serving the model takes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from flopprof.plan.result import Optimum, Plan, Run, Serving, TrainingMemory
from flopprof.report.facts import Facts
from flopprof.report.grid import Column, Grid
from flopprof.report.peaks import format_tera
from flopprof.units import format_si

_GIGA, _TERA = 10**9, 10**12
_KWH_J = 3.6e6
_MILLI = 1000
Fact = tuple[str, str]


def render(plan: Plan) -> RenderableType:
    """The sections that the plan has something to say in."""
    shown = sections(plan)
    parts: list[RenderableType] = []
    width = max(len(label) for _, facts in shown for label, _ in facts)
    for title, facts in shown:
        padded = [(label.ljust(width), text) for label, text in facts]
        parts += [Text(title, style="bold"), Facts(padded), Text()]
    told = notes(plan)
    if told:
        return Group(*parts, Facts([(label.ljust(width), text) for label, text in told]))
    return Group(*parts[:-1])


def sections(plan: Plan) -> list[tuple[str, list[Fact]]]:
    """(title, labelled sentences) of each part that the plan has something to say in."""
    parts = [
        ("Training", _training(plan)),
        ("Best use of these FLOPs", _optima(plan)),
        ("Training memory, fullest device", _memory(plan)),
        ("Decoding", _serving(plan)),
    ]
    return [(title, facts) for title, facts in parts if facts]


def notes(plan: Plan) -> list[Fact]:
    """What was assumed, and what to beware of."""
    return [("assumed", text) for text in plan.assumptions] + [("warning", text) for text in plan.warnings]


def _training(plan: Plan) -> list[Fact]:
    facts: list[Fact] = []
    if plan.params is not None:
        active = "" if plan.active_params == plan.params else f", {_count(plan.active_params)} of them active a token"
        name = "" if plan.model is None else f"{plan.model}: "
        facts.append(("model", f"{name}{_count(plan.params)} parameters{active}"))
    if plan.tokens is not None:
        ratio = "" if not plan.active_params else f" ({plan.tokens / plan.active_params:.3g} a parameter)"
        facts.append(("tokens", f"{_count(plan.tokens)}{ratio}"))
    if plan.flops_6nd is not None:
        facts.append(("6 N D", f"{plan.flops_6nd:.4g} FLOPs{_mark(plan, '6nd')}"))
    if plan.flops_detailed is not None:
        share = "" if not plan.flops_6nd else f", {plan.flops_detailed / plan.flops_6nd:.3f} of 6 N D"
        where = f"attention over all pairs of {plan.seq} tokens"
        facts.append(("detailed", f"{plan.flops_detailed:.4g} FLOPs{share}; {where}{_mark(plan, 'detailed')}"))
    if plan.flops is not None and plan.flops_6nd is None:
        facts.append(("FLOPs", f"{plan.flops:.4g}"))
    if plan.peak_flops_per_s is not None:
        name = plan.hardware or "device"
        dtype = "" if plan.dtype is None else f" {plan.dtype}"
        rate = "" if plan.bytes_per_s is None else f", {plan.bytes_per_s / _GIGA:.0f} GB/s"
        facts.append(("hardware", f"{name}, {format_tera(plan.peak_flops_per_s)} TFLOP/s dense{dtype}{rate}"))
    if plan.mfu is not None:
        reached = "" if plan.peak_flops_per_s is None else f" = {format_tera(plan.mfu * plan.peak_flops_per_s)} TFLOP/s"
        how = "given" if "mfu" in plan.given else "assumed" if plan.mfu_assumed else "implied"
        facts.append(("MFU", f"{plan.mfu:.1%}{reached} a device ({how})"))
    if plan.device_hours is not None:
        facts.append(("device-hours", f"{_figure(plan.device_hours)} ({_figure(plan.device_hours / 24)} device-days)"))
    if plan.days is not None and plan.devices is not None:
        facts.append(("time", f"{_figure(plan.days)} days on {_figure(plan.devices)} devices"))
    if plan.cost_usd is not None:
        price = "" if plan.usd_per_device_hour is None else f" at ${plan.usd_per_device_hour:,.2f} a device-hour"
        facts.append(("cost", f"${plan.cost_usd:,.0f}{price}"))
    if plan.energy_j is not None:
        of = f"{plan.power_w:.0f} W a device ({plan.power_is}), PUE {plan.pue:g}"
        facts.append(("energy", f"{_figure(plan.energy_j / _KWH_J / _MILLI)} MWh: {of}"))
    if plan.co2_kg is not None:
        facts.append(("CO2", f"{_figure(plan.co2_kg / _MILLI)} t"))
    return facts


def _mark(plan: Plan, counting: str) -> str:
    both = plan.flops_6nd is not None and plan.flops_detailed is not None
    return " (used below)" if both and plan.counted_by == counting else ""


def _optima(plan: Plan) -> list[Fact]:
    return [("", _optimum(found)) for found in plan.optima]


def _optimum(found: Optimum) -> str:
    return f"{_count(found.params)} parameters on {_count(found.tokens)} tokens ({found.rule})"


def _memory(plan: Plan) -> list[Fact]:
    found = plan.memory
    if found is None:
        return []
    facts = [
        ("weights", _bytes(found.weights_bytes)),
        ("gradients", _bytes(found.gradients_bytes)),
        ("optimizer", _bytes(found.optimizer_bytes)),
    ]
    if found.activations_bytes is None:
        facts.append(("activations", "not known: they follow from a shape, not from a number of parameters"))
    else:
        logits = _bytes(found.logits_bytes or 0)
        facts.append(("activations", f"{_bytes(found.activations_bytes)}, and logits {logits}"))
    total = f"{'' if found.activations_bytes is not None else '>= '}{_bytes(found.total_bytes)}"
    facts += [("together", f"{total}{_fits(found, plan)}"), ("with", found.settings)]
    return facts


def _fits(found: TrainingMemory, plan: Plan) -> str:
    fits = found.fits(plan.device_memory_bytes)
    if fits is None or plan.device_memory_bytes is None:
        return ""
    verdict = "within" if fits else "MORE than"
    return f", {verdict} the device's {_bytes(plan.device_memory_bytes)}; buffers come on top"


def _serving(plan: Plan) -> list[Fact]:
    found = plan.serving
    if found is None:
        return []
    thousand = f"{1000 * found.flops_per_token:.4g} FLOPs"
    if plan.flops is not None:
        thousand += f"; the training above is {plan.flops / found.flops_per_token / 1000:.2g} times that"
    facts = [
        ("a token", f"{found.flops_per_token:.4g} FLOPs"),
        ("1,000 tokens", thousand),
        (
            "weights",
            f"{_bytes(found.resident_bytes)} in {found.weight_bits} bits{_spread(found, plan)}; "
            f"{_bytes(found.weight_bytes)} read a step",
        ),
    ]
    if found.cache_bytes_per_token is not None:
        each = _bytes(found.cache_bytes_per_token)
        facts.append(("cache", f"{each} a token, {found.context} tokens a sequence"))
    if found.compute_s is not None:
        facts.append(("products", f"{_seconds(found.compute_s)} at the peak"))
    if found.memory_s is not None:
        facts.append(("memory", f"{_seconds(found.memory_s)} to read {_bytes(found.bytes_per_step)}"))
    if found.time_s is not None and found.tokens_per_s is not None:
        rate = f"{_figure(found.tokens_per_s)} tokens/s{_with(found)}"
        facts.append(("bound by", f"{found.bound}: {_seconds(found.time_s)} a step, {rate}"))
    if found.compute_bound_from is not None:
        facts.append(("", f"by products from a batch of {found.compute_bound_from:,}"))
    if found.usd_per_million_tokens is not None:
        facts.append(("1 M tokens", f"${found.usd_per_million_tokens:.4g}"))
    return facts


def _spread(found: Serving, plan: Plan) -> str:
    """How many devices the weights alone need, where they are too large for those that were given."""
    if plan.device_memory_bytes is None or found.resident_bytes <= found.devices * plan.device_memory_bytes:
        return ""
    return f", for which {-(-found.resident_bytes // plan.device_memory_bytes)} devices are needed"


def _with(found: Serving) -> str:
    return f" (batch {found.batch}" + (f", {found.devices} devices" if found.devices > 1 else "") + "; at best)"


def render_runs(runs: Sequence[Run]) -> RenderableType:
    """Published runs: 6 N D over their device-hours, as a share of the dense peak."""
    columns = [
        Column("Run\n ", number=False, elastic=True),
        Column("N\n "),
        Column("Tokens\n "),
        Column("6 N D\nFLOPs"),
        Column("Device\n ", number=False),
        Column("Device-hours\n "),
        Column("Reached\nTFLOP/s"),
        Column("Share\nof peak"),
    ]
    rows = [
        [
            run.name,
            _count(run.params),
            _count(run.tokens),
            f"{run.flops:.2e}".replace("e+", "e"),
            run.device,
            "-" if run.device_hours is None else f"{run.device_hours:,.0f}",
            format_tera(run.flops_per_s),
            f"{run.utilisation:.1%}",
        ]
        for run in runs
    ]
    facts = [
        ("Share", "6 N D over device-hours and dense peak: of the whole run, restarts and evaluation included"),
        ("as of", "each run's source and date: --json -"),
    ]
    return Group(Grid(columns, rows), Text(), Facts(facts))


def _count(value: int | None) -> str:
    """`7 B`, `1 T`: how the field writes parameters and tokens."""
    return "-" if value is None else _trim(format_si(value, digits=4)).replace(" G", " B")


def _trim(text: str) -> str:
    number, _, unit = text.partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number} {unit}".strip()


def _bytes(count: int) -> str:
    return _trim(format_si(count, "B"))


def _seconds(value: float) -> str:
    return _trim(format_si(value, "s")) if value >= 1 else _trim(f"{value * _MILLI:.4g} ms")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
