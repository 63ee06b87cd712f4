/** What a cell shows, and what it is sorted by: [number, text] says both. */
const shown = (cell, kind) => (Array.isArray(cell) ? cell[1] : show(cell, kind));
const weight = (cell) => (Array.isArray(cell) ? cell[0] : cell);

/** A table whose columns sort by a press on their heading; undefined values come last either way. */
function sortableTable(label, columns, rows, kindClass) {
  let sorted = null;
  let falling = false;
  const body = make("tbody");
  const heads = columns.map((column, place) => {
    const arrow = make("span", { class: "arrow", "aria-hidden": "true" });
    const button = make("button", { type: "button", title: column.help, on: { click: () => sort(place) } }, column.label, arrow);
    return { th: make("th", { scope: "col", class: column.kind === "number" || column.kind === "percent" ? null : column.kind }, button), arrow };
  });
  const table = make("table", { "aria-label": label }, make("thead", {}, make("tr", {}, heads.map((head) => head.th))), body);

  function fill(order) {
    body.replaceChildren(
      ...order.map((row) =>
        make("tr", {}, columns.map((column, place) =>
          place === 0
            ? make("th", { scope: "row", text: shown(row[place], column.kind) })
            : make("td", { class: column.kind === "text" ? "text" : null, text: shown(row[place], column.kind) })))),
    );
  }
  function sort(place) {
    falling = sorted === place ? !falling : false;
    sorted = place;
    heads.forEach(({ th, arrow }, index) => {
      arrow.textContent = index === place ? (falling ? "▾" : "▴") : "";
      if (index === place) th.setAttribute("aria-sort", falling ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
    const missing = (value) => value === null || value === undefined || value === "–";
    const order = [...rows].sort((first, second) => {
      const [a, b] = [weight(first[place]), weight(second[place])];
      if (missing(a) || missing(b)) return Number(missing(a)) - Number(missing(b));
      const by = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
      return falling ? -by : by;
    });
    fill(order);
  }
  fill(rows);
  return make("div", { class: `scroll ${kindClass}`, tabindex: "0", role: "region", "aria-label": label }, table);
}

function addSaes() {
  if (!data.saes) return;
  const place = section("saes", "The SAEs", "SAEs");
  place.append(
    make("p", { class: "soft", text: "On held-out tokens; ns: non-sinks. A press on a heading sorts. Compare SAEs at equal L0 only: error always falls as L0 grows." }),
    sortableTable("SAEs and their metrics", data.saes.columns, data.saes.rows, "saes"),
  );
  const key = make("dl", { class: "key" });
  for (const column of data.saes.columns.slice(1)) {
    if (column.help.startsWith("option of")) continue;
    key.append(make("dt", { text: column.label }), make("dd", { text: column.help }));
  }
  place.append(make("details", {}, make("summary", { text: "What the columns mean" }), key));
}

function addComparisons() {
  if (!data.tables.length) return;
  const place = section("comparison", "Comparisons", "Comparison");
  for (const table of data.tables) {
    place.append(make("h3", { text: table.name }));
    if (table.sentences.length) place.append(...table.sentences.map((text) => make("p", { text })));
    for (const group of table.groups) {
      if (group.label) place.append(make("p", { class: "soft", text: group.label }));
      place.append(sortableTable(`Comparison ${table.name} ${group.label}`, group.columns, group.rows, "saes"));
    }
    if (table.predictions.length) {
      place.append(make("details", {}, make("summary", { text: "Predictions" }), make("ul", {}, table.predictions.map((text) => make("li", { text })))));
    }
  }
}
