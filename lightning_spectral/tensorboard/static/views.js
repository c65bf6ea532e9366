// The figures: rank curves, losses, heat maps, spectra, exponents. Each takes the state and returns elements.

import { figure, lineChart } from "./chart.js";
import { element, select, short, svg } from "./dom.js";
import { heatMap } from "./heatmap.js";
import { shortNames } from "./names.js";
import { mix, plasma, viridis } from "./scales.js";

// of the runs of one chart, in order; dots are the untrained network's alone
const DASHES = [null, "7 3", "9 3 2 3", "16 5", "4 2"];
const FEW_LEVELS = 6; // in a chart a bucket, more runs than these would be a comb of levels
const FEW = 3; // so many runs fit into one chart of all buckets, told apart by dashes

/** Line colour of every selected run: hue by optimizer (lighter: narrower), by width alone where there is one optimizer. */
export function runColors(runs, palette) {
  const optimizers = [...new Set(runs.map((run) => run.optimizer))];
  const widths = [...new Set(runs.map((run) => run.width))].sort((a, b) => a - b);
  const spare = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#8B6F3E", "#7A5195", "#56B4E9", "#444444", "#A50026", "#C5A200", "#1F3A93", "#66A61E"];
  const at = (run) => (widths.length > 1 ? widths.indexOf(run.width) / (widths.length - 1) : 1);
  return new Map(runs.map((run, k) => {
    if (optimizers.length > 1) {
      return [run.name, mix(palette[run.optimizer], "#BBBBBB", 0.65 * (1 - at(run)))];
    }
    return [run.name, widths.length > 1 ? viridis(0.85 * (1 - at(run))) : spare[k % spare.length]];
  }));
}

const nameOf = (bucket, looks) => looks.buckets[bucket] ?? bucket;

const isLoss = (metric) => metric === "loss" || metric === "accuracy";
const halfOf = (width) => (width < 900 ? width : Math.floor(width / 2) - 12);

function shown(curve, bucket, state, name) {
  const own = curve.buckets[bucket];
  const metric = state.metrics[name] ?? name;
  if (isLoss(name)) return { divide: 1, label: metric };
  if (state.relative === "width") return { divide: curve.width, label: `${metric} / width D` };
  const untrained = curve.steps[0] === 0 ? own.median[0] : null;
  if (state.relative === "untrained") return { divide: untrained || NaN, label: `${metric} / untrained` };
  return { divide: 1, label: metric };
}

const scaled = (values, divide) => values.map((value) => (value === null || !Number.isFinite(divide) ? null : value / divide));

function lineOf(run, bucket, state, metric, extra) {
  const curve = state.of.get(metric).get(run.name);
  const own = curve.buckets[bucket];
  const { divide } = shown(curve, bucket, state, metric);
  const x = state.xAxis === "tokens" ? curve.tokens : curve.steps;
  const title = (k) => [
    `${run.name} - ${nameOf(bucket, state.looks)}`,
    `step ${curve.steps[k].toLocaleString("en")}${curve.tokens[k] === null ? "" : `, ${short(curve.tokens[k])} tokens`}`,
    `${state.metrics[metric] ?? metric} ${short(own.median[k])}` + (own.low[k] === own.high[k] ? "" : ` (layers ${short(own.low[k])} to ${short(own.high[k])})`),
    ...(curve.width && metric.includes("rank") ? [`of width D = ${curve.width}: ${short((100 * own.median[k]) / curve.width)} %`] : []),
    ...(curve.steps[0] === 0 && k > 0 && own.median[0] ? [`untrained: ${short(own.median[0])}, now ${short(own.median[k] / own.median[0])} times`] : []),
    ...(own.status[k] === "ok" || !own.status[k] ? [] : [`status: ${own.status[k]}`]),
  ];
  return { x, y: scaled(own.median, divide), hollow: own.status.map((status) => status !== "ok" && status !== ""), title, ...extra, divide, own };
}

/** Whether so many runs share one chart of all buckets, told apart by dashes. */
export const inOneChart = (state, count) => state.panels === "one" || (state.panels === "auto" && count <= FEW);

/** Whether the untrained network has a dotted line in each chart of so many runs. */
export const drawsUntrained = (state, count) => state.relative === "untrained" || inOneChart(state, count) || count <= FEW_LEVELS;

/** A piece of the line that the `place`-th run has in a chart of all buckets. */
const dashOf = (place) => svg("svg", { class: "dash", width: 34, height: 8 }, svg("path", { d: "M0,4H34", "stroke-dasharray": DASHES[place % DASHES.length] }));

/** Which run has which dashes, where runs share charts; else nothing. */
export function legendOf(state, runs) {
  if (runs.length < 2 || !inOneChart(state, runs.length)) return null;
  const names = shortNames(runs.map((run) => run.name));
  return element("div", { class: "legend" }, ...runs.map((run, place) => element("span", { title: run.name }, dashOf(place), names.get(run.name))));
}

const hasNumber = (curve, bucket) => curve.buckets[bucket]?.median.some(Number.isFinite);

