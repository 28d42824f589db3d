"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report").textContent);
  const byId = (id) => document.getElementById(id);
  const byScore = report.score === "evaluate";

  // Numbers ---------------------------------------------------------------------------------------------------------
  const number = (value) => (value === "inf" ? Infinity : value === "-inf" ? -Infinity : value);
  const finite = (value) => (Number.isFinite(number(value)) ? number(value) : null);
  const digits = (value, count = 4) => {
    const found = number(value);
    if (found === null || found === undefined) return "–";
    if (!Number.isFinite(found)) return found > 0 ? "∞" : "−∞";
    if (Math.abs(found) < 1e-3 && found !== 0) return found.toExponential(count - 1);
    return Number.isInteger(found) ? String(found) : Number(found.toPrecision(count)).toString();
  };
  const decibels = (value) => {
    const found = number(value);
    return found === Infinity ? "exact" : found === null ? "–" : Number.isFinite(found) ? found.toFixed(2) : "−∞";
  };
  const percent = (value) => (value === null ? "–" : (100 * value).toFixed(2) + " %");
  const damage = (value) => (byScore ? digits(value) : percent(number(value)));
  const damageValue = (value) => (byScore ? finite(value) : finite(value) === null ? null : 100 * number(value));
  const short = (name, limit = 34) => {
    if (name.length <= limit) return name;
    const tail = Math.floor((limit - 1) / 2);
    return name.slice(0, limit - 1 - tail) + "…" + name.slice(name.length - tail);
  };
  const plain = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); // plotly reads markup

  // Elements --------------------------------------------------------------------------------------------------------
  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  byId("title").textContent = "Analysis of " + report.program;
  byId("subtitle").textContent = `${report.units.length} layers, ${report.values.length} quantized values; stage ` +
    `${report.stage}; ${report.samples} samples in ${report.batches} batch${report.batches === 1 ? "" : "es"}`;
  byId("suggestions").textContent = report.suggestions;
  for (const note of report.notes) byId("notes").append(element("li", note));

  for (const [name, score] of [["Float", report.float_score], ["Weights alone quantized", report.weights_only],
    ["Activations alone quantized", report.activations_only], ["All quantized", report.quantized]]) {
    const card = element("div", undefined, "card");
    const sqnr = number(score.sqnr_db) === Infinity ? "exact" : decibels(score.sqnr_db) + " dB";
    const more = [];
    if (byScore) more.push("outputs' SQNR " + sqnr);
    if (score.agreement !== null) more.push("top-1 as float " + percent(score.agreement));
    card.append(element("div", name, "name"), element("div", byScore ? digits(score.evaluated, 6) : sqnr, "figure"),
      element("div", more.join(" · ") || (byScore ? "" : "SQNR of the outputs"), "more"));
    byId("cards").append(card);
  }
  byId("damage-text").textContent = byScore
    ? "Alone: how much the score falls when only this layer is quantized. Without: how much it rises when all but this " +
      "layer are."
    : "Alone: the noise at the outputs when only this layer is quantized, in % of that with all quantized. Without: how " +
      "much of that noise goes when this layer alone stays in float; below 0 its error cancels others'.";

  // Plots -----------------------------------------------------------------------------------------------------------
  const isNarrow = () => window.innerWidth < 700;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const axis = (title) => ({ title: { text: title, standoff: 8 }, gridcolor: colour("line"), automargin: true,
    zerolinecolor: colour("line"), linecolor: colour("line") });
  const draw = (id, traces, layout) => {
    const base = { paper_bgcolor: colour("ground"), plot_bgcolor: colour("ground"), hovermode: "closest",
      font: { color: colour("text"), family: "system-ui, sans-serif", size: 12 }, height: 380,
      margin: { l: 60, r: 15, t: 30, b: 50 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      hoverlabel: { bgcolor: colour("panel"), font: { color: colour("text") }, bordercolor: colour("line") } };
    Plotly.react(id, traces, { ...base, ...layout }, { responsive: true, displaylogo: false,
      displayModeBar: isNarrow() ? false : "hover", showLink: false,
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]] });
  };
  const unitText = (unit) => `<b>${plain(unit.name)}</b>${unit.module ? "<br>" + plain(unit.module) : ""}` +
    `<br>${plain(unit.op)} ${unit.bits}<br>alone ${damage(unit.damage_alone)}, without ${damage(unit.damage_without)}` +
    `<br>SQNR alone ${decibels(unit.alone.sqnr_db)} dB`;
  const unit = new Map(report.units.map((item) => [item.name, item]));
  const measure = byScore ? "score lost" : "% of all noise";
  const bars = (items, key, name, tone, sideways) => {
    const sizes = items.map((item) => damageValue(item[key]));
    const places = items.map((_, index) => index);
    return { type: "bar", name, marker: { color: colour(tone) }, orientation: sideways ? "h" : "v",
      x: sideways ? sizes : places, y: sideways ? places : sizes, text: items.map(unitText), textposition: "none",
      hovertemplate: "%{text}<extra></extra>" };
  };
  const bothBars = (items, sideways) => [bars(items, "damage_alone", "alone", "first", sideways),
    bars(items, "damage_without", "without", "second", sideways)];

  const drawSorted = () => {
    const count = byId("damage-count").value;
    const key = "damage_" + byId("damage-by").value;
    let items = report.order.map((name) => unit.get(name));
    if (key !== "damage_alone") items.sort((a, b) => number(b[key]) - number(a[key]));
    items = count === "all" ? items : items.slice(0, Number(count));
    draw("plot-sorted", bothBars(items, true), { height: 110 + 24 * items.length, bargap: 0.25,
      xaxis: axis(measure), yaxis: { ...axis(""), autorange: "reversed", tickmode: "array",
        tickvals: items.map((_, index) => index), ticktext: items.map((item) => plain(short(item.name, isNarrow() ? 22 : 40))) } });
  };
  const fewTicks = (names, most) => {
    const step = Math.max(1, Math.ceil(names.length / most));
    const places = names.map((_, index) => index).filter((index) => index % step === 0);
    return { tickmode: "array", tickvals: places, ticktext: places.map((index) => plain(short(names[index], 22))), tickangle: -50 };
  };
  const mostTicks = () => Math.max(6, Math.floor(window.innerWidth / 26));
  const drawOrder = () => draw("plot-order", bothBars(report.units, false), { bargap: 0.2,
    xaxis: { ...axis(""), ...fewTicks(report.units.map((item) => item.name), mostTicks()) }, yaxis: axis(measure) });

  const valueText = (item) => `<b>${plain(item.value)}</b>${item.module ? "<br>" + plain(item.module) : ""}<br>` +
    `${plain(item.spec)}<br>local ${decibels(item.local_sqnr_db)} dB, accumulated ${decibels(item.accumulated_sqnr_db)} dB` +
    `<br>[${digits(item.min)}, ${digits(item.max)}] on [${digits(item.grid_min)}, ${digits(item.grid_max)}]`;
  const drawSqnr = () => {
    const points = (items, key, name, tone, mode, symbol) => ({ type: "scatter", mode, name,
      x: items.map((entry) => entry[0]), y: items.map((entry) => finite(entry[1][key])),
      text: items.map((entry) => valueText(entry[1])), hovertemplate: "%{text}<extra></extra>",
      marker: { color: colour(tone), size: 6, symbol }, line: { color: colour(tone), width: 1.5 } });
    const all = report.values.map((item, index) => [index, item]);
    const activations = all.filter((entry) => entry[1].kind === "activation");
    const weights = all.filter((entry) => entry[1].kind === "weight");
    draw("plot-sqnr", [points(activations, "local_sqnr_db", "activations, local", "first", "lines+markers", "circle"),
      points(activations, "accumulated_sqnr_db", "activations, accumulated", "second", "lines+markers", "circle"),
      points(weights, "local_sqnr_db", "weights, local", "third", "markers", "diamond")], { height: 460,
      xaxis: { ...axis(""), ...fewTicks(report.values.map((item) => item.value), mostTicks()) }, yaxis: axis("dB") });
  };
  const drawRanges = () => {
    const items = report.values.filter((item) => item.kind === byId("ranges-kind").value);
    const unitOf = (item) => (byId("ranges-relative").checked ? item.grid_max - item.grid_min || 1 : 1);
    const places = items.map((_, index) => index);
    const texts = items.map(valueText);
    const marks = (key, name) => ({ type: "scatter", mode: "markers", name, x: places,
      y: items.map((item) => item[key] / unitOf(item)), marker: { symbol: "line-ew-open", size: 9, color: colour("second"),
        line: { width: 2, color: colour("second") } }, text: texts, hovertemplate: "%{text}<extra></extra>" });
    draw("plot-ranges", [{ type: "bar", name: "float values", x: places, base: items.map((item) => item.min / unitOf(item)),
      y: items.map((item) => (item.max - item.min) / unitOf(item)), marker: { color: colour("first") }, text: texts,
      textposition: "none", hovertemplate: "%{text}<extra></extra>" }, marks("grid_min", "grid, lowest"),
    marks("grid_max", "grid, highest")], { height: 460, xaxis: { ...axis(""),
      ...fewTicks(items.map((item) => item.value), mostTicks()) }, yaxis: axis("") });
  };

  // One value -------------------------------------------------------------------------------------------------------
  let chosen = 0;
  const line = (x, tone, dash) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1,
    line: { color: colour(tone), width: 2, dash } });
  const drawValue = () => {
    const item = report.values[chosen];
    byId("value-name").value = item.value;
    byId("value-text").textContent = `${item.kind} of ${item.unit}, ${item.spec}` +
      `${item.shares ? ", on the grid of " + item.shares : ""}: [${digits(item.min)}, ${digits(item.max)}] on the grid ` +
      `[${digits(item.grid_min)}, ${digits(item.grid_max)}], ${digits(item.codes_used)} of ${digits(item.codes)} codes used, ` +
      `${percent(item.clipped)} clipped; SQNR local ${decibels(item.local_sqnr_db)} dB` +
      `${item.accumulated_sqnr_db === null ? "" : ", accumulated " + decibels(item.accumulated_sqnr_db) + " dB"}` +
      `${item.dead_channels.length ? `; ${item.dead_channels.length} of ${item.channels} channels dead` : ""}`;
    const { low, width, counts } = item.histogram;
    draw("plot-histogram", [{ type: "bar", x: counts.map((_, index) => low + (index + 0.5) * width), y: counts,
      width: counts.map(() => width), name: "elements", marker: { color: colour("first") },
      hovertemplate: "%{x:.4g}: %{y}<extra></extra>" }], { showlegend: false, bargap: 0, height: 340,
      xaxis: axis("float value (vertical lines: the grid's ends)"), yaxis: { ...axis("elements (log)"), type: "log", dtick: "D2" },
      shapes: [line(item.grid_min, "second", "solid"), line(item.grid_max, "second", "solid")] });
    const channels = item.channel_low.map((_, index) => index);
    byId("plot-channels").style.display = channels.length ? "" : "none";
    if (channels.length) {
      draw("plot-channels", [{ type: "bar", x: channels, base: item.channel_low, name: "channel's range",
        y: item.channel_high.map((high, index) => high - item.channel_low[index]), marker: { color: colour("third") },
        hovertemplate: "channel %{x}: from %{base:.4g}<extra></extra>" }], { height: 280, showlegend: false, bargap: 0.1,
        xaxis: axis(`output channel (largest range / smallest: ${digits(item.channel_ratio)})`), yaxis: axis("weight") });
    }
    for (const row of byId("values-table").querySelectorAll("tbody tr")) {
      row.classList.toggle("chosen", Number(row.dataset.index) === chosen);
    }
  };
  const choose = (index) => {
    chosen = (index + report.values.length) % report.values.length;
    drawValue();
  };
  byId("value-names").append(...report.values.map((item) => {
    const option = element("option");
    option.value = item.value;
    return option;
  }));
  byId("value-name").addEventListener("change", (event) => {
    const index = report.values.findIndex((item) => item.value === event.target.value);
    if (index >= 0) choose(index);
  });
  byId("value-name").addEventListener("focus", (event) => event.target.select());
  byId("value-before").addEventListener("click", () => choose(chosen - 1));
  byId("value-after").addEventListener("click", () => choose(chosen + 1));

  // Tables ----------------------------------------------------------------------------------------------------------
  const order = (a, b) => (typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
  const makeTable = (id, items, columns, click) => {
    const head = element("tr");
    const body = element("tbody");
    const rows = items.map((item, index) => {
      const row = element("tr");
      row.dataset.index = index;
      for (const column of columns) {
        const raw = column.get(item);
        const cell = element("td", column.show ? column.show(raw, item) : String(raw), column.text ? "text" : "");
        if (column.text) cell.title = String(raw);
        row.append(cell);
      }
      if (click) row.addEventListener("click", () => click(index));
      return row;
    });
    const sortBy = (place, direction) => {
      const keys = items.map((item) => { const raw = columns[place].get(item); return columns[place].text ? raw : number(raw); });
      const missing = (key) => key === null || key === undefined;
      const sorted = rows.map((_, index) => index).sort((a, b) => missing(keys[a]) - missing(keys[b]) ||
        direction * order(keys[a], keys[b]) || a - b);
      body.append(...sorted.map((index) => rows[index]));
      [...head.children].forEach((cell, index) => (index === place
        ? cell.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending") : cell.removeAttribute("aria-sort")));
    };
    columns.forEach((column, place) => {
      const cell = element("th", undefined, column.text ? "text" : "");
      cell.append(element("button", column.name));
      cell.title = column.hint || "";
      cell.addEventListener("click", () => {
        const first = column.text || column.low ? 1 : -1;
        const now = cell.getAttribute("aria-sort");
        sortBy(place, now === null ? first : now === "ascending" ? -1 : 1);
      });
      head.append(cell);
    });
    const top = element("thead");
    top.append(head);
    body.append(...rows);
    byId(id + "-table").append(top, body);
    const filter = () => {
      const words = byId(id + "-filter").value.toLowerCase().split(/\s+/);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      byId(id + "-count").textContent = `${shown} of ${rows.length}`;
    };
    byId(id + "-filter").addEventListener("input", filter);
    filter();
    return sortBy;
  };

  const sortLayers = makeTable("layers", report.units, [
    { name: "layer", get: (item) => item.name, text: true },
    { name: "module", get: (item) => item.module, text: true },
    { name: "operation", get: (item) => item.op, text: true },
    { name: "bits", get: (item) => item.bits, text: true },
    { name: "damage alone", get: (item) => item.damage_alone, show: damage },
    { name: "damage without", get: (item) => item.damage_without, show: damage },
    { name: "SQNR alone (dB)", get: (item) => item.alone.sqnr_db, show: decibels, low: true },
    { name: "SQNR without (dB)", get: (item) => item.without.sqnr_db, show: decibels },
    ...(report.quantized.agreement === null ? [] : [
      { name: "top-1 alone", get: (item) => item.alone.agreement, show: percent, low: true },
      { name: "top-1 without", get: (item) => item.without.agreement, show: percent }]),
    ...(byScore ? [
      { name: "score alone", get: (item) => item.alone.evaluated, show: (raw) => digits(raw, 6), low: true },
      { name: "score without", get: (item) => item.without.evaluated, show: (raw) => digits(raw, 6) }] : []),
    { name: "quantizes", get: (item) => [...item.weights, ...item.activations].join(", "), text: true },
  ]);
  sortLayers(4, -1);
  makeTable("values", report.values, [
    { name: "value", get: (item) => item.value, text: true },
    { name: "kind", get: (item) => item.kind, text: true },
    { name: "layer", get: (item) => item.unit, text: true },
    { name: "spec", get: (item) => item.spec, text: true },
    { name: "local SQNR (dB)", get: (item) => item.local_sqnr_db, show: decibels, low: true },
    { name: "accumulated SQNR (dB)", get: (item) => item.accumulated_sqnr_db, show: decibels, low: true },
    { name: "local MSE", get: (item) => item.local_mse, show: (raw) => digits(raw, 3) },
    { name: "accumulated MSE", get: (item) => item.accumulated_mse, show: (raw) => digits(raw, 3) },
    { name: "min", get: (item) => item.min, show: (raw) => digits(raw), low: true },
    { name: "max", get: (item) => item.max, show: (raw) => digits(raw) },
    { name: "grid min", get: (item) => item.grid_min, show: (raw) => digits(raw), low: true },
    { name: "grid max", get: (item) => item.grid_max, show: (raw) => digits(raw) },
    { name: "scale", hint: "the largest of its channels'", get: (item) => item.scale_high, show: (raw) => digits(raw) },
    { name: "zero point", get: (item) => item.zero_point_low, show: (raw, item) =>
      (raw === item.zero_point_high ? digits(raw) : `${raw}..${item.zero_point_high}`) },
    { name: "clipped", get: (item) => item.clipped, show: percent },
    { name: "codes used", get: (item) => item.codes_used / item.codes, low: true,
      show: (raw, item) => `${item.codes_used} / ${item.codes}` },
    { name: "channels' ratio", hint: "largest range over smallest", get: (item) => item.channel_ratio, show: (raw) => digits(raw, 3) },
    { name: "dead channels", get: (item) => item.dead_channels.length, show: (raw, item) => `${raw} / ${item.channels}` },
  ], (index) => { choose(index); byId("value").scrollIntoView({ behavior: "smooth" }); });

  // The rest --------------------------------------------------------------------------------------------------------
  byId("copy").addEventListener("click", () => {
    getSelection().selectAllChildren(byId("suggestions"));
    if (navigator.clipboard) navigator.clipboard.writeText(report.suggestions).catch(() => {});
  });
  for (const id of ["damage-count", "damage-by"]) byId(id).addEventListener("change", drawSorted);
  for (const id of ["ranges-kind", "ranges-relative"]) byId(id).addEventListener("change", drawRanges);
  const drawAll = () => [drawSorted, drawOrder, drawSqnr, drawRanges, drawValue].forEach((one) => one());
  const setScheme = (name) => {
    document.documentElement.dataset.scheme = name;
    drawAll();
  };
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  preferred.addEventListener("change", () => setScheme(preferred.matches ? "dark" : "light"));
  byId("scheme").addEventListener("click", () =>
    setScheme(document.documentElement.dataset.scheme === "dark" ? "light" : "dark"));
  let resizing = 0;
  window.addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(drawAll, 200); });
  setScheme(preferred.matches ? "dark" : "light");
  document.documentElement.dataset.ready = "yes";
})();
