// Small helpers to build the page: elements, selects, requests.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element with attributes (functions become listeners) and children (strings become text). */
export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An SVG element. */
export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A labelled select; hidden while there is nothing to choose. `options`: [[value, text], ...]. */
export function select(label, options, chosen, onChange, keep = false) {
  const box = element("select", { change: (event) => onChange(event.target.value), "aria-label": label });
  for (const [value, text] of options) {
    box.append(element("option", { value, selected: value === chosen || null }, text));
  }
  return element("label", { class: "field", hidden: (options.length < 2 && !keep) || null }, element("span", {}, label), box);
}

/** The answer of a route; throws an Error with the server's sentence. */
export async function ask(route, parameters = {}, runs = []) {
  const query = new URLSearchParams(parameters);
  for (const run of runs) query.append("run", run);
  const response = await fetch(`./${route}?${query}`);
  const answer = await response.json();
  if (answer.error) throw new Error(answer.error);
  return answer;
}

/** Several requests of at most `size` runs each, so that the first curves come soon. */
export async function askInParts(route, parameters, runs, size, onPart) {
  for (let start = 0; start < runs.length; start += size) {
    if (onPart(await ask(route, parameters, runs.slice(start, start + size))) === false) return;
  }
}

/** A box that follows the pointer. */
export function tooltip() {
  const box = element("div", { class: "tooltip", hidden: true });
  document.body.append(box);
  return {
    show(event, lines) {
      box.replaceChildren(...lines.map((line) => element("div", {}, line)));
      box.hidden = false;
      const { width, height } = box.getBoundingClientRect();
      const left = event.clientX + 14 + width > innerWidth ? event.clientX - width - 14 : event.clientX + 14;
      box.style.left = `${Math.max(0, left)}px`;
      box.style.top = `${Math.max(0, Math.min(event.clientY + 12, innerHeight - height - 4))}px`;
    },
    hide() {
      box.hidden = true;
    },
  };
}

/** 1234567 -> "1.23M", 0.01234 -> "0.0123". */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "none";
  const size = Math.abs(value);
  for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return `${Number((value / (name === "k" ? 1e3 : unit)).toPrecision(3))}${name}`;
  }
  return size !== 0 && size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
}
