// What the page takes from TensorBoard around it: its reload button, its runs, their selection and filter, the dark theme.
// Messages go as in TensorBoard's own plugin library; the selection, which no message tells, is read from its address
// (Scalars, Images, ...: `runSelectionState`, `regexInput`) and from the table of runs in Time Series.

const ON_BY_DEFAULT = 40; // of more runs, Scalars switches on none but those that are ticked

/** Asks and hears TensorBoard. `onReload`: its data were read again; `onRuns`: it has other runs. */
export function connect(onReload, onRuns) {
  if (window.parent === window) return { runs: async () => [] };
  const channel = new MessageChannel();
  const waiting = new Map();
  let sent = 0;
  channel.port1.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.isReply) {
      waiting.get(message.id)?.(message.payload);
      waiting.delete(message.id);
      return;
    }
    channel.port1.postMessage(JSON.stringify({ type: message.type, id: message.id, payload: null, error: null, isReply: true }));
    if (message.type === "experimental.DataReloaded") onReload();
    if (message.type === "experimental.RunsChanged") onRuns(message.payload ?? []);
  };
  window.parent.postMessage("experimental.bootstrap", "*", [channel.port2]);
  const request = (type) => new Promise((resolve) => {
    const id = sent++;
    waiting.set(id, resolve);
    channel.port1.postMessage(JSON.stringify({ type, id, payload: null, error: null, isReply: false }));
    setTimeout(() => resolve(null), 2000); // another host does not answer
  });
  return { runs: async () => (await request("experimental.GetRuns")) ?? [] };
}

/** Calls back when the page is shown again or TensorBoard's address changes: its selectors may have been used. */
export function onReturn(callback) {
  new ResizeObserver(callback).observe(document.documentElement);
  try {
    for (const event of ["hashchange", "popstate"]) window.parent.addEventListener(event, callback);
  } catch {
    // shown in a page of another origin
  }
}

/** The regular expression of TensorBoard's run filter, of whichever of its two selectors has one; else empty. */
export function runFilter() {
  try {
    const { search, hash } = window.parent.location;
    return new URLSearchParams(search).get("runFilter") || fromHash(hash).get("regexInput") || "";
  } catch {
    return ""; // another origin
  }
}

/** Run of TensorBoard -> whether it is switched on; runs that no selector speaks of are left out. */
export function switches(runs) {
  const on = new Map();
  try {
    const ticks = JSON.parse(atob(fromHash(window.parent.location.hash).get("runSelectionState") ?? "") || "{}");
    const others = Object.values(ticks).includes(true) && runs.length > ON_BY_DEFAULT ? runs : [];
    for (const run of others) on.set(run, false);
    for (const [run, tick] of Object.entries(ticks)) on.set(run, Boolean(tick));
    for (const row of window.parent.document.querySelectorAll("tb-data-table-content-row[data-id]")) {
      const box = row.querySelector("input[type=checkbox]");
      const run = row.dataset.id.slice(row.dataset.id.indexOf("/") + 1); // after the experiment's id
      if (box) on.set(run, box.checked && on.get(run) !== false);
    }
  } catch {
    // another origin, or a TensorBoard that keeps its selection elsewhere: the list of this page decides
  }
  return on;
}

const fromHash = (hash) => new URLSearchParams(hash.replace(/^#[^&]*&?/, ""));

/** Follows TensorBoard's dark theme; calls back when it has changed: what is drawn on a canvas keeps its ink. */
export function followTheme(onChange) {
  const apply = () => {
    let dark = matchMedia("(prefers-color-scheme: dark)").matches && window.parent === window;
    try {
      if (window.parent !== window) dark = window.parent.document.body.classList.contains("dark-mode");
    } catch {
      dark = false;
    }
    if (document.documentElement.classList.contains("dark") === dark) return;
    document.documentElement.classList.toggle("dark", dark);
    onChange();
  };
  apply();
  try {
    new MutationObserver(apply).observe(window.parent.document.body, { attributes: true, attributeFilter: ["class"] });
  } catch {
    // another origin: the theme at the start has to do
  }
}
