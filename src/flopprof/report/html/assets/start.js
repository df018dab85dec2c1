// The last script: the page can be read and walked by now. plotly takes longer, so it runs after the first painting;
// the charts that are in sight are drawn first, the others while nothing else is to do, so that they print unseen too.
showTheme();
for (const [id, { data: traces, layout }] of Object.entries(data.figures)) draw(id, traces, layout);
performance.mark("readable");

const idle = window.requestIdleCallback ?? ((task) => setTimeout(task));

function inSight(id) {
  const box = document.getElementById(id).getBoundingClientRect();
  return box.bottom > 0 && box.top < window.innerHeight;
}

async function startCharts() {
  if (!window.DecompressionStream) {
    for (const box of document.querySelectorAll(".chart")) {
      box.replaceChildren("This browser is too old for the charts; the tables hold the same numbers.");
      box.style.height = "auto";
    }
    return;
  }
  const text = atob(document.getElementById("plotly-js").textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) packed[i] = text.charCodeAt(i);
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(element("script", { textContent: await new Response(unpacked).text() }));
  const waiting = new Set(repaint.keys());
  const next = () => { // one chart a task: keys and clicks come in between
    const seen = [...waiting].find(inSight);
    if (seen === undefined && !performance.getEntriesByName("charts in sight").length) performance.mark("charts in sight");
    const id = seen ?? [...waiting][0];
    if (id === undefined) { document.documentElement.dataset.charts = "drawn"; return; }
    waiting.delete(id);
    repaint.get(id)();
    if ([...waiting].some(inSight)) setTimeout(next); else idle(next);
  };
  next();
}

requestAnimationFrame(() => setTimeout(startCharts));
