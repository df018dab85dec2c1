// The table of all modules.
{
  const count = (head, unit, value, text = (m) => exact(value(m))) => ({ head, unit, number: true, value, text });
  const bounded = (m, i) => `${m.uncounted[i] ? "≥ " : ""}${exact(m.total[i])}`;
  const all = sum(tree.modules[0].total);
  const columns = [
    { head: "Module", value: (m) => m.fqn, text: (m) => m.fqn || tree.root },
    { head: "Class", value: (m) => m.cls, text: (m) => m.cls },
    count("Share", "of all FLOPs", (m) => sum(m.total), (m) => share(sum(m.total), all)),
    ...tree.phases.map((phase, i) =>
      count(phase[0].toUpperCase() + phase.slice(1), "FLOPs", (m) => m.total[i], (m) => bounded(m, i))),
    count("Own", "FLOPs", (m) => sum(m.own)),
    count("Elementwise", "FLOPs, apart", (m) => m.elementwise),
    count("Parameters", "", (m) => m.parameters),
    count("Calls", "", (m) => m.calls),
    { head: "Output shape", value: (m) => m.shape, text: (m) => m.shape },
  ];
  sortableTable({
    box: document.getElementById("listing"), search: document.getElementById("search"),
    found: document.getElementById("found"), rows: tree.modules, columns, caption: "All modules",
    words: (m) => `${m.fqn} ${m.cls}`.toLowerCase(),
    open: (m) => openModule(tree.modules.indexOf(m)),
  });
}
