// Which runs are drawn: the list at the left, moved by TensorBoard's own selectors whenever one of them is used.

import { runFilter, switches } from "./host.js";

/** The selection of `state.runs` (`state.selected`, `state.filter`), kept in step with TensorBoard's. */
export class Selection {
  constructor(state, atFirst) {
    this.state = state;
    this.atFirst = atFirst;
    this.theirs = []; // TensorBoard's runs: folders of event files
    this.of = new Map(); // run -> TensorBoard's runs in its folder
    this.on = new Map(); // run -> whether TensorBoard has it on, when last seen
    this.filter = ""; // TensorBoard's, when last seen
  }

  /** New lists of runs. At first TensorBoard's choice is taken over; later, new runs are drawn while there is room. */
  adopt(runs, theirs = this.theirs) {
    const { state } = this;
    const [first, known] = [!state.runs.length, new Set(state.runs.map((run) => run.name))];
    Object.assign(state, { runs });
    this.theirs = theirs;
    this.of = new Map(runs.map((run) => [run.name, []]));
    for (const name of theirs) this.of.get(ownerOf(runs, name)?.name)?.push(name);
    this.follow();
    const values = [...this.on.values()];
    const chosen = first && values.includes(true) && values.includes(false);
    const room = chosen ? Infinity : this.atFirst;
    for (const run of this.visible()) {
      if (!known.has(run.name) && state.selected.size < room && this.on.get(run.name) !== false) state.selected.add(run.name);
    }
  }

  /** Takes over what was changed in TensorBoard since the last look; whether there was something. */
  follow() {
    const { state } = this;
    const [filter, was] = [runFilter(), this.on];
    let changed = filter !== this.filter;
    if (changed) state.filter = this.filter = filter;
    const ticks = switches(this.theirs);
    this.on = new Map();
    for (const [name, folders] of this.of) {
      const said = folders.map((folder) => ticks.get(folder)).filter((tick) => tick !== undefined);
      if (said.length) this.on.set(name, said.includes(true));
      else if (was.has(name)) this.on.set(name, was.get(name)); // filtered away there: its row is gone
    }
    const before = [...this.on.values()].includes(true); // of very many runs TensorBoard switches on none by itself
    for (const [name, on] of this.on) {
      if (on === (was.get(name) ?? before)) continue;
      if (on) state.selected.add(name);
      else state.selected.delete(name);
      changed = true;
    }
    return changed;
  }

  /** Runs that pass the filter, by their name, their optimizer or what TensorBoard calls them. */
  visible() {
    let pattern;
    try {
      pattern = new RegExp(this.state.filter, "i");
    } catch {
      return this.state.runs; // half-typed
    }
    return this.state.runs.filter((run) => [run.name, run.optimizer, ...(this.of.get(run.name) ?? [])].some((text) => pattern.test(text)));
  }
}

/** The run whose folder holds a folder of event files; the deepest one if several do. */
function ownerOf(runs, folder) {
  const holds = (key) => key === "" || folder === key || folder.startsWith(`${key}/`);
  return runs.filter((run) => holds(run.key)).sort((a, b) => b.key.length - a.key.length)[0];
}
