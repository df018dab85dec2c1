// What every page needs: its data, numbers as text, charts that follow the theme, and the theme itself.
const data = JSON.parse(document.getElementById("data").textContent);
const narrow = window.matchMedia("(max-width: 40rem)");
const system = window.matchMedia("(prefers-color-scheme: dark)");
const repaint = new Map(); // box -> what draws it again, after the theme or the width changed

// --- numbers: counts are BigInt, so that none is rounded ---
const exact = (count) => count.toString().replace(/\B(?=(\d{3})+$)/g, ",");

function si(count, unit) {
  const prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"];
  let value = Number(count), step = 0;
  while (step < prefixes.length - 1 && Number(Math.abs(value).toPrecision(4)) >= 1000) { value /= 1000; step += 1; }
  const text = step === 0 ? String(value) : value.toPrecision(4);
  return `${text} ${prefixes[step]}${unit}`.trim();
}

const share = (part, whole) => (whole ? `${((100 * Number(part)) / Number(whole)).toFixed(1)}%` : "");

// plotly reads tags and entities in what it writes
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value; else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// --- charts ---
const dark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function template() {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--quiet"), linecolor: colour("--line") };
  return { layout: {
    paper_bgcolor: colour("--paper"), plot_bgcolor: colour("--paper"),
    font: { color: colour("--ink"), family: getComputedStyle(document.body).fontFamily, size: narrow.matches ? 11 : 13 },
    xaxis: axis, yaxis: axis,
    hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left" },
  } };
}

function draw(id, traces, layout, again = () => draw(id, traces, layout)) {
  repaint.set(id, again);
  if (!window.Plotly) return; // not yet: start.js comes back to it
  const shape = {
    margin: { l: 10, r: 10, t: 10, b: 10 }, dragmode: narrow.matches ? false : "zoom", // a finger scrolls the page
    ...layout, template: template(), autosize: true,
  };
  Plotly.react(document.getElementById(id), traces, shape, { responsive: true, displayModeBar: false });
}

function repaintAll() {
  for (const again of [...repaint.values()]) again();
}

// --- theme ---
const themeButton = document.getElementById("theme");

function showTheme() {
  themeButton.textContent = dark() ? "Light" : "Dark";
  themeButton.setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colours`);
  themeButton.setAttribute("aria-pressed", String(dark()));
}

themeButton.addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  showTheme();
  repaintAll();
});
system.addEventListener("change", () => { showTheme(); repaintAll(); });
narrow.addEventListener("change", repaintAll);

// --- paper: white, and a chart, which has a size in pixels, scaled to the width of the sheet ---
let chosen;
window.addEventListener("beforeprint", () => {
  chosen = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
  repaintAll();
  for (const svg of document.querySelectorAll(".chart .main-svg")) {
    const width = svg.getAttribute("width"), height = svg.getAttribute("height");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.parentElement.style.setProperty("--ratio", `${width} / ${height}`);
  }
});
window.addEventListener("afterprint", () => {
  for (const svg of document.querySelectorAll(".chart .main-svg")) svg.removeAttribute("viewBox");
  if (chosen === undefined) delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
  repaintAll();
});
