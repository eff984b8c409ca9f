"use strict";
// Hide and show policies, sort tables, choose a measure, read values under the pointer. Without it the page is whole.
(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const make = (name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Policies: one style sheet holds what is hidden and what is dimmed, so that every plot and table follows.
  const sheet = document.head.appendChild(make("style"));
  const buttons = all("[data-toggle]");
  const showAll = document.querySelector("[data-all]");
  const hidden = new Set();
  let focus = null;
  const rules = () => {
    const lines = Array.from(hidden, (run) => `[data-run="${run}"]{display:none!important}`);
    if (focus !== null && !hidden.has(focus)) {
      lines.push(`.plot [data-run]:not([data-run="${focus}"]){opacity:.18}`);
      lines.push(`.plot [data-run="${focus}"].band{display:inline!important}`);
    }
    sheet.textContent = lines.join("");
  };
  const apply = () => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.toggle)));
    if (showAll) showAll.hidden = hidden.size === 0;
    rules();
  };
  for (const button of buttons) {
    const run = button.dataset.toggle;
    button.addEventListener("click", (event) => {
      if (event.shiftKey) {
        const alone = hidden.size === buttons.length - 1 && !hidden.has(run);
        hidden.clear();
        if (!alone) for (const other of buttons) if (other !== button) hidden.add(other.dataset.toggle);
      } else if (!hidden.delete(run)) hidden.add(run);
      apply();
    });
    const look = (value) => () => { focus = value; rules(); };
    button.addEventListener("pointerenter", look(run));
    button.addEventListener("pointerleave", look(null));
    button.addEventListener("focus", look(run));
    button.addEventListener("blur", look(null));
  }
  if (showAll) showAll.addEventListener("click", () => { hidden.clear(); apply(); });
  for (const button of buttons) button.disabled = false;

  addEventListener("beforeprint", () => { for (const block of all("details")) block.open = true; });

  // Tables: the first press sorts numbers downwards and words upwards, the second turns round. No value stays last.
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    const text = cell === undefined ? undefined : cell.dataset.v;
    return text === undefined || text === "" ? null : text;
  };
  const sortBy = (head) => {
    const table = head.closest("table");
    const isText = head.classList.contains("text");
    const before = head.getAttribute("aria-sort");
    const order = before ? (before === "ascending" ? -1 : 1) : isText ? 1 : -1;
    for (const other of all("th[aria-sort]", table)) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
    const compare = (a, b) => (isText ? a.localeCompare(b) : Number(a) - Number(b));
    const body = table.tBodies[0];
    const rows = Array.from(body.rows, (row) => [valueOf(row, head.cellIndex), row]);
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : order * compare(a, b)));
    body.append(...rows.map(([, row]) => row));
  };
  for (const button of all("button.sort")) button.addEventListener("click", () => sortBy(button.closest("th")));

  // Curves: one measure at a time.
  const select = document.getElementById("measure");
  const box = document.querySelector(".curvebox");
  if (select) {
    const choose = () => { for (const figure of all("figure", box)) figure.hidden = figure.id !== select.value; };
    select.addEventListener("change", choose);
    choose();
    const bands = document.getElementById("bands");
    const show = () => box.classList.toggle("bands", bands.checked);
    bands.addEventListener("change", show);
    show();
  }

  // Values under the pointer: a line at the nearest window, and the policies there from the highest to the lowest.
  for (const area of all(".curves .area")) {
    const times = JSON.parse(area.dataset.times);
    const end = Number(area.dataset.end);
    let parts = null;
    const readout = () => {
      if (parts) return parts;
      const lines = Object.entries(JSON.parse(area.dataset.values)).map(([run, values]) => ({ run, values }));
      const cursor = area.appendChild(make("div", "cursor"));
      const panel = area.appendChild(make("div", "readout"));
      parts = { lines, cursor, panel };
      return parts;
    };
    area.addEventListener("pointermove", (event) => {
      const { lines, cursor, panel } = readout();
      const bounds = area.getBoundingClientRect();
      const time = ((event.clientX - bounds.left) / bounds.width) * end;
      const at = times.reduce((best, value, i) => (Math.abs(value - time) < Math.abs(times[best] - time) ? i : best), 0);
      const shown = lines.filter((line) => !hidden.has(line.run) && line.values[at] !== null);
      shown.sort((a, b) => b.values[at] - a.values[at]);
      panel.replaceChildren(make("b", "", `${times[at]} s`));
      for (const line of shown) {
        const row = panel.appendChild(make("div", "row"));
        const label = buttons[line.run];
        if (label) row.append(label.querySelector("svg").cloneNode(true), make("span", "", label.textContent));
        row.append(make("span", "value", line.values[at].toFixed(area.dataset.digits).replace("-", "\u2212")));
      }
      const share = times[at] / end;
      cursor.style.left = `${100 * share}%`;
      panel.style.left = share < 0.5 ? `calc(${100 * share}% + 10px)` : "";
      panel.style.right = share < 0.5 ? "" : `calc(${100 - 100 * share}% + 10px)`;
      cursor.hidden = panel.hidden = shown.length === 0;
    });
    area.addEventListener("pointerleave", () => { if (parts) parts.cursor.hidden = parts.panel.hidden = true; });
  }
})();
