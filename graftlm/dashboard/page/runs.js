"use strict";
/* The list of runs: filter, choose, open. Rows stay where they are while the folders are read again. */

Board.chosen = new Set();

Board.views = {};

Board.views.runs = {
  title: "Runs",
  open(main) {
    const { el, format } = Board;
    const heads = [{ text: "" }, { text: "run" }, { text: "state" }, { text: "steps", right: true }, { text: "training loss", right: true },
      { text: "eval loss", right: true }, { text: "tokens/s", right: true }, { text: "peak memory", right: true }, { text: "last written", right: true }];
    const filter = el("input", { type: "search", id: "filter", placeholder: "name, model, method", "aria-keyshortcuts": "/", autocomplete: "off" });
    const state = el("select", { id: "state" }, ["any state", "running", "finished", "stopped", "failed"].map(name => el("option", { value: name }, name)));
    const scope = el("select", { id: "scope" }, [["single", "runs of their own"], ["all", "also of sweeps and comparisons"]].map(([value, text]) => el("option", { value }, text)));
    const body = el("tbody");
    const said = el("p", { class: "note", role: "status" });
    const faults = el("div");
    const bar = el("div", { class: "chosen", hidden: true, role: "region", "aria-label": "Chosen runs" });
    main.replaceChildren(
      el("div", { class: "title" }, el("h1", {}, "Runs"), said), faults,
      el("div", { class: "controls" }, el("label", {}, "Filter", filter), el("label", {}, "State", state), el("label", {}, "Show", scope)),
      el("table", { class: "runs list" }, el("caption", { class: "unseen" }, "Runs"),
        el("thead", {}, el("tr", {}, heads.map(head => el("th", { scope: "col", class: head.right ? "right" : null }, head.text || el("span", { class: "unseen" }, "choose"))))), body),
      bar);
    const rows = new Map();
    let runs = [], begun = false;

    function fill(row, run) {
      const before = row.text;
      row.text = JSON.stringify(run);
      if (before === row.text) { row.when.textContent = format.ago(run.modified); return; }
      const share = run.steps ? Math.min(1, run.step / run.steps) : null;
      row.box.setAttribute("aria-label", `Choose ${run.name}`);
      row.link.textContent = run.name;
      row.about.textContent = [run.model?.split("/").pop(), run.method, run.base_precision, run.rank && run.method !== "full" ? `rank ${run.rank}` : null,
        run.learning_rate != null ? `lr ${format.short(run.learning_rate)}` : null].filter(Boolean).join(" · ");
      row.state.replaceChildren(Board.state(run.state, run.how), run.faults.length ? el("span", { class: "warn", title: run.faults.join("\n") }, "damaged") : "");
      row.steps.replaceChildren(run.steps ? `${format.count(run.step)} of ${format.count(run.steps)}` : format.count(run.step));
      if (share != null && run.state === "running") {
        const done = el("progress", { max: 1, value: share, "aria-label": `${Math.round(100 * share)} % of ${run.name}` });
        row.steps.append(done);
      }
      row.loss.textContent = format.loss(run.loss);
      row.evals.replaceChildren(run.eval_best == null && run.eval_before == null ? format.none
        : run.eval_before != null && run.eval_best != null ? el("span", {}, el("span", { class: "soft" }, `${format.loss(run.eval_before)} → `), format.loss(run.eval_best)) : format.loss(run.eval_best ?? run.eval_before));
      row.rate.textContent = format.count(run.rate);
      row.memory.textContent = format.memory(run);
      row.when.textContent = format.ago(run.modified);
    }

    function make(run) {
      const row = { id: run.id, box: el("input", { type: "checkbox" }), link: el("a", { href: `#/run/${run.id}` }), about: el("span", { class: "soft small" }) };
      for (const name of ["state", "steps", "loss", "evals", "rate", "memory", "when"]) row[name] = el("td", { class: name === "state" ? null : "right" });
      ["state", "steps", "loss", "evals", "rate", "memory", "when"].forEach((name, i) => { row[name].dataset.head = heads[i + 2].text; });
      row.box.checked = Board.chosen.has(run.id);
      row.box.addEventListener("change", () => { row.box.checked ? Board.chosen.add(run.id) : Board.chosen.delete(run.id); showChosen(); });
      row.node = el("tr", {}, el("td", { class: "box" }, row.box), el("th", { scope: "row" }, row.link, row.about), row.state, row.steps, row.loss, row.evals, row.rate, row.memory, row.when);
      return row;
    }

    function showChosen() {
      const chosen = runs.filter(run => Board.chosen.has(run.id));
      bar.hidden = !chosen.length;
      const focused = bar.contains(document.activeElement) ? document.activeElement.id : null;
      bar.replaceChildren(
        el("span", {}, chosen.length === 1 ? "1 run chosen" : `${chosen.length} runs chosen`),
        chosen.length > 1 && el("a", { class: "button", id: "side", href: `#/side/${chosen.slice(0, 8).map(run => run.id).join(",")}`, "aria-keyshortcuts": "c" }, chosen.length > 8 ? "First 8 side by side" : "Side by side"),
        el("button", { type: "button", id: "none", class: "quiet", onclick: () => { Board.chosen.clear(); for (const row of rows.values()) row.box.checked = false; showChosen(); } }, "Choose none"));
      if (focused) document.getElementById(focused)?.focus();
    }

    function show() {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      const order = { running: 0 };
      const newest = (a, b) => (b.started ?? "").localeCompare(a.started ?? "", "en");  // not by what they wrote last, or rows swap at each look
      const own = runs.some(run => !run.parent);
      if (!begun && runs.length) { begun = true; if (!own) scope.value = "all"; }
      const shown = runs.filter(run => (scope.value === "all" || !run.parent) && (state.value === "any state" || run.state === state.value)
        && words.every(word => [run.name, run.model, run.method].join(" ").toLowerCase().includes(word)))
        .sort((a, b) => (order[a.state] ?? 1) - (order[b.state] ?? 1) || (a.state === "running" ? newest(a, b) : (b.modified ?? 0) - (a.modified ?? 0)) || a.name.localeCompare(b.name, "en"));
      const wanted = shown.map(run => {
        if (!rows.has(run.id)) rows.set(run.id, make(run));
        const row = rows.get(run.id);
        fill(row, run);
        return row.node;
      });
      if (wanted.length !== body.children.length || wanted.some((node, i) => body.children[i] !== node)) {
        const active = body.contains(document.activeElement) ? document.activeElement : null;
        body.replaceChildren(...wanted);
        active?.isConnected && active.focus();
      }
      const parts = ["running", "finished", "stopped", "failed"].map(name => [runs.filter(run => run.state === name).length, name]).filter(([count]) => count);
      said.textContent = !runs.length ? "No run yet in these folders." : `${parts.map(([count, name]) => `${count} ${name}`).join(", ")}${shown.length < runs.length ? `; ${shown.length} shown` : ""}`;
      showChosen();
    }
    for (const control of [filter, state, scope]) control.addEventListener("input", show);

    return {
      async refresh() {
        const { value, changed } = await Board.data.get("overview");
        runs = value.runs;
        if (changed) faults.replaceChildren(...[value.cut && Board.faults(["There are more folders than the board looks into; name deeper ones."])].filter(Boolean));
        show();
      },
      keys: {
        "/": ["filter", () => filter.focus()],
        j: ["next run", () => move(1)],
        k: ["run before", () => move(-1)],
        x: ["choose the run", () => current()?.querySelector("input")?.click()],
        c: ["chosen runs side by side", () => document.getElementById("side")?.click()],
      },
    };

    function current() { return document.activeElement?.closest?.("table.runs tbody tr"); }
    function move(by) {
      const all = [...body.children], at = all.indexOf(current());
      all[Math.max(0, Math.min(all.length - 1, at < 0 ? (by > 0 ? 0 : all.length - 1) : at + by))]?.querySelector("a").focus();
    }
  },
};
