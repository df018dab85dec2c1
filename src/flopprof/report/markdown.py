"""Profile -> Markdown: totals and tables of modules and operators, for pull requests and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flopprof.profile import PHASES, Profile
from flopprof.report.facts import idle_experts
from flopprof.report.tree import Node, module_tree
from flopprof.units import common_step, format_fixed, format_flops, format_share, format_si, unit_name

_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]<>#|~"} | {"\n": " "})


def to_markdown(profile: Profile, *, heading: str = "", depth: int = 3) -> str:
    """The report as GitHub-flavoured Markdown; FLOPs, one multiply-add is 2. depth: levels of modules shown."""
    title = profile.target or next((row.cls for row in profile.modules if not row.fqn), "model")
    parts = [f"# FLOPs of {escaped(title)}", ""]
    if heading:
        parts += [escaped(heading), ""]
    parts += [*_totals(profile), "", "## Modules", "", *_modules(profile, depth), "", "## Operators", ""]
    parts += [*_operators(profile), "", "One multiply-add is 2 FLOPs; attention counted as "]
    parts[-1] += f"{profile.attention}; elementwise FLOPs are apart."
    if profile.assumptions:
        parts += ["", "Assumed:", "", *(f"- {escaped(sentence)}" for sentence in profile.assumptions)]
    if profile.uncounted:
        parts += ["", "Without a formula, hence in no number above:", ""]
        parts += [f"- {escaped(op)}: {calls} calls" for op, calls in profile.uncounted.items()]
    return "\n".join(parts) + "\n"


def _totals(profile: Profile) -> Iterator[str]:
    bound = "&ge; " if profile.uncounted else ""
    rows = [(phase, flops) for phase, flops in profile.by_phase().items() if flops]
    rows += [("model: forward + backward", profile.model_flops), ("hardware: everything", profile.hardware_flops)]
    table = [(name, f"{bound}{format_flops(flops)}", f"{flops:,}") for name, flops in rows]
    if profile.experts:
        name = f"active: {idle_experts(profile)}"
        table.append((name, f"{bound}{format_flops(profile.active_flops)}", f"{profile.active_flops:,}"))
    table.append(("elementwise", format_si(profile.elementwise_flops, "FLOPs"), f"{profile.elementwise_flops:,}"))
    table.append(("parameters", format_si(profile.n_params), f"{profile.n_params:,}"))
    yield from pipe_table(["Total", "", "Exact"], table)


def _modules(profile: Profile, depth: int) -> Iterator[str]:
    root = module_tree(profile)
    phases = [number for number, flops in enumerate(root.flops) if flops] or [0]
    step = common_step(root.flops)
    heads = ["Module", "Class", "Params", *(f"{PHASES[i].capitalize()} ({unit_name(step, 'FLOPs')})" for i in phases)]
    rows = [
        [
            f"{'&nbsp;' * 4 * level}{escaped(label)}",
            escaped(node.cls),
            format_si(node.parameters),
            *(format_fixed(node.flops[i], step) for i in phases),
            format_share(node.total, root.total),
        ]
        for level, label, node in _visible(root, depth, 0, title=profile.target or root.cls)
    ]
    yield from pipe_table([*heads, "Share"], rows, names=2)


def _visible(node: Node, depth: int, level: int, *, title: str = "") -> Iterator[tuple[int, str, Node]]:
    name = title or node.name
    yield level, f"{name} ({node.repeats}x)" if node.repeats > 1 else name, node
    if level < depth:
        for child in node.children:
            yield from _visible(child, depth, level + 1)


def _operators(profile: Profile) -> Iterator[str]:
    calls: dict[str, int] = {}
    for row in profile.operators:
        calls[row.op] = calls.get(row.op, 0) + row.calls
    whole = profile.hardware_flops
    rows = [
        (escaped(op), str(calls[op]), format_flops(flops), format_share(flops, whole))
        for op, flops in profile.by_operator().items()
    ]
    yield from pipe_table(["Operator", "Calls", "FLOPs", "Share"], rows)


def pipe_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> Iterator[str]:
    """Rows under their heads, the first `names` columns to the left, numbers to the right."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{'|'.join(' :--- ' if i < names else ' ---: ' for i in range(len(heads)))}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def escaped(name: str) -> str:
    """A name as plain text: nothing in it is markup."""
    return name.translate(_SPECIAL)
