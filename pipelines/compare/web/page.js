// The page: which runs and figures the charts show, and what the legend and the tables do.

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const COLOURS = 8, DASHES = 5;
const look = (n) => `c${n % COLOURS} d${Math.floor(n / COLOURS) % DASHES}`;
const NONE_YET = "nothing measured yet";
const SPECS = [
  { id: "length", title: "Estimated acceptance length", from: "evaluated", way: true, first: 1 },
  { id: "acc", title: "Accuracy", note: "held-out", from: "evaluated", name: "acc", first: 0, percent: true },
  { id: "held-out-loss", title: "Held-out loss", note: "cross entropy", from: "evaluated", name: "loss", first: 0, loss: true },
  { id: "training-loss", title: "Training loss", note: "sum over steps k", from: "trained", name: "loss", loss: true },
  { id: "training-acc", title: "Training accuracy", note: "in the draft vocabulary", from: "trained", name: "acc_in_vocab_k", first: 0, percent: true },
  { id: "gradient", title: "Norm of the gradient", note: "", from: "trained", name: "gradient_norm", loss: true },
  { id: "rate", title: "Learning rate", note: "", from: "trained", name: "learning_rate" },
];

let group = 0, x = 1, range = null, hidden = new Set();
const runs = () => DATA.groups[group].runs;
const single = () => runs().length === 1;
const tag = (run, n) => run.ranked ? `${n + 1}` : `(${n + 1})`;
const way = () => document.querySelector("[name=way]:checked").value;
const lengthName = () => `length_${way()}_by_k`;
const steps = () => Math.max(0, ...runs().flatMap((r) => Object.entries(r.evaluated.y).concat(Object.entries(r.trained.y))
  .filter(([name]) => name !== "loss").map(([, y]) => y.length)));

// m neighbouring points as one: their mean, their extremes.
function smoothed(curve, m) {
  if (m === 1) return curve;
  const chunks = [];
  for (let i = 0; i < curve.x.length; i += m) chunks.push([i, Math.min(i + m, curve.x.length)]);
  const part = (values, [a, b]) => values.slice(a, b).filter(known);
  const mean = (values) => values.length ? values.reduce((p, q) => p + q, 0) / values.length : null;
  const bound = (f, values, c) => { const v = part(values, c); return v.length ? f(...v) : null; };
  return {
    ...curve,
    x: chunks.map((c) => mean(part(curve.x, c))),
    y: chunks.map((c) => mean(part(curve.y, c))),
    low: chunks.map((c) => bound(Math.min, curve.low || curve.y, c)),
    high: chunks.map((c) => bound(Math.max, curve.high || curve.y, c)),
  };
}

function curves(spec) {
  const name = spec.way ? lengthName() : spec.name;
  const byK = spec.first !== undefined;
  const k = spec.way ? +$("drafted").value - 1 : byK ? +$("step").value : 0;
  const found = [];
  const take = (run, k, rest) => {
    const { x: xs, y } = run[spec.from];
    const values = y[name] && y[name][k];
    if (!values || hidden.has(rest.key)) return;
    const star = spec.way && run.best ? [run.best.at[x], run.best[way()][k]] : null;
    const curve = { ...rest, x: xs[x], y: values[0], low: values[1] || null, high: values[2] || null, star };
    found.push(spec.from === "trained" ? smoothed(curve, 2 ** +$("smooth").value) : curve);
  };
  if (!single()) runs().forEach((run, n) => take(run, k, { key: `${n}`, label: run.name, about: run.about, tag: tag(run, n), look: look(n) }));
  else if (!byK) take(runs()[0], 0, { key: "whole", label: spec.title, about: "", tag: "", look: look(0) });
  else for (let j = 0; j < steps(); j++)
    take(runs()[0], j, { key: `${j}`, label: spec.way ? `${j + 1} drafted` : `step ${j}`, about: "", tag: `${j + spec.first}`, look: look(j) });
  return found;
}

function note(spec) {
  if (spec.way) return single() ? `by tokens drafted, temperature ${way() === "greedy" ? 0 : 1}` : `${$("drafted").value} drafted, temperature ${way() === "greedy" ? 0 : 1}`;
  if (spec.first === undefined) return spec.note;
  return `${single() ? "by step k" : `step k = ${$("step").value}`}, ${spec.note}`;
}

const charts = SPECS.map((spec) => new Chart($("charts"), spec.id, { near: showNear, zoom }));

function draw() {
  SPECS.forEach((spec, n) => {
    const found = curves(spec);
    const all = hidden.size && !found.length ? "no curve is chosen" : NONE_YET;
    charts[n].draw(found, { title: spec.title, note: note(spec), axis: x, range, percent: spec.percent,
      log: spec.loss && $("log").checked, empty: all, marked: single() ? "" : "1" });
  });
  $("reset").disabled = !range;
  if (!single()) for (const item of $("entries").children) {
    const best = runs()[+item.dataset.key].best, values = best && best[way()];
    item.querySelector(".value").textContent = values && known(values[+$("drafted").value - 1]) ? values[+$("drafted").value - 1].toFixed(3) : "-";
  }
}

function zoom(to) {
  range = to;
  draw();
}

function showNear(key) {
  for (const chart of charts) if (chart.plot) chart.near(key);
  for (const item of $("entries").children) item.classList.toggle("near", item.dataset.key === key);
  for (const row of document.querySelectorAll("tr[data-run]")) row.classList.toggle("near", !single() && row.dataset.run === `${group}-${key}`);
}

