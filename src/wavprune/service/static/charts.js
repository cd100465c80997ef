// Lines in SVG: axes, one path for each basis, and a mark at what is set.

const NAMESPACE = "http://www.w3.org/2000/svg";
const MARGIN = { left: 46, right: 14, top: 12, bottom: 40 };

function node(name, attributes, text) {
  const found = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  if (text !== undefined) found.textContent = text;
  return found;
}

function linearTicks(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const ticks = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step / 1e6; x += step) ticks.push(x);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10) {
    for (const n of high / low < 30 ? [1, 2, 3, 5, 7] : [1, 3]) ticks.push(n * power);
  }
  return ticks.filter((x) => x >= low && x <= high);
}

// settings: series [{name, color, x, y, chosen}], xLabel, yLabel, xFormat, range, line, dot, title.
export function draw(svg, settings) {
  const width = svg.clientWidth || 400;
  const height = svg.clientHeight || 300;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", settings.title);
  const points = settings.series.flatMap((one) => one.x.map((x, i) => [x, one.y[i]])).filter(([, y]) => !Number.isNaN(y));
  if (settings.dot) points.push([settings.dot.x, settings.dot.y]);
  const xs = points.map(([x]) => x);
  const [low, high] = settings.range ?? [Math.min(...xs), Math.max(...xs)];
  const wide = high / low > 6 && low > 0;
  const scale = wide ? Math.log : (x) => x;
  const ys = points.map(([, y]) => y);
  const least = Math.min(...ys);
  const most = Math.max(...ys) || 1;
  // Lines that lie close together are looked at closely.
  const bottom = least > most / 2 ? least - (most - least) * 0.1 : 0;
  const top = most + (most - bottom) * 0.04;
  const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  const left = (x) => MARGIN.left + ((scale(x) - scale(low)) / (scale(high) - scale(low) || 1)) * inner.width;
  const down = (y) => MARGIN.top + (1 - (y - bottom) / (top - bottom || 1)) * inner.height;
  const parts = [];
  let last = -Infinity;
  for (const x of (wide ? logTicks : linearTicks)(low, high)) {
    parts.push(node("line", { class: "grid", x1: left(x), x2: left(x), y1: MARGIN.top, y2: MARGIN.top + inner.height }));
    if (left(x) - last < 52) continue;
    last = left(x);
    parts.push(node("text", { x: left(x), y: height - 22, "text-anchor": "middle" }, settings.xFormat(x)));
  }
  for (const y of linearTicks(bottom, top)) {
    parts.push(node("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: down(y), y2: down(y) }));
    parts.push(node("text", { x: MARGIN.left - 6, y: down(y) + 4, "text-anchor": "end" }, String(+y.toPrecision(3))));
  }
  parts.push(node("text", { x: MARGIN.left + inner.width / 2, y: height - 5, "text-anchor": "middle" }, settings.xLabel));
  const turned = `translate(12 ${MARGIN.top + inner.height / 2}) rotate(-90)`;
  parts.push(node("text", { transform: turned, "text-anchor": "middle" }, settings.yLabel));
  const ordered = [...settings.series].sort((a, b) => a.chosen - b.chosen);
  for (const one of ordered) {
    const steps = one.x.map((x, i) => [x, one.y[i]]).filter(([x, y]) => x >= low && x <= high && !Number.isNaN(y));
    const path = steps.map(([x, y], i) => `${i ? "L" : "M"}${left(x).toFixed(1)} ${down(y).toFixed(1)}`).join("");
    const line = node("path", { class: `series c${one.color}${one.chosen ? " chosen" : ""}`, d: path });
    line.append(node("title", {}, one.name));
    parts.push(line);
  }
  if (settings.line !== undefined) {
    parts.push(node("line", { class: "marker", x1: left(settings.line), x2: left(settings.line), y1: MARGIN.top, y2: MARGIN.top + inner.height }));
  }
  if (settings.dot) {
    const { x, y, color } = settings.dot;
    parts.push(node("circle", { class: `dot c${color}`, cx: left(x), cy: down(y), r: 5 }));
  }
  svg.replaceChildren(...parts);
}
