"use strict";
// Makes tables sortable, filters the page and draws its charts. Texts are set as text, never as HTML.
(() => {
  const page = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // --- light and dark: as the system has it, or as the button was left ---
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const show = (theme) => {
    page.dataset.theme = theme;
    button.setAttribute("aria-pressed", theme === "dark");
  };
  const follow = () => show(system.matches ? "dark" : "light");
  follow();
  try { show(sessionStorage.getItem("theme") ?? page.dataset.theme); } catch { /* no storage: the choice ends with the page */ }
  system.addEventListener("change", follow);
  button.addEventListener("click", () => {
    show(page.dataset.theme === "dark" ? "light" : "dark");
    try { sessionStorage.setItem("theme", page.dataset.theme); } catch { /* as above */ }
  });

  // --- sorting: numbers by value, cells without one last in both directions ---
  const collator = new Intl.Collator("en", { numeric: true });
  const number = (text) => {
    const found = /^[[(]?([+-]?(?:[\d,]+(?:\.\d+)?(?:e[+-]?\d+)?|inf))(?![\w.])/i.exec(text);
    return found && Number(found[1].replaceAll(",", "").replace(/inf/i, "Infinity"));
  };

  function sort(header, headers) {
    const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    headers.forEach((other) => other.setAttribute("aria-sort", "none"));
    header.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    const numeric = header.cellIndex > 0 && !header.classList.contains("words");
    const key = (cell) => (cell.classList.contains("none") ? null : numeric ? number(cell.textContent.trim()) : cell.textContent);
    const body = header.closest("table").tBodies[0];
    const keyed = [...body.rows].map((row) => [key(row.cells[header.cellIndex]), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return direction * (numeric ? (a > b) - (a < b) : collator.compare(a, b));
    });
    body.append(...keyed.map(([, row]) => row));
  }

  for (const table of all(".table table")) {
    const headers = all("thead th", table);
    for (const header of headers) {
      const press = Object.assign(document.createElement("button"), { type: "button", textContent: header.textContent });
      press.addEventListener("click", () => sort(header, headers));
      header.replaceChildren(press);
      header.setAttribute("aria-sort", "none");
    }
  }

  // --- filter: a row, a gallery or a curve is shown if each word stands in it or in a heading above it ---
  const field = document.getElementById("words");
  const rows = all("main tbody tr");
  let words = [];
  let items = null; // made at the first word: a page may have many rows
  const has = (text) => words.every((word) => text.toLowerCase().includes(word));
  const headings = (element) => {
    const found = [];
    for (let at = element.parentElement; at && at.tagName !== "MAIN"; at = at.parentElement) {
      found.push(at.querySelector(":scope > summary, :scope > caption, :scope > h2, :scope > h3")?.textContent ?? "");
    }
    return found.join(" ");
  };
  const content = (element) => { // of a row each cell with the head of its column: "Seed 1"
    const heads = element.closest("table")?.tHead.rows[0].cells;
    return heads ? [...element.cells].map((cell, i) => `${heads[i].textContent} ${cell.textContent}`).join(" ") : element.textContent;
  };

  function filter() {
    words = [...field.value.toLowerCase().matchAll(/"([^"]+)"?|[^\s"]+/g)].map(([word, quoted]) => quoted ?? word);
    items ??= [...rows, ...all(".gallery")].map((element) => ({ element, text: `${content(element)} ${headings(element)}` }));
    for (const { element, text } of items) element.hidden = !has(text);
    for (const block of all("main .table, main details:not(.notes), main .part")) {
      const inner = all("tbody tr, .gallery", block);
      const shown = inner.filter((element) => !element.hidden).length;
      block.hidden = words.length > 0 && !shown;
      const some = words.length > 0 && shown > 0 && shown < inner.length && block.tagName === "DETAILS";
      if (some && !block.open) block.open = block.openedHere = true;
      if (!some && block.openedHere) block.open = block.openedHere = false;
    }
    const shown = rows.filter((row) => !row.hidden).length;
    document.getElementById("shown").textContent = words.length ? `${shown} of ${rows.length} table rows shown` : "";
    for (const plot of all(".plot")) { // the watcher then says of each whether it is in view
      plot.parentElement.hidden = false;
      watcher.unobserve(plot);
      watcher.observe(plot);
    }
  }

  let waiting = 0;
  field.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 150);
  });

  // --- charts: drawn when they come into view, again when the filter has changed ---
  const CONFIG = { responsive: true, displaylogo: false, showSendToCloud: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  let library = null;

  async function unpacked(element) {
    const packed = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  async function loadLibrary() { // the page's policy allows it by its digest
    const textContent = await unpacked(document.getElementById("plotly"));
    document.head.append(Object.assign(document.createElement("script"), { textContent }));
  }

  async function draw(plot) {
    plot.drawnFor = words;
    try {
      await (library ??= loadLibrary());
      const figure = (plot.figure ??= JSON.parse(await unpacked(plot.nextElementSibling)));
      const above = headings(plot);
      const traces = figure.data.filter(({ name, meta }) => !meta || has(`${name} ${meta} ${above}`));
      const legend = new Set();
      for (const trace of traces.filter(({ mode }) => mode === "lines+markers")) {
        trace.showlegend = !legend.has(trace.legendgroup);
        legend.add(trace.legendgroup);
      }
      await Plotly.react(plot, traces, figure.layout, CONFIG);
      plot.parentElement.hidden = !traces.length;
    } catch (error) {
      plot.textContent = `This browser cannot draw the plot: ${error.message}`;
      console.error(error);
    }
  }

  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting && target.drawnFor !== words) draw(target);
  }, { rootMargin: "200px" });
  for (const plot of all(".plot")) watcher.observe(plot);
  page.classList.add("js");
})();
