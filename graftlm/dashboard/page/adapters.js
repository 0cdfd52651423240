"use strict";
/* The store of adapters: names, versions, aliases, and what each was made from. */

Board.views.adapters = {
  title: "Adapters",
  open(main) {
    const { el, format } = Board;
    const head = el("div"), list = el("div");
    const sections = new Map();  // by name and base
    main.replaceChildren(el("h1", {}, "Adapters"), head, list);

    const anchor = label => `adapter-${label}`;
    const go = label => el("button", { type: "button", class: "link", onclick: () => { const row = document.getElementById(anchor(label)); row?.scrollIntoView({ block: "center" }); row?.focus(); } }, label);

    function versions(name) {
      return Board.table([{ text: "version" }, { text: "aliases" }, { text: "eval loss", right: true }, { text: "method" }, { text: "made from" }, { text: "parent of" }, { text: "run" }, { text: "size", right: true }, { text: "published" }],
        name.versions.map(v => ({ attributes: { id: anchor(v.label), tabindex: "-1" }, cells: [
          el("span", {}, el("b", {}, v.label), el("code", { class: "soft small", title: v.digest }, v.digest.slice(0, 12)), v.note && el("span", { class: "soft small" }, String(v.note))),
          v.aliases.length ? v.aliases.map(alias => el("span", { class: "alias" }, alias)) : null,
          v.before != null && v.after != null ? el("span", {}, el("span", { class: "soft" }, `${format.loss(v.before)} → `), format.loss(v.after)) : null,
          [v.method, v.rank && `rank ${format.value(v.rank)}`, v.precision].filter(Boolean).join(", ") || null,
          v.parents.length ? v.parents.map(parent => parent.label ? go(parent.label) : el("code", { title: parent.digest }, parent.digest.slice(0, 12))) : null,
          v.children.length ? v.children.map(go) : null,
          v.run ? el("a", { href: `#/run/${v.run}` }, "open the run") : el("span", { class: "soft small", title: v.source == null ? null : String(v.source) }, v.source == null ? format.none : String(v.source)),
          format.bytes(v.bytes), format.day(v.at),
        ] })), { caption: `Versions of ${name.name}` });
    }

    function history(name) {
      if (!name.history.length) return null;
      const words = { alias: e => `${e.alias} → ${e.version}`, rollback: e => `${e.alias} rolled back from ${e.from} to ${e.version}`, unalias: e => `${e.alias} deleted, was ${e.version}`, remove: e => `version ${e.version} removed` };
      return el("details", {}, el("summary", {}, "History of aliases"), el("ul", {}, name.history.map(e => el("li", {}, `${format.day(e.at)}: ${(words[e.do] || (one => String(one.do)))(e)}${e.by ? ` by ${e.by}` : ""}`))));
    }

    return {
      async refresh() {
        const { value: about } = await Board.data.get("overview");
        if (!about.store) { list.replaceChildren(el("p", { class: "empty" }, "No store: name one with --store. graft adapters publish makes one.")); return; }
        const { value, changed } = await Board.data.get("adapters");
        if (!changed) return;
        Board.fill(head, [value.store, value.faults, value.names.length], () => [el("p", { class: "note" }, value.store), Board.faults(value.faults),
          !value.names.length && el("p", { class: "empty" }, "The store is empty.")]);
        const shown = value.names.map(name => {
          const key = `${name.fingerprint} ${name.name}`;
          if (!sections.has(key)) sections.set(key, el("section", { class: "adapter" }));
          Board.fill(sections.get(key), name, () => [el("div", { class: "title" }, el("h2", {}, name.name), el("span", { class: "soft" }, `on ${format.model(name.base)} `, el("code", { title: name.fingerprint }, name.fingerprint.slice(0, 12)))), versions(name), history(name)]);
          return sections.get(key);
        });
        if (shown.length !== list.children.length || shown.some((node, i) => list.children[i] !== node)) list.replaceChildren(...shown);
      },
    };
  },
};
