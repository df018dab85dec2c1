// The tree of modules: an icicle or treemap of it, and buttons that walk it by keyboard.
const tree = readModules(data.modules);
const palette = ["#8fbce8", "#f2b87c", "#92cfae", "#dda6cc", "#e6d277", "#b7b0ec", "#92d3dd", "#eba69f", "#c2cd92", "#cfb094"];
const maxDepth = 5, leastShare = 1 / 400, mostChildren = 200, mostNamed = 12;
const shown = { at: 0 };

// Columns become modules; totals are summed up, children before parents (parents come first in the file).
function readModules(columns) {
  const flops = columns.flops.map((own) => own.map(BigInt));
  const uncounted = columns.uncounted.map((holes) => new Set(holes));
  const modules = columns.names.map((name, i) => ({
    name, parent: columns.parents[i], children: [],
    cls: columns.cls[i] < 0 ? "" : columns.classes[columns.cls[i]],
    calls: BigInt(columns.calls[i]), shape: columns.shapes[i],
    own: flops.map((column) => column[i]), total: flops.map((column) => column[i]),
    elementwise: BigInt(columns.elementwise[i]), ownElementwise: BigInt(columns.elementwise[i]),
    ownParameters: BigInt(columns.own_parameters[i]), uncounted: [],
    parameters: columns.parameters[i] === null ? null : BigInt(columns.parameters[i]),
  }));
  modules.forEach((module, i) => {
    const above = modules[module.parent];
    module.fqn = !above ? "" : above.fqn ? `${above.fqn}.${module.name}` : module.name;
    if (above) above.children.push(i);
    module.uncounted = uncounted.map((holes) => holes.has(i));
  });
  for (let i = modules.length - 1; i >= 0; i -= 1) {
    const module = modules[i], above = modules[module.parent];
    if (module.parameters === null) {
      module.parameters = module.children.reduce((sum, child) => sum + modules[child].parameters, 0n);
    }
    if (!above) continue;
    module.total.forEach((count, phase) => { above.total[phase] += count; });
    above.elementwise += module.elementwise;
  }
  return { modules, phases: columns.phases, root: columns.root, folded: columns.folded, classes: columns.classes };
}

// --- nodes: what the chart shows; one module each, or a row of identical ones ---
function nodesOf(folded) {
  if (!folded) {
    return tree.modules.map((module, i) => ({
      module: i, parent: module.parent, children: module.children, times: 1n, repeats: 1, label: module.name,
    }));
  }
  const nodes = tree.folded.map(([parent, module, repeats, label]) => ({
    module, parent, repeats, label: label || tree.modules[module].name, children: [],
  }));
  nodes.forEach((node, i) => {
    const above = nodes[node.parent];
    node.times = BigInt(node.repeats) * (above ? above.times : 1n);
    if (above) above.children.push(i);
  });
  return nodes;
}

const sum = (counts) => counts.reduce((total, count) => total + count, 0n);
const label = (node) => (node.parent < 0 ? tree.root : node.repeats > 1 ? `${node.label} (${node.repeats}x)` : node.label);

function sizes(metric) {
  if (metric === "elementwise") return { total: (m) => m.elementwise, own: (m) => m.ownElementwise, unit: "elementwise FLOPs" };
  if (metric === "parameters") return { total: (m) => m.parameters, own: (m) => m.ownParameters, unit: "parameters" };
  const phase = tree.phases.indexOf(metric);
  if (phase < 0) return { total: (m) => sum(m.total), own: (m) => sum(m.own), unit: "FLOPs" };
  return { total: (m) => m.total[phase], own: (m) => m.own[phase], unit: "FLOPs" };
}

function lowerBound(module, metric) {
  const phase = tree.phases.indexOf(metric);
  if (metric === "elementwise" || metric === "parameters") return "";
  return (phase < 0 ? module.uncounted.some(Boolean) : module.uncounted[phase]) ? "≥ " : "";
}

const choice = () => ({
  metric: document.getElementById("size").value,
  folded: document.getElementById("folded").checked,
  shape: document.getElementById("shape").value,
});

