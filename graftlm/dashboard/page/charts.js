"use strict";
/* All charts of the board, drawn by uPlot: lines over steps, dots, and intervals. Colours are the page's own, by variable. */

Board.charts = (() => {
  const live = new Set();
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const series = index => colour(`--c${index % 8}`);
  const faint = (name, share) => {
    const [r, g, b] = name.match(/[0-9a-f]{2}/gi).map(pair => parseInt(pair, 16));
    return `rgba(${r}, ${g}, ${b}, ${share})`;
  };
  const font = "12px system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif";

  function axis(label, side, options = {}) {
    return { stroke: colour("--quiet"), grid: { stroke: colour("--rule"), width: 1, show: side === "y" }, ticks: { show: false }, font, labelFont: font,
      label, labelSize: 18, labelGap: 2, size: side === "y" ? 58 : 26, gap: 6, space: side === "y" ? 34 : 64,
      filter: (plot, splits, index) => plot.scales[plot.axes[index].scale].distr === 3 ? splits.map(value => ROUND.has(Number(value.toExponential()[0])) ? value : null) : splits, ...options };
  }
  const ROUND = new Set([1, 2, 5]);  // leading digits of the labels of a logarithmic axis
  const WHOLE = [1, 2, 5].flatMap(digit => Array.from({ length: 15 }, (_, power) => digit * 10 ** power)).sort((a, b) => a - b);
  const tick = value => value == null ? "" : Math.abs(value) >= 1e4 ? Intl.NumberFormat("en", { notation: "compact" }).format(value)
    : Board.format.short(value);

  /* A figure with a chart in it. `make` gives { data, series, axes, scales, bands, hooks, legend, label } for the colours of now. */
  function figure(title, make, { height = 260, note, wide } = {}) {
    const place = Board.el("div", { class: "plot", role: "img" });
    const legend = Board.el("ul", { class: "legend" });
    const readout = Board.el("output", { class: "readout", "aria-hidden": "true" });
    const node = Board.el("figure", { class: wide ? "wide" : null }, Board.el("figcaption", {}, Board.el("h3", {}, title), readout), place, legend,
      note && Board.el("p", { class: "note" }, note));
    const chart = { node, plot: null, make, drawn: null };

    chart.draw = () => {
      if (!node.isConnected) return;
      const found = chart.make();
      const width = Math.max(200, place.clientWidth);
      place.setAttribute("aria-label", found ? `${title}: ${found.label || ""}` : `${title}: nothing yet`);
      if (!found) { chart.plot?.destroy(); chart.plot = null; place.replaceChildren(Board.el("p", { class: "empty" }, "Nothing to draw yet.")); legend.replaceChildren(); return; }
      const shape = JSON.stringify([found.series.map(s => [s.label, s.show]), found.shape ?? null, document.documentElement.dataset.theme, matchMedia("(prefers-color-scheme: dark)").matches]);
      if (chart.plot && chart.drawn === shape) { chart.plot.setData(found.data); return; }
      chart.plot?.destroy();
      place.replaceChildren();
      chart.drawn = shape;
      chart.plot = new uPlot({
        width, height, legend: { show: false }, padding: [10, 18, 0, 0],
        cursor: { points: { size: 6 }, drag: { x: true, y: false }, y: false },
        scales: found.scales, axes: found.axes, series: found.series, bands: found.bands || [],
        hooks: { draw: found.hooks?.draw || [], setCursor: [plot => read(plot, found, readout)] },
      }, found.data, place);
      legend.replaceChildren(...(found.legend || []).map(([index, text, mark]) => {
        const swatch = Board.el("i", { class: `swatch ${mark || "line"}` });
        swatch.style.setProperty("--own", series(index));
        return Board.el("li", {}, swatch, text);
      }));
    };
    chart.sizing = new ResizeObserver(() => {
      if (!chart.plot) return chart.draw();
      const width = Math.max(200, place.clientWidth);
      if (width !== chart.plot.width) chart.plot.setSize({ width, height });
    });
    chart.sizing.observe(place);
    live.add(chart);
    return chart;
  }

  function read(plot, found, place) {
    const at = plot.cursor.idx;
    if (at == null || plot.cursor.left < 0) { place.textContent = ""; return; }
    const parts = found.series.map((one, i) => [one, plot.data[i]?.[at]]).filter(([one, value], i) => i && one.label && !one.quiet && value != null)
      .map(([one, value]) => `${one.label} ${Board.format.short(value)}`);
    place.textContent = parts.length ? `${found.xName || "step"} ${tick(plot.data[0][at])}: ${parts.slice(0, 4).join(", ")}` : "";
  }

  /* Curves of several runs have their points at different steps: one axis that has all of them. */
  function joined(tables) { return tables.length === 1 ? tables[0].map(column => column.slice()) : uPlot.join(tables); }

  function lossScale(values) {
    const finite = values.filter(value => value != null && value > 0);
    const low = Math.min(...finite), high = Math.max(...finite);
    return finite.length && high / low > 4 ? { distr: 3 } : {};
  }

  const X = { step: "step", tokens: "tokens", hours: "hours of steps" };

  /* Training and eval loss of one run or several. `runs` are [{ name, curve, index }]. */
  function losses(runs, { x = "step", train = true, evals = true } = {}) {
    const shown = runs.filter(run => run.curve);
    const tables = [], lines = [], bands = [], legend = [], all = [];
    const alone = shown.length === 1;
    for (const { name, curve, index } of shown) {
      const paint = series(index), columns = curve.columns, base = lines.length;
      if (train && columns.step.length) {
        const range = alone && curve.width > 1;
        tables.push(range ? [columns[x], columns.high, columns.low, columns.loss] : [columns[x], columns.loss]);
        if (range) {
          lines.push({ label: "high", quiet: true, stroke: "transparent", points: { show: false } }, { label: "low", quiet: true, stroke: "transparent", points: { show: false } });
          bands.push({ series: [base + 1, base + 2], fill: faint(paint, 0.16) });
        }
        lines.push({ label: alone ? "training loss" : `${name}, training`, stroke: faint(paint, evals && !alone ? 0.45 : 1), width: alone ? 1.6 : 1.1, points: { show: columns.step.length < 2 }, spanGaps: true });
        if (!evals || alone) legend.push([index, alone ? `training loss${range ? `, mean and range of ${curve.width} steps` : ""}` : name]);
        for (const value of columns.loss) all.push(value);
      }
      if (evals && curve.evals.length) {
        const places = curve.evals.map(([step, , tokens]) => x === "step" ? step : x === "tokens" ? tokens ?? (step ? null : 0) : hoursAt(columns, step));
        const rows = places.map((place, i) => [place, curve.evals[i][1]]).filter(([place]) => place != null);
        const index2 = alone ? index + 1 : index;
        if (rows.length) {
          tables.push([rows.map(row => row[0]), rows.map(row => row[1])]);
          lines.push({ label: alone ? "eval loss" : `${name}, eval`, stroke: series(index2), width: 2, points: { show: true, size: 6, fill: series(index2) }, spanGaps: true });
          legend.push([index2, alone ? "eval loss" : name, "dot"]);
          for (const row of rows) all.push(row[1]);
        }
      }
    }
    if (!tables.length) return null;
    return {
      data: joined(tables), series: [{ label: X[x] }, ...lines], bands, legend, xName: X[x], shape: [x, Object.keys(lossScale(all)).length, shown.map(run => run.curve.width)],
      scales: { x: { time: false }, y: lossScale(all) },
      axes: [axis(X[x], "x", { values: (u, ticks) => ticks.map(tick), ...(x === "hours" ? {} : { incrs: WHOLE }) }), axis("nats a token", "y", { values: (u, ticks) => ticks.map(tick) })],
      label: shown.map(run => `${run.name}: ${describe(run.curve)}`).join("; "),
    };
  }

  function hoursAt(columns, step) {
    if (!step) return 0;
    const at = columns.step.findIndex(value => value >= step);
    return at < 0 ? columns.hours.at(-1) ?? null : columns.hours[at];
  }

  function describe(curve) {
    const first = curve.columns.loss[0], last = curve.columns.loss.at(-1), after = curve.evals.at(-1);
    return [last != null && `training loss ${Board.format.loss(first)} to ${Board.format.loss(last)}`,
      after && `eval loss ${Board.format.loss(after[1])} at step ${after[0]}`].filter(Boolean).join(", ");
  }

  /* One column of one run or several: learning rate, tokens/s, gradient norm; `of` says which of its steps a point shows. */
  function column(runs, name, label, { x = "step", of } = {}) {
    const shown = runs.filter(run => run.curve?.columns.step.length && run.curve.columns[name].some(value => value != null));
    if (!shown.length) return null;
    const alone = shown.length === 1, width = shown[0].curve.width;
    return {
      data: joined(shown.map(({ curve }) => [curve.columns[x], curve.columns[name]])), xName: X[x], shape: [x, alone && shown[0].curve.width],
      series: [{ label: X[x] }, ...shown.map(run => ({ label: shown.length > 1 ? run.name : label, stroke: series(run.index), width: 1.6, points: { show: run.curve.columns.step.length < 2 }, spanGaps: true }))],
      scales: { x: { time: false }, y: { range: (u, low, high) => [Math.min(0, low), high > 0 ? high * 1.08 : 1] } },
      axes: [axis(X[x], "x", { values: (u, ticks) => ticks.map(tick), ...(x === "hours" ? {} : { incrs: WHOLE }) }), axis(label, "y", { values: (u, ticks) => ticks.map(tick) })],
      legend: !alone ? shown.map(run => [run.index, run.name]) : of && width > 1 ? [[shown[0].index, `${label}, ${of} of ${width} steps`]] : [],
      label: shown.map(run => `${run.name} ${Board.format.short(run.curve.columns[name].at(-1))}`).join(", "),
    };
  }

  /* Dots, such as a trial's loss by one of its options; `best` is drawn strong, `line` joins the lowest so far. */
  function dots(points, { label, x = {}, best, line, categories }) {
    if (!points.length) return null;
    const sorted = points.map((point, i) => ({ ...point, i })).sort((a, b) => a.x - b.x || a.i - b.i);
    let low = Infinity;
    const falling = line ? sorted.map(point => (low = Math.min(low, point.y))) : null;
    const strong = sorted.map(point => point === sorted.find(one => one.key === best) ? point.y : null);
    const scale = lossScale(sorted.map(point => point.y));
    const places = categories ? (u, ticks) => ticks.map(value => Number.isInteger(value) ? categories[value] ?? "" : "") : (u, ticks) => ticks.map(tick);
    const edge = categories ? { range: [-0.5, categories.length - 0.5] } : x.log ? { distr: 3 } : { range: (u, from, to) => { const room = (to - from || 1) * 0.06; return [from - room, to + room]; } };
    return {
      data: [sorted.map(point => point.x), sorted.map(point => point.y), strong, ...(falling ? [falling] : [])], xName: x.name || "at", shape: [categories, best, x.log, Object.keys(scale).length],
      series: [{}, { label: "loss", stroke: "transparent", paths: () => null, points: { show: true, size: 8, fill: faint(series(0), 0.55), stroke: faint(series(0), 0.55) } },
        { label: "best", stroke: "transparent", paths: () => null, points: { show: true, size: 11, fill: series(1), stroke: series(1) } },
        ...(falling ? [{ label: "best so far", stroke: series(1), width: 1.6, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } }] : [])],
      scales: { x: { time: false, ...edge }, y: scale },
      axes: [axis(x.label, "x", { values: places, ...(x.whole ? { incrs: WHOLE } : {}), ...(categories ? { splits: categories.map((_, i) => i) } : {}) }), axis(label, "y", { values: (u, ticks) => ticks.map(tick) })],
      legend: [[0, "a trial", "dot"], ...(best != null ? [[1, "the best", "dot"]] : []), ...(falling ? [[1, "best so far"]] : [])],
      label: `${sorted.length} points, lowest ${Board.format.loss(Math.min(...sorted.map(point => point.y)))}`,
    };
  }

  /* A value with its interval for each name. */
  function intervals(rows, label, write) {
    if (!rows.length) return null;
    const names = rows.map(row => row.name);
    const whisker = plot => {
      const { ctx } = plot, ratio = devicePixelRatio;
      ctx.save();
      rows.forEach((row, i) => {
        if (row.low == null || row.high == null) return;
        const x = plot.valToPos(i, "x", true), low = plot.valToPos(row.low, "y", true), high = plot.valToPos(row.high, "y", true);
        ctx.strokeStyle = series(i); ctx.lineWidth = 2 * ratio;
        ctx.beginPath(); ctx.moveTo(x, low); ctx.lineTo(x, high);
        for (const end of [low, high]) { ctx.moveTo(x - 5 * ratio, end); ctx.lineTo(x + 5 * ratio, end); }
        ctx.stroke();
      });
      ctx.restore();
    };
    const ends = rows.flatMap(row => [row.value, row.low, row.high]).filter(value => value != null);
    const low = Math.min(...ends), high = Math.max(...ends), room = (high - low || Math.abs(high) || 1) * 0.12;
    return {
      data: [names.map((_, i) => i), ...rows.map((row, i) => names.map((_, j) => i === j ? row.value : null))], xName: "method", shape: [names, ends],
      series: [{}, ...rows.map((row, i) => ({ label: row.name, stroke: series(i), paths: () => null, points: { show: true, size: 9, fill: series(i) } }))],
      scales: { x: { time: false, range: [-0.6, names.length - 0.4] }, y: { range: [low - room, high + room] } },
      axes: [axis("", "x", { splits: names.map((_, i) => i), values: () => names, labelSize: 0, label: undefined, size: 26 }),
        axis(label, "y", { values: (u, ticks) => ticks.map(write || tick) })],
      hooks: { draw: [whisker] }, legend: [],
      label: rows.map(row => `${row.name} ${(write || tick)(row.value)}${row.low != null ? ` (${(write || tick)(row.low)} to ${(write || tick)(row.high)})` : ""}`).join(", "),
    };
  }

  function redraw() { for (const chart of live) chart.draw(); }
  function forget() { for (const chart of live) { chart.sizing.disconnect(); chart.plot?.destroy(); } live.clear(); }

  return { figure, losses, column, dots, intervals, redraw, forget };
})();
