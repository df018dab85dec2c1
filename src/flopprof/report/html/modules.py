"""Profile -> the tree of its modules: a chart to walk down, and a table to sort and search."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from flopprof.profile import PHASES, Profile, ancestors
from flopprof.report.html.elements import Head, escape, figure, paragraph, table
from flopprof.report.html.page import Section
from flopprof.report.tree import Node, module_tree
from flopprof.units import format_share

_STATIC_DEPTH = 4
_STATIC_ROWS = 300


def phases_of(profile: Profile) -> list[int]:
    """Positions in PHASES of those that occur; forward always."""
    used = {row.phase for row in profile.operators if row.flops} | {row.phase for row in profile.uncounted_rows}
    return [i for i, phase in enumerate(PHASES) if phase == "forward" or phase in used]


def chart(profile: Profile) -> Section:
    """The icicle (or treemap) of FLOPs by module; a click goes down, buttons beside it do the same by keyboard."""
    tree, phases = module_tree(profile), phases_of(profile)
    options = "".join(
        f'<option value="{key}">{escape(label)}</option>'
        for key, label in (
            ("all", "FLOPs, all phases"),
            *((PHASES[i], f"FLOPs, {PHASES[i]}") for i in phases if len(phases) > 1),
            *((("elementwise", "elementwise FLOPs"),) if profile.elementwise_flops else ()),
            *((("parameters", "parameters"),) if profile.n_params else ()),
        )
    )
    body = (
        '<div class="controls scripted-only">'
        '<label>Chart <select id="shape"><option value="icicle">icicle</option><option value="treemap">treemap</option>'
        f'</select></label><label>Size <select id="size">{options}</select></label>'
        '<label><input type="checkbox" id="folded" checked> identical blocks in a row as one</label></div>'
        '<nav class="path scripted-only" id="path" aria-label="Module shown"></nav>'
        + figure("icicle", label="FLOPs by module; the buttons below hold the same numbers", height=420)
        + '<ul class="classes scripted-only" id="classes" aria-label="Colours: classes of modules"></ul>'
        '<h3 class="scripted-only" id="children-title">Inside</h3>'
        '<ul class="children scripted-only" id="children" aria-labelledby="children-title"></ul>'
        f"<noscript>{_static(profile, tree)}</noscript>"
    )
    return Section(
        anchor="modules",
        title="FLOPs by module",
        body=body,
        data={"modules": modules_data(profile, tree)},
        scripts=("modules",),
    )


def listing(profile: Profile) -> Section:
    """Every module that ran in one table, which the script of `chart` sorts and searches."""
    body = (
        '<div class="controls scripted-only"><label>Search <input type="search" id="search" autocomplete="off" '
        'placeholder="name or class" aria-controls="listing"></label>'
        '<span id="found" role="status" aria-live="polite"></span></div>'
        '<div id="listing" class="scripted-only"></div>'
        "<noscript><p>The table of modules above folds repeated blocks; this one is drawn by a script.</p></noscript>"
    )
    return Section(anchor="table", title="All modules", body=body, scripts=("table", "listing"))


def modules_data(profile: Profile, tree: Node) -> dict[str, Any]:
    """Every module in columns, parents before children: names, parents (positions), own FLOPs by phase and so on.

    tree: module_tree(profile). `folded` is that tree, in which identical repeated siblings are one node: [parent node,
    module, repeats, label] each; no label: the module's name.
    """
    names = _ordered(profile)
    place = {fqn: i for i, fqn in enumerate(names)}
    rows = {row.fqn: row for row in profile.modules}
    classes = list(dict.fromkeys(row.cls for row in profile.modules))
    position = {cls: i for i, cls in enumerate(classes)}
    phases = phases_of(profile)
    own = [profile.by_module(PHASES[i], own=True) for i in phases]
    elementwise = profile.elementwise_by_module(own=True)
    holes = [
        sorted({place[name] for row in profile.uncounted_rows if row.phase == PHASES[i] for name in ancestors(row.fqn)})
        for i in phases
    ]
    ran = [rows.get(fqn) for fqn in names]
    return {
        "root": profile.target or (rows[""].cls if "" in rows else "") or "(all)",
        "phases": [PHASES[i] for i in phases],
        "classes": classes,
        "parents": [-1, *(place[ancestors(fqn)[1]] for fqn in names[1:])],
        "names": [fqn.rpartition(".")[2] for fqn in names],
        "cls": [position[row.cls] if row else -1 for row in ran],
        "calls": [row.calls if row else 0 for row in ran],
        "parameters": [row.parameters if row else None for row in ran],
        "own_parameters": [row.own_parameters if row else 0 for row in ran],
        "shapes": [_shape(row.output_shape) if row else "" for row in ran],
        "flops": [[table.get(fqn, 0) for fqn in names] for table in own],
        "elementwise": [elementwise.get(fqn, 0) for fqn in names],
        "uncounted": holes,
        "folded": list(_folded(tree, place)),
    }


def _ordered(profile: Profile) -> list[str]:
    """Every module and everything above one, each parent followed by what is below it; the root first."""
    known = [
        *profile.by_module(),
        *(row.fqn for row in profile.elementwise),
        *(row.fqn for row in profile.uncounted_rows),
    ]
    below: dict[str, dict[str, None]] = {}
    for fqn in dict.fromkeys(known):
        for child, parent in pairwise(ancestors(fqn)):
            below.setdefault(parent, {})[child] = None
    ordered, waiting = [], [""]
    while waiting:
        fqn = waiting.pop()
        ordered.append(fqn)
        waiting.extend(reversed(below.get(fqn, {})))
    return ordered


def _folded(root: Node, place: dict[str, int]) -> Iterator[tuple[int, int, int, str]]:
    waiting = [(root, -1)]
    for number, (node, parent) in enumerate(waiting):  # it grows: level after level
        # a label only where it is not the module's own name
        yield parent, place[node.fqn], node.repeats, "" if node.name == node.fqn.rpartition(".")[2] else node.name
        waiting.extend((child, number) for child in node.children)


# --- without scripts -------------------------------------------------------------------------------
def _static(profile: Profile, root: Node) -> str:
    """The folded tree as a table, down to a few levels."""
    phases = phases_of(profile)
    rows: list[list[str]] = []
    left_out = 0
    for level, node in _visible(root, 0):
        if len(rows) == _STATIC_ROWS:
            left_out += 1
            continue
        label = f"{node.name} ({node.repeats}x)" if node.repeats > 1 else node.name or profile.target or "(all)"
        numbers = [f"{'>= ' if node.uncounted[i] else ''}{node.flops[i]:,}" for i in phases]
        rows.append(
            ["· " * level + label, node.cls, f"{node.parameters:,}", *numbers, format_share(node.total, root.total)]
        )
    heads = [
        Head("Module"),
        Head("Class", number=False),
        Head("Parameters"),
        *(Head(PHASES[i].capitalize(), "FLOPs") for i in phases),
        Head("Share"),
    ]
    more = paragraph(f"{left_out} more modules are not in this table.", css="note") if left_out else ""
    return table(heads, rows, caption="FLOPs by module, repeated blocks folded") + more


def _visible(node: Node, level: int) -> Iterator[tuple[int, Node]]:
    yield level, node
    if level < _STATIC_DEPTH:
        for child in node.children:
            yield from _visible(child, level + 1)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape)) or "scalar"