// --- colours: a class has the same one at every place ---
const coloured = (() => {
  const own = new Map();
  for (const module of tree.modules) own.set(module.cls, (own.get(module.cls) ?? 0n) + sum(module.own));
  const order = [...own].filter(([, flops]) => flops > 0n).sort(([, a], [, b]) => (a < b ? 1 : a > b ? -1 : 0));
  return { order, of: new Map(order.map(([cls], i) => [cls, palette[i]])) };
})();
const colourOf = (cls) => coloured.of.get(cls) ?? colour("--structure");

// --- the chart: a few levels below the node shown; what is too thin to see is one sector ---
function showModules() {
  const { metric, folded, shape } = choice();
  const nodes = nodesOf(folded);
  const { total, own, unit } = sizes(metric);
  const count = (node, of) => of(tree.modules[node.module]) * node.times;
  const start = nodes[shown.at], whole = count(start, total), all = count(nodes[0], total);
  const sectors = { ids: [], labels: [], parents: [], values: [], text: [], colours: [] };
  const add = (id, parent, name, value, text, colour) => {
    sectors.ids.push(id); sectors.parents.push(parent); sectors.labels.push(plain(name));
    sectors.values.push(Number(value)); sectors.text.push(text); sectors.colours.push(colour);
  };
  const visit = (i, parent, depth) => {
    const node = nodes[i], module = tree.modules[node.module];
    const large = node.children.filter((child) => {
      const size = count(nodes[child], total);
      return size > 0n && Number(size) >= leastShare * Number(whole);
    });
    const open = depth < maxDepth && large.length > 0;
    const inside = sum(large.map((child) => count(nodes[child], total)));
    const rest = count(node, total) - inside - count(node, own);
    const small = node.children.length - large.length;
    const value = !open ? count(node, total) : count(node, own) > 0n ? count(node, own) : 0n;
    add(String(i), parent, label(node), value, describe(node, count(node, total), all, unit, metric), colourOf(module.cls));
    if (!open) return;
    for (const child of large) visit(child, String(i), depth + 1);
    if (rest > 0n) add(`${i}+`, String(i), `${small} smaller`, rest, `${small} smaller: ${exact(rest)} ${unit}`, colour("--bar"));
  };
  visit(shown.at, "", 0);
  const trace = {
    type: shape, ids: sectors.ids, labels: sectors.labels, parents: sectors.parents, values: sectors.values,
    customdata: sectors.text, branchvalues: "remainder", sort: false, marker: { colors: sectors.colours, line: { width: 1 } },
    hovertemplate: "%{customdata}<extra></extra>", texttemplate: "%{label}", pathbar: { visible: false },
    tiling: shape === "icicle" ? { orientation: narrow.matches ? "h" : "v", pad: 1 } : { pad: 2 },
    maxdepth: maxDepth + 1, leaf: { opacity: 1 },
  };
  draw("icicle", [trace], { margin: { l: 0, r: 0, t: 4, b: 4 }, uniformtext: { minsize: 9, mode: "hide" } }, showModules);
  listen();
  showPath(nodes);
  showChildren(nodes, count, total, own, whole, unit, metric);
}

// A click on a sector goes into it, on the topmost one goes up.
function listen() {
  const box = document.getElementById("icicle");
  if (!box.on || shown.listening) return;
  shown.listening = true;
  const clicked = (event) => {
    const id = event.points[0].id;
    if (id !== undefined && !id.endsWith("+")) {
      const place = Number(id), above = nodesOf(choice().folded)[place].parent;
      go(place === shown.at && above >= 0 ? above : place, false);
    }
    return false; // plotly's own zoom would stop at the levels that are drawn
  };
  box.on("plotly_icicleclick", clicked);
  box.on("plotly_treemapclick", clicked);
}

