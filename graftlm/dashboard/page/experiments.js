"use strict";
/* Sweeps and comparisons: lists, and one of each. */

Board.groupList = (name, words) => ({
  title: words.title,
  open(main) {
    const { el, format } = Board;
    const list = el("div");
    main.replaceChildren(el("h1", {}, words.title), list);
    return {
      async refresh() {
        const { value } = await Board.data.get("overview");
        const shown = value[name].map(one => [[one.id, one.name], format.model(one.model),
          ["running", "finished", "stopped", "failed"].filter(state => one.states[state]).map(state => `${one.states[state]} ${state}`).join(", ") || format.none, format.loss(one.best), format.ago(one.modified)]);
        Board.fill(list, shown, () => shown.length ? Board.table([{ text: words.one }, { text: "model" }, { text: words.parts }, { text: "lowest eval loss", right: true }, { text: "last written", right: true }], shown.map(([[id, text], ...cells]) => [el("a", { href: `#/${words.one}/${id}` }, text), ...cells]), { caption: words.title })
          : el("p", { class: "empty" }, words.none));
      },
    };
  },
});
Board.views.sweeps = Board.groupList("sweeps", { title: "Sweeps", one: "sweep", parts: "trials", none: "No sweep in these folders. graft sweep writes one." });
Board.views.comparisons = Board.groupList("comparisons", { title: "Comparisons", one: "comparison", parts: "runs", none: "No comparison in these folders. graft compare writes one." });

/* A run knows its parent by id alone: which of the two it is, the overview says. */
Board.views.group = {
  title: "",
  open(main, [id]) {
    return { async refresh() {
      const { value } = await Board.data.get("overview");
      location.replace(`#/${value.sweeps.some(one => one.id === id) ? "sweep" : "comparison"}/${id}`);
    } };
  },
};

