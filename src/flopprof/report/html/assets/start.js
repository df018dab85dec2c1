// The last script: the page can be read and walked by now; plotly takes longer, so it runs after the first painting.
showTheme();
for (const [id, { data: traces, layout }] of Object.entries(data.figures)) draw(id, traces, layout);

function startCharts() {
  document.head.append(element("script", { textContent: document.getElementById("plotly-js").textContent }));
  const waiting = [...repaint.values()];
  const next = () => { // one chart a task: keys and clicks come in between
    const again = waiting.shift();
    if (again) { again(); setTimeout(next); } else document.documentElement.dataset.charts = "drawn";
  };
  next();
}

requestAnimationFrame(() => setTimeout(startCharts));