function entry(key, rank, name, about) {
  const item = add($("entries"), "li");
  item.dataset.key = key;
  item.dataset.text = `${name} ${about}`.toLowerCase();
  const label = add(item, "label");
  label.title = `${name}${about ? `: ${about}` : ""}`;
  const box = add(label, "input");
  box.type = "checkbox";
  box.checked = true;
  box.addEventListener("change", () => { hidden[box.checked ? "delete" : "add"](key); draw(); });
  add(label, "span", rank, "rank");
  make("path", { d: "M0 5H28" }, make("svg", { class: `key ${look(+key)}`, viewBox: "0 0 28 10", "aria-hidden": true }, label));
  const named = add(label, "span", "", "name");
  for (const [n, part] of name.split(",").entries()) {  // a grid's names: lines break behind a setting
    if (n) named.append(",", document.createElement("wbr"));
    named.append(part);
  }
  add(label, "span", "", "value");
  if (about) add(label, "span", about, "about");
  item.addEventListener("pointerenter", () => showNear(key));
  item.addEventListener("pointerleave", () => showNear(null));
  box.addEventListener("focus", () => showNear(key));
  box.addEventListener("blur", () => showNear(null));
}

function choose(select, values, value) {
  select.replaceChildren();
  for (const v of values) add(select, "option", v).value = v;
  select.value = value;
}

// Another store's runs: a new legend, everything visible.
function begin() {
  hidden = new Set();
  range = null;
  $("entries").replaceChildren();
  const K = steps(), each = [...Array(K).keys()];
  choose($("drafted"), each.map((k) => k + 1), DATA.groups[group].k);
  choose($("step"), each, 0);
  for (const id of ["drafted-choice", "step-choice"]) $(id).hidden = single() || K < 2;
  document.querySelector(".tools").hidden = single();
  if (!single()) runs().forEach((run, n) => entry(`${n}`, tag(run, n), run.name, run.about));
  else each.forEach((k) => entry(`${k}`, "", `step ${k}; drafts of ${k + 1}`, ""));
  $("entries").classList.toggle("many", runs().length > LABELLED);
  smoothAtFirst();
  search();
  draw();
}

// So smooth that about 100 points of a curve are left, or 50 where there are many curves.
function smoothAtFirst() {
  const longest = Math.max(...runs().map((run) => run.trained.x[0].length), 1);
  const wanted = longest / (runs().length > LABELLED ? 50 : 100);
  $("smooth").value = Math.max(0, Math.round(Math.log2(wanted)));
  saySmooth();
}

function saySmooth() {
  $("smooth").setAttribute("aria-valuetext", `${2 ** +$("smooth").value} points as one`);
}

function search() {
  const words = $("search").value.toLowerCase().split(/\s+/);
  for (const item of $("entries").children) item.hidden = !words.every((word) => item.dataset.text.includes(word));
}

// Of the entries that the search leaves.
function show(which) {
  let left = 5;
  for (const item of $("entries").children) {
    const on = which === "all" ? true : which === "none" ? false : !item.hidden && left-- > 0;
    if (item.hidden && which !== "best") continue;
    item.querySelector("input").checked = on;
    hidden[on ? "delete" : "add"](item.dataset.key);
  }
  draw();
}

function sort(button) {
  const cell = button.parentElement, table = cell.closest("table"), body = table.tBodies[0], column = cell.cellIndex;
  const down = cell.getAttribute("aria-sort") === "ascending";
  for (const other of cell.parentElement.children) other.setAttribute("aria-sort", "none");
  cell.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...body.rows].sort((a, b) => {
    const [p, q] = [value(a), value(b)];
    if (p === "" || q === "") return (p === "") - (q === "");  // what is not known comes last, either way
    const order = Number.isNaN(+p) || Number.isNaN(+q) ? p.localeCompare(q, "en", { numeric: true }) : p - q;
    return down ? -order : order;
  });
  body.append(...rows);
}

for (const radio of document.querySelectorAll("[name=x]"))
  radio.addEventListener("change", () => { x = +radio.value; range = null; draw(); });
for (const id of ["drafted", "step", "log"]) $(id).addEventListener("change", draw);
for (const radio of document.querySelectorAll("[name=way]")) radio.addEventListener("change", draw);
$("smooth").addEventListener("input", () => { saySmooth(); draw(); });
$("reset").addEventListener("click", () => zoom(null));
$("search").addEventListener("input", search);
for (const button of document.querySelectorAll("[data-show]")) button.addEventListener("click", () => show(button.dataset.show));
for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => sort(button));
for (const row of document.querySelectorAll("tr[data-run]")) {
  const [g, key] = row.dataset.run.split("-");
  row.addEventListener("pointerenter", () => { if (+g === group && !single()) showNear(key); });
  row.addEventListener("pointerleave", () => showNear(null));
}
$("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark"
    || (document.documentElement.style.colorScheme === "" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.style.colorScheme = dark ? "light" : "dark";
});
if (DATA.groups.length > 1) {
  $("group-choice").hidden = false;
  DATA.groups.forEach((one, n) => { add($("group"), "option", one.title).value = n; });
  $("group").addEventListener("change", () => { group = +$("group").value; begin(); });
}
let width = 0;
new ResizeObserver(() => {
  if ($("charts").clientWidth !== width) { width = $("charts").clientWidth; draw(); }
}).observe($("charts"));
begin();
