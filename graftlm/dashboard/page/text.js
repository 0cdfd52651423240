"use strict";
/* Elements and text. Every string goes in as text, never as markup: names, samples and messages come from files. */

const Board = {};

Board.el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "data") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(2).filter(child => child != null && child !== false));
  return node;
};

Board.format = (() => {
  const isNumber = value => typeof value === "number" && Number.isFinite(value);
  const none = "–";
  const loss = value => isNumber(value) ? value.toFixed(Math.abs(value) < 100 ? 4 : 1) : none;
  const count = value => isNumber(value) ? Math.round(value).toLocaleString("en") : none;
  const short = value => !isNumber(value) ? none : value === 0 ? "0"
    : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(1).replace(".0e", "e").replace("e+", "e")
    : String(Number(value.toPrecision(4)));
  const bytes = value => {
    if (!isNumber(value)) return none;
    let unit = 0;
    while (Math.abs(value) >= 1000 && unit < 4) { value /= 1000; unit += 1; }
    return `${unit ? value.toFixed(1) : value.toFixed(0)} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
  };
  const memory = run => bytes(run.memory_measured ?? run.memory_planned) + (run.memory_measured == null && run.memory_planned != null ? " planned" : "");
  const ago = seconds => {
    if (!isNumber(seconds)) return none;
    const age = Math.max(0, Date.now() / 1000 - seconds);
    for (const [size, name] of [[86400, "d"], [3600, "h"], [60, "min"]]) if (age >= size) return `${Math.floor(age / size)} ${name} ago`;
    return age < 10 ? "now" : `${Math.floor(age)} s ago`;
  };
  const duration = seconds => !isNumber(seconds) ? none : seconds < 90 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`
    : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
  const value = found => found == null ? none : typeof found === "number" ? short(found)
    : typeof found === "object" ? JSON.stringify(found) : String(found);
  const percent = found => isNumber(found) ? `${(100 * found).toFixed(1)} %` : none;
  const model = name => name == null ? none : String(name).split("/").length > 2 ? String(name).split("/").pop() : String(name);
  const day = text => text == null ? none : String(text).slice(0, 16).replace("T", " ");
  return { isNumber, none, loss, count, short, bytes, memory, ago, duration, value, percent, model, day };
})();

/* Fills a part of the page where what it shows has changed. Elsewhere an open list, the focus, the scroll and a selection stay as they
   are; in a part that is made anew the lists that were open, the focus and the scroll come back. */
Board.fill = (node, shown, make) => {
  const text = JSON.stringify(shown);
  if (node.shown === text) return;
  node.shown = text;
  const reached = () => [...node.querySelectorAll("a, button, select, input, textarea, summary, [tabindex]")];
  const lists = () => [...node.querySelectorAll("details")].map(list => [list, list.querySelector("summary").textContent]);
  const open = new Set(lists().filter(([list]) => list.open).map(([, name]) => name));
  const scrolled = [...node.querySelectorAll(".scroll")].map(one => one.scrollLeft);
  const active = node.contains(document.activeElement) ? document.activeElement : null, at = reached().indexOf(active);
  node.replaceChildren(...[make()].flat().filter(Boolean));
  for (const [list, name] of lists()) list.open = open.has(name);
  node.querySelectorAll(".scroll").forEach((one, i) => { if (scrolled[i]) one.scrollLeft = scrolled[i]; });
  if (!active) return;
  const same = reached().find(one => active.id ? one.id === active.id : active.hasAttribute("href") && one.getAttribute("href") === active.getAttribute("href"));
  (same ?? reached()[at])?.focus({ preventScroll: true });
};

/* A table that is a list of cards on a phone: each cell knows its heading. */
Board.table = (heads, rows, { caption, kind = "" } = {}) => {
  const el = Board.el;
  return el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": caption || "table" },
    el("table", { class: kind },
      caption && el("caption", { class: "unseen" }, caption),
      el("thead", {}, el("tr", {}, heads.map(head => el("th", { scope: "col", class: head.right ? "right" : null }, head.text ?? head)))),
      el("tbody", {}, rows.map(row => {
        const cells = row.cells ?? row;
        return el("tr", row.attributes ?? {}, cells.map((cell, i) => {
          const content = cell == null ? Board.format.none : cell;
          return el(i === 0 ? "th" : "td", { scope: i === 0 ? "row" : null, class: heads[i]?.right ? "right" : null,
            data: { head: heads[i]?.text ?? heads[i] ?? "" } }, content);
        }));
      }))));
};

Board.state = (state, how) => Board.el("span", { class: `state ${state}`, title: how || null }, state);

Board.faults = list => list?.length
  ? Board.el("div", { class: "faults", role: "note" }, Board.el("strong", {}, "Not all of it could be read"),
      Board.el("ul", {}, list.map(text => Board.el("li", {}, text))))
  : null;

Board.facts = pairs => Board.el("dl", { class: "facts" }, pairs.filter(pair => pair && pair[1] != null && pair[1] !== Board.format.none)
  .map(([name, value]) => Board.el("div", {}, Board.el("dt", {}, name), Board.el("dd", {}, value))));
