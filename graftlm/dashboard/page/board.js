"use strict";
/* Which view is open, reading again every two seconds, keys, and light or dark. */

(() => {
  const { el } = Board;
  const main = document.getElementById("main"), live = document.getElementById("live"), help = document.getElementById("help");
  const SECTIONS = [["runs", "Runs"], ["sweeps", "Sweeps"], ["comparisons", "Comparisons"], ["adapters", "Adapters"], ["playground", "Playground"]];
  const HOME = { run: "runs", side: "runs", sweep: "sweeps", comparison: "comparisons" };
  const SECONDS = 2;
  let view = null, timer = null, opened = 0;

  const sections = document.getElementById("sections");
  sections.append(...SECTIONS.map(([name, text], i) => el("a", { href: `#/${name}`, id: `to-${name}`, "aria-keyshortcuts": String(i + 1) }, text)));

  function open() {
    const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(part => { try { return decodeURIComponent(part); } catch { return part; } });
    const made = Object.hasOwn(Board.views, name) ? Board.views[name] : null;
    if (!made || (HOME[name] && !rest[0])) { location.replace("#/runs"); return; }
    clearTimeout(timer);
    view?.close?.();
    Board.charts.forget();
    Board.data.unseen();
    document.title = `${made.title} · Graft board`;
    for (const [section] of SECTIONS) {
      const link = document.getElementById(`to-${section}`);
      if (section === (HOME[name] ?? name)) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
    }
    opened += 1;
    view = made.open(main, rest);
    scrollTo(0, 0);
    if (opened > 1) main.focus({ preventScroll: true });
    again(opened);
  }

  async function again(which) {
    try {
      await view.refresh();
      if (which !== opened) return;
      live.textContent = Board.data.fixed ? "as of when it was written" : "live";
      live.className = "live";
    } catch (error) {
      if (which !== opened) return;
      live.textContent = error instanceof TypeError ? "the board does not answer" : error.message;
      live.className = "live bad";
    }
    if (which === opened && !Board.data.fixed) timer = setTimeout(() => document.hidden ? wait(which) : again(which), SECONDS * 1000);
  }
  function wait(which) { document.addEventListener("visibilitychange", () => which === opened && again(which), { once: true }); }

  /* Light, dark, or as the system is. */
  const themes = ["system", "light", "dark"], button = document.getElementById("theme");
  function theme(name) {
    document.documentElement.dataset.theme = name;
    button.textContent = `Theme: ${name}`;
    try { localStorage.setItem("graft-board-theme", name); } catch { /* a page that is a file may keep nothing */ }
    Board.charts.redraw();
  }
  let kept = null;
  try { kept = localStorage.getItem("graft-board-theme"); } catch { /* as above */ }
  theme(themes.includes(kept) ? kept : "system");
  const next = () => theme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length]);
  button.addEventListener("click", next);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", Board.charts.redraw);

  const common = {
    ...Object.fromEntries(SECTIONS.map(([name, text], i) => [String(i + 1), [text, () => { location.hash = `#/${name}`; }]])),
    t: ["light, dark, or as the system is", next],
    "?": ["these keys", showKeys],
  };
  function showKeys() {
    document.getElementById("help-keys").replaceChildren(...Object.entries({ ...view?.keys, ...common }).map(([key, [text]]) => el("div", {}, el("dt", {}, el("kbd", {}, key)), el("dd", {}, text))));
    help.showModal();
  }
  document.getElementById("keys").addEventListener("click", showKeys);
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    if (event.target.closest?.("input:not([type=checkbox]), select, textarea")) { if (event.key === "Escape") event.target.blur(); return; }
    const found = (view?.keys ?? {})[event.key] ?? common[event.key];
    if (!found?.[1]) return;
    event.preventDefault();
    found[1]();
  });
  addEventListener("hashchange", open);
  open();
})();
