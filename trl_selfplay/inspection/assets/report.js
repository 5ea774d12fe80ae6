// Draws the charts and filters the samples of a report. What models wrote is set by textContent alone.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const SVG = "http://www.w3.org/2000/svg";
  const COLORS = 9;
  const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
  const POINTS = ["circle", "rect", "triangle", "rectRot", "star"];

  // Places in the list of colours of what became of completions: green is kept, red and orange are wrong.
  const OUTCOMES = {
    "kept": 2, "kept, with hint": 7, "wrong": 6, "cut by length": 1, "not graded": 5, "quotes the hint": 3,
    "too long to train on": 4, "duplicate": 0, "over the cap per prompt": 8, "equal to its partner": 0, "empty": 5,
    "without a wrong partner": 4, "malformed call": 3, "out of calls": 4,
  };

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faded = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

  // Vertical lines with a name where something happened.
  const marks = {
    id: "marks",
    afterDatasetsDraw(chart, _, options) {
      const { ctx, chartArea: area, scales } = chart;
      ctx.save();
      ctx.strokeStyle = faded(options.color, 0.55);
      ctx.fillStyle = options.color;
      ctx.font = "12px system-ui, sans-serif";
      ctx.setLineDash([3, 3]);
      let free = area.left; // where the last name ends
      for (const [place, text] of options.marks) { // and what it means in full, in the tooltip
        const x = scales.x.getPixelForValue(place);
        ctx.beginPath();
        ctx.moveTo(x, area.top);
        ctx.lineTo(x, area.bottom);
        ctx.stroke();
        const width = ctx.measureText(text).width;
        const left = Math.min(x + 4, area.right - width);
        if (left >= free) {
          ctx.fillText(text, left, area.top - 9);
          free = left + width + 8;
        }
      }
      ctx.restore();
    },
  };

  function datasetsOf(spec) {
    const found = [];
    let place = 0;
    for (const series of spec.series) {
      if (series.is_reference) {
        found.push({
          label: series.name, data: series.values, borderColor: color("--soft"), borderWidth: 1.5,
          borderDash: found.some((d) => d.isReference) ? [2, 4] : [8, 4], pointStyle: "line", pointRadius: 0, pointHitRadius: 0, isReference: true,
        });
        continue;
      }
      const own = color(`--c${OUTCOMES[series.name] ?? place % COLORS}`);
      const few = spec.labels.length <= 40;
      const shown = {
        label: series.name, data: series.values, borderColor: own, backgroundColor: own, spanGaps: true,
        borderWidth: spec.kind === "bars" ? 0 : 2, borderDash: spec.kind === "bars" ? [] : DASHES[place % DASHES.length],
        pointStyle: POINTS[place % POINTS.length], pointRadius: few ? 4 : 0, pointHoverRadius: 6,
        lows: series.lows, highs: series.highs, clip: false,
        order: spec.kind === "bars" ? 0 : -place, // lines with wider dashes on top of those that they cover
      };
      found.push(shown);
      if (series.lows.some((low) => low !== null)) {
        const band = { borderWidth: 0, pointRadius: 0, pointHitRadius: 0, spanGaps: true, isBand: true, backgroundColor: faded(own, 0.13) };
        found.push({ ...band, label: series.name, data: series.lows, fill: false });
        found.push({ ...band, label: series.name, data: series.highs, fill: "-1" });
      }
      place += 1;
    }
    return found;
  }

  function draw(canvas) {
    const spec = data.charts[Number(canvas.dataset.chart)];
    const soft = color("--soft");
    const grid = { color: faded(color("--line"), 0.6) };
    const isBars = spec.kind === "bars";
    const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
    const exact = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
    const chart = new Chart(canvas, {
      type: isBars ? "bar" : "line",
      data: { labels: spec.labels, datasets: datasetsOf(spec) },
      plugins: [marks],
      options: {
        animation: false, responsive: true, maintainAspectRatio: false,
        interaction: { mode: "index", intersect: false },
        layout: { padding: { top: spec.marks.length ? 24 : 6 } },
        scales: {
          x: { stacked: isBars, grid, title: { display: true, text: spec.axis, color: soft }, ticks: { color: soft, maxRotation: 0, autoSkipPadding: 12 }, offset: isBars || spec.labels.length < 2 },
          y: { stacked: isBars, grid, min: spec.bounds[0] ?? undefined, max: spec.bounds[1] ?? undefined, ticks: { color: soft, callback: (value) => short.format(value) } },
        },
        plugins: {
          marks: { marks: spec.marks, color: spec.axis === "step" ? soft : color("--bad") },
          legend: { display: false },
          tooltip: {
            filter: (item) => !item.dataset.isBand,
            callbacks: {
              title: (items) => (items.length ? `${spec.axis} ${items[0].label}` : ""),
              footer: (items) => spec.marks.filter(([place, , full]) => full && place === items[0]?.dataIndex).map(([, , full]) => full),
              label: (item) => {
                const { lows, highs, label } = item.dataset;
                const low = lows?.[item.dataIndex];
                const ends = low === null || low === undefined ? "" : ` [${exact.format(low)}, ${exact.format(highs[item.dataIndex])}]`;
                return `${label}: ${exact.format(item.parsed.y)}${ends}`;
              },
            },
          },
        },
      },
    });
    showLegend(chart, isBars);
    return chart;
  }

  // A stroke with its dashes and its point, or the colour of bars.
  function symbol(dataset, isBars) {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 36 14");
    svg.setAttribute("aria-hidden", "true");
    const add = (tag, attributes) => {
      const shape = document.createElementNS(SVG, tag);
      Object.entries(attributes).forEach(([name, value]) => shape.setAttribute(name, value));
      svg.append(shape);
    };
    const own = dataset.isReference ? dataset.borderColor : dataset.backgroundColor;
    if (isBars) {
      add("rect", { x: 11, y: 1, width: 14, height: 12, fill: own });
      return svg;
    }
    add("line", { x1: 0, y1: 7, x2: 36, y2: 7, stroke: own, "stroke-width": 2, "stroke-dasharray": dataset.borderDash.join(" ") || "none" });
    const shapes = {
      circle: ["circle", { cx: 18, cy: 7, r: 4 }],
      rect: ["rect", { x: 14, y: 3, width: 8, height: 8 }],
      triangle: ["path", { d: "M18 2 L23 11 L13 11 Z" }],
      rectRot: ["path", { d: "M18 2 L23 7 L18 12 L13 7 Z" }],
      star: ["path", { d: "M18 2 V12 M13 7 H23 M14.5 3.5 L21.5 10.5 M21.5 3.5 L14.5 10.5", stroke: own, "stroke-width": 1.5 }],
    };
    if (dataset.pointRadius && shapes[dataset.pointStyle]) {
      const [tag, attributes] = shapes[dataset.pointStyle];
      add(tag, { fill: own, ...attributes });
    }
    return svg;
  }

  // The legend is made of buttons, each of which shows or hides what it names.
  function showLegend(chart, isBars) {
    const legend = document.createElement("ul");
    legend.className = "legend";
    chart.data.datasets.forEach((dataset) => {
      if (dataset.isBand) return;
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      const name = document.createElement("span");
      name.textContent = dataset.label;
      button.append(symbol(dataset, isBars), name);
      button.addEventListener("click", () => {
        const show = button.getAttribute("aria-pressed") === "false";
        button.setAttribute("aria-pressed", String(show));
        chart.data.datasets.forEach((each, place) => { if (each.label === dataset.label) chart.setDatasetVisibility(place, show); });
        chart.update();
      });
      const item = document.createElement("li");
      item.append(button);
      legend.append(item);
    });
    const plot = chart.canvas.parentElement;
    plot.parentElement.querySelector(".legend")?.remove();
    plot.after(legend);
  }

  const canvases = [...document.querySelectorAll("canvas[data-chart]")];
  let charts = [];
  const drawAll = () => {
    charts.forEach((chart) => chart.destroy());
    charts = canvases.map(draw);
  };
  drawAll();
  dark.addEventListener("change", drawAll);

  // --- samples ---
  const form = document.getElementById("filters");
  if (!form) return;
  const PAGE = 20;
  const WRONG = new Set(["wrong", "cut by length", "not graded", "quotes the hint"]);
  const UNFINISHED = "not selected yet";
  const list = document.getElementById("list");
  const more = document.getElementById("more");
  const same = document.getElementById("same");
  let found = [];
  let shown = 0;

  const make = (tag, text = "", className = "") => {
    const element = document.createElement(tag);
    element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const nameOf = (round) => (round < 0 ? "untrained" : `round ${round}`);
  const isHeldOut = (sample) => sample.outcome.startsWith("held-out");
  const options = (select, values, name) => {
    const all = make("option", "all");
    all.value = "";
    select.replaceChildren(all, ...values.map((value) => {
      const option = make("option", name(value));
      option.value = String(value);
      return option;
    }));
  };
  const rounds = [...new Set(data.samples.map((s) => s.round))].sort((a, b) => a - b);
  options(form.elements.round, rounds, nameOf);
  options(form.elements.outcome, [...new Set(data.samples.map((s) => s.outcome))], (name) => name);

  function texts(sample) {
    const parts = [];
    const prompt = make("details");
    const asked = data.texts[sample.text].trimEnd();
    const end = asked.slice(-70).split("\n").at(-1);
    const summary = make("summary");
    const start = make("span", `${end.length < asked.length ? "…" : ""}${end}`, "end");
    start.dir = "auto";
    summary.append("Prompt ", start);
    prompt.append(summary, make("pre", data.texts[sample.text]));
    parts.push(prompt);
    if (sample.steps) {
      for (const [writer, name, text] of sample.steps) {
        const step = make("div", "", `step ${writer}`);
        step.append(make("b", name), make("pre", text || "(empty)"));
        parts.push(step);
      }
      if (sample.written) {
        const written = make("details");
        const tokens = make("pre");
        tokens.append(...sample.written.map(([isOwn, text]) => make(isOwn ? "span" : "s", text)));
        written.append(make("summary", "As tokens: what is struck through is never trained on"), tokens);
        parts.push(written);
      }
    } else {
      parts.push(make("pre", sample.completion || "(empty)"));
    }
    for (const pre of [prompt, ...parts].flatMap((part) => (part.tagName === "PRE" ? [part] : [...part.querySelectorAll("pre")]))) {
      pre.dir = "auto";
      pre.tabIndex = 0;
    }
    return parts;
  }

  function article(sample, withButton) {
    const box = make("article");
    const head = make("h3");
    const kind = sample.outcome === "kept" ? "kept" : WRONG.has(sample.outcome) ? "dropped" : "other";
    head.append(make("span", nameOf(sample.round)), make("span", sample.outcome, `tag ${kind}`));
    if (sample.hinted) head.append(make("span", "with hint", "tag other"));
    head.append(make("span", sample.reward === null ? "no reward" : `reward ${sample.reward}`));
    const scores = sample.scores.map(([name, score]) => `${name} ${score ?? "–"}`);
    const own = sample.steps && `${sample.own_tokens} of them the policy's`;
    const facts = [...scores, sample.cause && `not graded: ${sample.cause}`, `${sample.tokens} tokens`, own, sample.end];
    box.append(head, make("p", facts.filter(Boolean).join(" · "), "scores"), ...texts(sample));
    const solution = data.solutions[sample.prompt];
    if (solution) box.append(make("p", `Solution: ${solution}`, "scores"));
    const alike = withButton ? data.samples.filter((each) => each.prompt === sample.prompt) : [];
    if (alike.length > 1) {
      const count = new Set(alike.map((each) => each.round)).size;
      const button = make("button", count > 1 ? `This prompt in ${count} rounds` : "All samples of this prompt", "small");
      button.type = "button";
      button.addEventListener("click", () => showSame(sample.prompt));
      box.append(button);
    }
    return box;
  }

  function showSame(prompt) {
    const samples = data.samples.filter((sample) => sample.prompt === prompt);
    const rounds = [...new Set(samples.map((sample) => sample.round))].sort((a, b) => a - b);
    const columns = make("div", "", "columns");
    columns.tabIndex = 0;
    columns.setAttribute("role", "group");
    columns.setAttribute("aria-label", "One column per round");
    for (const round of rounds) {
      const column = make("section");
      column.append(make("h4", nameOf(round)), ...samples.filter((s) => s.round === round).map((s) => article(s, false)));
      columns.append(column);
    }
    const close = make("button", "Close");
    close.type = "button";
    close.addEventListener("click", () => { same.hidden = true; list.focus(); });
    const heading = make("h3", `Prompt ${data.prompts[prompt].slice(0, 8)}, ${rounds.length === 1 ? "one round" : `${rounds.length} rounds`}`);
    heading.tabIndex = -1;
    same.replaceChildren(heading, make("p", `trl-selfplay samples DIR --prompt ${data.prompts[prompt].slice(0, 8)} shows all of its samples.`, "note"), columns, close);
    same.hidden = false;
    same.scrollIntoView({ block: "start" });
    heading.focus();
  }

  function showMore() {
    list.append(...found.slice(shown, shown + PAGE).map((sample) => article(sample, true)));
    shown = Math.min(shown + PAGE, found.length);
    more.hidden = shown >= found.length;
    document.getElementById("count").textContent = `${found.length} of ${data.samples.length} samples, ${shown} shown`;
  }

  function filter() {
    const { round, outcome, hinted, least, most, text } = form.elements;
    const needle = text.value.toLowerCase();
    found = data.samples.filter((s) =>
      (round.value === "" || s.round === Number(round.value)) &&
      (outcome.value === "" || s.outcome === outcome.value) &&
      (hinted.value === "" || s.hinted === (hinted.value === "yes")) &&
      (least.value === "" || (s.reward !== null && s.reward >= Number(least.value))) &&
      (most.value === "" || (s.reward !== null && s.reward <= Number(most.value))) &&
      (needle === "" || [s.completion, ...(s.steps ?? []).flat()].some((each) => each.toLowerCase().includes(needle)) || data.texts[s.text].toLowerCase().includes(needle)));
    list.replaceChildren();
    shown = 0;
    showMore();
  }
  list.tabIndex = -1;
  more.addEventListener("click", showMore);
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  const selected = data.samples.filter((s) => s.outcome !== UNFINISHED && !isHeldOut(s)).map((s) => s.round);
  form.elements.round.value = String(Math.max(...(selected.length ? selected : rounds))); // the newest
  filter();
})();
