const PAGE = 50;
// Places in a feature's list of numbers.
const NUMBERS = { density: 0, mass: 1, mean: 2, max: 3, decoder: 4, sinks: 5, correlation: 6 };
const SORTS = {
  mass: ["activation mass", (feature) => -feature.numbers[NUMBERS.mass]],
  number: ["number", (feature) => feature.id],
  dense: ["density, densest first", (feature) => -feature.numbers[NUMBERS.density]],
  rare: ["density, rarest first", (feature) => feature.numbers[NUMBERS.density]],
  mean: ["mean activation", (feature) => -feature.numbers[NUMBERS.mean]],
  max: ["largest activation", (feature) => -feature.numbers[NUMBERS.max]],
  decoder: ["decoder norm", (feature) => -feature.numbers[NUMBERS.decoder]],
  sinks: ["share on sinks", (feature) => -feature.numbers[NUMBERS.sinks]],
  correlated: ["correlation with norm, highest", (feature) => -feature.numbers[NUMBERS.correlation]],
  against: ["correlation with norm, lowest", (feature) => feature.numbers[NUMBERS.correlation]],
};

/** The SAE's features with names for their parts, made when first shown. */
function opened(sae) {
  if (!sae.opened) {
    sae.opened = sae.features.map(([id, numbers, contexts, logits]) => ({ id, numbers, contexts, logits, words: null }));
    sae.byId = new Map(sae.opened.map((feature) => [feature.id, feature]));
  }
  return sae.opened;
}

/** Everything of a feature that a search looks through, in lower case. */
function words(sae, feature) {
  if (feature.words === null) {
    const contexts = feature.contexts.map(([, , , tokens]) => tokens.map((token) => sae.tokens[token]).join(""));
    const logits = (feature.logits || []).flat().map(([token]) => sae.tokens[token]);
    feature.words = [...contexts, ...logits].join("\n").toLowerCase();
  }
  return feature.words;
}

const fires = (sae, id) => (parseInt(sae.alive[id >> 2], 16) >> (3 - (id & 3))) & 1;

function peakToken(sae, feature) {
  if (!feature.contexts.length || !sae.has_tokens) return "";
  const [, , first, tokens] = feature.contexts[0];
  return sae.tokens[tokens[sae.before - first]] ?? "";
}

function tokenRun(sae, [act, , first, tokens, shades]) {
  const run = make("bdi", { class: "text-run" });
  tokens.forEach((token, place) => {
    const shade = (shades[place] || 0) / sae.shades;
    const text = sae.tokens[token];
    const peak = place === sae.before - first;
    run.append(make("span", {
      class: `tok${shade > 0 ? " on" : ""}${peak ? " peak" : ""}`, text: readable(text),
      style: shade > 0 ? { "--a": shade.toFixed(3) } : {}, title: shade > 0 ? `${JSON.stringify(text)}: ${Math.round(shade * 100)} % of the feature's largest` : null,
    }));
    if (text.includes("\n") && place < tokens.length - 1) run.append(make("wbr"));
  });
  return make("li", {}, make("span", { class: "act", text: show(act), title: "activation at the outlined token" }), run);
}

function logitList(sae, title, entries, sign) {
  return make("div", {}, make("h3", { text: title }), make("ol", {}, entries.map(([token, effect]) =>
    make("li", {}, make("span", { class: "tok", text: readable(sae.tokens[token]) }), make("span", { class: sign, text: (effect > 0 ? "+" : "") + show(effect) })))));
}