Board.views.sweep = {
  title: "Sweep",
  open(main, [id]) {
    const { el, format, charts } = Board;
    const head = el("div"), figures = el("div", { class: "figures" }), trials = el("div");
    main.replaceChildren(head, figures, trials);
    let found = null, drawn = new Map(), order = "loss";
    const flag = name => name.replaceAll("_", "-");
    const complete = () => found.trials.filter(trial => trial.state === "complete" && trial.loss != null);

    function charted() {
      const wanted = new Map([["so far", () => charts.figure("Loss by trial", () => charts.dots(complete().map(t => ({ key: t.number, x: t.number, y: t.loss })), { label: "nats a token", x: { label: "trial", name: "trial", whole: true }, best: found.best, line: true }))]]);
      for (const option of found.options)
        wanted.set(option, () => charts.figure(`Loss by ${flag(option)}`, () => against(option)));
      wanted.set("evals", () => charts.figure("Eval loss of each trial", () => curves(), { wide: true }));
      if ([...wanted.keys()].join() === [...drawn.keys()].join()) return;
      drawn = new Map([...wanted].map(([name, make]) => [name, make()]));
      figures.replaceChildren(...[...drawn.values()].map(figure => figure.node));
    }

    function against(option) {
      const ended = complete().filter(trial => trial.params[option] != null);
      const numeric = ended.every(trial => typeof trial.params[option] === "number");
      const names = numeric ? null : [...new Set(ended.map(trial => format.value(trial.params[option])))];
      const values = ended.map(trial => numeric ? trial.params[option] : names.indexOf(format.value(trial.params[option])));
      const log = numeric && Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= 4;
      return charts.dots(ended.map((trial, i) => ({ key: trial.number, x: values[i], y: trial.loss })), { label: "nats a token", x: { label: flag(option), name: flag(option), log }, best: found.best, categories: names && names.map(name => name.length > 14 ? `…${name.slice(-13)}` : name) });
    }

    function curves() {
      const shown = found.trials.filter(trial => trial.evals.length).sort((a, b) => (a.number === found.best) - (b.number === found.best)).slice(-60);
      const empty = { step: [], loss: [], high: [], low: [], hours: [], tokens: [] };
      const chart = charts.losses(shown.map(trial => ({ name: `trial ${trial.number}`, index: trial.number === found.best ? 1 : 0, curve: { columns: empty, width: 1, evals: trial.evals.map(([step, loss]) => [step, loss]) } })), { train: false });
      if (!chart) return null;
      chart.series.forEach((one, i) => { if (i && shown.length > 1 && i < shown.length) { one.width = 1; one.alpha = 0.45; one.points = { show: false }; one.quiet = true; } });
      chart.legend = [[1, "the best", "dot"], ...(shown.length > 1 ? [[0, "the others"]] : [])];
      return chart;
    }

    function show() {
      document.title = `${found.name} · Graft board`;
      const counts = ["complete", "running", "pruned", "diverged", "failed", "lost"].map(state => [found.trials.filter(t => t.state === state).length, state]).filter(([count]) => count);
      const best = found.trials.find(trial => trial.number === found.best);
      Board.fill(head, { ...found, trials: [counts, best] }, () => [el("p", { class: "back" }, el("a", { href: "#/sweeps" }, "Sweeps")), el("div", { class: "title" }, el("h1", {}, found.name), found.state && Board.state(found.state)),
        el("p", { class: "note" }, [counts.map(([count, state]) => `${count} ${state}`).join(", ") || "no trial yet", found.wanted ? `${found.wanted} wanted` : "how many are wanted is not known", Object.entries(found.space).map(([name, text]) => `${flag(name)} ${text}`).join(", ") || null].filter(Boolean).join("; ")),
        Board.faults(found.faults), best && el("p", { class: "headline" }, `Best so far: trial ${best.number}, eval loss ${format.loss(best.loss)}${best.loss_before != null ? `, ${format.loss(best.loss_before)} before` : ""}. `,
          found.options.map(name => `${flag(name)} ${format.value(best.params[name])}`).join(", ")), found.report && !Board.data.fixed && el("p", {}, el("a", { href: `reports/${id}`, target: "_blank", rel: "noopener" }, "Its report"))]);
      charted();
      const sorted = [...found.trials].sort((a, b) => order === "loss" ? (a.loss ?? Infinity) - (b.loss ?? Infinity) || a.number - b.number : a.number - b.number);
      Board.fill(trials, [order, found.best, found.options, sorted.map(({ evals, ...trial }) => trial)], () => [el("div", { class: "title" }, el("h2", {}, "Trials"), el("label", { class: "inline" }, "Order", el("select", { id: "order", onchange: event => { order = event.target.value; show(); } },
        [["loss", "by loss"], ["number", "by number"]].map(([value, text]) => el("option", { value, selected: value === order }, text))))),
        Board.table([{ text: "trial" }, { text: "state" }, ...found.options.map(name => ({ text: flag(name), right: true })), { text: "loss before", right: true }, { text: "loss", right: true }, { text: "steps", right: true }],
          sorted.map(t => ({ attributes: { class: t.number === found.best ? "best" : null }, cells: [t.run ? el("a", { href: `#/run/${t.run}` }, String(t.number)) : String(t.number), Board.state(t.state, t.why), ...found.options.map(name => format.value(t.params[name])), format.loss(t.loss_before), format.loss(t.loss), format.count(t.steps)] })), { caption: "Trials" })]);
    }

    return {
      async refresh() {
        const { value, changed } = await Board.data.get(`sweeps/${id}`);
        if (!value) throw new Error("this sweep is not in the folders");
        if (!changed) return;
        found = value;
        show();
        for (const figure of drawn.values()) figure.draw();
      },
    };
  },
};

