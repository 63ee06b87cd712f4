const data = JSON.parse(document.getElementById("data").textContent);

/** An element; text always by textContent, so that no data becomes markup. */
function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "text") element.textContent = value;
    else if (key === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (key === "style") for (const [name, one] of Object.entries(value)) element.style.setProperty(name, one);
    else element.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) element.append(child);
  return element;
}

/** Three significant digits, without exponent or padding zeros; – where there is no value. */
function show(value, kind) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (kind === "percent") return value === 0 ? "0 %" : value > 0 && value < 1e-4 ? "<0.01 %" : `${show(value * 100)} %`;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4) return value > 0 ? "<0.0001" : ">−0.0001";
  if (Number.isInteger(value)) return value.toLocaleString("en-US").replace("-", "−");
  const digits = size >= 100 ? 0 : Math.max(0, 2 - Math.floor(Math.log10(size)));
  return Number(value.toFixed(Math.min(digits, 8))).toLocaleString("en-US", { maximumFractionDigits: 8 }).replace("-", "−");
}

const count = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en-US"));
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

/** Text with every `code` span of it set as code. */
function sentence(text) {
  return text.split(/(`[^`]+`)/).map((part) => (part.startsWith("`") ? make("code", { text: part.slice(1, -1) }) : part));
}

const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]/u;

/** A token as it can be read: line breaks, tabs and long blanks as signs, control characters by their number. */
function readable(text) {
  let shown = "";
  for (const character of text.replace(/ {4,}/g, (blank) => `␣${blank.length}`)) {
    if (character === "\n") shown += "↵";
    else if (character === "\t") shown += "⇥";
    else if (character === "\r") shown += "␍";
    else if (INVISIBLE.test(character)) shown += `⟨${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
    else shown += character;
  }
  return shown;
}

/** A labelled choice; `options` are [value, label]. Left out where there is nothing to choose. */
function choice(label, options, onChange) {
  const select = make("select", { on: { change: () => onChange(select.value) } });
  for (const [value, text] of options) select.append(make("option", { value, text }));
  const field = make("label", { class: "field" }, make("span", { text: label }), select);
  field.hidden = options.length < 2;
  return { field, select };
}

const numbered = (items, key) => items.map((item, place) => [String(place), item[key]]);

const nav = make("ul");
document.getElementById("nav").append(nav);

/** A section of the page with its entry in the navigation. */
function section(id, title, short) {
  const element = make("section", { id, "aria-labelledby": `${id}-title` }, make("h2", { id: `${id}-title`, text: title }));
  document.getElementById("main").append(element);
  nav.append(make("li", {}, make("a", { href: `#${id}`, text: short || title })));
  return element;
}
