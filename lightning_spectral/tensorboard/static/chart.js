// A line chart in SVG: lines with bands, dotted levels, markers, labels at the right end, a tooltip at the nearest point.

import { element, short, svg } from "./dom.js";
import { onDark, scale, textOnBright } from "./scales.js";

/** What style.css takes in the dark theme for the colour of a mark; a saved chart keeps the colour. */
const ink = (color) => ({ style: `--dark: ${onDark(color)}` });

/** The same of a text, which is darker than its mark in the bright theme, too. */
const textInk = (color) => `--dark: ${onDark(color, 4.5)}; --bright: ${textOnBright(color)}`;

const MARGIN = { top: 8, bottom: 38, left: 56 };

/**
 * @param {object} options
 *   lines: [{label, color, dash, width, x: [], y: [], low, high, title: (k) => [text], hollow: [bool], bold}]
 *   levels: [{y, color, dash, label}]; marks: [{x, y, color, text}]; verticals: [{x, label, dash, color}]
 *   xLabel, yLabel, logX, logY, height, width, tip, testId
 */
export function lineChart(options) {
  const { lines, levels = [], marks = [], verticals = [], logX, logY, tip } = options;
  const width = options.width ?? 640;
  const height = options.height ?? 300;
  const longest = Math.max(0, ...lines.map((line) => (line.label ?? "").length));
  const right = longest ? Math.min(14 + longest * 7, width * 0.3) : 12;
  const xs = lines.flatMap((line) => line.x);
  const ys = [...lines.flatMap((line) => [...line.y, ...(line.low ?? []), ...(line.high ?? [])]), ...levels.map((level) => level.y)];
  const known = (values) => values.filter((value) => value !== null && Number.isFinite(value));
  const x = scale(known(xs), MARGIN.left, width - right, logX);
  const y = scale(known(ys), height - MARGIN.bottom, MARGIN.top, logY, 0.04);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "chart", "data-chart": options.testId, role: "img", "aria-label": options.title ?? options.yLabel });
  drawAxes(root, { x, y, width, height, right, ...options });
  const clip = (path, attributes) => root.append(svg("path", { d: path, fill: "none", ...attributes }));
  for (const line of lines) {
    if (line.low) {
      root.append(svg("path", { d: bandPath(line, x, y), fill: line.color, opacity: line.bandOpacity ?? 0.12, stroke: "none", class: "band", ...ink(line.color) }));
    }
  }
  for (const level of levels) {
    if (!Number.isFinite(y(level.y))) continue;
    clip(`M${MARGIN.left},${y(level.y)}H${width - right}`, { stroke: level.color, "stroke-dasharray": level.dash ?? "2 3", opacity: 0.8, class: "level", ...ink(level.color) });
  }
  for (const vertical of verticals) {
    const at = x(vertical.x);
    if (!Number.isFinite(at)) continue;
    clip(`M${at},${MARGIN.top}V${height - MARGIN.bottom}`, { stroke: vertical.color, "stroke-dasharray": vertical.dash, class: "vertical" });
    root.append(svg("text", { x: at + 3, y: height - MARGIN.bottom - 5, class: "note" }, vertical.label));
  }
  for (const line of lines) {
    clip(linePath(line, x, y), { stroke: line.color, "stroke-width": line.width ?? 1.8, "stroke-dasharray": line.dash, opacity: line.opacity ?? 1, "stroke-linejoin": "round", class: "line", ...ink(line.color) });
    line.x.forEach((at, k) => {
      const [px, py] = [x(at), y(line.y[k])];
      if (line.y[k] === null || !Number.isFinite(px) || !Number.isFinite(py)) return;
      if (line.hollow?.[k]) root.append(svg("circle", { cx: px, cy: py, r: 3, class: "hollow", stroke: line.color, ...ink(line.color) }));
      else if (line.dots) root.append(svg("circle", { cx: px, cy: py, r: 2, fill: line.color, class: "point", ...ink(line.color) }));
    });
  }
  for (const mark of marks) {
    const [px, py] = [x(mark.x), y(mark.y)];
    if (!Number.isFinite(px) || !Number.isFinite(py)) continue;
    root.append(svg("path", { d: `M${px},${py - 4}l6,-11h-12z`, class: "alarm" }, svg("title", {}, mark.text)));
  }
  endLabels(root, lines, y, width - right + 5, height);
  if (tip) hover(root, { lines, marks, x, y, width, height, right, tip });
  return root;
}