function addFeatures() {
  if (!data.features.length) return;
  const place = section("features", "Features", "Features");
  const about = make("p", { class: "soft" });
  const body = make("tbody");
  const status = make("span", { role: "status" });
  const detail = make("div", { class: "detail", "aria-live": "polite", tabindex: "-1" });
  let sae = data.features[0];
  let found = [];
  let page = 0;
  let selected = null;
  let sort = "mass";

  const search = make("input", { type: "search", placeholder: "token text or feature number", autocomplete: "off", spellcheck: "false", on: { input: () => { page = 0; list(); } } });
  const sorts = choice("Sort by", Object.entries(SORTS).map(([key, [name]]) => [key, name]), (value) => { sort = value; page = 0; list(); });
  const saes = choice("SAE", numbered(data.features, "sae"), (value) => { open(Number(value)); });
  const back = make("button", { type: "button", text: "Previous", on: { click: () => { page -= 1; fill(); } } });
  const on = make("button", { type: "button", text: "Next", on: { click: () => { page += 1; fill(); } } });

  const map = plot("Features by density and mean activation", (colours) => {
    const features = opened(sae);
    return {
      caption: "One point per feature on this page; colour: share of its activation mass on sinks. A press on a point opens the feature.",
      traces: [{
        type: "scatter", mode: "markers", x: features.map((feature) => feature.numbers[NUMBERS.density]), y: features.map((feature) => feature.numbers[NUMBERS.mean]),
        customdata: features.map((feature) => [feature.id, show(feature.numbers[NUMBERS.density], "percent"), show(feature.numbers[NUMBERS.mean]), show(feature.numbers[NUMBERS.sinks], "percent"), plain(peakToken(sae, feature))]),
        marker: { size: 6, opacity: 0.8, color: features.map((feature) => feature.numbers[NUMBERS.sinks]), cmin: 0, cmax: 1, colorscale: [[0, colours.bottom], [1, colours.top]], colorbar: { title: { text: "share on sinks", side: "right", font: { size: 12 } }, thickness: 12, outlinewidth: 0, tickvals: [0, 0.25, 0.5, 0.75, 1], ticktext: ["0 %", "25 %", "50 %", "75 %", "100 %"] } },
        hovertemplate: "feature %{customdata[0]}: ‘%{customdata[4]}’<br>density %{customdata[1]}, mean %{customdata[2]}<br>on sinks %{customdata[3]}<extra></extra>",
      }],
      layout: layout(colours, {
        xaxis: logAxis(colours, features.map((feature) => feature.numbers[NUMBERS.density]), { title: "density: share of tokens on which it fires (log)" }, percent),
        yaxis: logAxis(colours, features.map((feature) => feature.numbers[NUMBERS.mean]), { title: "mean activation where it fires (log)" }), hovermode: "closest",
      }),
    };
  }, (event) => { choose(event.points[0].customdata[0]); detail.scrollIntoView({ block: "nearest" }); });

  function open(index) {
    sae = data.features[index];
    const left = sae.left_out ? ` ${plural(sae.left_out, "feature")} that fire${sae.left_out === 1 ? "s" : ""} (those with the least activation mass) ${sae.left_out === 1 ? "is" : "are"} left out to keep the page below 8 MB.` : "";
    about.textContent = `${sae.sae}, ${sae.hook}: ${plural(opened(sae).length, "feature")} of ${count(sae.d_sae)} with up to ${sae.contexts} contexts each, measured on ${count(sae.rows)} held-out tokens of ${sae.source}. ${sae.dead ? `${count(sae.dead)} never fire on these.` : "Every feature fires."}${left}`;
    page = 0;
    selected = null;
    list();
    choose(found.length ? found[0].id : null);
    if (map.place.data) map.draw();
  }
  function list() {
    const wanted = search.value.toLowerCase();
    const features = opened(sae);
    const number = /^\s*#?\d+\s*$/.test(wanted) ? Number(wanted.replace("#", "")) : null;
    found = features.filter((feature) => wanted === "" || feature.id === number || words(sae, feature).includes(wanted));
    const by = SORTS[sort][1];
    // The feature of that very number comes first whatever the order.
    found.sort((a, b) => Number(b.id === number) - Number(a.id === number) || by(a) - by(b) || a.id - b.id);
    fill();
    if (number !== null && number < sae.d_sae && !sae.byId.has(number)) {
      status.textContent += fires(sae, number) ? `; feature ${number} is left out` : `; feature ${number} never fires here`;
    }
  }
  function fill() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    back.disabled = page === 0;
    on.disabled = page >= pages - 1;
    body.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map((feature) => {
      const numbers = feature.numbers;
      return make("tr", { "data-feature": feature.id, "aria-selected": String(feature.id === selected), on: { click: () => choose(feature.id) } },
        make("td", {}, make("button", { type: "button", text: feature.id, "aria-label": `Open feature ${feature.id}` })),
        make("td", { class: "token", text: readable(peakToken(sae, feature)) }), make("td", { text: show(numbers[NUMBERS.density], "percent") }),
        make("td", { class: "wide", text: show(numbers[NUMBERS.mean]) }), make("td", { text: show(numbers[NUMBERS.sinks], "percent") }));
    }));
    status.textContent = found.length ? `${count(page * PAGE + 1)}–${count(Math.min(found.length, (page + 1) * PAGE))} of ${count(found.length)}` : "no feature matches";
  }
  function choose(id) {
    selected = id;
    for (const row of body.children) row.setAttribute("aria-selected", String(row.dataset.feature === String(id)));
    const feature = id === null ? null : sae.byId.get(id);
    if (!feature) { detail.replaceChildren(); return; }
    const n = feature.numbers;
    const facts = [
      ["density", show(n[NUMBERS.density], "percent"), "share of the held-out tokens on which it fires"], ["mean activation", show(n[NUMBERS.mean]), "where it fires"],
      ["largest", show(n[NUMBERS.max]), "largest activation"], ["decoder norm", show(n[NUMBERS.decoder]), "length of its row of W_dec"],
      ["on sinks", show(n[NUMBERS.sinks], "percent"), "share of its activation mass on sink tokens"], ["corr. with norm", show(n[NUMBERS.correlation]), "correlation of firing with ‖x‖ over non-sinks"],
    ];
    const logits = feature.logits
      ? [make("div", { class: "logits" }, logitList(sae, "Raises", feature.logits[0], "up"), logitList(sae, "Lowers", feature.logits[1], "down")),
         make("p", { class: "note", text: `Direct effect of one unit of activation on the logits: (d − mean d)∘γ @ W_U, γ the final LayerNorm's gain. The LayerNorm also divides by the standard deviation of the final residual stream${sae.logits.final_scale ? `, typically ${show(sae.logits.final_scale)}` : ""}: not done here.` })]
      : [make("p", { class: "note", text: "No effects on the logits: the model was not at hand." })];
    const legend = make("span", { class: "legend", "aria-hidden": "true" }, [0.1, 0.3, 0.5, 0.75, 1].map((shade) => make("i", { style: { "--a": shade } })));
    detail.replaceChildren(
      make("h3", { text: `Feature ${feature.id}` }),
      make("dl", { class: "facts" }, facts.map(([name, value, help]) => make("div", { title: help }, make("dt", { text: name }), make("dd", { text: value })))),
      make("h3", { text: sae.has_tokens ? "Strongest contexts" : "Strongest rows" }),
      sae.has_tokens
        ? make("ol", { class: "contexts" }, feature.contexts.map((context) => tokenRun(sae, context)))
        : make("p", { class: "note", text: `Rows ${feature.contexts.map(([, row]) => count(row)).join(", ")} of the store, which has no tokens.` }),
      make("p", { class: "note" }, "Shading: activation, ", legend, "up to the feature's largest; outlined: the context's strongest token. ↵ line break, ⇥ tab, ␣N: N blanks."),
      ...logits,
    );
    detail.scrollTop = 0;
  }

  const table = make("table", { "aria-label": "Features" }, make("thead", {}, make("tr", {},
    make("th", { scope: "col", text: "#" }), make("th", { scope: "col", class: "text", text: "token" }), make("th", { scope: "col", text: "density" }),
    make("th", { scope: "col", class: "wide", text: "mean act" }), make("th", { scope: "col", text: "on sinks" }))), body);
  place.append(
    about, make("div", { class: "controls" }, saes.field), map.figure,
    make("div", { class: "controls" }, make("label", { class: "field" }, make("span", { text: "Search" }), search), sorts.field),
    make("div", { class: "browser" }, make("div", { class: "list" }, make("div", { class: "scroll" }, table), make("div", { class: "pager" }, back, status, on)), detail),
  );
  open(0);
}