function describe(node, flops, all, unit, metric) {
  const module = tree.modules[node.module];
  const lines = [`<b>${plain(module.fqn || tree.root)}</b>` + (node.times > 1n ? ` (${node.times} identical)` : "")];
  if (module.cls) lines.push(plain(module.cls) + (module.shape ? `, output ${module.shape}` : ""));
  lines.push(`${lowerBound(module, metric)}${exact(flops)} ${unit}, ${share(flops, all)} of all`);
  if (unit === "FLOPs" && tree.phases.length > 1) {
    tree.phases.forEach((phase, i) => lines.push(`${phase}: ${exact(module.total[i] * node.times)}`));
  }
  lines.push(`${exact(module.parameters * node.times)} parameters`);
  return lines.join("<br>");
}

// --- by keyboard: the way up, and the ways down ---
function go(place, focus) {
  shown.at = place;
  showModules();
  if (focus) document.querySelector("#path [aria-current]").focus();
}

function showPath(nodes) {
  const chain = [];
  for (let i = shown.at; i >= 0; i = nodes[i].parent) chain.unshift(i);
  document.getElementById("path").replaceChildren(...chain.flatMap((i) => {
    const button = element("button", { type: "button", textContent: label(nodes[i]) });
    button.addEventListener("click", () => go(i, true));
    if (i === shown.at) button.setAttribute("aria-current", "true");
    return i === chain[0] ? [button] : [element("span", { textContent: "›", "aria-hidden": "true" }), button];
  }));
}

function showChildren(nodes, count, total, own, whole, unit, metric) {
  const here = nodes[shown.at];
  document.getElementById("children-title").textContent =
    `Inside ${label(here)}: ${lowerBound(tree.modules[here.module], metric)}${exact(whole)} ${unit}`;
  const every = here.children.map((i) => [i, count(nodes[i], total)]).sort(([, a], [, b]) => (a < b ? 1 : a > b ? -1 : 0));
  const inside = every.filter(([, flops]) => flops > 0n), empty = every.filter(([, flops]) => flops === 0n);
  const rows = inside.slice(0, mostChildren).map(([i, flops]) => entry(nodes[i], flops, () => go(i, true)));
  const outside = count(here, own);
  if (outside > 0n && inside.length) rows.push(entry({ repeats: 1, label: "(own)" }, outside, null));
  if (inside.length > mostChildren) {
    rows.push(element("li", { textContent: `${inside.length - mostChildren} more: search the table of all modules.` }));
  }
  if (!every.length) rows.push(element("li", { className: "note", textContent: "No module is inside." }));
  if (empty.length) {
    const names = empty.slice(0, mostNamed).map(([i]) => label(nodes[i])).join(", ");
    const more = empty.length > mostNamed ? ` and ${empty.length - mostNamed} more` : "";
    rows.push(element("li", { className: "note", textContent: `0 ${unit} in ${names}${more}` }));
  }
  document.getElementById("children").replaceChildren(...rows);

  function entry(node, flops, action) {
    const cells = [
      element("span", { className: "name", textContent: label(node) }),
      element("span", { className: "amount", textContent: `${exact(flops)} ${share(flops, whole)}` }),
    ];
    const box = action ? element("button", { type: "button" }, ...cells) : element("span", { className: "leaf" }, ...cells);
    box.style.setProperty("--share", `${whole ? (100 * Number(flops)) / Number(whole) : 0}%`);
    if (action) box.addEventListener("click", action);
    return element("li", {}, box);
  }
}

// A module of the table, shown in the chart: unfolded, because one of a row of identical ones is meant.
function openModule(i) {
  document.getElementById("folded").checked = false;
  go(i, false);
  document.getElementById("modules").scrollIntoView();
  document.querySelector("#path [aria-current]").focus({ preventScroll: true });
}

function legend() {
  const items = coloured.order.slice(0, palette.length).map(([cls, flops]) =>
    element("li", {}, element("i", { style: `background:${colourOf(cls)}` }), `${cls || "(no class)"} ${si(flops, "FLOPs")}`));
  if (coloured.order.length > palette.length) items.push(element("li", { textContent: "others grey" }));
  document.getElementById("classes").replaceChildren(...items);
}

legend();
document.getElementById("folded").addEventListener("change", () => go(0, false));
for (const id of ["size", "shape"]) document.getElementById(id).addEventListener("change", showModules);
showModules();
