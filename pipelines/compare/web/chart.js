"use strict";
// One chart: curves over x, drawn as SVG; it knows nothing of runs.
// A curve: {key, label, about, tag, look, x: [], y: [], low: [] or null, high: [] or null, star: [x, y] or null}.

const HEIGHT = 250, TOP = 10, BOTTOM = 36, LEFT = 54;
const LABELLED = 12;  // curves that bear their tag at the end
const BANDED = 4;     // curves that show their extremes
const LISTED = 8;     // curves whose values are all shown at the cursor
const DOTTED = 60;    // points of a curve that are marked

const known = (v) => v !== null && v !== undefined;

function make(name, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function add(parent, name, text, className) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  parent.append(node);
  return node;
}

// Numbers as people read them.
function number(v, digits = 4, least = 1) {
  if (!known(v)) return "-";
  if (v === 0) return "0";
  const size = Math.abs(v);
  if (size < 1e-3 || size >= 1e6) return v.toExponential(Math.max(digits - 2, 0)).replace(/\.?0+e/, "e").replace("e+", "e");
  return v.toLocaleString("en", { maximumSignificantDigits: digits, minimumSignificantDigits: least });
}

function count(v) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(v) >= size) return `${+(v / size).toPrecision(4)}${unit}`;
  return `${+v.toPrecision(4)}`;
}

function duration(s) {
  if (s < 120) return `${+s.toPrecision(3)} s`;
  const two = (v) => String(v).padStart(2, "0");
  if (s < 7200) return `${Math.floor(s / 60)} min${s % 60 >= 1 ? ` ${two(Math.floor(s % 60))} s` : ""}`;
  if (s < 172800) return `${Math.floor(s / 3600)} h${s % 3600 >= 60 ? ` ${two(Math.floor((s % 3600) / 60))} min` : ""}`;
  return `${Math.floor(s / 86400)} d${s % 86400 >= 3600 ? ` ${two(Math.floor((s % 86400) / 3600))} h` : ""}`;
}

const AXES = [
  { name: "steps", show: (v) => Math.round(v).toLocaleString("en") },
  { name: "tokens", show: count },
  { name: "time", show: duration, units: [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400] },
];

function ticks([low, high], wanted, units) {
  const rough = (high - low) / wanted;
  let step = units && units.find((unit) => unit >= rough);
  if (!step) {
    const power = 10 ** Math.floor(Math.log10(rough));
    step = power * [1, 2, 2.5, 5, 10].find((m) => m * power >= rough * 0.999);
  }
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(+(n * step).toPrecision(12));
  return found;
}

function logTicks([low, high]) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const m of [1, 2, 5]) if (m * 10 ** power >= low && m * 10 ** power <= high) found.push(+(m * 10 ** power).toPrecision(3));
  return found.length > 1 ? found : ticks([low, high], 4);
}

class Chart {
  // `events`: near(key or null, where it comes from), zoom([low, high] or null).
  constructor(parent, id, events) {
    this.id = id;
    this.events = events;
    this.figure = add(parent, "figure");
    this.figure.id = id;
    this.caption = add(this.figure, "figcaption");
    this.svg = make("svg", { tabindex: 0, role: "group", "aria-roledescription": "chart" }, this.figure);
    this.tip = add(this.figure, "div", "", "tip");
    this.tip.setAttribute("role", "status");
    this.tip.hidden = true;
    this.listen();
  }

  // `view`: {title, note, axis: index of AXES, range: [low, high] or null, log, percent}.
  draw(curves, view) {
    this.curves = curves;
    this.view = view;
    this.at = null;
    this.tip.hidden = true;
    this.caption.replaceChildren(view.title, " ");
    add(this.caption, "small", view.note);
    this.svg.replaceChildren();
    this.svg.setAttribute("aria-label", `${view.title} against ${AXES[view.axis].name}, ${curves.length} curves`);
    this.width = Math.max(this.figure.clientWidth, 240);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.svg.setAttribute("height", HEIGHT);
    this.svg.setAttribute("class", curves.length > LABELLED ? "many" : "");
    this.right = this.width - (curves.length <= LABELLED ? 34 : 14);
    const banded = curves.length <= BANDED;
    if (!this.scale(banded)) {
      make("text", { x: this.width / 2, y: HEIGHT / 2, "text-anchor": "middle", class: "none" }, this.svg, view.empty);
      return;
    }
    this.axes();
    const clip = make("clipPath", { id: `${this.id}-clip` }, make("defs", {}, this.svg));
    make("rect", { x: LEFT, y: TOP - 4, width: this.right - LEFT + 4, height: HEIGHT - BOTTOM - TOP + 8 }, clip);
    this.plot = make("g", { "clip-path": `url(#${this.id}-clip)` }, this.svg);
    for (const curve of [...curves].reverse()) this.curve(curve, banded);  // the first on top
    if (curves.length <= LABELLED) this.tags();
    this.cursor = make("path", { class: "cursor", visibility: "hidden" }, this.svg);
    this.point = make("circle", { class: "point", r: 4.5, visibility: "hidden" }, this.svg);
    this.drag = make("rect", { class: "drag", y: TOP, height: HEIGHT - TOP - BOTTOM, visibility: "hidden" }, this.svg);
  }

