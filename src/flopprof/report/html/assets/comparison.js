// Models as points, and their figures in a table.
{
  const { columns, rows } = data.comparison;
  const mostLabels = 40; // more would lie over each other; the pointer tells them
  const numeric = (value) => (value === null ? null : Number(value));
  const named = (column) => (column.unit ? `${column.head}, ${column.unit}` : column.head);

  const showScatter = () => {
    const [across, up] = ["across", "up"].map((id) => columns.findIndex((c) => c.key === document.getElementById(id).value));
    const placed = rows.filter((row) => row.values[across] !== null && row.values[up] !== null);
    const marks = (optimal) => {
      const own = placed.filter((row) => row.pareto === optimal);
      return {
        type: "scatter", mode: placed.length > mostLabels ? "markers" : "markers+text", textposition: "top center", cliponaxis: false, showlegend: false,
        x: own.map((row) => numeric(row.values[across])), y: own.map((row) => numeric(row.values[up])),
        text: own.map((row) => plain(row.name)),
        customdata: own.map((row) => [row.texts[across], row.texts[up]].map(plain)),
        hovertemplate: `<b>%{text}</b><br>${named(columns[across])}: %{customdata[0]}<br>${named(columns[up])}: %{customdata[1]}<extra></extra>`,
        marker: { size: 11, color: "#3b82c4", symbol: optimal ? "circle" : "circle-open", line: { width: 2 } },
      };
    };
    const axis = (column) => ({
      title: { text: named(column) }, type: column.key === "accuracy" ? "linear" : "log", automargin: true,
      ...(column.key === "accuracy" ? {} : { tickformat: "~s", dtick: "D2" }),
    });
    draw("scatter", [marks(false), marks(true)], {
      xaxis: axis(columns[across]), yaxis: axis(columns[up]), hovermode: "closest", margin: { l: 10, r: 40, t: 24, b: 10 },
    }, showScatter);
  };

  const cell = (column, i) => ({
    head: column.head, unit: column.unit, number: true, text: (row) => row.texts[i],
    value: column.count ? (row) => (row.values[i] === null ? -1n : BigInt(row.values[i])) : (row) => row.values[i] ?? -1,
  });
  sortableTable({
    box: document.getElementById("listing"), search: document.getElementById("search"),
    found: document.getElementById("found"), rows, caption: "Figures of each model",
    columns: [
      { head: "Model", value: (row) => row.name, text: (row) => (row.pareto ? `${row.name} ◆` : row.name) },
      { head: "FLOPs", unit: "of the first", number: true, value: (row) => row.ratio ?? -1,
        text: (row) => (row.ratio === null ? "" : `${Number(row.ratio.toPrecision(3))}x`) },
      ...columns.map(cell),
    ],
    words: (row) => row.name.toLowerCase(),
  });
  if (document.getElementById("scatter")) {
    for (const id of ["across", "up"]) document.getElementById(id).addEventListener("change", showScatter);
    showScatter();
  }
}
