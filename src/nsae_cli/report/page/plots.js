const drawings = [];
const scheme = matchMedia("(prefers-color-scheme: dark)");
let printing = false;

/** Colours as the style sheet has them now. */
function theme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const dark = scheme.matches && !printing;
  return {
    dark,
    ink: printing ? "#000" : colour("ink"), soft: printing ? "#444" : colour("soft"), grid: printing ? "#ddd" : colour("grid"),
    card: printing ? "#fff" : colour("card"), top: printing ? "#d55e00" : colour("top"),
    bottom: printing ? "#0072b2" : colour("bottom"), other: printing ? "#b9b9b9" : colour("other"),
    font: colour("sans"),
    series: dark
      ? ["#56b4e9", "#ff8a3d", "#3fcf9e", "#f0b429", "#e08bbd", "#9aa7ff", "#cfd4d9"]
      : ["#0072b2", "#d55e00", "#009e73", "#c98600", "#b3548f", "#4a4fc4", "#333333"],
    bins: dark
      ? ["#6a5acd", "#5f74d6", "#548cd6", "#4aa3cf", "#42b7bf", "#4cc9a5", "#74d787", "#a3e06a", "#d0e35a", "#f6e65c"]
      : ["#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21908d", "#22a884", "#42be71", "#7ad151", "#b5c820"],
  };
}

function axis(colours, options = {}) {
  return {
    gridcolor: colours.grid, linecolor: colours.soft, tickcolor: colours.soft, zeroline: false, automargin: true,
    fixedrange: false, tickangle: 0, ticks: "outside", ticklen: 4, ...options, title: { text: options.title || "", font: { size: 13 }, standoff: 8 },
  };
}

/** A log axis for these values, labelled in plain numbers as densely as their range allows. */
function logAxis(colours, values, options, form = show) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const decades = Math.log10(high / low);
  const steps = narrow() && decades > 1 ? [1] : decades < 0.7 ? [1, 1.5, 2, 3, 4, 5, 7] : decades < 1.6 ? [1, 2, 3, 5, 7] : decades < 3.5 ? [1, 2, 5] : [1];
  const at = [];
  for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.ceil(Math.log10(high)); power += decades > 10 ? 2 : 1) {
    for (const step of steps) at.push(Number((step * 10 ** power).toPrecision(3)));
  }
  const inside = at.filter((value) => value >= low / 1.3 && value <= high * 1.3);
  return axis(colours, { ...options, type: "log", tickvals: inside, ticktext: inside.map((value) => form(value)) });
}

const spans = (values, factor) => values.length > 1 && Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > factor;

const percent = (value) => `${Number((100 * value).toPrecision(3)).toLocaleString("en-US", { maximumFractionDigits: 12 })} %`;

function layout(colours, options) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 12, t: narrow() ? 10 : 32, b: 44 },
    font: { family: colours.font, size: 12.5, color: colours.ink }, hoverlabel: {
      bgcolor: colours.card, bordercolor: colours.soft, font: { color: colours.ink, family: colours.font, size: 12.5 }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.soft, activecolor: colours.ink }, showlegend: false,
    // A finger scrolls the page; only a mouse draws a zoom box.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", ...options,
  };
}

/** Data must not become Plotly's own markup (<b>, <a href>) in labels. */
const plain = (text) => readable(String(text)).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/%\{/g, "%&#123;");

const narrow = () => innerWidth < 640;

/**
 * A plot in a figure; `build(colours)` gives {traces, layout, caption} and is called again when colours or data change.
 * Traces with a `glyph` stand in a legend above it, whose buttons hide and show them.
 */
function plot(label, build, onClick) {
  const place = make("div", { class: "plot", role: "img", "aria-label": label });
  const text = make("figcaption");
  const legend = make("ul", { class: "keys", "aria-label": `${label}: shown` });
  const figure = make("figure", {}, legend, place, text);
  const hidden = new Set();
  let begun = false;
  const draw = () => {
    const { traces, layout: own, caption } = build(theme());
    text.textContent = caption;
    const focused = document.activeElement?.closest(".keys") === legend ? document.activeElement.dataset.key : null;
    legend.replaceChildren(...traces.filter((trace) => trace.glyph).map((trace) => make("li", {}, make("button", {
      type: "button", "data-key": trace.key, "aria-pressed": String(!hidden.has(trace.key)), title: "hide or show",
      on: { click: () => { if (!hidden.delete(trace.key)) hidden.add(trace.key); draw(); } },
    }, make("span", { class: "glyph", "aria-hidden": "true", text: trace.glyph, style: { color: trace.colour } }), trace.key))));
    if (focused !== null) [...legend.querySelectorAll("button")].find((button) => button.dataset.key === focused)?.focus();
    const shown = traces.map(({ glyph, key, colour, ...trace }) => ({ ...trace, visible: !hidden.has(key) }));
    const done = Plotly.react(place, shown, own, {
      responsive: true, displaylogo: false, displayModeBar: !narrow(),
      // Named one by one: plotly.js brings buttons that send data to a server.
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]],
      toImageButtonOptions: { format: "svg", filename: label.toLowerCase().replace(/[^a-z0-9]+/g, "-") },
    });
    if (!begun && onClick) done.then(() => place.on("plotly_click", onClick));
    begun = true;
  };
  drawings.push(draw);
  return { figure, draw, place };
}