  // Sets px and py, from values to pixels; false if there is nothing to show.
  scale(banded) {
    const { range, log } = this.view;
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    const take = (v) => { if (known(v) && (!log || v > 0)) { y0 = Math.min(y0, v); y1 = Math.max(y1, v); } };
    for (const c of this.curves) {
      c.x.forEach((x, i) => {
        if (!known(x) || !known(c.y[i]) || (range && (x < range[0] || x > range[1]))) return;
        x0 = Math.min(x0, x); x1 = Math.max(x1, x);
        take(c.y[i]);
        if (banded && c.low) { take(c.low[i]); take(c.high[i]); }
      });
    }
    if (y0 > y1) return false;
    if (range) [x0, x1] = range;
    else x0 = Math.min(x0, 0);
    if (x0 === x1) { x0 -= 0.5 * Math.abs(x0) || 0.5; x1 += 0.5 * Math.abs(x1) || 0.5; }
    const f = log ? Math.log : (v) => v;
    if (y0 === y1) { const pad = 0.1 * Math.abs(y0) || 0.1; y0 -= pad; y1 += pad; }
    else if (log) { const pad = (y1 / y0) ** 0.04; y0 /= pad; y1 *= pad; }
    else { const pad = 0.05 * (y1 - y0); y1 += pad; y0 = y0 >= 0 && y0 < pad * 4 ? 0 : y0 - pad; }
    this.domain = { x: [x0, x1], y: [y0, y1] };
    this.px = (x) => LEFT + ((x - x0) / (x1 - x0)) * (this.right - LEFT);
    this.py = (y) => TOP + ((f(y1) - f(y)) / (f(y1) - f(y0))) * (HEIGHT - TOP - BOTTOM);
    this.value = (px) => x0 + ((px - LEFT) / (this.right - LEFT)) * (x1 - x0);
    return true;
  }

