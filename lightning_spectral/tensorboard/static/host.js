// What the page takes from TensorBoard around it: the reload button, the run filter, the dark theme.

/** Calls `onReload` when TensorBoard reloads its data. Speaks the messages of TensorBoard's own plugin library. */
export function listenForReload(onReload) {
  if (window.parent === window) return;
  const channel = new MessageChannel();
  channel.port1.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.isReply) return;
    channel.port1.postMessage(JSON.stringify({ type: message.type, id: message.id, payload: null, error: null, isReply: true }));
    if (message.type === "experimental.DataReloaded") onReload();
  };
  window.parent.postMessage("experimental.bootstrap", "*", [channel.port2]);
}

/** The regular expression in TensorBoard's own list of runs, which it keeps in its address; empty if there is none. */
export function runFilter() {
  try {
    return new URLSearchParams(window.parent.location.search).get("runFilter") ?? "";
  } catch {
    return ""; // shown in a page of another origin
  }
}

/** Follows TensorBoard's dark theme. */
export function followTheme() {
  const apply = () => {
    let dark = matchMedia("(prefers-color-scheme: dark)").matches && window.parent === window;
    try {
      if (window.parent !== window) dark = window.parent.document.body.classList.contains("dark-mode");
    } catch {
      dark = false;
    }
    document.documentElement.classList.toggle("dark", dark);
  };
  apply();
  try {
    new MutationObserver(apply).observe(window.parent.document.body, { attributes: true, attributeFilter: ["class"] });
  } catch {
    // another origin: the theme at the start has to do
  }
}