function drawAxes(root, { x, y, width, height, right, xLabel, yLabel, xFormat }) {
  const bottom = height - MARGIN.bottom;
  for (const tick of y.ticks(Math.max(3, Math.round(height / 45)))) {
    const at = y(tick);
    if (at < MARGIN.top - 1 || at > bottom + 1) continue;
    root.append(svg("path", { d: `M${MARGIN.left},${at}H${width - right}`, class: "grid" }));
    root.append(svg("text", { x: MARGIN.left - 6, y: at + 4, class: "tick", "text-anchor": "end" }, short(tick)));
  }
  let last = -Infinity;
  for (const tick of x.ticks(Math.max(3, Math.round(width / 75)))) {
    if (tick < 0 || !Number.isInteger(tick)) continue; // steps, tokens and modes are counted
    const at = x(tick);
    if (!Number.isFinite(at) || at < MARGIN.left - 1 || at > width - right + 1) continue;
    root.append(svg("path", { d: `M${at},${MARGIN.top}V${bottom}`, class: "grid" }));
    if (at - last < 30) continue;
    root.append(svg("text", { x: at, y: bottom + 15, class: "tick", "text-anchor": "middle" }, (xFormat ?? short)(tick)));
    last = at;
  }
  root.append(svg("path", { d: `M${MARGIN.left},${MARGIN.top}V${bottom}H${width - right}`, class: "axis" }));
  root.append(svg("text", { x: (MARGIN.left + width - right) / 2, y: height - 5, class: "label", "text-anchor": "middle" }, xLabel ?? ""));
  const middle = (MARGIN.top + bottom) / 2;
  root.append(svg("text", { x: 12, y: middle, class: "label", "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, yLabel ?? ""));
}

function linePath(line, x, y) {
  let path = "";
  let pen = "M";
  line.x.forEach((at, k) => {
    const [px, py] = [x(at), line.y[k] === null ? NaN : y(line.y[k])];
    if (Number.isFinite(px) && Number.isFinite(py)) {
      path += `${pen}${px.toFixed(1)},${py.toFixed(1)}`;
      pen = "L";
    } else {
      pen = "M"; // a window without a number is a gap, never bridged
    }
  });
  return path || "M0,0";
}

function bandPath(line, x, y) {
  const there = [];
  const back = [];
  line.x.forEach((at, k) => {
    if (line.low[k] === null || line.high[k] === null) return;
    const [px, low, high] = [x(at), y(line.low[k]), y(line.high[k])];
    if (![px, low, high].every(Number.isFinite)) return;
    there.push(`${px.toFixed(1)},${high.toFixed(1)}`);
    back.unshift(`${px.toFixed(1)},${low.toFixed(1)}`);
  });
  return there.length > 1 ? `M${[...there, ...back].join("L")}Z` : "M0,0";
}

function endLabels(root, lines, y, at, height) {
  const labels = lines
    .filter((line) => line.label)
    .map((line) => ({ line, y: y(line.y.filter((value) => value !== null).at(-1)) }))
    .filter((label) => Number.isFinite(label.y))
    .sort((one, other) => one.y - other.y);
  if (labels.length * 12 > height - MARGIN.bottom) return; // more lines than room: the list of runs says which is which
  for (let k = 1; k < labels.length; k += 1) labels[k].y = Math.max(labels[k].y, labels[k - 1].y + 12);
  let floor = height - MARGIN.bottom;
  for (const label of labels.toReversed()) {
    label.y = Math.min(label.y, floor);
    floor = label.y - 12;
  }
  for (const label of labels) root.append(svg("text", { x: at, y: label.y + 4, class: "end", fill: label.line.color, style: textInk(label.line.color) }, label.line.label));
}

function hover(root, { lines, marks, x, y, width, height, right, tip }) {
  const points = lines.flatMap((line) =>
    line.x.map((at, k) => ({ px: x(at), py: line.y[k] === null ? NaN : y(line.y[k]), color: line.color, text: () => line.title?.(k) ?? [] })),
  ).filter((point) => Number.isFinite(point.px) && Number.isFinite(point.py));
  for (const mark of marks) points.push({ px: x(mark.x), py: y(mark.y) - 10, color: "#C8102E", text: () => [mark.text] });
  const dot = svg("circle", { r: 4.5, class: "dot", visibility: "hidden" });
  const area = svg("rect", { x: MARGIN.left - 8, y: 0, width: Math.max(1, width - right - MARGIN.left + 16), height, fill: "transparent", class: "hover" });
  area.addEventListener("mousemove", (event) => {
    const box = root.getBoundingClientRect();
    const [mx, my] = [((event.clientX - box.left) * width) / box.width, ((event.clientY - box.top) * height) / box.height];
    let best = null;
    let distance = 45 ** 2;
    for (const point of points) {
      const far = (point.px - mx) ** 2 + (point.py - my) ** 2;
      if (far < distance) [best, distance] = [point, far];
    }
    if (!best) return leave();
    for (const [name, value] of [["cx", best.px], ["cy", best.py], ["fill", best.color], ["visibility", "visible"]]) dot.setAttribute(name, value);
    tip.show(event, best.text());
  });
  const leave = () => {
    dot.setAttribute("visibility", "hidden");
    tip.hide();
  };
  area.addEventListener("mouseleave", leave);
  root.append(dot, area);
}

/** A figure: title, chart and an "SVG" link that saves it. */
export function figure(title, color, chart) {
  const width = chart.getAttribute("width");
  const save = element("button", {
    class: "save",
    title: "Save this chart as SVG",
    click: () => {
      const copy = chart.cloneNode(true);
      copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
      const style = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]).filter((rule) => rule.selectorText?.includes(".chart")).map((rule) => rule.cssText);
      copy.prepend(svg("style", {}, `:root{--text:#333;--soft:#777;--line:#e4e4e4;--page:#fff}${style.join("\n")}`));
      const link = element("a", { download: `${title.replace(/\W+/g, "_")}.svg`, href: URL.createObjectURL(new Blob([copy.outerHTML], { type: "image/svg+xml" })) });
      link.click();
      URL.revokeObjectURL(link.href);
    },
  }, "SVG");
  const heading = element("figcaption", {}, element("span", {}, title), save);
  if (color) heading.firstChild.style = textInk(color);
  return element("figure", { style: `width: ${width}px` }, heading, chart);
}
