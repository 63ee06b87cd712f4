const summary = section("summary", "Summary");
summary.append(data.summary.length
  ? make("ul", {}, data.summary.map((text) => make("li", {}, sentence(text))))
  : make("p", { text: "Nothing was measured yet." }));
if (data.missing.length) {
  summary.append(make("div", { class: "missing" }, make("p", { class: "soft", text: "Not on this page:" }), make("ul", {}, data.missing.map((text) => make("li", {}, sentence(text))))));
}
addNorms();
addHistograms();
addTraining();
addPareto();
addSaes();
addComparisons();
addFeatures();

document.getElementById("lead").textContent = [
  data.norms.length ? `norms of ${plural(data.norms.length, "store")}` : null, data.saes ? plural(data.saes.rows.length, "SAE") : null,
  data.features.length ? `${plural(data.features.length, "SAE")} in the feature browser` : null,
].filter(Boolean).join(" · ");
document.getElementById("footer").append(make("p", { text: `Made by nsae ${data.version}. Everything is in this file; nothing is fetched. Plots: plotly.js (MIT licence).` }));
redraw();

const links = [...nav.querySelectorAll("a")];
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links) {
      if (link.hash === `#${entry.target.id}`) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }
}, { rootMargin: "-10% 0px -80% 0px" });
document.querySelectorAll("main > section").forEach((element) => watcher.observe(element));
