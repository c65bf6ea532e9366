// The tab SPECTRAL: list of runs at the left, figures at the right. Everything is drawn as measured: nothing is smoothed.

import { ask, askInParts, element, select, tooltip } from "./dom.js";
import { connect, followTheme, onReturn } from "./host.js";
import { shortNames } from "./names.js";
import { Selection } from "./selection.js";
import { bucketTools, curvePanels, drawsUntrained, exponentView, heatView, inOneChart, legendOf, numberless, runColors, spectrumView } from "./views.js";

const AT_FIRST = 12; // runs selected when the page opens
const MAX_MAPS = 6; // heat maps at once
const PART = 12; // runs in one request
const RELOAD_SECONDS = 30;
const LONG = 60; // a name in the list takes two lines or so

const state = {
  runs: [], selected: new Set(), filter: "", metric: "hard_rank", site: "post", stage: "train", xAxis: "step", logX: false, logY: false,
  relative: "none", panels: "auto", range: false, of: new Map(), looks: { colors: {}, buckets: {}, metrics: {} }, metrics: {},
  bucketNames: [], layerNames: [], runColors: new Map(), palette: {}, heat: { bucket: "tail" }, spectrum: { bucket: "tail", layer: "" },
};
const selection = new Selection(state, AT_FIRST);
let tip;
let drawing = 0;

export async function render() {
  document.head.append(element("link", { rel: "stylesheet", href: "./static/style.css" }));
  followTheme(() => draw());
  tip = tooltip();
  document.body.append(element("div", { class: "page" }, element("aside", { class: "side" }), element("main", { class: "main" })));
  const host = connect(() => reload(), (theirs) => reload(theirs));
  await reload(await host.runs());
  onReturn(() => selection.follow() && update());
  setInterval(() => document.visibilityState === "visible" && reload(), RELOAD_SECONDS * 1000);
  let resized;
  addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(draw, 200);
  });
}

async function reload(theirs) {
  try {
    const { runs, palette } = await ask("runs");
    Object.assign(state, { palette });
    selection.adopt(runs, theirs);
    await update();
  } catch (error) {
    say(`TensorBoard does not answer: ${error.message}. Is it still running?`);
  }
}

const visible = () => selection.visible();
const chosen = () => visible().filter((run) => state.selected.has(run.name));

/** Asks for what the selected runs have, and draws as answers come. */
async function update() {
  const mine = ++drawing;
  const runs = chosen();
  state.runColors = runColors(runs, state.palette);
  drawSide();
  if (!runs.length) {
    say(state.runs.length ? "No run is selected." : "No run folder (one with a run.json) lies below the logdir. Give TensorBoard the out_dir of a run or sweep; a run that starts there appears by itself.");
    return;
  }
  const names = runs.map((run) => run.name);
  const of = new Map();
  try {
    const looks = await Promise.all(metricsShown().map(async (metric) => {
      const parts = [];
      of.set(metric, new Map());
      await askInParts("curves", { stage: state.stage, site: state.site, metric }, names, PART, (answer) => {
        if (mine !== drawing) return false;
        for (const [name, curve] of Object.entries(answer.runs)) of.get(metric).set(name, curve);
        parts.push(answer.looks);
        return true;
      });
      return parts;
    }));
    if (mine !== drawing) return;
    looks.flat().forEach(merge); // in the metrics' order, whichever answer came first
  } catch (error) {
    say(error.message);
    return;
  }
  state.of = of;
  if (adopt()) return update();
  drawSide();
  await draw();
}

const isLoss = () => ["loss", "accuracy"].includes(state.metric);

/** The chosen metric; beside a rank the other one, and the loss. */
function metricsShown() {
  const companion = { hard_rank: ["soft_rank"], soft_rank: ["hard_rank"], loss: ["accuracy"], accuracy: ["loss"] }[state.metric] ?? [];
  return [state.metric, ...companion, ...(isLoss() ? [] : ["loss"])];
}

function merge(looks) {
  state.looks = { colors: { ...state.looks.colors, ...looks.colors }, buckets: { ...state.looks.buckets, ...looks.buckets } };
  state.metrics = looks.metrics;
}

