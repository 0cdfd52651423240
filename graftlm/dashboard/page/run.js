"use strict";
/* One run, and several side by side. */

/* A plan is of what comes on top of the idle process, which is part of what is measured. */
Board.memoryBars = runs => {
  const { el, format } = Board;
  const bars = runs.flatMap(run => [[run.name, "planned", run.planned == null ? null : run.planned + (run.idle ?? 0)], [run.planned == null ? run.name : "", "measured", run.measured]]).filter(bar => bar[2] != null);
  if (!bars.length) return null;
  const most = Math.max(...bars.map(bar => bar[2])), named = runs.some(run => run.name);
  return el("div", { class: `bars${named ? " many" : ""}` }, bars.map(([name, kind, value]) => {
    const bar = el("span", { class: `bar ${kind}` });
    bar.style.setProperty("--share", value / most);
    return el("div", { class: name ? "first" : null }, named && el("b", {}, name), el("span", { class: "soft" }, kind), el("span", { class: "track" }, bar), el("span", { class: "right" }, format.bytes(value)));
  }));
};

Board.xChoice = (id, change) => Board.el("label", { class: "inline" }, "Over", Board.el("select", { id, onchange: event => change(event.target.value) },
  [["step", "steps"], ["tokens", "tokens"], ["hours", "time"]].map(([value, text]) => Board.el("option", { value }, text))));

Board.views.run = {
  title: "Run",
  open(main, [id]) {
    const { el, format, charts } = Board;
    const own = { name: "", curve: null, index: 0 };
    let x = "step";
    const head = el("div"), facts = el("div"), evals = el("div"), samples = el("div"), memory = el("div");
    const lists = Object.fromEntries(["Options", "Data", "Plan", "Summary", "Machine", "Events"].map(name => {
      const list = el("dl", { class: "all" });
      return [name, [el("details", { id: `part-${name}`, hidden: true }, el("summary", {}, name), list), list]];
    }));
    const figures = [
      charts.figure("Loss", () => charts.losses([own], { x }), { height: 320, wide: true }),
      charts.figure("Learning rate", () => charts.column([own], "learning_rate", "learning rate", { x }), { height: 180 }),
      charts.figure("Tokens/s", () => charts.column([own], "rate", "tokens/s", { x }), { height: 180 }),
      charts.figure("Gradient norm", () => charts.column([own], "grad_norm", "gradient norm", { x, of: "highest" }), { height: 180 }),
    ];
    main.replaceChildren(head, facts,
      el("div", { class: "controls" }, Board.xChoice("over", value => { x = value; figures.forEach(figure => figure.draw()); })),
      el("div", { class: "figures" }, figures.map(figure => figure.node)), memory, samples, evals, el("div", {}, Object.values(lists).map(([whole]) => whole)));

    function show(run) {
      document.title = `${run.name} · Graft board`;
      own.name = run.name;
      Board.fill(head, [run.name, run.parent, run.state, run.how, run.faults], () => [el("p", { class: "back" }, el("a", { href: "#/runs" }, "Runs"), run.parent && " / ", run.parent && el("a", { href: `#/group/${run.parent}` }, "its sweep or comparison")),
        el("div", { class: "title" }, el("h1", {}, run.name), Board.state(run.state)), el("p", { class: "note" }, run.how), Board.faults(run.faults)]);
      const pairs = [
        ["model", format.model(run.model)], ["method", run.method], ["base stored as", run.base_precision], ["rank", run.method === "full" ? null : format.value(run.rank)],
        ["steps", run.steps ? `${format.count(run.step)} of ${format.count(run.steps)}` : format.count(run.step)],
        ["training loss", format.loss(run.loss)], ["eval loss before", format.loss(run.eval_before)],
        ["eval loss, best", run.eval_best == null ? null : `${format.loss(run.eval_best)}${run.eval_best_step != null ? ` at step ${format.count(run.eval_best_step)}` : ""}`],
        [run.score || "score", run.score_best == null ? null : format.short(run.score_best)],
        ["learning rate", format.short(run.learning_rate)], ["tokens/s", format.count(run.rate)], ["started", format.day(run.started)], ["last written", format.ago(run.modified)],
      ];
      Board.fill(facts, pairs, () => Board.facts(pairs));
      const used = { planned: run.memory_planned, idle: run.memory_idle, measured: run.memory_measured };
      Board.fill(memory, used, () => { const bars = Board.memoryBars([used]); return bars && [el("h2", {}, "Peak memory"), bars]; });
      showSamples(run.samples);
      Board.fill(evals, run.evals, () => run.evals.length ? [el("h2", {}, "Evaluations"), Board.table(
        [{ text: "step", right: true }, { text: "eval loss", right: true }, { text: "score", right: true }, { text: "tokens read", right: true }],
        run.evals.map(e => [format.count(e.step), format.loss(e.eval_loss), format.short(e.eval_score), format.count(e.num_tokens)]), { caption: "Evaluations", kind: "narrow" })] : []);
      for (const [name, value] of [["Options", run.config], ["Data", run.data], ["Plan", run.plan], ["Summary", run.summary], ["Machine", run.environment], ["Events", Object.assign({}, run.events)]]) {
        const [whole, list] = lists[name];
        whole.hidden = !value || !Object.keys(value).length;
        Board.fill(list, value, () => Object.entries(value ?? {}).map(([key, one]) => el("div", {}, el("dt", {}, key), el("dd", {}, format.value(one)))));
      }
    }

    let step = null;
    function showSamples(found) { Board.fill(samples, [found, step], () => samplesOf(found)); }
    function samplesOf(found) {
      if (!found.length) return [];
      const steps = [...new Set(found.map(sample => sample.step))];
      if (!steps.includes(step)) step = null;
      const at = step ?? steps.at(-1);
      const choice = el("select", { id: "sample-step", onchange: event => { step = Number(event.target.value); showSamples(found); } },
        steps.map(one => el("option", { value: one, selected: one === at }, `step ${one}`)));
      return [el("div", { class: "title" }, el("h2", {}, "Samples"), el("label", { class: "inline" }, "Evaluation at", choice)),
        el("div", { class: "samples" }, found.filter(sample => sample.step === at).map(sample => el("article", { class: "sample" },
          el("h3", {}, "prompt"), el("p", { class: "text" }, String(sample.prompt ?? "")),
          el("h3", {}, "answer"), el("p", { class: "text answer" }, String(sample.answer ?? "")),
          el("h3", {}, "reference"), el("p", { class: "text soft" }, (Array.isArray(sample.references) ? sample.references : []).join("\n")))))];
    }

    return {
      async refresh() {
        const [{ value, changed }, curve] = await Promise.all([Board.data.get(`runs/${id}`), Board.data.curve(id)]);
        if (!value) throw new Error("this run is not in the folders");
        if (changed) show(value);
        const before = own.curve;
        own.curve = curve;
        if (!before || before.columns.step.length !== curve.columns.step.length || before.columns.step.at(-1) !== curve.columns.step.at(-1) || before.evals.length !== curve.evals.length || before.generation !== curve.generation)
          figures.forEach(figure => figure.draw());
      },
    };
  },
};