Board.views.comparison = {
  title: "Comparison",
  open(main, [id]) {
    const { el, format, charts } = Board;
    const head = el("div"), methods = el("div"), runs = el("div"), memory = el("figure");
    let found = null;
    const whole = value => format.isNumber(value) ? value : null;
    const interval = m => whole(m.share_interval?.low) == null || whole(m.share_interval?.high) == null ? {} : { low: 100 * m.share_interval.low, high: 100 * m.share_interval.high };
    const rows = key => found.methods.filter(m => whole(m[key]) != null);
    const behind = () => {
      const all = Array.isArray(found.verdict.differences) ? found.verdict.differences.filter(d => d && whole(d.mean) != null) : [], best = found.verdict.best;
      const against = all.filter(d => d.second === best);
      return against.length ? [{ name: String(best), value: 0 }, ...against.map(d => ({ name: String(d.first), value: whole(d.mean), low: whole(d.interval?.low), high: whole(d.interval?.high) }))] : [];
    };
    const figures = [
      charts.figure("Behind the best", () => charts.intervals(found ? behind() : [], "nats a token"), { height: 220, note: "Eval loss above the best method's, with its 95 % interval." }),
      charts.figure("Share of the gain", () => charts.intervals(found ? rows("share").map(m => ({ name: String(m.name), value: 100 * m.share, ...interval(m) })) : [], "%"), { height: 220, note: "Of what the reference gains over the untrained base, with its 95 % interval." }),
    ];
    const drawn = el("div", { class: "figures" }, [...figures.map(figure => figure.node), memory]);
    main.replaceChildren(head, drawn, methods, runs);

    function show() {
      document.title = `${found.name} · Graft board`;
      const verdict = found.verdict, sentences = Array.isArray(verdict.sentences) ? verdict.sentences : [];
      Board.fill(head, { ...found, methods: null, runs: null }, () => [el("p", { class: "back" }, el("a", { href: "#/comparisons" }, "Comparisons")), el("div", { class: "title" }, el("h1", {}, found.name), Board.state(found.running ? "running" : found.done ? "finished" : "stopped")),
        el("p", { class: "note" }, [found.model && `on ${format.model(found.model)}`, found.seeds && `${found.seeds} seed${found.seeds === 1 ? "" : "s"}`, found.data.eval_rows && `${format.count(found.data.eval_rows)} eval rows`].filter(Boolean).join(", ")),
        Board.faults(found.faults),
        found.done ? el("section", { class: `verdict${verdict.certain ? "" : " open"}` }, el("p", { class: "headline" }, verdict.choice ? verdict.certain ? `Take ${verdict.choice}.` : `Cannot tell; ${verdict.choice} until more is known.` : "No method is better than the untrained base."),
          el("ul", {}, sentences.map(text => el("li", {}, String(text))))) : el("p", { class: "note" }, "The verdict is there once all methods have run."),
        ...Object.entries(found.failed).map(([name, why]) => el("p", {}, el("strong", {}, name), ` is missing: ${why}`)),
        found.report && !Board.data.fixed && el("p", {}, el("a", { href: `reports/${id}`, target: "_blank", rel: "noopener" }, "Its report"))]);
      drawn.hidden = !found.done;
      Board.fill(memory, found.methods, () => [el("figcaption", {}, el("h3", {}, "Peak memory")), Board.memoryBars(found.methods.map(m => ({ name: String(m.name), planned: whole(m.peak_planned), idle: whole(m.idle), measured: whole(m.peak_measured) })))]);
      const pm = (value, std) => format.loss(value) + (whole(std) != null ? ` ± ${std.toFixed(4)}` : "");
      Board.fill(methods, [found.reference, found.methods], () => found.methods.length ? [el("h2", {}, "Methods"), Board.table(
        [{ text: "method" }, { text: "trained", right: true }, { text: "learning rate", right: true }, { text: "loss before", right: true }, { text: "loss after", right: true }, { text: `share of ${found.reference ?? "the best"}'s gain`, right: true }, { text: "memory planned", right: true }, { text: "measured", right: true }, { text: "saved", right: true }, { text: "tokens/s", right: true }, { text: "time", right: true }],
        found.methods.map(m => [String(m.name), format.count(m.trainable_parameters), format.short(m.learning_rate), format.loss(m.loss_before), pm(m.loss, m.std),
          whole(m.share) == null ? format.none : `${format.percent(m.share)}${interval(m).low != null && m.name !== found.reference ? ` (${interval(m).low.toFixed(1)} to ${interval(m).high.toFixed(1)})` : ""}`,
          format.bytes(m.peak_planned), format.bytes(m.peak_measured), format.bytes(m.saved_bytes), format.count(m.tokens_per_second), format.duration(m.seconds)]), { caption: "Methods" })] : []);
    }

    function showRuns(all) {
      const own = all.filter(run => found.runs.includes(run.id));
      const trained = own.filter(run => run.role.startsWith("runs/"));
      Board.fill(runs, own, () => own.length ? [el("div", { class: "title" }, el("h2", {}, "Runs"), trained.length > 1 && el("a", { class: "button", href: `#/side/${trained.slice(0, 8).map(run => run.id).join(",")}` }, "Side by side")),
        Board.table([{ text: "run" }, { text: "state" }, { text: "steps", right: true }, { text: "learning rate", right: true }, { text: "eval loss", right: true }],
          own.map(run => [el("a", { href: `#/run/${run.id}` }, run.role || run.name), Board.state(run.state, run.how), format.count(run.step), format.short(run.learning_rate), format.loss(run.eval_best)]), { caption: "Runs" })] : []);
    }

    return {
      async refresh() {
        const [{ value, changed }, all] = await Promise.all([Board.data.get(`comparisons/${id}`), Board.data.get("overview")]);
        if (!value) throw new Error("this comparison is not in the folders");
        found = value;
        if (changed) { show(); figures.forEach(figure => figure.draw()); }
        if (changed || all.changed || !runs.children.length) showRuns(all.value.runs);
      },
    };
  },
};
