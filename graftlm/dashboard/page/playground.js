"use strict";
/* One prompt, two answers side by side as they are written, from a running server. */

Board.views.playground = {
  title: "Playground",
  open(main) {
    const { el, format } = Board;
    const sides = ["left", "right"];
    let begun = false, aborting = null;
    const problem = el("p", { class: "faults", role: "alert", hidden: true });
    const key = el("input", { type: "password", id: "key", autocomplete: "off" });
    const keyRow = el("label", { hidden: true }, "API key", key);
    const selects = Object.fromEntries(sides.map(side => [side, el("select", { id: `${side}-model` })]));
    const prompt = el("textarea", { id: "prompt", rows: 4, required: true, placeholder: "Ask both the same thing" });
    const tokens = el("input", { id: "tokens", type: "number", min: 1, value: 128 });
    const temperature = el("input", { id: "temperature", type: "number", min: 0, max: 5, step: 0.1, value: 0 });
    const ask = el("button", { type: "submit", id: "ask" }, "Ask both"), stop = el("button", { type: "button", class: "quiet", id: "stop", disabled: true }, "Stop");
    const answers = Object.fromEntries(sides.map(side => [side, { name: el("h2", {}, side), text: el("div", { class: "text answer", id: `${side}-answer`, "aria-live": "polite" }), note: el("p", { class: "note", id: `${side}-note` }) }]));
    const form = el("form", { class: "playground", onsubmit: event => { event.preventDefault(); both(); } }, keyRow,
      el("div", { class: "pair" }, sides.map(side => el("label", {}, side === "left" ? "Left" : "Right", selects[side]))), el("label", {}, "Prompt", prompt),
      el("div", { class: "controls" }, el("label", {}, "Most tokens", tokens), el("label", {}, "Temperature", temperature), el("div", { class: "buttons" }, ask, stop)));
    const pair = el("div", { class: "pair answers" }, sides.map(side => el("article", {}, answers[side].name, answers[side].text, answers[side].note)));
    main.replaceChildren(el("h1", {}, "Playground"), problem, form, pair);
    prompt.addEventListener("keydown", event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); both(); } });
    key.addEventListener("change", models);
    stop.addEventListener("click", () => aborting?.abort());

    function say(text) { problem.textContent = text; problem.hidden = !text; }
    const headers = () => ({ "Content-Type": "application/json", ...(key.value.trim() ? { Authorization: `Bearer ${key.value.trim()}` } : {}) });
    async function explain(response) {
      try { const found = await response.json(); return String(found.error?.message ?? found.error); } catch { return `status ${response.status}`; }
    }

    async function models() {
      let response;
      try { response = await fetch("api/playground/models", { headers: headers() }); } catch { return say("The board does not answer."); }
      if (response.status === 401) { keyRow.hidden = false; return say(key.value ? "This key is not known to the server." : "The server wants an API key."); }
      if (!response.ok) return say(await explain(response));
      say("");
      const { models: names } = await response.json();
      for (const [i, side] of sides.entries()) {
        const before = selects[side].value;
        selects[side].replaceChildren(...names.map(name => el("option", { value: name }, name)));
        selects[side].value = names.includes(before) ? before : names[Math.min(i, names.length - 1)] ?? "";
      }
      begun = names.length > 0;
    }

    async function both() {
      if (!prompt.value.trim() || ask.disabled) return;
      aborting = new AbortController();
      ask.disabled = true; stop.disabled = false;
      await Promise.all(sides.map(side => answer(side, aborting.signal)));
      ask.disabled = false; stop.disabled = true;
    }

    async function answer(side, signal) {
      const { name, text, note } = answers[side], model = selects[side].value, start = performance.now();
      name.textContent = model; text.textContent = ""; text.classList.remove("bad"); note.textContent = "…";
      let first = 0, count = 0, pieces = 0, finish = "";
      try {
        const response = await fetch("api/playground/chat", { method: "POST", headers: headers(), signal, body: JSON.stringify({ model, messages: [{ role: "user", content: prompt.value }], max_tokens: Number(tokens.value), temperature: Number(temperature.value) }) });
        if (!response.ok) throw new Error(await explain(response));
        const reader = response.body.getReader(), decoder = new TextDecoder();
        for (let rest = "";;) {
          const { value, done } = await reader.read();
          if (done) break;
          const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
          rest = lines.pop();
          for (const line of lines) {
            if (!line.startsWith("data:") || line.slice(5).trim() === "[DONE]") continue;
            const event = JSON.parse(line.slice(5));
            if (event.error) throw new Error(String(event.error.message));
            count = event.usage?.completion_tokens ?? count;
            for (const choice of event.choices ?? []) {
              const piece = choice.delta?.content;
              if (piece) { first ||= performance.now() - start; pieces += 1; text.append(String(piece)); }
              finish = choice.finish_reason || finish;
            }
          }
        }
        const seconds = (performance.now() - start) / 1000;
        note.textContent = `${format.count(count || pieces)} tokens in ${seconds.toFixed(1)} s, the first after ${(first / 1000).toFixed(2)} s${finish === "length" ? ", cut at the limit" : ""}`;
      } catch (error) {
        if (error.name === "AbortError") { note.textContent = "stopped"; return; }
        text.textContent = error.message; text.classList.add("bad"); note.textContent = "";
      }
    }

    return {
      async refresh() {
        const { value } = await Board.data.get("overview");
        form.hidden = pair.hidden = !value.server;
        if (!value.server) return say("No server: start graft serve, and give its address with --server http://127.0.0.1:8000.");
        if (!begun) await models();
      },
      close() { aborting?.abort(); },
      keys: { "Ctrl+Enter": ["ask both, within the prompt", null] },
    };
  },
};