Board.views.side = {
  title: "Side by side",
  open(main, [ids]) {
    const { el, format, charts } = Board;
    const runs = ids.split(",").filter(Boolean).slice(0, 8).map((id, index) => ({ id, name: id, curve: null, index, value: null }));
    let x = "step", everything = false, kind = "both";
    const table = el("div"), differ = el("div");
    const figures = [
      charts.figure("Loss", () => charts.losses(runs, { x, train: kind !== "evals", evals: kind !== "train" }), { height: 340, wide: true }),
      charts.figure("Learning rate", () => charts.column(runs, "learning_rate", "learning rate", { x }), { height: 180 }),
      charts.figure("Tokens/s", () => charts.column(runs, "rate", "tokens/s", { x }), { height: 180 }),
    ];
    const kinds = el("label", { class: "inline" }, "Loss of", el("select", { id: "kind", onchange: event => { kind = event.target.value; draw(); } },
      [["both", "training and eval"], ["train", "training"], ["evals", "eval"]].map(([value, text]) => el("option", { value }, text))));
    main.replaceChildren(el("p", { class: "back" }, el("a", { href: "#/runs" }, "Runs")), el("h1", {}, "Side by side"), table,
      el("div", { class: "controls" }, kinds, Board.xChoice("over", value => { x = value; draw(); })), el("div", { class: "figures" }, figures.map(figure => figure.node)), differ);
    function draw() { figures.forEach(figure => figure.draw()); }

    function name(run) {
      const swatch = el("i", { class: "swatch" });
      swatch.style.setProperty("--own", `var(--c${run.index})`);
      return el("span", { class: "named" }, swatch, el("a", { href: `#/run/${run.id}` }, run.name));
    }
    function show() {
      const known = runs.filter(run => run.value);
      Board.fill(table, known.map(run => run.value), () => Board.table([{ text: "run" }, { text: "state" }, { text: "steps", right: true }, { text: "eval loss before", right: true }, { text: "best", right: true }, { text: "at step", right: true }, { text: "tokens/s", right: true }, { text: "peak memory", right: true }],
        known.map(run => { const v = run.value; return [name(run), Board.state(v.state, v.how), format.count(v.step), format.loss(v.eval_before), format.loss(v.eval_best), format.count(v.eval_best_step), format.count(v.rate), format.memory(v)]; }), { caption: "Chosen runs" }));
      const keys = [...new Set(known.flatMap(run => Object.keys(run.value.config)))].filter(key => key !== "out");
      const text = (run, key) => format.value(run.value.config[key]);
      const differing = keys.filter(key => new Set(known.map(run => text(run, key))).size > 1);
      const shown = everything ? keys : differing;
      Board.fill(differ, [everything, differing, known.map(run => [run.name, run.value.config])], () => [el("div", { class: "title" }, el("h2", {}, everything ? "Options" : `Options that differ (${differing.length} of ${keys.length})`),
        el("button", { type: "button", class: "quiet", id: "all-options", onclick: () => { everything = !everything; show(); } }, everything ? "Only differences" : "All options")),
        shown.length ? Board.table([{ text: "option" }, ...known.map(run => ({ text: run.name }))], shown.map(key => ({ attributes: { class: differing.includes(key) ? "differs" : null }, cells: [key.replaceAll("_", "-"), ...known.map(run => text(run, key))] })), { caption: "Options", kind: "options" })
          : el("p", { class: "note" }, "Their options are the same.")]);
    }

    return {
      async refresh() {
        const changes = await Promise.all(runs.map(async run => {
          try {
            const [{ value, changed }, curve] = await Promise.all([Board.data.get(`runs/${run.id}`), Board.data.curve(run.id)]);
            if (!value || !curve) return [false, false];
            const grown = !run.curve || run.curve.generation !== curve.generation || run.curve.columns.step.at(-1) !== curve.columns.step.at(-1) || run.curve.evals.length !== curve.evals.length;
            Object.assign(run, { value, curve, name: value.name });
            return [changed, grown];
          } catch (error) {
            if (error instanceof TypeError) throw error;  // the board does not answer, as opposed to: this run is not there
            return [false, false];
          }
        }));
        if (!runs.some(run => run.value)) throw new Error("none of these runs is in the folders");
        if (changes.some(([changed]) => changed)) show();
        if (changes.some(([, grown]) => grown)) draw();
      },
    };
  },
};