const redraw = () => drawings.forEach((draw) => draw());
scheme.addEventListener("change", redraw);
addEventListener("beforeprint", () => { printing = true; redraw(); });
matchMedia("(max-width: 639px)").addEventListener("change", redraw);
addEventListener("afterprint", () => { printing = false; redraw(); });

const MAGMA = ["#fde2b8", "#feb77e", "#fb8861", "#e65164", "#b73779", "#812581", "#4f127b", "#1c1044"];

function addNorms() {
  if (!data.norms.length) return;
  const place = section("norms", "Norms of the residual stream", "Norms");
  const controls = make("div", { class: "controls" });
  let chosen = 0;
  let part = "all";
  const names = { all: "all tokens", rest: "positions ≥ 1", position0: "position 0" };
  const heat = plot("Distribution of token norms per layer", (colours) => {
    const norms = data.norms[chosen];
    const columns = norms.counts[part] || norms.counts.all;
    const totals = norms.rows[part] || norms.rows.all;
    const bins = norms.edges.length - 1;
    const room = 0.03 * (norms.edges[bins] - norms.edges[0]);
    const z = [];
    const custom = [];
    for (let bin = 0; bin < bins; bin++) {
      z.push(columns.map((column, layer) => (column[bin] ? Math.log10(column[bin] / totals[layer]) : null)));
      custom.push(columns.map((column, layer) => [show(10 ** norms.edges[bin]), show(10 ** norms.edges[bin + 1]), count(column[bin]), show(column[bin] / totals[layer], "percent")]));
    }
    const low = Math.floor(Math.min(...z.flat().filter((value) => value !== null)) + 1e-9);
    const powers = [];
    for (let power = low; power <= 0; power++) powers.push(power);
    const scale = (colours.dark ? [...MAGMA].reverse() : MAGMA).map((colour, index) => [index / (MAGMA.length - 1), colour]);
    if (colours.dark) scale[0][1] = "#3a2463";
    const medians = part === "all" ? [{
      type: "scatter", mode: norms.layers.length > 1 ? "lines+markers" : "markers", x: norms.layers, y: norms.medians.map((value) => (value > 0 ? Math.log10(value) : null)),
      name: "median", line: { color: colours.ink, width: 1.5 }, marker: { color: colours.card, size: 6, line: { color: colours.ink, width: 1.5 } },
      customdata: norms.medians.map((value) => show(value)), hovertemplate: "layer %{x}: median %{customdata}<extra></extra>",
    }] : [];
    return {
      caption: `Share of ${names[part]} of each layer, on a log colour scale; an empty cell holds no token.${part === "all" ? " Line: median of all tokens." : ""} ${norms.caption}`,
      traces: [{
        type: "heatmap", x: norms.layers, y: norms.edges, z, customdata: custom, colorscale: scale, zmin: low, zmax: 0, hoverongaps: false,
        hovertemplate: "layer %{x}<br>norm %{customdata[0]} to %{customdata[1]}<br>%{customdata[2]} tokens, %{customdata[3]}<extra></extra>",
        colorbar: { title: { text: "share of tokens", side: "right", font: { size: 12 } }, thickness: 12, outlinewidth: 0, tickvals: powers, ticktext: powers.map((power) => percent(10 ** power)) },
      }, ...medians],
      layout: layout(colours, {
        xaxis: axis(colours, { title: "layer", type: "category", showgrid: false }),
        yaxis: axis(colours, { title: "norm ‖x‖₂ (log)", tickvals: norms.ticks.at, ticktext: norms.ticks.text, range: [norms.edges[0] - room, norms.edges[bins] + room] }),
      }),
    };
  });
  const table = make("div");
  const parts = choice("Tokens", Object.entries(names), (value) => { part = value; heat.draw(); });
  const fill = () => {
    const norms = data.norms[chosen];
    parts.field.hidden = !norms.counts.position0;
    if (parts.field.hidden) parts.select.value = part = "all";
    const columns = [["layer", "text"], ["median", "number"], ["p99", "number"], ["max", "number"], ["position 0", "number"], ["sinks", "percent"], ["of Σ‖x‖²", "percent"]];
    table.replaceChildren(make("details", {}, make("summary", { text: "The same in numbers" }), sortableTable(
      "Norms per layer", columns.map(([label, kind]) => ({ label, kind, help: { "position 0": "median norm at position 0", sinks: "share of the tokens that are sinks", "of Σ‖x‖²": "the sinks' share of the sum of squared norms" }[label] || label })),
      norms.table.map((row) => [row.layer, row.median, row.p99, row.max, row.position0, row.sinks, row.share]), "plain")));
  };
  controls.append(choice("Activations", data.norms.map((norms, index) => [String(index), `${norms.name} (${norms.title})`]), (value) => { chosen = Number(value); fill(); heat.draw(); }).field, parts.field);
  place.append(controls, heat.figure, table);
  fill();
}

