// A table that sorts by its heads and finds rows by words; a few rows are drawn until all are asked for.
const firstRows = 100;

// columns: { head, unit, number, value(row), text(row) }; open(row): what the button in a row's first cell does
function sortableTable({ box, search, found, rows, columns, words, caption, open }) {
  const state = { by: -1, descending: true, all: false };
  const body = element("tbody");
  const heads = columns.map((column, i) => {
    const button = element("button", { type: "button", textContent: column.head });
    button.addEventListener("click", () => {
      state.descending = state.by === i ? !state.descending : Boolean(column.number);
      state.by = i;
      show();
    });
    // on paper a head is text: browsers leave buttons out where a head is repeated on the next sheet
    const printed = element("span", { className: "printed", textContent: column.head, "aria-hidden": "true" });
    const head = element("th", { scope: "col", className: column.number ? "number" : "" }, button, printed);
    if (column.unit) head.append(element("span", { className: "unit", textContent: column.unit }));
    return head;
  });
  const more = element("button", { type: "button" });
  more.addEventListener("click", () => {
    const next = body.children.length;
    state.all = true;
    show();
    body.children[next]?.querySelector("button")?.focus();
  });
  const frame = element("div", { className: "scroll", role: "region", tabIndex: 0, "aria-label": caption },
    element("table", {}, element("caption", { className: "unseen", textContent: caption }),
      element("thead", {}, element("tr", {}, ...heads)), body));
  const absent = element("span", { className: "printed" });
  box.replaceChildren(frame, element("p", {}, more, absent));
  search.addEventListener("input", () => { state.all = false; show(); });
  show();

  function show() {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matching = rows.filter((row) => { const text = words(row); return wanted.every((word) => text.includes(word)); });
    if (state.by >= 0) {
      const value = columns[state.by].value;
      const keyed = matching.map((row) => [value(row), row]);
      keyed.sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0) * (state.descending ? -1 : 1));
      keyed.forEach(([, row], i) => { matching[i] = row; });
    }
    heads.forEach((head, i) => {
      if (i === state.by) head.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const drawnRows = state.all ? matching : matching.slice(0, firstRows);
    body.replaceChildren(...drawnRows.map(line));
    more.hidden = drawnRows.length === matching.length;
    absent.textContent = more.hidden ? "" : `${exact(matching.length - drawnRows.length)} more rows are not printed.`;
    more.textContent = `Show all ${exact(matching.length)} rows`;
    found.textContent = wanted.length
      ? `${exact(matching.length)} of ${exact(rows.length)} found` : `${exact(rows.length)} in all`;
  }

  function line(row) {
    const cells = columns.map((column, i) => {
      const text = column.text(row);
      if (i > 0) return element("td", { className: column.number ? "number" : "", textContent: text });
      const head = element("th", { scope: "row" });
      if (!open) { head.textContent = text; return head; }
      const button = element("button", { type: "button", textContent: text, title: "Show in the chart" });
      button.addEventListener("click", () => open(row));
      head.append(button);
      return head;
    });
    return element("tr", {}, ...cells);
  }
}
