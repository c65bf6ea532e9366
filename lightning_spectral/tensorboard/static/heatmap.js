// Layer x step heat map on a canvas, with a colour bar and a value under the pointer.

import { element, short } from "./dom.js";
import { viridis } from "./scales.js";

const LEFT = 92;
const BOTTOM = 34;
const BAR = 70;

/** @param {object} answer what `/layers` gave for one run; @param {object} options width, log, xLabel, x (T), tip, title(layer, k) */
export function heatMap(answer, options) {
  const { steps, layers, values, status } = answer;
  const width = options.width ?? 640;
  const row = Math.max(8, Math.min(26, 300 / Math.max(layers.length, 1)));
  const height = row * layers.length + BOTTOM + 6;
  const canvas = element("canvas", { class: "heat", width: width * 2, height: height * 2, "data-chart": options.testId, role: "img", "aria-label": options.label });
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const known = values.flat().filter((value) => value !== null && (!options.log || value > 0));
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const change = options.log ? Math.log : (value) => value;
  const shade = (value) => viridis(high > low ? (change(value) - change(low)) / (change(high) - change(low)) : 0.5);
  const edges = edgesOf(options.x ?? steps, LEFT, width - BAR);
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.body);
  const ink = style.getPropertyValue("--soft").trim() || "#777";
  const line = style.getPropertyValue("--line").trim() || "#ddd";
  pen.scale(2, 2);
  pen.font = "11px Roboto, system-ui, sans-serif";
  const top = (l) => 4 + (layers.length - 1 - l) * row; // the first layer at the bottom, as in a network
  layers.forEach((name, l) => {
    values[l].forEach((value, k) => {
      pen.fillStyle = value === null ? line : shade(value); // no number: a grey cell, its status under the pointer
      pen.fillRect(edges[k], top(l), edges[k + 1] - edges[k] + 0.4, row + 0.2);
      if (value !== null && status[l][k] !== "ok") {
        pen.fillStyle = "#ffffffb0";
        pen.fillRect((edges[k] + edges[k + 1]) / 2 - 1.5, top(l) + row / 2 - 1.5, 3, 3);
      }
    });
    if (row >= 11 || l % Math.ceil(11 / row) === 0) {
      pen.fillStyle = ink;
      pen.textAlign = "right";
      pen.fillText(name.length > 14 ? `...${name.slice(-12)}` : name, LEFT - 6, top(l) + row / 2 + 4);
    }
  });
  drawSteps(pen, options.x ?? steps, edges, height, ink, options.xLabel, width);
  drawBar(pen, { low, high, change, shade, width, height: row * layers.length, ink, log: options.log });
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const [mx, my] = [event.clientX - box.left, event.clientY - box.top];
    const k = edges.findIndex((edge, place) => mx >= edge && mx < (edges[place + 1] ?? -1));
    const l = layers.length - 1 - Math.floor((my - 4) / row);
    if (k < 0 || l < 0 || l >= layers.length) return options.tip.hide();
    options.tip.show(event, options.title(l, k));
  });
  canvas.addEventListener("mouseleave", () => options.tip.hide());
  return canvas;
}

function edgesOf(xs, from, to) {
  if (xs.length < 2) return [from, to];
  const middles = xs.slice(1).map((x, k) => (x + xs[k]) / 2);
  const all = [2 * xs[0] - middles[0], ...middles, 2 * xs.at(-1) - middles.at(-1)];
  const span = all.at(-1) - all[0] || 1;
  return all.map((edge) => from + ((edge - all[0]) / span) * (to - from));
}

function drawSteps(pen, xs, edges, height, ink, label, width) {
  pen.fillStyle = ink;
  pen.textAlign = "center";
  let last = -Infinity;
  xs.forEach((x, k) => {
    const at = (edges[k] + edges[k + 1]) / 2;
    if (at - last < 48) return;
    pen.fillText(short(x), at, height - BOTTOM + 14);
    last = at;
  });
  pen.fillText(label, (LEFT + width - BAR) / 2, height - 4);
}

function drawBar(pen, { low, high, change, shade, width, height, ink, log }) {
  if (!(low <= high)) return;
  const left = width - BAR + 12;
  for (let k = 0; k < height; k += 1) {
    const at = 1 - k / height;
    pen.fillStyle = shade(log ? Math.exp(change(low) + at * (change(high) - change(low))) : low + at * (high - low));
    pen.fillRect(left, 4 + k, 12, 1.3);
  }
  pen.fillStyle = ink;
  pen.textAlign = "left";
  pen.fillText(short(high), left + 16, 12);
  if (high > low) pen.fillText(short(low), left + 16, 4 + height);
}