/** A sentence on runs of which no window has a number; nothing where all have some. */
export function numberless(state, runs) {
  const curves = state.of.get(state.metric);
  const buckets = state.bucketNames;
  const drawn = runs.filter((run) => curves.get(run.name)?.steps.length);
  const none = drawn.filter((run) => !buckets.some((bucket) => hasNumber(curves.get(run.name), bucket)));
  if (!none.length) return null;
  const statuses = new Set(none.flatMap((run) => buckets.flatMap((bucket) => curves.get(run.name).buckets[bucket]?.status ?? [])));
  return element("p", { class: "message" }, `No window has a number: ${none.map((run) => run.name).join(", ")} (status: ${[...statuses].filter(Boolean).join(", ")}).`);
}

/** Rank (or loss) curves with the untrained network dotted: one chart of all buckets, or a chart a bucket. */
export function curvePanels(state, metric, runs, tip, width) {
  const curves = state.of.get(metric) ?? new Map();
  const drawn = runs.filter((run) => curves.get(run.name)?.steps.length);
  const buckets = state.bucketNames.filter((bucket) => drawn.some((run) => curves.get(run.name).buckets[bucket]));
  if (!buckets.length) return element("p", { class: "hint" }, "The selected runs have no such number; choose another metric, site or stage.");
  const together = inOneChart(state, runs.length);
  const names = shortNames(drawn.map((run) => run.name));
  if (!drawn.some((run) => buckets.some((bucket) => hasNumber(curves.get(run.name), bucket)))) return null;
  const groups = together ? [buckets] : buckets.map((bucket) => [bucket]);
  const size = halfOf(width);
  const panels = groups.map((group) => {
    const lines = [];
    const levels = [];
    const marks = [];
    for (const bucket of group) {
      const first = drawn.find((run) => hasNumber(curves.get(run.name), bucket));
      drawn.forEach((run) => {
        const curve = curves.get(run.name);
        if (!curve.buckets[bucket]) return;
        const color = together ? state.looks.colors[bucket] : state.runColors.get(run.name);
        const label = together ? (run === first ? nameOf(bucket, state.looks) : "") : drawn.length <= 16 ? names.get(run.name) : "";
        const line = lineOf(run, bucket, state, metric, { color, label, dash: together ? DASHES[runs.indexOf(run) % DASHES.length] : null, dots: drawn.length <= FEW && curve.steps.length <= 60 });
        if (state.range) Object.assign(line, { low: scaled(line.own.low, line.divide), high: scaled(line.own.high, line.divide) });
        lines.push(line);
        const untrained = curve.steps[0] === 0 ? line.y[0] : null;
        if (untrained !== null && !isLoss(metric) && state.relative !== "untrained" && drawsUntrained(state, drawn.length)) levels.push({ y: untrained, color });
        for (const alarm of curve.alarms.filter((alarm) => alarm.bucket === bucket)) {
          const k = curve.steps.indexOf(alarm.step);
          if (k >= 0) marks.push({ x: line.x[k], y: line.y[k], color, text: alarm.message });
        }
      });
    }
    if (state.relative === "untrained" && !isLoss(metric)) levels.push({ y: 1, color: "#888888" });
    const { label } = shown(curves.get(drawn.find((run) => curves.get(run.name).buckets[group[0]]).name), group[0], state, metric);
    const stage = curves.get(drawn[0].name).stage;
    const named = stage === "train" ? label : `${stage} ${label}`;
    const title = together ? `${named} by bucket` : `${named}, ${nameOf(group[0], state.looks)}`;
    const chart = lineChart({ lines, levels, marks, tip, title, xLabel: xName(state), yLabel: label, logX: state.logX, logY: state.logY, width: size, height: together ? 300 : 260, testId: `${metric}.${together ? "all" : group[0]}` });
    return figure(title, together ? null : state.looks.colors[group[0]], chart);
  });
  return element("div", together ? {} : { class: "whole" }, element("div", { class: "panels" }, ...panels));
}

export const xName = (state) => (state.xAxis === "tokens" ? "training tokens" : "optimizer step");

/** Layer x step. */
export function heatView(state, runs, answers, tip, width) {
  const panels = runs.filter((run) => answers[run.name]?.steps.length).map((run) => {
    const answer = answers[run.name];
    const title = (l, k) => [
      `${answer.layers[l]}, step ${answer.steps[k].toLocaleString("en")}`,
      `${state.metrics[state.metric] ?? state.metric} ${short(answer.values[l][k])}`,
      ...(answer.status[l][k] === "ok" ? [] : [`status: ${answer.status[l][k] || "no record"}`]),
    ];
    const size = halfOf(width);
    const x = state.xAxis === "tokens" && answer.tokens.every((value) => value !== null) ? answer.tokens : answer.steps;
    const map = heatMap(answer, { width: size, log: state.logY, x, xLabel: x === answer.tokens ? "training tokens" : "optimizer step", tip, title, testId: `layers.${run.name}`, label: `layers of ${run.name}` });
    return element("figure", { style: `width: ${size}px` }, element("figcaption", {}, element("span", {}, run.name)), map);
  });
  return element("div", { class: "panels" }, ...panels);
}

