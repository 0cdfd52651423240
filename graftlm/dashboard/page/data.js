"use strict";
/* Where contents come from: the board's server, asked again every two seconds, or the block in a page that is one file. */

Board.data = (() => {
  const block = document.getElementById("contents");
  const fixed = block && JSON.parse(block.textContent);
  const known = new Map();  // path -> { tag, value, seen }
  const curves = new Map(); // id of a run -> its whole curve

  async function get(path) {
    const before = known.get(path);
    if (fixed) { known.set(path, { seen: true }); return { value: fixed[path] ?? null, changed: !before?.seen }; }
    const response = await fetch(`api/${path}`, { headers: before ? { "If-None-Match": before.tag } : {}, cache: "no-store" });
    if (response.status === 304) {
      const changed = !before.seen;
      before.seen = true;
      return { value: before.value, changed };
    }
    if (!response.ok) {
      let said = `status ${response.status}`;
      try { said = (await response.json()).error; } catch { /* no JSON: the status is all there is */ }
      throw new Error(said);
    }
    const value = await response.json();
    known.set(path, { tag: response.headers.get("ETag"), value, seen: true });
    return { value, changed: true };
  }

  /* A curve grows at its end: only what follows the points that are here is asked for. */
  async function curve(id) {
    if (fixed) return fixed[`runs/${id}/curve`];
    const before = curves.get(id);
    const ask = before ? `?generation=${before.generation}&width=${before.width}&known=${before.columns.step.length}` : "";
    const path = `runs/${id}/curve`;
    const { value } = await get(path + ask);
    known.delete(path + ask);
    const columns = {};
    for (const [name, values] of Object.entries(value.columns))
      columns[name] = value.first && before ? before.columns[name].slice(0, value.first).concat(values) : values;
    const whole = { ...value, columns };
    curves.set(id, whole);
    return whole;
  }

  /* A view that opens has shown nothing yet: to it everything has changed. */
  function unseen() { for (const entry of known.values()) entry.seen = false; }

  return { get, curve, unseen, fixed: Boolean(fixed) };
})();