  axes() {
    const { x, y } = this.domain, axis = AXES[this.view.axis], floor = HEIGHT - BOTTOM;
    for (const v of this.view.log ? logTicks(y) : ticks(y, 6)) {
      make("path", { class: "grid", d: `M${LEFT} ${this.py(v)}H${this.right}` }, this.svg);
      make("text", { x: LEFT - 6, y: this.py(v) + 4, "text-anchor": "end" }, this.svg, this.show(v, 3));
    }
    for (const v of ticks(x, Math.max(2, Math.floor((this.right - LEFT) / (axis.units ? 105 : 80))), axis.units)) {
      make("path", { class: "grid", d: `M${this.px(v)} ${floor}v4` }, this.svg);
      make("text", { x: this.px(v), y: floor + 16, "text-anchor": "middle" }, this.svg, axis.show(v));
    }
    make("path", { class: "grid", d: `M${LEFT} ${floor}H${this.right}` }, this.svg);
    make("text", { x: (LEFT + this.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, this.svg, axis.name);
  }

  // With all of its digits if `whole`.
  show(v, digits, whole = false) {
    const least = whole ? digits : 1;
    return this.view.percent && known(v) ? `${number(100 * v, digits, least)}%` : number(v, digits, least);
  }

  curve(c, banded) {
    const marked = c.tag === this.view.marked;
    const group = make("g", { class: `${c.look}${marked ? " marked" : ""}`, "data-key": c.key }, this.plot);
    const pixel = (x, y) => `${this.px(x).toFixed(1)} ${this.py(y).toFixed(1)}`;
    const shown = (i) => known(c.x[i]) && known(c.y[i]) && (!this.view.log || c.y[i] > 0);
    if (banded && c.low) {
      const inside = c.x.map((_, i) => i).filter((i) => shown(i) && (!this.view.log || c.low[i] > 0));
      const edge = [...inside.map((i) => pixel(c.x[i], c.high[i])), ...inside.reverse().map((i) => pixel(c.x[i], c.low[i]))];
      if (edge.length) make("path", { class: "band", d: `M${edge.join("L")}Z` }, group);
    }
    let d = "";
    c.x.forEach((x, i) => { if (shown(i)) d += `${i && shown(i - 1) ? "L" : "M"}${pixel(x, c.y[i])}`; });
    make("path", { class: "curve", d }, group);
    if (c.x.length <= DOTTED && this.curves.length <= LABELLED)
      c.x.forEach((x, i) => { if (shown(i)) make("circle", { class: "dot", cx: this.px(x), cy: this.py(c.y[i]), r: 2.2 }, group); });
    if (c.star) this.star(c.star, group, marked ? 9 : 6);
  }

  star([x, y], group, size) {
    if (!known(x) || !known(y)) return;
    const points = [...Array(10).keys()].map((i) => {
      const r = i % 2 ? size * 0.45 : size, angle = (i * Math.PI) / 5;
      return `${this.px(x) + r * Math.sin(angle)},${this.py(y) - r * Math.cos(angle)}`;
    });
    make("polygon", { class: "star", points: points.join(" ") }, group);
  }

  // The curves' tags beside their ends, moved apart.
  tags() {
    const ends = this.curves.map((c) => {
      const seen = c.x.map((_, i) => i).filter((i) => known(c.y[i]) && known(c.x[i]) && c.x[i] <= this.domain.x[1]);
      const i = seen[seen.length - 1];
      return i === undefined || c.x[i] < this.domain.x[0] ? null : { c, x: this.px(c.x[i]), y: this.py(c.y[i]) };
    }).filter((end) => end && Number.isFinite(end.y)).sort((a, b) => a.y - b.y);
    const floor = HEIGHT - BOTTOM;
    ends.forEach((end, i) => { end.y = Math.max(end.y, i ? ends[i - 1].y + 12 : TOP + 4); });
    ends.reverse().forEach((end, i) => { end.y = Math.min(end.y, i ? ends[i - 1].y - 12 : floor); });
    for (const end of ends)
      make("text", { class: `end ${end.c.look}`, x: end.x + 6, y: end.y + 4, "data-key": end.c.key }, this.svg, end.c.tag);
  }

  // Shows the curve `key` before all others; null: all alike.
  near(key) {
    this.svg.classList.toggle("dim", key !== null && this.curves.some((c) => c.key === key));
    for (const node of this.svg.querySelectorAll("[data-key]")) node.classList.toggle("near", node.dataset.key === key);
  }

  listen() {
    const svg = this.svg;
    const place = (event) => {
      const box = svg.getBoundingClientRect();
      return [((event.clientX - box.left) * this.width) / box.width, ((event.clientY - box.top) * HEIGHT) / box.height];
    };
    svg.addEventListener("pointermove", (event) => {
      if (!this.plot) return;
      const [x, y] = place(event);
      if (this.from !== undefined) return this.stretch(x);
      this.move(this.nearest(x, y));
    });
    svg.addEventListener("pointerleave", () => { if (this.from === undefined) this.move(null); });
    svg.addEventListener("blur", () => this.move(null));
    svg.addEventListener("pointerdown", (event) => {
      if (!this.plot || event.button || event.pointerType === "touch") return;
      this.from = place(event)[0];
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointerup", (event) => {
      if (this.from === undefined) return;
      const ends = [this.from, place(event)[0]].sort((a, b) => a - b);
      this.from = undefined;
      this.drag.setAttribute("visibility", "hidden");
      if (ends[1] - ends[0] > 8) this.events.zoom(ends.map((x) => this.value(Math.min(Math.max(x, LEFT), this.right))));
    });
    svg.addEventListener("pointercancel", () => { this.from = undefined; });
    svg.addEventListener("dblclick", () => this.events.zoom(null));
    svg.addEventListener("keydown", (event) => {
      if (!this.plot || event.ctrlKey || event.metaKey || event.altKey || !this.key(event.key)) return;
      event.preventDefault();
    });
  }

  stretch(x) {
    const [a, b] = [this.from, x].sort((p, q) => p - q);
    for (const [name, value] of [["x", a], ["width", b - a], ["visibility", "visible"]]) this.drag.setAttribute(name, value);
  }

  // What a key does; false if nothing.
  key(key) {
    const at = this.at;
    const points = (c) => this.points(this.curves[c]);
    const go = (c, i) => this.move({ c, i });
    if (key === "0") this.events.zoom(null);
    else if (key === "+" || key === "=" || key === "-") this.magnify(key === "-" ? 2 : 0.5);
    else if (key === "Escape") this.move(null);
    else if (!key.startsWith("Arrow") && key !== "Home" && key !== "End") return false;
    else if (!at) {
      const c = this.curves.findIndex((_, n) => points(n).length);
      if (c >= 0) go(c, points(c).at(-1));
    } else if (key === "ArrowUp" || key === "ArrowDown") {
      const others = this.curves.map((_, c) => ({ c, i: this.closest(c, this.curves[at.c].x[at.i]) })).filter((p) => p.i !== null);
      others.sort((a, b) => this.curves[b.c].y[b.i] - this.curves[a.c].y[a.i]);
      const next = others[others.findIndex((p) => p.c === at.c) + (key === "ArrowUp" ? -1 : 1)];
      if (next) this.move(next);
    } else {
      const here = points(at.c), n = here.indexOf(at.i);
      go(at.c, here[{ ArrowLeft: Math.max(n - 1, 0), ArrowRight: Math.min(n + 1, here.length - 1), Home: 0, End: here.length - 1 }[key]]);
    }
    return true;
  }

  magnify(factor) {
    const [x0, x1] = this.domain.x;
    const middle = this.at ? this.curves[this.at.c].x[this.at.i] : (x0 + x1) / 2;
    this.events.zoom([middle - (middle - x0) * factor, middle + (x1 - middle) * factor]);
  }

  // The indices of a curve's points in sight.
  points(c) {
    const [x0, x1] = this.domain.x;
    return c.x.map((_, i) => i).filter((i) => known(c.x[i]) && known(c.y[i]) && c.x[i] >= x0 && c.x[i] <= x1);
  }

  closest(c, x) {
    let best = null;
    for (const i of this.points(this.curves[c]))
      if (best === null || Math.abs(this.curves[c].x[i] - x) < Math.abs(this.curves[c].x[best] - x)) best = i;
    return best;
  }

  // Whether a curve has values about x.
  reaches(c, x) {
    const xs = this.points(this.curves[c]).map((i) => this.curves[c].x[i]), slack = 0.02 * (this.domain.x[1] - this.domain.x[0]);
    return xs.length > 0 && x >= xs[0] - slack && x <= xs.at(-1) + slack;
  }

  nearest(px, py) {
    let found = null, least = Infinity;
    this.curves.forEach((curve, c) => {
      for (const i of this.points(curve)) {
        const far = Math.hypot(this.px(curve.x[i]) - px, this.py(curve.y[i]) - py);
        if (far < least) { least = far; found = { c, i }; }
      }
    });
    return found;
  }

  // Puts the cursor on a point {c: curve, i: index}, or nowhere.
  move(at) {
    if (!this.plot || (!at && !this.at)) return;
    this.at = at;
    for (const node of [this.cursor, this.point]) node.setAttribute("visibility", at ? "visible" : "hidden");
    this.tip.hidden = !at;
    this.events.near(at ? this.curves[at.c].key : null);
    if (!at) return;
    const curve = this.curves[at.c], [x, y] = [this.px(curve.x[at.i]), this.py(curve.y[at.i])];
    this.cursor.setAttribute("d", `M${x} ${TOP}V${HEIGHT - BOTTOM}`);
    this.point.setAttribute("cx", x);
    this.point.setAttribute("cy", y);
    this.tell(at, curve);
    const beyond = x > this.width / 2;
    const scale = this.figure.clientWidth / this.width;
    this.tip.style.left = beyond ? "auto" : `${(x + 14) * scale}px`;
    this.tip.style.right = beyond ? `${(this.width - x + 14) * scale}px` : "auto";
    this.tip.style.top = `${this.caption.offsetHeight + Math.max(0, Math.min(y, HEIGHT - 120))}px`;
  }

  tell({ c, i }, curve) {
    const x = curve.x[i], axis = AXES[this.view.axis];
    this.tip.replaceChildren();
    add(this.tip, "div", `${axis.name === "time" ? "after" : axis.name} ${axis.show(x)}`);
    if (this.curves.length > LISTED || this.curves.length === 1) {
      add(this.tip, "div", curve.label);
      add(this.tip, "b", this.show(curve.y[i], 4, true));
      if (curve.about && this.curves.length > 1) add(this.tip, "div", curve.about);
    } else {
      const body = add(this.tip, "table");
      const rows = this.curves.map((_, n) => ({ n, i: n === c ? i : this.closest(n, x) })).filter((r) => r.i !== null && this.reaches(r.n, x));
      rows.sort((a, b) => this.curves[b.n].y[b.i] - this.curves[a.n].y[a.i]);
      for (const r of rows) {
        const line = add(body, "tr", undefined, r.n === c ? "near" : "");
        add(line, "td", this.curves[r.n].tag);
        add(line, "td", this.curves[r.n].label);
        add(line, "td", this.show(this.curves[r.n].y[r.i], 4, true), "number");
      }
    }
    if (curve.low && curve.low[i] !== curve.high[i]) add(this.tip, "div", `from ${this.show(curve.low[i], 4)} to ${this.show(curve.high[i], 4)}`);
  }
}