function addHistograms() {
  if (!data.histograms.length) return;
  const place = section("top-norms", "What high-norm tokens do to an SAE", "Top norms");
  let chosen = 0;
  const draw = (quantity, title) => plot(`${title} by norm group`, (colours) => {
    const one = data.histograms[chosen];
    const bins = one[quantity];
    const middles = bins.edges.slice(1).map((edge, index) => (edge + bins.edges[index]) / 2);
    const widths = bins.edges.slice(1).map((edge, index) => edge - bins.edges[index]);
    const unlog = (edge) => (bins.log ? 10 ** edge : edge);
    const range = (index) => {
      if (bins.zeros && index < 2) return "0";
      const [low, high] = [unlog(bins.edges[index]), unlog(bins.edges[index + 1])];
      if (quantity === "l0") { const [a, b] = [Math.ceil(low), Math.ceil(high) - 1]; return a >= b ? count(a) : `${count(a)}–${count(b)}`; }
      return `${show(low)}–${show(high)}`;
    };
    const traces = [["top", `top ${one.top} by norm`, colours.top], ["bottom", `bottom ${one.top}`, colours.bottom], ["other", "other", colours.other]].map(([key, name, colour]) => ({
      type: "bar", glyph: "■", key: `${name} (${count(one.rows[key])})`, colour, name, x: middles, y: bins.counts[key], width: widths, marker: { color: colour, line: { width: 0 } },
      customdata: middles.map((_, index) => range(index)), hovertemplate: `${title} %{customdata}: %{y:,} tokens<extra>${plain(name)}</extra>`,
    }));
    return {
      traces, caption: "",
      layout: layout(colours, {
        barmode: "stack", bargap: 0,
        xaxis: axis(colours, { title: `${title} per token${bins.log ? " (log)" : ""}`, ...(bins.ticks ? { tickvals: bins.ticks.at, ticktext: bins.ticks.text } : {}), showgrid: false }),
        yaxis: axis(colours, { title: "tokens per bin, stacked (log)", type: "log", dtick: 1, rangemode: "tozero" }),
      }),
    };
  });
  const [l0, l1] = [draw("l0", "L0: active features"), draw("l1", "L1: sum of activations")];
  const findings = make("div", { class: "findings" });
  const fill = () => {
    const one = data.histograms[chosen];
    findings.replaceChildren(...one.findings.map((text) => make("p", { text })), make("p", { class: "note", text: one.caption }));
    l0.draw(); l1.draw();
  };
  const controls = make("div", { class: "controls" }, choice("SAE", numbered(data.histograms, "sae"), (value) => { chosen = Number(value); fill(); }).field);
  place.append(controls, make("div", { class: "pair" }, l0.figure, l1.figure), findings);
  if (data.left_out.histograms) place.append(make("p", { class: "note", text: `${plural(data.left_out.histograms, "SAE")} left out to keep the page small.` }));
  const first = data.histograms[chosen];
  findings.replaceChildren(...first.findings.map((text) => make("p", { text })), make("p", { class: "note", text: first.caption }));
}