/** Choices that the selected runs have; true if what was chosen is not among them and another was taken. */
function adopt() {
  const all = (name) => [...new Set([...state.of.get(state.metric).values()].flatMap((curve) => curve.choices[name]))];
  state.choices = { stages: all("stages"), sites: all("sites"), metrics: all("metrics") };
  const order = Object.keys(state.looks.colors);
  state.bucketNames = all("buckets").sort((a, b) => order.indexOf(a) - order.indexOf(b));
  state.layerNames = all("layers").sort();
  for (const section of [state.heat, state.spectrum]) {
    if (!state.bucketNames.includes(section.bucket)) section.bucket = state.bucketNames.at(-1) ?? "";
  }
  if (!state.layerNames.includes(state.spectrum.layer)) state.spectrum.layer = state.layerNames[Math.floor(state.layerNames.length / 2)] ?? "";
  let changed = false;
  for (const [name, list] of [["stage", "stages"], ["site", "sites"], ["metric", "metrics"]]) {
    const known = state.choices[list];
    if (known.length && !known.includes(state[name])) {
      state[name] = known[0];
      changed = true;
    }
  }
  return changed;
}

function drawSide() {
  const side = document.querySelector(".side");
  side.hidden = !state.runs.length;
  const choices = state.choices ?? { stages: [], sites: [], metrics: [] };
  const set = (name, ask_ = false) => (value) => {
    state[name] = value;
    if (ask_) update();
    else draw();
  };
  const flag = (name, text) => element("label", {}, element("input", { type: "checkbox", checked: state[name] || null, change: (event) => set(name)(event.target.checked) }), ` ${text}`);
  const names = (list, words = {}) => list.map((value) => [value, words[value] ?? value]);
  const controls = element("div", { class: "controls" },
    select("metric", names(choices.metrics, state.metrics), state.metric, set("metric", true), true),
    select("stage", names(choices.stages), state.stage, set("stage", true)),
    select("site", names(choices.sites, { post: "after the nonlinearity", pre: "before it" }), state.site, set("site", true)),
    select("x axis", [["step", "optimizer step"], ["tokens", "training tokens"]], state.xAxis, set("xAxis")),
    select("y axis", [["none", "as measured"], ["width", "relative to width D"], ["untrained", "relative to untrained"]], state.relative, set("relative")),
    select("charts", [["auto", "automatic"], ["one", "all buckets in one"], ["each", "one a bucket"]], state.panels, set("panels")),
    element("div", { class: "flags" }, flag("logX", "log x"), flag("logY", "log y"), flag("range", "range of layers")));
  const old = side.querySelector(".runs");
  const scroll = old ? old.scrollTop : 0;
  const filter = side.querySelector("input[type=text]") ?? element("input", {
    type: "text", placeholder: "Filter runs (regular expression)", "aria-label": "filter runs", value: state.filter,
    input: (event) => {
      state.filter = event.target.value;
      clearTimeout(filter.waiting);
      filter.waiting = setTimeout(update, 150);
    },
  });
  if (document.activeElement !== filter) filter.value = state.filter;
  const list = runList();
  const toggle = element("button", { click: () => {
    const all = visible().every((run) => state.selected.has(run.name));
    visible().forEach((run) => (all ? state.selected.delete(run.name) : state.selected.add(run.name)));
    update();
  } }, "Toggle all");
  const count = element("small", { class: "hint" }, `${chosen().length} of ${state.runs.length} runs drawn`);
  if (filter.isConnected) {
    side.querySelector(".controls").replaceWith(controls);
    old.replaceWith(list);
    side.querySelector(".count").replaceChildren(toggle, " ", count);
  } else side.replaceChildren(controls, filter, element("div", { class: "count" }, toggle, " ", count), list);
  list.scrollTop = scroll;
}

function runList() {
  const names = shortNames(visible().map((run) => run.name));
  const swatches = !inOneChart(state, chosen().length); // in a chart of all buckets colours are buckets
  return element("ul", { class: "runs" }, ...visible().map((run) => {
    const box = element("input", { type: "checkbox", checked: state.selected.has(run.name) || null, change: (event) => {
      if (event.target.checked) state.selected.add(run.name);
      else state.selected.delete(run.name);
      update();
    } });
    const swatch = element("span", { class: "swatch", hidden: !swatches || null });
    swatch.style.background = state.runColors.get(run.name) ?? "transparent";
    return element("li", {}, element("label", { title: `${run.name} (${run.run_id}, ${run.optimizer})` }, box, swatch, element("span", { class: "name" }, run.name.length > LONG ? names.get(run.name) : run.name), element("small", {}, run.width ? `D ${run.width}` : "")));
  }));
}

