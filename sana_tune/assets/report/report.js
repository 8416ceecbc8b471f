"use strict";
const report = (() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const hidden = new Map(); // chart id -> set of hidden labels

  function node(name, attributes = {}, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }
  function html(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }
  const colour = (one) => (one.ramp === undefined ? `var(--c${one.colour % 8})` : `var(--r${Math.round(one.ramp * 4)})`);

  /* ---- numbers ---- */
  function plain(value, digits = 4, least = 1e-3) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < least || size >= 1e7) return value.toExponential(Math.min(2, digits - 1)).replace(/\.?0+e/, "e").replace("e+", "e");
    return Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 8 });
  }
  function bytes(value, digits = 3) {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let place = 0;
    while (Math.abs(value) >= 1000 && place < 4) { value /= 1000; place += 1; }
    return `${Number(value.toPrecision(digits))} ${units[place]}`;
  }
  function seconds(value, digits = 3) {
    return Math.abs(value) < 1 && value !== 0 ? `${Number((value * 1000).toPrecision(digits))} ms` : `${Number(value.toPrecision(digits))} s`;
  }
  function told(value, format, digits) {
    if (format === "bytes") return bytes(value, digits);
    if (format === "seconds") return seconds(value, digits);
    if (format === "percent") return `${Number((100 * value).toPrecision(digits || 3))} %`;
    return plain(value, digits || 4, format === "small" ? 0.01 : 1e-3);
  }

  /* ---- axes ---- */
  function nice(low, high, wanted) {
    const rough = (high - low) / Math.max(1, wanted);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].find((each) => each * power >= rough * 0.999) * power;
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) found.push(n * step);
    return found;
  }
  function decades(low, high) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) found.push(10 ** power);
    const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
    return inside.length >= 2 ? inside.filter((_, n) => inside.length < 7 || n % 2 === 0) : [low, Math.sqrt(low * high), high].map((value) => Number(value.toPrecision(1)));
  }

  function draw(figure, spec) {
    const plot = figure.querySelector(".plot");
    const width = Math.max(240, plot.clientWidth);
    const height = figure.classList.contains("wide") ? (width < 560 ? 240 : 300) : 220;
    const off = hidden.get(spec.id) || new Set();
    const shown = spec.series.filter((one) => !off.has(one.label));
    const xs = spec.series.flatMap((one) => [one.x[0], one.x[one.x.length - 1]]).filter((value) => value !== null && value !== undefined);
    let [left, right] = spec.x === "σ" ? [0, 1] : [Math.min(...xs), Math.max(...xs)];
    if (spec.x !== "σ" && left === 1 && right > 20) left = 0;
    if (left === right) { left -= 1; right += 1; }
    let { low, high } = spec;
    if (!spec.log) { const gap = (high - low) * 0.05; if (low !== 0) low -= gap; high += gap; }
    const yTicks = spec.log ? decades(low, high) : nice(low, high, height < 230 ? 4 : 5);
    const labels = yTicks.map((value) => told(value, spec.format, 3));
    const margin = { left: 14 + 6.6 * Math.max(...labels.map((label) => label.length), 2), right: 14, top: 10, bottom: 26 };
    const x = (value) => margin.left + ((value - left) / (right - left)) * (width - margin.left - margin.right);
    const scale = spec.log ? Math.log : (value) => value;
    const bottom = height - margin.bottom;
    const y = (value) => bottom - ((scale(Math.max(value, spec.log ? 1e-300 : -Infinity)) - scale(low)) / (scale(high) - scale(low))) * (bottom - margin.top);

    const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    const clip = `clip-${spec.id}`;
    const defs = node("defs");
    const clipping = node("clipPath", { id: clip });
    clipping.append(node("rect", { x: margin.left, y: margin.top - 4, width: width - margin.left - margin.right + 4, height: bottom - margin.top + 8 }));
    defs.append(clipping);
    svg.append(defs);
    yTicks.forEach((value, n) => {
      svg.append(node("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y(value), y2: y(value) }));
      svg.append(node("text", { x: margin.left - 8, y: y(value) + 4, "text-anchor": "end" }, labels[n]));
    });
    const xTicks = nice(left, right, Math.max(2, Math.floor((width - margin.left) / 90)));
    svg.append(node("line", { class: "axis", x1: margin.left, x2: width - margin.right, y1: bottom, y2: bottom }));
    xTicks.forEach((value) => {
      const anchor = x(value) > width - 28 ? "end" : "middle";
      svg.append(node("text", { x: anchor === "end" ? width - margin.right : x(value), y: height - 8, "text-anchor": anchor }, plain(value, 6)));
    });
    svg.append(node("text", { x: margin.left - 8, y: height - 8, "text-anchor": "end" }, spec.x));
    if (spec.reference && spec.reference.y >= low && spec.reference.y <= high) {
      const at = y(spec.reference.y);
      svg.append(node("line", { class: "reference", x1: margin.left, x2: width - margin.right, y1: at, y2: at }));
      svg.append(node("text", { x: width - margin.right, y: at - 5, "text-anchor": "end" }, spec.reference.label));
    }
    const curves = node("g", { "clip-path": `url(#${clip})` });
    for (const one of shown) if (one.low) curves.append(band(one, x, y));
    const order = [...shown].sort((a, b) => (a.style === "raw" ? 0 : 1) - (b.style === "raw" ? 0 : 1));
    for (const one of order) {
      const raw = one.style === "raw";
      curves.append(node("path", {
        d: line(one, x, y), fill: "none", stroke: colour(one), "stroke-width": raw ? 1 : 2, "stroke-opacity": raw ? 0.3 : 1,
        "stroke-linejoin": "round", "stroke-linecap": "round", "stroke-dasharray": one.style === "dash" ? "5 5" : "none", class: "curve",
      }));
      if ((one.style === "points" && one.x.length <= 40) || one.x.length === 1) {
        one.x.forEach((at, n) => {
          if (one.y[n] !== null) curves.append(node("circle", { cx: x(at), cy: y(one.y[n]), r: 3, fill: colour(one), stroke: "var(--card)", "stroke-width": 1.5 }));
        });
      }
    }
    svg.append(curves);
    plot.querySelectorAll("svg, .tip").forEach((old) => old.remove());
    plot.style.minHeight = "0";
    plot.prepend(svg);
    plot.setAttribute("aria-label", summary(spec));
    plot.state = { spec, shown, x, y, svg, left, right, width, margin, bottom, low, high };
  }
  function line(one, x, y) {
    let path = "", pen = false;
    for (let n = 0; n < one.x.length; n += 1) {
      if (one.y[n] === null) { pen = false; continue; }
      path += `${pen ? "L" : "M"}${x(one.x[n]).toFixed(1)} ${Math.min(Math.max(y(one.y[n]), -500), 2000).toFixed(1)}`;
      pen = true;
    }
    return path || "M0 0";
  }
  function band(one, x, y) {
    const there = one.x.map((_, n) => n).filter((n) => one.low[n] !== null && one.high[n] !== null);
    const point = (n, side) => `${x(one.x[n]).toFixed(1)} ${y(side[n]).toFixed(1)}`;
    const d = there.length ? `M${there.map((n) => point(n, one.high)).join("L")}L${[...there].reverse().map((n) => point(n, one.low)).join("L")}Z` : "M0 0";
    return node("path", { d, fill: colour(one), "fill-opacity": 0.14 });
  }
  function summary(spec) {
    const parts = spec.series.filter((one) => one.style !== "raw").map((one) => {
      const there = one.y.filter((value) => value !== null);
      return there.length ? `${one.label}: from ${told(there[0], spec.format)} to ${told(there[there.length - 1], spec.format)}` : "";
    });
    const title = document.getElementById(`chart-${spec.id}`).querySelector("h3").textContent;
    return `${title}. ${parts.filter(Boolean).join("; ")}. The arrow keys read the values.`;
  }

  /* ---- reading values ---- */
  function nearest(values, wanted) {
    let low = 0, high = values.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (values[middle] < wanted) low = middle; else high = middle; }
    return wanted - values[low] <= values[high] - wanted ? low : high;
  }
  function point(plot, at, spoken) {
    const { spec, shown, x, y, svg, width, margin, bottom, left, right } = plot.state;
    svg.querySelector(".reading")?.remove();
    plot.querySelector(".tip")?.remove();
    if (at === null || !shown.length) return;
    const group = node("g", { class: "reading" });
    const tip = html("div", { class: "tip" });
    const lines = [];
    let place = null;
    const reach = (right - left) * 0.02;
    const found = [];
    for (const one of shown) {
      const n = nearest(one.x, at);
      if (one.y[n] === null || one.y[n] === undefined) continue;
      if (Math.abs(one.x[n] - at) > reach && Math.abs(one.x[n] - at) > (right - left) / Math.max(one.x.length, 1)) continue;
      found.push([one, n]);
      if (place === null || Math.abs(one.x[n] - at) < Math.abs(place - at)) place = one.x[n];
    }
    if (place === null) return;
    for (const [one, n] of found) {
      group.append(node("circle", { cx: x(one.x[n]), cy: Math.min(Math.max(y(one.y[n]), margin.top), bottom), r: 4, fill: colour(one), stroke: "var(--card)", "stroke-width": 2 }));
      const value = told(one.y[n], spec.format);
      const error = one.low && one.low[n] !== null ? ` ± ${plain((one.high[n] - one.low[n]) / 2, 2)}` : "";
      lines.push(`${one.label} ${value}${error}`);
      tip.append(html("span", {}, html("i", { class: `key ${one.style}`, style: `--k: ${colour(one)}` }), one.label, `${value}${error}`));
    }
    const head = spec.x === "σ" ? `σ ${plain(place)}` : `${spec.x} ${plain(place, 9)}`;
    tip.prepend(html("b", {}, head));
    group.prepend(node("line", { class: "cross", x1: x(place), x2: x(place), y1: margin.top, y2: bottom }));
    svg.append(group);
    plot.append(tip);
    tip.style.left = `${Math.max(0, x(place) + 14 + tip.offsetWidth > width ? x(place) - tip.offsetWidth - 14 : x(place) + 14)}px`;
    plot.at = place;
    if (spoken) document.getElementById("spoken").textContent = `${head}: ${lines.join(", ")}`;
  }
  function listen(plot) {
    plot.addEventListener("pointermove", (event) => {
      const { left, right, margin, width } = plot.state;
      const at = event.clientX - plot.getBoundingClientRect().left;
      point(plot, left + ((at - margin.left) / (width - margin.left - margin.right)) * (right - left));
    });
    plot.addEventListener("pointerleave", () => { if (document.activeElement !== plot) point(plot, null); });
    plot.addEventListener("blur", () => point(plot, null));
    plot.addEventListener("keydown", (event) => {
      const longest = [...plot.state.shown].sort((a, b) => b.x.length - a.x.length)[0];
      if (!longest) return;
      const last = longest.x.length - 1, far = Math.max(1, Math.round(last / 10));
      const now = plot.at === undefined ? null : nearest(longest.x, plot.at);
      const to = { ArrowRight: (n) => (n === null ? 0 : n + 1), ArrowLeft: (n) => (n === null ? last : n - 1), PageUp: (n) => (n ?? 0) + far, PageDown: (n) => (n ?? last) - far, Home: () => 0, End: () => last }[event.key];
      if (event.key === "Escape") { plot.at = undefined; point(plot, null); return; }
      if (!to) return;
      event.preventDefault();
      point(plot, longest.x[Math.min(last, Math.max(0, to(now)))], true);
    });
  }
  function legend(figure, spec) {
    if (spec.series.length < 2) return;
    const list = html("ul", { class: "legend" });
    for (const one of spec.series) {
      const button = html("button", { type: "button", "aria-pressed": "true" }, html("i", { class: `key ${one.style}`, style: `--k: ${colour(one)}` }), one.label);
      button.addEventListener("click", () => {
        const off = hidden.get(spec.id) || new Set();
        if (off.has(one.label)) off.delete(one.label); else off.add(one.label);
        hidden.set(spec.id, off);
        button.setAttribute("aria-pressed", String(!off.has(one.label)));
        draw(figure, spec);
      });
      list.append(html("li", {}, button));
    }
    figure.querySelector("figcaption").after(list);
  }
  function charts() {
    document.body.append(html("div", { id: "spoken", class: "quiet", "aria-live": "polite" }));
    const all = data.charts.map((spec) => [document.getElementById(`chart-${spec.id}`), spec]);
    for (const [figure, spec] of all) { legend(figure, spec); draw(figure, spec); listen(figure.querySelector(".plot")); }
    let width = document.documentElement.clientWidth, waiting = false;
    addEventListener("resize", () => {
      if (document.documentElement.clientWidth === width || waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; width = document.documentElement.clientWidth; all.forEach(([figure, spec]) => draw(figure, spec)); });
    });
  }
  function places() {
    const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
    if (!("IntersectionObserver" in window)) return;
    const seen = new Set();
    const watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) seen.add(entry.target.id); else seen.delete(entry.target.id);
      const first = [...links.keys()].find((id) => seen.has(id));
      if (!first) return;
      for (const [id, link] of links) if (id === first) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    }, { rootMargin: "-60px 0px -50% 0px" });
    for (const id of links.keys()) watcher.observe(document.getElementById(id));
  }

  /* ---- the timeline ---- */
  function pictures() {
    const place = document.getElementById("timeline");
    if (!place) return;
    const told = JSON.parse(document.getElementById("report-timeline").textContent);
    const slider = document.getElementById("step"), choice = document.getElementById("prompt"), now = document.getElementById("step-now");
    const back = document.getElementById("step-back"), on = document.getElementById("step-on");
    slider.max = told.steps.length - 1;
    slider.value = slider.max;
    if (told.rows.length > 6) choice.value = "0";
    function figure(picture, title, row) {
      const image = html("img", { src: picture.src, width: picture.w, height: picture.h, alt: `${title}: ${row.prompt || row.name}`, class: picture.w < 160 ? "tiny" : null });
      return html("figure", {}, html("a", { href: picture.href }, image), html("figcaption", {}, title));
    }
    function newest(steps, until, view) {
      const there = Object.keys(steps).map(Number).filter((step) => step > 0 && step <= until && steps[step][view]);
      return there.length ? Math.max(...there) : null;
    }
    function views(row, steps, until) {
      const small = Object.values(steps).some((each) => Object.values(each).some((picture) => picture.w < 160));
      const list = html("div", { class: small ? "views small" : "views" });
      if (steps[0] && steps[0].raw) list.append(figure(steps[0].raw, "base model", row));
      for (const [view, name] of [["raw", "weights"], ["ema", "EMA"]]) {
        const any = Object.entries(steps).some(([step, each]) => Number(step) > 0 && each[view]);
        if (!any) continue;
        const step = newest(steps, until, view);
        list.append(step === null ? html("div", { class: "none" }, until === 0 ? "not trained yet" : "none yet") : figure(steps[step][view], `${name}, step ${plain(step, 9)}`, row));
      }
      return list;
    }
    function show() {
      const at = told.steps[Number(slider.value)];
      now.textContent = plain(at, 9);
      slider.setAttribute("aria-valuetext", `step ${at}`);
      back.disabled = slider.value === slider.min;
      on.disabled = slider.value === slider.max;
      const rows = choice.value === "" ? told.rows : [told.rows[Number(choice.value)]];
      place.replaceChildren(...rows.map((row) => {
        const card = html("div", { class: "row card" }, html("h3", {}, `${row.name} `, html("span", { class: "soft" }, `${row.size}${row.index ? `, picture ${row.index + 1}` : ""}`)));
        if (row.prompt) card.append(html("p", { class: "prompt" }, row.prompt));
        row.pictures.forEach((steps, number) => {
          if (!Object.keys(steps).length) return;
          if (data.runs.length > 1) card.append(html("p", { class: "runname" }, html("i", { class: "runkey", style: `--k: var(--c${number % 8})` }), data.runs[number]));
          card.append(views(row, steps, at));
        });
        return card;
      }));
    }
    const move = (by) => { slider.value = Number(slider.value) + by; show(); };
    slider.addEventListener("input", show);
    choice.addEventListener("change", show);
    back.addEventListener("click", () => move(-1));
    on.addEventListener("click", () => move(1));
    show();
  }

  charts();
  places();
  return { pictures };
})();
