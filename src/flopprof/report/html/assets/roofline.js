// The roofline: points under the roof of the device that is chosen.
const phaseMarks = {
  forward: { color: "#3b82c4", symbol: "circle" }, backward: { color: "#d9772b", symbol: "diamond" },
  recompute: { color: "#b5588f", symbol: "square" }, optimizer: { color: "#3f9d6c", symbol: "cross" },
};
const deviceChoice = document.getElementById("device");

function showRoofline() {
  const { points, devices } = data.roofline;
  const device = devices[deviceChoice.value];
  const rate = (point) => device.peaks[device.columns[point.dtype]];
  const intensity = (point) => Number(point.flops) / Number(point.bytes);
  const placed = points.filter((point) => device.columns[point.dtype]);
  const traces = roofs(device, placed.map(intensity));
  const most = Math.max(...placed.map((point) => Number(point.flops)));
  // the forward lies on top: a product and its gradients often have the same intensity
  for (const phase of Object.keys(phaseMarks).reverse()) {
    const own = placed.filter((point) => point.phase === phase);
    if (!own.length) continue;
    traces.push({
      type: "scatter", mode: "markers", name: phase, legendrank: 1001 + Object.keys(phaseMarks).indexOf(phase),
      x: own.map(intensity),
      y: own.map((point) => Math.min(rate(point), intensity(point) * device.bytes_per_s)),
      text: own.map(told),
      marker: {
        ...phaseMarks[phase], opacity: 0.7, line: { width: 1, color: "#ffffff" },
        size: own.map((point) => 7 + 25 * Math.sqrt(Number(point.flops) / most)),
      },
      hovertemplate: "%{text}<br>at most %{y:.4s}FLOP/s<extra></extra>",
    });
  }
  draw("roofline-chart", traces, {
    xaxis: { type: "log", dtick: 1, tickformat: "~s", title: { text: "FLOPs per byte moved" }, automargin: true },
    yaxis: { type: "log", dtick: 1, tickformat: "~s", title: { text: "FLOP/s at most" }, automargin: true },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    hovermode: "closest",
  });
  tellBounds(device, placed, points.length - placed.length, rate, intensity);
}

function roofs(device, intensities) {
  const dtypes = [...new Set(Object.values(device.columns))];
  if (dtypes.includes("float32") && device.peaks.tf32) dtypes.push("tf32");
  return dtypes.map((dtype) => {
    const ridge = device.peaks[dtype] / device.bytes_per_s;
    const left = Math.min(...intensities, ridge) / 2, right = Math.max(...intensities, ridge) * 2;
    return {
      type: "scatter", mode: "lines", name: `${device.name}, ${dtype}`,
      x: [left, ridge, right], y: [left * device.bytes_per_s, device.peaks[dtype], device.peaks[dtype]],
      line: { width: 2, color: "#8a929c", dash: dtype === "tf32" ? "dot" : "solid" },
      hovertemplate: `${device.name}, ${dtype}<br>%{y:.4s}FLOP/s at %{x:.4~s} FLOPs a byte<extra></extra>`,
    };
  });
}

function told(point) {
  const more = point.modules > 1 ? ` and ${point.modules - 1} more` : "";
  return [
    `${plain(point.op)}, ${point.phase}`, `${plain(point.module)}${more}`, `${plain(point.shapes)} ${point.dtype}`,
    `${exact(BigInt(point.flops))} FLOPs in ${exact(BigInt(point.calls))} calls, ${exact(BigInt(point.bytes))} bytes`,
  ].join("<br>");
}

function tellBounds(device, placed, absent, rate, intensity) {
  const total = placed.reduce((sum, point) => sum + BigInt(point.flops), 0n);
  const fast = placed.filter((point) => intensity(point) * device.bytes_per_s >= rate(point));
  const bound = fast.reduce((sum, point) => sum + BigInt(point.flops), 0n);
  const peaks = [...new Set(Object.values(device.columns))]
    .map((dtype) => `${si(device.peaks[dtype], "FLOP/s")} dense ${dtype}`).join(", ");
  document.getElementById("bound").textContent =
    `${device.name} (per ${device.per}): ${peaks}, ${si(device.bytes_per_s, "B/s")}; table of ${device.date}. ` +
    `${share(bound, total)} of the FLOPs drawn are bound by arithmetic there, the rest by memory.` +
    (absent ? ` ${absent} points are not drawn: the device has no peak in their dtype.` : "");
}

if (deviceChoice) {
  deviceChoice.addEventListener("change", showRoofline);
  showRoofline();
}