async function draw() {
  const main = document.querySelector(".main");
  const runs = chosen();
  const width = Math.max(360, main.clientWidth - 60);
  if (!state.of.size) return;
  const [heat, spectrum, exponent] = [element("div"), element("div"), element("div")];
  const metric = state.metrics[state.metric] ?? state.metric;
  const skipped = [...(state.of.get(state.metric)?.values() ?? [])].reduce((sum, curve) => sum + curve.skipped, 0);
  const notes = [
    skipped ? element("p", { class: "message" }, `${skipped} line(s) of these runs' files were left out: torn, repeated or of another run.`) : null,
    visible().length > AT_FIRST && runs.length === AT_FIRST ? element("p", { class: "hint" }, `The first ${AT_FIRST} of ${visible().length} runs are drawn; select others at the left.`) : null,
  ];
  const [first, ...others] = metricsShown();
  const ranks = [first, ...others.filter((name) => isLoss() || name !== "loss")].map((name) => curvePanels(state, name, runs, tip, width));
  const losses = !isLoss() && [...state.of.get("loss").values()].some((curve) => curve.steps.length);
  const many = runs.length > 1;
  const sections = [
    section("Rank curves", `Median over layers, as measured.${drawsUntrained(state, runs.length) ? " Dotted: the untrained network." : ""} Hollow points: status not ok. Red: alarms.`, numberless(state, runs), legendOf(state, runs), element("div", { class: "panels" }, ...ranks.filter(Boolean))),
    isLoss() ? null : half(many, section("Layers", `${metric} of every layer and window${runs.length > MAX_MAPS ? `; the first ${MAX_MAPS} runs` : ""}.`, heat)),
    half(many, section("Eigenspectrum", "Normalised eigenvalues of one layer's covariance; move the slider through training.", spectrum)),
    losses ? half(many, section("Loss by bucket", "Cross-entropy of the token to be predicted, in nats.", legendOf(state, runs), curvePanels(state, "loss", runs, tip, width))) : null,
    isLoss() ? null : half(many, section("Exponent over training", "beta of rank ~ D^beta over the widths of the selected runs, with its 95 % interval over widths.", exponent)),
  ];
  const scroll = main.scrollTop;
  main.replaceChildren(...notes.filter(Boolean), element("div", { class: "sections" }, ...sections.filter(Boolean)));
  main.scrollTop = scroll;
  main.dataset.drawn = runs.length;
  await Promise.all([drawHeat(heat, runs, width), drawSpectrum(spectrum, runs, width), drawExponent(exponent, runs, width)]);
  main.dataset.complete = String(Number(main.dataset.complete ?? 0) + 1);
}

const half = (wide, node) => {
  if (!wide) node.classList.add("half");
  return node;
};
const section = (title, words, ...content) => element("section", {}, element("h2", {}, title), element("p", {}, words), ...content.filter(Boolean));

/** Fills a section with what a route says; an error is a sentence in its place. */
async function drawPart(holder, route, parameters, runs, view) {
  try {
    const answer = await ask(route, { stage: state.stage, site: state.site, ...parameters }, runs.map((run) => run.name));
    holder.replaceChildren(...view(answer));
  } catch (error) {
    holder.replaceChildren(element("p", { class: "message" }, error.message));
  }
}

function drawHeat(holder, runs, width) {
  const some = runs.slice(0, MAX_MAPS);
  const tools = bucketTools(state, state.heat, false, (change) => {
    Object.assign(state.heat, change);
    drawHeat(holder, runs, width);
  });
  return drawPart(holder, "layers", { metric: state.metric, bucket: state.heat.bucket }, some, (answer) => [tools, heatView(state, some, answer.runs, tip, width)]);
}

function drawSpectrum(holder, runs, width) {
  const tools = bucketTools(state, state.spectrum, true, (change) => {
    Object.assign(state.spectrum, change);
    drawSpectrum(holder, runs, width);
  });
  const { bucket, layer } = state.spectrum;
  return drawPart(holder, "spectra", { bucket, layer }, runs.slice(0, AT_FIRST), (answer) => [tools, spectrumView(state, runs, answer.runs, tip, width)]);
}

function drawExponent(holder, runs, width) {
  if (new Set(runs.map((run) => run.width)).size < 2) {
    holder.replaceChildren(element("p", { class: "hint" }, "An exponent needs runs of at least two widths: ", element("code", {}, "lightning-spectral sweep"), " makes them."));
    return null;
  }
  return drawPart(holder, "exponents", { metric: state.metric }, runs, (answer) => [exponentView(state, answer, tip, width)]);
}

function say(text) {
  document.querySelector(".main").replaceChildren(element("p", { class: "message" }, text));
}
