// Draws the charts of a page, and lets the reader zoom, choose runs and filter clients. Text from a run enters the page
// only through textContent; the page's policy forbids every request.
"use strict";
(() => {
  const COLOURS = ["#4c78a8", "#e45756", "#54a24b", "#f58518", "#b279a2", "#72b7b2", "#9d755d", "#ff9da6", "#bab0ac", "#d4a72c"];
  const WIDTH = 640, HEIGHT = 340, LEFT = 58, RIGHT = 22, TOP = 32, BOTTOM = 46;
  const MAX_LINES = 12;
  let clips = 0;

  const make = (tag, attributes = {}, text) => {
    const isSvg = ["svg", "g", "path", "line", "text", "rect", "circle", "clipPath", "defs"].includes(tag);
    const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const short = (value) => {
    if (value === null) return "nan";
    if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
    return Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  const ticks = (low, high) => {
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw) || raw;
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
    return found;
  };
  const bounds = (values) => {
    let low = Infinity, high = -Infinity;
    for (const value of values) if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
    if (low > high) return [0, 1];
    const margin = low === high ? Math.abs(low) * 0.1 || 1 : 0;
    return [low - margin, high + margin];
  };

  // A chart of lines [{name, x: [...], y: [... or null]}]: drag to zoom, wheel to zoom at the mouse, double click for all.
  function chart(place, lines, xLabel, yLabel) {
    place.replaceChildren();
    place.classList.add("drawn");
    const hidden = new Set(), colour = (index) => COLOURS[index] || `hsl(${(index * 137.5) % 360} 60% 50%)`;
    const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${yLabel} by ${xLabel}`, tabindex: "0" });
    const told = make("div", { class: "told" }, "Drag to zoom, double click to see all.");
    const legend = make("div", { class: "legend" });
    place.append(svg, told, legend);
    const clip = `clip${clips++}`;
    let view = null;

    const shown = () => lines.map((line, index) => ({ ...line, index })).filter((line) => !hidden.has(line.index));
    const whole = () => {
      const [y0, y1] = bounds(shown().flatMap((line) => line.y)), margin = (y1 - y0) * 0.04;
      const [x0, x1] = bounds(shown().flatMap((line) => line.x));
      return { x0, x1, y0: y0 - margin, y1: y1 + margin };
    };
    const toX = (value) => LEFT + ((value - view.x0) / (view.x1 - view.x0)) * (WIDTH - LEFT - RIGHT);
    const toY = (value) => TOP + ((view.y1 - value) / (view.y1 - view.y0)) * (HEIGHT - TOP - BOTTOM);
    const fromX = (at) => view.x0 + ((at - LEFT) / (WIDTH - LEFT - RIGHT)) * (view.x1 - view.x0);
    const fromY = (at) => view.y1 - ((at - TOP) / (HEIGHT - TOP - BOTTOM)) * (view.y1 - view.y0);

    function draw() {
      svg.replaceChildren();
      const defs = make("defs"), box = make("clipPath", { id: clip });
      box.append(make("rect", { x: LEFT, y: TOP - 2, width: WIDTH - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM + 4 }));
      defs.append(box);
      svg.append(defs);
      for (const at of ticks(view.y0, view.y1)) {
        svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: toY(at), y2: toY(at), class: "grid" }));
        svg.append(make("text", { x: LEFT - 6, y: toY(at) + 4, "text-anchor": "end" }, short(at)));
      }
      for (const at of ticks(view.x0, view.x1)) {
        svg.append(make("text", { x: toX(at), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, short(at)));
      }
      svg.append(make("text", { x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end" }, xLabel));
      svg.append(make("text", { x: 4, y: 16 }, yLabel));
      const group = make("g", { "clip-path": `url(#${clip})` });
      for (const line of shown()) {
        let path = "", isOpen = false;
        line.x.forEach((x, at) => {
          if (line.y[at] === null) { isOpen = false; return; }
          path += `${isOpen ? "L" : "M"}${toX(x).toFixed(1)} ${toY(line.y[at]).toFixed(1)}`;
          isOpen = true;
        });
        group.append(make("path", { d: path, stroke: colour(line.index), class: "line" }));
        if (line.x.length < 3) line.x.forEach((x, at) => {
          if (line.y[at] !== null) group.append(make("circle", { cx: toX(x), cy: toY(line.y[at]), r: 3, fill: colour(line.index) }));
        });
      }
      svg.append(group);
    }
    const all = () => { view = whole(); draw(); };

    lines.forEach((line, index) => {
      const entry = make("button", { type: "button", title: "show or hide" });
      entry.append(make("i", { style: `background:${colour(index)}` }), make("span", {}, line.name));
      entry.addEventListener("click", () => {
        hidden.has(index) ? hidden.delete(index) : hidden.add(index);
        entry.classList.toggle("off", hidden.has(index));
        draw();
      });
      if (lines.length > 1) legend.append(entry);
    });

    const where = (event) => {
      const box = svg.getBoundingClientRect();
      const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
      return [clamp(((event.clientX - box.left) / box.width) * WIDTH, LEFT, WIDTH - RIGHT), clamp(((event.clientY - box.top) / box.height) * HEIGHT, TOP, HEIGHT - BOTTOM)];
    };
    let start = null, frame = null;
    svg.addEventListener("pointerdown", (event) => {
      start = where(event);
      svg.setPointerCapture(event.pointerId);
      frame = make("rect", { class: "frame" });
      svg.append(frame);
    });
    svg.addEventListener("pointermove", (event) => {
      const [x, y] = where(event);
      if (start) {
        frame.setAttribute("x", Math.min(x, start[0]));
        frame.setAttribute("y", Math.min(y, start[1]));
        frame.setAttribute("width", Math.abs(x - start[0]));
        frame.setAttribute("height", Math.abs(y - start[1]));
        return;
      }
      const at = fromX(x), values = [];
      let nearest = null;
      for (const line of shown()) for (const one of line.x) if (nearest === null || Math.abs(one - at) < Math.abs(nearest - at)) nearest = one;
      if (nearest === null) return;
      for (const line of shown()) {
        const index = line.x.indexOf(nearest);
        if (index >= 0) values.push(`${line.name} ${short(line.y[index])}`);
      }
      told.textContent = `${xLabel} ${short(nearest)}: ${values.slice(0, 8).join(", ")}${values.length > 8 ? ", ..." : ""}`;
      svg.querySelector(".cursor")?.remove();
      svg.append(make("line", { x1: toX(nearest), x2: toX(nearest), y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor" }));
    });
    svg.addEventListener("pointerup", (event) => {
      const [x, y] = where(event), [x0, y0] = start || [x, y];
      start = null;
      frame?.remove();
      if (Math.abs(x - x0) < 6 && Math.abs(y - y0) < 6) return;
      const isFlat = Math.abs(y - y0) < 6, isThin = Math.abs(x - x0) < 6;
      view = {
        x0: isThin ? view.x0 : fromX(Math.min(x, x0)), x1: isThin ? view.x1 : fromX(Math.max(x, x0)),
        y0: isFlat ? view.y0 : fromY(Math.max(y, y0)), y1: isFlat ? view.y1 : fromY(Math.min(y, y0)),
      };
      draw();
    });
    svg.addEventListener("dblclick", all);
    svg.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.shiftKey) return; // the page scrolls
      event.preventDefault();
      const factor = (event.deltaY || event.deltaX) < 0 ? 0.8 : 1.25, [x, y] = where(event), cx = fromX(x), cy = fromY(y);
      view = { x0: cx + (view.x0 - cx) * factor, x1: cx + (view.x1 - cx) * factor, y0: cy + (view.y0 - cy) * factor, y1: cy + (view.y1 - cy) * factor };
      draw();
    }, { passive: false });
    svg.addEventListener("keydown", (event) => { if (event.key === "Escape") all(); });
    all();
  }

  const choice = (label, names) => {
    const box = make("label", {}, `${label} `), select = make("select");
    names.forEach((name) => select.append(make("option", { value: name }, name)));
    box.append(select);
    return [box, select];
  };

  // Clients whose name has one of the words, split at commas; a word in quotation marks, or a number, is the whole name.
  const matching = (names, text) => {
    const words = text.split(",").map((word) => word.trim()).filter(Boolean);
    if (!words.length) return names;
    const fits = (name, word) => (/^".*"$|^\d+$/.test(word) ? name === word.replace(/^"|"$/g, "") : name.toLowerCase().includes(word.toLowerCase()));
    return names.filter((name) => words.some((word) => fits(name, word)));
  };

  // Chosen clients as lines, and in a table of their last rounds.
  function clients(place, data) {
    const { columns, rows } = data, [round, client] = [columns.indexOf("round"), columns.indexOf("client")];
    const measured = columns.filter((name, at) => at !== round && at !== client && rows.some((row) => typeof row[at] === "number"));
    const byClient = new Map();
    for (const row of rows) {
      const name = String(row[client]);
      if (!byClient.has(name)) byClient.set(name, []);
      byClient.get(name).push(row);
    }
    measured.sort((one, other) => (other === "loss") - (one === "loss"));
    const filter = make("input", { type: "search", placeholder: "3, 5, north", "aria-label": "clients" });
    const label = make("label", {}, "clients ");
    label.append(filter);
    const [whatBox, what] = choice("show", measured), [orderBox, order] = choice("first", ["highest", "lowest", "by name"]);
    const note = make("p"), drawing = make("div", { class: "chart" }), table = make("table"), wide = make("div", { class: "wide" });
    const controls = make("div", { class: "controls" });
    controls.append(label, whatBox, orderBox);
    wide.append(table);
    place.replaceChildren(controls, note, drawing, wide);
    function update() {
      const at = columns.indexOf(what.value), last = (name) => byClient.get(name)[byClient.get(name).length - 1];
      const names = matching([...byClient.keys()], filter.value);
      const number = (name) => (typeof last(name)[at] === "number" ? last(name)[at] : -Infinity);
      if (order.value === "by name") names.sort((one, other) => one.localeCompare(other, undefined, { numeric: true }));
      else names.sort((one, other) => (order.value === "highest" ? number(other) - number(one) : number(one) - number(other)));
      const chosen = names.slice(0, MAX_LINES);
      note.textContent = `${names.length} of ${byClient.size} clients${names.length > chosen.length ? `, the first ${chosen.length} shown` : ""}.`;
      chart(drawing, chosen.map((name) => ({ name, x: byClient.get(name).map((row) => row[round] + 1), y: byClient.get(name).map((row) => row[at] ?? null) })), "round", what.value);
      const head = make("tr");
      columns.forEach((name) => head.append(make("th", { class: name === "client" ? "" : "number" }, name.replace(/^num_/, ""))));
      table.replaceChildren(head, ...chosen.map((name) => {
        const line = make("tr");
        last(name).forEach((value, column) => line.append(make("td", { class: column === client ? "" : "number" },
          column === round ? String(value + 1) : typeof value === "number" ? short(value) : value === null ? "-" : String(value))));
        return line;
      }));
    }
    filter.addEventListener("input", update);
    what.addEventListener("change", update);
    order.addEventListener("change", update);
    update();
  }

  // Chosen runs side by side: a metric of all of them, and the settings in which they differ.
  function runs(place, data) {
    const boxes = [...document.querySelectorAll("input[data-run]")];
    const metrics = [...new Set(data.flatMap((run) => Object.keys(run.metrics)))];
    if (!metrics.length) return;
    const [metricBox, metric] = choice("metric", metrics), [axisBox, axis] = choice("by", ["round", "seconds", "local steps"]);
    metric.value = place.dataset.metric;
    const controls = make("div", { class: "controls" }), drawing = make("div", { class: "chart" });
    const wide = make("div", { class: "wide" }), table = make("table");
    controls.append(metricBox, axisBox);
    wide.append(table);
    place.replaceChildren(controls, drawing, wide);
    function update() {
      const chosen = data.filter((run, at) => boxes[at].checked);
      const lines = chosen.filter((run) => metric.value in run.metrics).map((run) => {
        const { at, y } = run.metrics[metric.value], x = at.map((place) => run.x[axis.value][place]);
        return { name: run.name, x: x.filter((one) => one !== null), y: y.filter((one, place) => x[place] !== null) };
      });
      chart(drawing, lines, axis.value, metric.value);
      const names = [...new Set(chosen.flatMap((run) => Object.keys(run.settings)))];
      const differing = names.filter((name) => new Set(chosen.map((run) => run.settings[name])).size > 1);
      const head = make("tr");
      ["setting", ...chosen.map((run) => run.name)].forEach((name) => head.append(make("th", {}, name)));
      if (!differing.length) return table.replaceChildren(make("caption", {}, chosen.length > 1 ? "All settings are the same." : ""));
      table.replaceChildren(head, ...differing.map((name) => {
        const line = make("tr");
        [name, ...chosen.map((run) => run.settings[name] ?? "-")].forEach((value) => line.append(make("td", {}, value)));
        return line;
      }));
    }
    boxes.forEach((box) => box.addEventListener("change", update));
    metric.addEventListener("change", update);
    axis.addEventListener("change", update);
    update();
  }

  const parts = { clients, runs, curves: (place, lines) => chart(place, lines, place.dataset.x, place.dataset.y) };
  for (const place of document.querySelectorAll("[data-part]")) parts[place.dataset.part](place, JSON.parse(place.dataset.content));
})();
