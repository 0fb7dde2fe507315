"use strict";
// Makes the page's tables sortable, filters it, and replaces the pictures of plots by plots. Without it the page can
// still be read. Texts are set as text, never as HTML.
(() => {
  const page = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // --- light and dark ---
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (page.dataset.theme ? page.dataset.theme === "dark" : system.matches);
  const themeButton = document.getElementById("theme");
  const showTheme = () => {
    themeButton.setAttribute("aria-pressed", String(isDark()));
    redraw();
  };
  themeButton.addEventListener("click", () => {
    page.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
  });
  system.addEventListener("change", showTheme);

  // --- sorting: numbers by value, what is none last in both directions ---
  const words = new Intl.Collator("en", { numeric: true });
  const number = (cell) => {
    const found = /^[[(]?([+-]?(?:[\d,]+(?:\.\d+)?(?:e[+-]?\d+)?|inf))(?![\w.])/i.exec(cell.textContent.trim());
    if (cell.classList.contains("none") || !found) return null;
    return /inf/i.test(found[1]) ? Infinity * (found[1][0] === "-" ? -1 : 1) : Number(found[1].replaceAll(",", ""));
  };

  function sort(table, column, direction) {
    const body = table.tBodies[0];
    const cells = [...body.rows].map((row) => [row, row.cells[column]]);
    const numeric = column > 0 && !table.tHead.rows[0].cells[column].classList.contains("words");
    const key = (cell) => {
      if (numeric) return number(cell);
      return cell.classList.contains("none") ? null : cell.textContent.trim();
    };
    const keyed = cells.map(([row, cell]) => [row, key(cell)]);
    keyed.sort(([, a], [, b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return direction * (numeric ? (a < b ? -1 : Number(a > b)) : words.compare(a, b));
    });
    body.append(...keyed.map(([row]) => row));
  }

  for (const table of all(".table table")) {
    all("thead th", table).forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = header.textContent;
      header.replaceChildren(button);
      header.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const next = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
        for (const other of all("thead th", table)) other.setAttribute("aria-sort", "none");
        header.setAttribute("aria-sort", next);
        sort(table, column, next === "ascending" ? 1 : -1);
      });
    });
  }

  // --- filter: which runs are shown, and with them all that they are behind ---
  const boxes = all("#filter [name=method]");
  const published = document.querySelector("#filter [name=published]");
  const wordField = document.getElementById("words");
  let shownRuns = new Set(data.runs.keys());
  let shownPublished = true;

  // runs: undefined for what belongs to none, empty for a method that was not run
  const isShown = (runs) => !runs || (runs.length ? runs.some((run) => shownRuns.has(run)) : shownPublished);

  function filter() {
    const labels = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const wanted = wordField.value.toLowerCase().split(/\s+/).filter(Boolean);
    const passes = ({ label, text }) => labels.has(label) && wanted.every((word) => text.includes(word));
    shownRuns = new Set([...data.runs.keys()].filter((run) => passes(data.runs[run])));
    shownPublished = !published || (published.checked && !wanted.length);
    for (const element of all("[data-runs]")) {
      element.hidden = !isShown(element.dataset.runs.split(" ").filter(Boolean).map(Number));
    }
    for (const block of all(".table")) {
      const rows = all("tbody tr", block);
      block.hidden = rows.length > 0 && rows.every((row) => row.hidden);
    }
    document.getElementById("shown").textContent = `${shownRuns.size} of ${data.runs.length} runs shown`;
    redraw();
  }

  let waiting = 0;
  const filterSoon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  };
  for (const box of [...boxes, ...(published ? [published] : [])]) box.addEventListener("change", filterSoon);
  wordField.addEventListener("input", filterSoon);
  document.getElementById("filter").addEventListener("submit", (event) => event.preventDefault());
  for (const [name, checked] of [["all", true], ["none", false]]) {
    document.getElementById(name).addEventListener("click", () => {
      for (const box of boxes) box.checked = checked;
      if (checked) wordField.value = "";
      filter();
    });
  }

  // --- search of settings by name or value ---
  function addSearch(section) {
    const label = document.createElement("label");
    label.textContent = "Search settings by name or value ";
    const field = document.createElement("input");
    field.type = "search";
    field.id = "setting";
    label.append(field);
    const count = document.createElement("p");
    count.setAttribute("role", "status");
    count.className = "muted";
    section.querySelector("h2").after(label, count);
    field.addEventListener("input", () => {
      const wanted = field.value.trim().toLowerCase();
      let found = 0;
      for (const details of all("details.values", section)) {
        const rows = all("tbody tr", details);
        for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
        const matching = rows.filter((row) => !row.hidden).length;
        found += matching;
        if (wanted) details.open = matching > 0;
      }
      count.textContent = wanted ? `${found} settings found` : "";
    });
  }
  const configuration = document.getElementById("configuration");
  if (configuration.querySelector("details.values")) addSearch(configuration);

  // --- plots: drawn when they come into view ---
  const visible = new Set();
  const stale = new Set(all("figure.plot"));
  let library = null;

  async function loadLibrary() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text(); // the page's policy lets this one in by its digest
    document.head.append(script);
    if (!window.Plotly) throw new Error("plotly.js did not start");
  }

  async function draw(figure) {
    stale.delete(figure);
    try {
      library ??= loadLibrary();
      await library;
      figure.classList.add("drawn");
      for (const place of all("[data-chart]", figure)) {
        const chart = data.charts[Number(place.dataset.chart)];
        const [traces, layout] = KINDS[chart.kind](chart);
        await Plotly.react(place, traces, { ...common(), ...layout }, CONFIG);
      }
    } catch (error) {
      figure.classList.remove("drawn"); // its picture is shown again
      console.error(error);
    }
  }

  function redraw() {
    for (const figure of all("figure.plot")) stale.add(figure);
    for (const figure of visible) draw(figure);
  }

  // --- kinds of charts ---
  const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const css = (name) => getComputedStyle(page).getPropertyValue(name).trim();
  // plotly reads tags and formulas in its texts: a name must have none
  const plain = (text) => text.replace(/[&<>$]/g, (c) => `&#${c.charCodeAt(0)};`);
  const axis = (title, more = {}) => ({
    title: { text: title, font: { size: 12 } }, gridcolor: css("--line"), linecolor: css("--strong-line"),
    zeroline: false, automargin: true, ticks: "outside", tickcolor: css("--line"), ...more,
  });
  const common = () => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    font: { family: "system-ui, sans-serif", size: 12, color: css("--text") },
    margin: { l: 50, r: 12, t: 28, b: 42 },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--strong-line"), font: { color: css("--text") }, namelength: -1 },
    modebar: { color: css("--muted"), activecolor: css("--accent"), bgcolor: "rgba(0,0,0,0)" },
  });
  // powers of ten where there are several, otherwise what plotly chooses
  const logAxis = (values) => {
    const decades = Math.log10(values.reduce((a, b) => Math.max(a, b), 0) / values.reduce((a, b) => Math.min(a, b), Infinity));
    return { type: "log", exponentformat: "power", ...(decades > 1.5 ? { dtick: Math.ceil(decades / 8) } : {}) };
  };
  const translucent = (colour) => `${colour}33`;

  function curves(chart) {
    const traces = [];
    const many = chart.curves.length > 24;
    for (const curve of chart.curves.filter(({ runs }) => isShown(runs ?? undefined))) {
      const style = data.styles[curve.label];
      const colour = isDark() ? style.dark : style.light;
      if (curve.lower) {
        const edge = { x: curve.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", connectgaps: false };
        traces.push({ ...edge, y: curve.lower }, { ...edge, y: curve.upper, fill: "tonexty", fillcolor: translucent(colour) });
      }
      traces.push({
        x: curve.x, y: curve.y, name: plain(curve.name), mode: "lines+markers",
        line: { color: colour, width: many ? 1 : 1.8, dash: style.dash }, opacity: many ? 0.75 : 1,
        marker: {
          symbol: style.symbol, color: css("--card"), line: { color: colour, width: 1.4 },
          size: many ? 5 : 7, maxdisplayed: many ? 3 : 9,
        },
        hovertemplate: "%{fullData.name}<br>%{xaxis.title.text}: %{x}<br>%{yaxis.title.text}: %{y:.5~g}<extra></extra>",
      });
    }
    const shown = chart.curves.flatMap(({ y, lower, upper }) => [...y, ...(lower ?? []), ...(upper ?? [])]).filter((v) => v !== null);
    const vertical = chart.log ? logAxis(shown) : {};
    return [traces, { xaxis: axis(chart.x), yaxis: axis(chart.y, vertical) }];
  }

  function intervals(chart) {
    const gaps = (ends, sign) => chart.middle.map((m, i) => (m === null || ends[i] === null ? 0 : sign * (ends[i] - m)));
    const trace = {
      x: chart.middle, y: chart.names.map((_, i) => i), text: chart.names.map(plain), mode: "markers", type: "scatter",
      marker: { color: css("--text"), size: 9 },
      error_x: {
        type: "data", symmetric: false, array: gaps(chart.upper, 1), arrayminus: gaps(chart.lower, -1),
        color: css("--strong-line"), thickness: 2, width: 5,
      },
      hovertemplate: "%{text}<br>%{x:.3~g}<extra></extra>",
    };
    const names = { showgrid: true, tickvals: trace.y, ticktext: trace.text, autorange: "reversed" };
    return [[trace], { xaxis: axis(chart.x, { ...logAxis([...chart.lower, ...chart.upper].filter((v) => v !== null)), tickangle: 0 }), yaxis: axis("", names) }];
  }

  function matrix(chart) {
    const size = chart.names.length;
    const empty = () => Array.from({ length: size }, () => Array(size).fill(null));
    const [wrong, right, text] = [empty(), empty(), empty()];
    const name = (i) => plain(chart.names[i]);
    for (const [i, j, count] of chart.cells) {
      const share = (100 * count) / chart.totals[i];
      (i === j ? right : wrong)[i][j] = i === j ? share : Math.sqrt(share);
      text[i][j] = `true: ${name(i)}<br>predicted: ${name(j)}<br>${count} images, ${share.toFixed(1)} % of the class`;
    }
    const common = { type: "heatmap", text, hoverinfo: "text", hovertemplate: "%{text}<extra></extra>", xgap: 0, ygap: 0 };
    const bar = (title, y) => ({
      title: { text: title, side: "right", font: { size: 11 } }, len: 0.48, y, thickness: 12, outlinewidth: 0, tickfont: { size: 10 },
    });
    const highest = Math.max(1, ...wrong.flat().filter((value) => value !== null));
    const ticks = [1, 2, 5, 10, 20, 50, 100].filter((share) => Math.sqrt(share) <= highest);
    const traces = [
      {
        ...common, z: wrong, zmin: 0, zmax: highest, colorscale: "YlOrRd", reversescale: !isDark(),
        colorbar: { ...bar("% taken for another", 0.76), tickvals: ticks.map(Math.sqrt), ticktext: ticks.map(String) },
      },
      {
        ...common, z: right, zmin: 0, zmax: 100, colorscale: isDark() ? [[0, "#333a44"], [1, "#c9d1d9"]] : [[0, "#e6e6e6"], [1, "#4d4d4d"]],
        colorbar: bar("% right", 0.24),
      },
    ];
    const named = size <= 40;
    const places = chart.names.map((_, i) => i);
    const marks = named ? { tickvals: places, ticktext: places.map(name), tickfont: { size: 10 } } : { showticklabels: false, ticks: "" };
    const square = { showgrid: false, constrain: "domain" };
    return [traces, {
      xaxis: axis("predicted class", { ...marks, ...square, tickangle: -90 }),
      yaxis: axis("true class", { ...marks, ...square, autorange: "reversed", scaleanchor: "x" }),
    }];
  }

  const KINDS = { curves, intervals, matrix };

  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) visible.add(target);
      else visible.delete(target);
      if (isIntersecting && stale.has(target)) draw(target);
    }
  }, { rootMargin: "200px" });
  for (const figure of stale) watcher.observe(figure);
  showTheme();
  page.classList.add("js");
})();