/** Eigenspectrum at the slider's step; the other steps of a single run are drawn faintly. */
export function spectrumView(state, runs, answers, tip, width) {
  const drawn = runs.filter((run) => answers[run.name]?.steps.length);
  if (!drawn.length) {
    return element("div", { class: "message" }, "No spectrum was saved for this choice: set ", element("code", {}, "eigenvalues: true"), " on the callback (in Python ", element("code", {}, "eigenvalues=True"), ").");
  }
  const names = shortNames(drawn.map((run) => run.name));
  const steps = [...new Set(drawn.flatMap((run) => answers[run.name].steps))].sort((a, b) => a - b);
  const holder = element("div");
  const value = element("output", {});
  const draw = (place) => {
    const step = steps[place];
    const lines = [];
    const verticals = [];
    for (const run of drawn) {
      const answer = answers[run.name];
      const k = Math.max(0, answer.steps.findLastIndex((own) => own <= step));
      const color = drawn.length === 1 ? plasma(0.85 * (k / Math.max(answer.steps.length - 1, 1))) : state.runColors.get(run.name);
      if (drawn.length === 1) {
        answer.steps.forEach((own, other) => {
          if (other !== k) lines.push({ x: answer.modes[other], y: answer.shares[other], color: plasma(0.85 * (other / Math.max(answer.steps.length - 1, 1))), opacity: 0.22, width: 1 });
        });
        verticals.push({ x: answer.hard[k], label: `hard ${short(answer.hard[k])}`, color: "#888888" }, { x: answer.soft[k], label: `soft ${short(answer.soft[k])}`, color: "#888888", dash: "5 3" });
      }
      lines.push({
        x: answer.modes[k], y: answer.shares[k], color, width: 2.4, label: drawn.length > 1 && drawn.length <= 12 ? names.get(run.name) : "",
        title: (m) => [run.name, `step ${answer.steps[k]}, mode ${answer.modes[k][m]}`, `share of variance ${short(answer.shares[k][m])}`, `hard rank ${short(answer.hard[k])}, soft rank ${short(answer.soft[k])}`],
      });
    }
    value.textContent = `step ${step.toLocaleString("en")}`;
    state.spectrum.place = place;
    const title = `${state.spectrum.layer}, ${nameOf(state.spectrum.bucket, state.looks)}, step ${step.toLocaleString("en")}`;
    holder.replaceChildren(figure(title, null, lineChart({ lines, verticals, tip, title, xLabel: "mode i", yLabel: "share of variance p_i", logX: true, logY: true, width: halfOf(width), height: 320, testId: "spectrum" })));
  };
  const place = Math.min(state.spectrum.place ?? steps.length - 1, steps.length - 1);
  const slider = element("input", { type: "range", min: 0, max: steps.length - 1, value: place, "aria-label": "step of the spectrum", input: (event) => draw(Number(event.target.value)) });
  draw(place);
  return element("div", {}, element("div", { class: "slider" }, slider, value), holder);
}

/** Exponent over training, one panel a bucket. */
export function exponentView(state, answer, tip, width) {
  if (!answer.series.length) return element("p", { class: "hint" }, answer.message);
  const panels = state.bucketNames.map((bucket) => {
    const own = answer.series.filter((series) => series.bucket === bucket);
    if (!own.length) return null;
    const lines = own.map((series) => ({
      x: series.steps, y: series.beta, low: series.widths > 2 ? series.low : null, high: series.widths > 2 ? series.high : null,
      color: series.color, label: series.name, bandOpacity: 0.13, dots: series.steps.length <= 60,
      title: (k) => [series.name, `step ${series.steps[k]}: beta = ${short(series.beta[k])}`, series.widths > 2 ? `95 % over ${series.widths} widths: ${short(series.low[k])} to ${short(series.high[k])}` : "two widths: no interval", `${series.widths} widths, up to ${series.seeds} seed(s) each`],
    }));
    const title = nameOf(bucket, state.looks);
    const chart = lineChart({ lines, levels: [{ y: 0, color: "#888888", dash: "none" }, { y: 1, color: "#888888" }], tip, title, xLabel: "optimizer step", yLabel: "exponent beta", logX: state.logX, width: halfOf(width), height: 280, testId: `beta.${bucket}` });
    return figure(title, state.looks.colors[bucket], chart);
  });
  return element("div", { class: "panels" }, ...panels);
}

/** The two selects and the figure of a section that looks at one bucket (and layer). */
export function bucketTools(state, section, withLayer, onChange) {
  const buckets = state.bucketNames.map((bucket) => [bucket, nameOf(bucket, state.looks)]);
  const tools = [select("bucket", buckets, section.bucket, (bucket) => onChange({ bucket }))];
  if (withLayer) tools.push(select("layer", state.layerNames.map((name) => [name, name]), section.layer, (layer) => onChange({ layer })));
  return element("div", { class: "tools" }, ...tools);
}
