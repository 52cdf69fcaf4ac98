"use strict";
(async () => {
  const report = JSON.parse(document.getElementById("report").textContent);
  const root = document.documentElement;
  const trouble = (text) => { const place = document.getElementById("trouble"); place.textContent = text; place.hidden = false; };
  const remembered = (name, value) => {
    try { if (value === undefined) return localStorage.getItem(name); localStorage.setItem(name, value); } catch { return null; }
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const theme = document.getElementById("theme");
  const state = { on: report.runs.map(() => true), log: true };
  const dark = () => (theme.value === "auto" ? system.matches : theme.value === "dark");
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  const inflate = async (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };

  const paint = (meta) => {
    const palette = report.palettes[dark() ? "dark" : "light"][meta.palette];
    const place = meta.palette === "tokens" ? Math.round(meta.colour * (palette.length - 1)) : meta.colour % palette.length;
    return palette[place];
  };
  const dash = (meta) => {
    if (meta.dash) return meta.dash;
    if (meta.run !== null && meta.run !== undefined) return report.runs[meta.run].dash;
    return ["solid", "dash", "dot", "dashdot"][meta.palette === "runs" ? Math.floor(meta.colour / report.palettes.light.runs.length) % 4 : 0];
  };

  // Plotly takes <, > and & for markup.
  const brief = (text) => (text.length > 44 ? `${text.slice(0, 43)}…` : text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  // A choice offers what the choices before it leave.
  const matching = (chart, names) =>
    chart.traces.filter((trace) => names.every((name) => !(name in trace.meta.pick) || trace.meta.pick[name] === chart.picked[name]));
  const offer = (chart) => {
    const before = [];
    for (const [name, select] of Object.entries(chart.selects)) {
      const options = [...new Set(matching(chart, before).map((trace) => trace.meta.pick[name]))];
      const wanted = options.includes(chart.picked[name]) ? chart.picked[name] : options[name === "step" ? options.length - 1 : 0];
      select.replaceChildren(...options.map((text) => { const option = document.createElement("option"); option.textContent = option.value = text; return option; }));
      select.value = chart.picked[name] = wanted;
      select.parentElement.hidden = options.length < 2;
      before.push(name);
    }
  };

  const draw = (chart) => {
    const shown = matching(chart, Object.keys(chart.selects)).filter((trace) => trace.meta.run === null || trace.meta.run === undefined || state.on[trace.meta.run]);
    const traces = shown.map((trace) => {
      const line = { ...(trace.line || {}), color: paint(trace.meta), dash: dash(trace.meta), width: (trace.line || {}).width || 1.8 };
      return { type: "scatter", ...chart.shared, ...trace, line, marker: { ...(chart.shared.marker || {}), ...(trace.marker || {}), color: line.color, line: { width: 2, color: line.color } } };
    });
    const values = traces.flatMap((trace) => trace.y).filter((value) => value !== null);
    const low = Math.min(...values), high = Math.max(...values);
    const font = { family: 'system-ui, "Segoe UI", Roboto, sans-serif', size: 12, color: colour("ink") };
    const axis = { gridcolor: colour("grid"), linecolor: colour("rule"), zerolinecolor: colour("rule"), automargin: true, exponentformat: "none", separatethousands: true };
    const x = { ...chart.layout.xaxis };
    if (x.type === "log" && !state.log) x.type = "linear";
    const y = { ...chart.layout.yaxis, type: chart.logY && low > 0 && high > 5 * low ? "log" : "linear" };
    if ("show" in chart.picked && y.title) y.title = { text: brief(chart.picked.show) };
    const layout = {
      ...chart.layout, font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      xaxis: { ...axis, ...x }, yaxis: { ...axis, ...y }, margin: { l: 58, r: 14, t: 12, b: 46 },
      hovermode: "closest", hoverlabel: { align: "left", namelength: -1 }, uirevision: JSON.stringify([chart.picked, state.log]),
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("accent") },
      legend: { orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom", font: { size: 11 } },
    };
    return Plotly.react(chart.place, traces, layout, { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendChartToCloud"] });
  };

  const swatches = () => document.querySelectorAll("#switches .switch").forEach((label, run) => {
    const line = label.querySelector("line");
    line.style.stroke = paint({ palette: "runs", colour: run });
    line.setAttribute("stroke-dasharray", { solid: "none", dash: "8 4", dot: "3 3", dashdot: "8 3 3 3", longdash: "12 4" }[report.runs[run].dash]);
  });
  const recolour = () => {
    if (theme.value === "auto") delete root.dataset.theme; else root.dataset.theme = theme.value;
    swatches();
    return Promise.all(report.charts.map((chart) => chart.place && window.Plotly && draw(chart)));
  };
  // The tables of estimates and of stages follow the choice of the chart beside them.
  const rows = () => {
    const sampler = (report.charts.find((chart) => chart.name === "estimates")?.picked || {}).sampler;
    document.querySelectorAll("tbody tr[data-run]").forEach((row) => {
      row.hidden = !state.on[row.dataset.run] || ("way" in row.dataset && sampler !== undefined && row.dataset.way !== sampler);
    });
  };

  theme.value = new URLSearchParams(location.hash.slice(1)).get("theme") || remembered("icl-theme") || "auto";
  if (!theme.value) theme.value = "auto";
  recolour();
  try {
    const script = document.createElement("script");
    script.textContent = await inflate(document.getElementById("plotly").textContent);
    document.head.append(script);
  } catch {
    trouble("This browser is too old to unpack the charts (Chrome 80, Firefox 113 and Safari 16.4 can). The tables are complete.");
    return;
  }

  for (const chart of report.charts) {
    const figure = document.getElementById(chart.name);
    chart.place = figure.querySelector(".plot");
    chart.picked = {};
    chart.selects = {};
    for (const name of [...new Set(chart.traces.flatMap((trace) => Object.keys(trace.meta.pick)))]) {
      const label = document.createElement("label"), select = document.createElement("select");
      label.append(name, select);
      figure.querySelector(".picks").append(label);
      select.addEventListener("change", () => { chart.picked[name] = select.value; offer(chart); draw(chart); rows(); });
      chart.selects[name] = select;
    }
    offer(chart);
    await draw(chart);
    new ResizeObserver(() => Plotly.Plots.resize(chart.place)).observe(chart.place);
  }

  rows();
  const redraw = () => { rows(); report.charts.forEach(draw); };
  const boxes = [...document.querySelectorAll("#switches input")];
  boxes.forEach((box) => box.addEventListener("change", () => { state.on[box.dataset.run] = box.checked; redraw(); }));
  document.querySelectorAll("#switches button[data-all]").forEach((button) => button.addEventListener("click", () => {
    boxes.forEach((box) => { box.checked = state.on[box.dataset.run] = button.dataset.all === "1"; });
    redraw();
  }));
  document.getElementById("axis").addEventListener("click", (event) => {
    state.log = !state.log;
    event.target.textContent = state.log ? "steps: log" : "steps: linear";
    report.charts.forEach(draw);
  });
  theme.addEventListener("change", () => { remembered("icl-theme", theme.value); recolour(); });
  system.addEventListener("change", recolour);
  root.dataset.drawn = String(document.querySelectorAll(".plot .main-svg").length > 0 && report.charts.every((chart) => chart.place.querySelector(".main-svg")));
})();
