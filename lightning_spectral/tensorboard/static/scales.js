// Axes and colour maps.

/** A scale from data to pixels. On a log scale 0 has a place of its own, left of (below) the smallest positive value. */
export function scale(values, from, to, log, padding = 0) {
  const finite = values.filter((value) => Number.isFinite(value) && (!log || value >= 0));
  const positive = finite.filter((value) => value > 0);
  const usesLog = log && positive.length > 0;
  const lowest = usesLog ? Math.min(...positive) : 0;
  const hasZero = usesLog && finite.some((value) => value === 0);
  const highest = usesLog ? Math.max(...positive) : 1;
  const gap = usesLog ? Math.max(Math.log10(highest / lowest) * 0.08, 0.05) : 0;
  const change = (value) => {
    if (!usesLog) return value;
    if (value > 0) return Math.log10(value);
    return value === 0 && hasZero ? Math.log10(lowest) - gap : NaN;
  };
  let low = Math.min(...finite.map(change));
  let high = Math.max(...finite.map(change));
  if (!(low <= high)) [low, high] = [0, 1];
  if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) [low, high] = [low - (usesLog ? 0.1 : Math.abs(low) * 0.1 || 0.5), high + (usesLog ? 0.1 : Math.abs(high) * 0.1 || 0.5)];
  const room = (high - low) * padding;
  [low, high] = [low - room, high + room];
  const place = (value) => from + ((change(value) - low) / (high - low)) * (to - from);
  place.invert = (pixel) => {
    const at = low + ((pixel - from) / (to - from)) * (high - low);
    return usesLog ? 10 ** at : at;
  };
  place.ticks = (count) => (usesLog ? logTicks(low, high, count, hasZero) : linearTicks(low, high, count));
  return place;
}

function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.75) ?? rough;
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) ticks.push(Number((k * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high, count, hasZero) {
  const decades = high - low;
  const factors = decades > count / 2 ? [1] : decades > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  const every = Math.max(1, Math.ceil(decades / count));
  const ticks = hasZero ? [0] : [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power += 1) {
    if (factors.length === 1 && power % every) continue;
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      const at = Math.log10(tick);
      if (at >= low + (hasZero ? decades * 0.05 : 0) && at <= high) ticks.push(tick);
    }
  }
  return ticks.length > 1 ? ticks : [...ticks, 10 ** low, 10 ** high].filter((tick, place, all) => all.indexOf(tick) === place);
}

const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const PLASMA = ["#0d0887", "#46039f", "#7201a8", "#9c179e", "#bd3786", "#d8576b", "#ed7953", "#fb9f3a", "#fdca26"];

/** Colour at a place in [0, 1]. */
export const viridis = (at) => between(VIRIDIS, at);
export const plasma = (at) => between(PLASMA, at);

function between(stops, at) {
  const place = Math.min(Math.max(at, 0), 1) * (stops.length - 1);
  const first = Math.min(Math.floor(place), stops.length - 2);
  return mix(stops[first], stops[first + 1], place - first);
}

const BRIGHT_PAGE = "#ffffff"; // --page of style.css
const DARK_PAGE = "#303030"; // and in the dark theme

/** A colour mixed with white until it can be seen on the dark page: contrast 3 (WCAG 2.1, graphics), 4.5 for text. */
export const onDark = (color, wanted = 3) => seenOn(DARK_PAGE, color, "#ffffff", wanted);

/** A colour mixed with black until text of it can be read on the bright page. */
export const textOnBright = (color) => seenOn(BRIGHT_PAGE, color, "#000000", 4.5);

function seenOn(page, color, towards, wanted) {
  if (!/^#[0-9a-f]{6}$/i.test(color ?? "")) return color;
  let seen = color;
  while (contrast(seen, page) < wanted) seen = mix(seen, towards, 0.06);
  return seen;
}

function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

function luminance(color) {
  const linear = [1, 3, 5].map((k) => parseInt(color.slice(k, k + 2), 16) / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

/** Mix two #rrggbb colours. */
export function mix(one, other, share) {
  const channel = (color, k) => parseInt(color.slice(1 + 2 * k, 3 + 2 * k), 16);
  const mixed = [0, 1, 2].map((k) => Math.round(channel(one, k) * (1 - share) + channel(other, k) * share));
  return `#${mixed.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
}