function addTraining() {
  if (!data.curves.length) return;
  const place = section("training", "Whom the loss listens to, over training", "Training");
  let chosen = 0;
  let what = "bias";
  const kinds = {
    bias: ["Norm bias per bin", "share of loss ÷ share of tokens"], share: ["Share of the loss per bin", "share of the squared-error loss"],
    l0: ["L0", "active features per token"], fvu: ["FVU", "unexplained share of the variance"],
  };
  const captions = {
    bias: "Each tenth of the non-sink tokens by norm, and the sinks: its share of the squared-error loss ÷ its share of the tokens, in the training batch. 1: every token counts alike.",
    share: "Each tenth of the non-sink tokens by norm, and the sinks: its share of the squared-error loss in the training batch.",
    l0: "Mean number of active features per token of the training batch.", fvu: "Unexplained share of the variance of the training batch, about its non-sinks' mean.",
  };
  const curves = plot("Training curves", (colours) => {
    const one = data.curves[chosen];
    let lines;
    if (what === "bias" || what === "share") {
      lines = one[what].slice(1).map((values, bin) => [`bin ${bin}${bin === 0 ? " (shortest)" : bin === 9 ? " (longest)" : ""}`, values, colours.bins[bin], 1.4]);
      if (one[what][0].some((value) => value !== null)) lines.push(["sinks", one[what][0], colours.top, 2.6]);
    } else lines = [["non-sinks", one[`${what}_ns`], colours.bottom, 2], ["all tokens", one[`${what}_all`], colours.top, 2]];
    const values = lines.flatMap((line) => line[1]).filter((value) => value !== null);
    const log = spans(values, 3);
    const title = kinds[what][1];
    return {
      caption: captions[what],
      traces: lines.map(([name, y, colour, width]) => ({
        type: "scatter", mode: "lines", glyph: "━", key: name, colour, name, x: one.tokens, y, line: { color: colour, width }, connectgaps: false,
        hovertemplate: `${name}: %{y:.3g} at %{x:.3s} tokens<extra></extra>`,
      })),
      layout: layout(colours, {
        xaxis: axis(colours, { title: "training tokens", tickformat: "~s", rangemode: "tozero" }),
        yaxis: log ? logAxis(colours, values, { title: `${title} (log)` }) : axis(colours, { title, tickformat: "~g" }),
        shapes: what === "bias" ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { color: colours.soft, width: 1, dash: "dot" } }] : [],
      }),
    };
  });
  place.append(make("div", { class: "controls" },
    choice("SAE", numbered(data.curves, "sae"), (value) => { chosen = Number(value); curves.draw(); }).field,
    choice("Shown", Object.entries(kinds).map(([key, [name]]) => [key, name]), (value) => { what = value; curves.draw(); }).field), curves.figure);
  if (data.left_out.curves) place.append(make("p", { class: "note", text: `The curves of ${plural(data.left_out.curves, "SAE")} left out to keep the page small.` }));
}

const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star"];
const GLYPHS = ["●", "■", "◆", "▲", "✚", "✖", "★"];

function addPareto() {
  const { points, errors } = data.pareto;
  if (!errors.length || !points.length) return;
  const place = section("pareto", "Sparsity against error", "Pareto");
  const hooks = [...new Set(points.map((point) => point.hook))];
  let hook = hooks[0];
  let error = errors[0][0];
  const front = plot("Error against L0", (colours) => {
    const shown = points.filter((point) => point.hook === hook && point.l0 > 0 && point[error] !== null);
    const arms = [...new Set(points.filter((point) => point.hook === hook).map((point) => point.arm))].sort();
    const name = errors.find(([key]) => key === error)[1];
    const values = shown.map((point) => point[error]);
    const log = spans(values, 5);
    return {
      caption: "One point per SAE, on held-out tokens; lower left is better. A line joins the SAEs of one method by L0. Methods can be compared where they reach the same L0, not elsewhere.",
      traces: arms.map((arm, index) => {
        const mine = shown.filter((point) => point.arm === arm).sort((a, b) => a.l0 - b.l0);
        return {
          type: "scatter", mode: "lines+markers", glyph: GLYPHS[index % 7], key: arm, colour: colours.series[index % 7], name: plain(arm), x: mine.map((point) => point.l0), y: mine.map((point) => point[error]),
          line: { color: colours.series[index % 7], width: 1.5, dash: ["solid", "dash", "dot"][Math.floor(index / 7) % 3] },
          marker: { color: colours.series[index % 7], size: 8, symbol: SYMBOLS[index % 7] },
          customdata: mine.map((point) => [plain(point.sae), show(point.l0), show(point.fvu), show(point.mre), show(point.delta_ce)]),
          hovertemplate: `<b>%{customdata[0]}</b><br>${plain(arm)}<br>L0 %{customdata[1]} · FVU %{customdata[2]} · MRE %{customdata[3]}${errors.length > 2 ? " · ΔCE %{customdata[4]}" : ""}<extra></extra>`,
        };
      }),
      layout: layout(colours, {
        xaxis: logAxis(colours, shown.map((point) => point.l0), { title: "L0, non-sinks (log)" }), hovermode: "closest",
        yaxis: log ? logAxis(colours, values, { title: `${name} (log)` }) : axis(colours, { title: name, tickformat: "~g" }),
      }),
    };
  });
  place.append(make("div", { class: "controls" },
    choice("Hook", hooks.map((one) => [one, one]), (value) => { hook = value; front.draw(); }).field,
    choice("Error", errors, (value) => { error = value; front.draw(); }).field), front.figure);
}
