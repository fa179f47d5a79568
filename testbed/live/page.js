"use strict";
// Everything that comes from the run is put on the page as text, or drawn; nothing of it is ever markup.

const $ = id => document.getElementById(id);
const NONE = "–", SPACE = "\u00a0";
const ALL = "";  // the choice that stands for every link, as the link server understands an empty list

// The run, as the server tells it

const empty = () => ({rows: Object.create(null), series: Object.create(null)});  // cells may have any name
let run = empty(), lost = false;

function take(message) {
  if (message.ended) return location.replace("report.html");
  if (message.all) run = empty();
  const {rows, series, all, ...parts} = message;
  Object.assign(run, parts);
  Object.assign(run.rows, rows);
  for (const [cell, told] of Object.entries(series || {})) run.series[cell] = extended(run.series[cell], told);
  schedule();
}

function extended(before, told) {
  const kept = before && before.width_s === told.width_s ? before.columns : {};
  const columns = {};
  for (const [name, values] of Object.entries(told.columns)) {
    const column = (kept[name] || []).slice(0, told.from);
    while (values.length && column.length < told.from) column.push(null);
    columns[name] = column.concat(values);
  }
  return {width_s: told.width_s, reported_s: told.reported_s, columns};
}

// Numbers as people read them

function si(value, unit) {
  if (value == null) return NONE;
  const prefixes = ["n", "µ", "m", "", "k", "M", "G", "T"];
  const power = value ? Math.min(4, Math.max(-3, Math.floor(Math.log10(Math.abs(value)) / 3 + 1e-9))) : 0;
  return Number((value / 1000 ** power).toPrecision(3)) + SPACE + prefixes[power + 3] + unit;
}
const number = value => value == null ? NONE : value >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
const percent = value => value == null ? NONE : (100 * value).toFixed(1) + SPACE + "%";
const limit = value => value == null ? "no limit" : si(value, "bit/s");

function rateText(bps) {
  for (const [unit, factor] of [["gbit", 1e9], ["mbit", 1e6], ["kbit", 1e3]])
    if (bps >= factor) return Number((bps / factor).toPrecision(3)) + unit;
  return Math.round(bps) + "bit";
}

function duration(seconds) {
  if (seconds >= 5400) return `${(seconds / 3600).toFixed(1)}${SPACE}h`;
  return seconds >= 90 ? `${Math.round(seconds / 60)}${SPACE}min` : `${Math.round(seconds)}${SPACE}s`;
}

// Page

function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

function element(tag, className, content) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (content !== undefined) node.textContent = content;
  return node;
}

/** One row a key, made once by ``make`` and then filled by ``fill``; rows whose key is gone are removed. */
function table(body, keys, make, fill) {
  body.known ||= new Map();
  for (const [key, row] of body.known) if (!keys.includes(key)) { row.remove(); body.known.delete(key); }
  keys.forEach((key, place) => {
    let row = body.known.get(key);
    if (!row) body.known.set(key, row = make(key));
    if (body.children[place] !== row) body.insertBefore(row, body.children[place] || null);
    fill(row, key);
  });
}

const cells = (row, classes) => classes.map(name => row.appendChild(element("td", name)));

function choose(select, choices) {
  const now = [...select.options].map(option => option.value + "\n" + option.text).join("\n\n");
  if (now === choices.map(([value, label]) => value + "\n" + label).join("\n\n")) return;
  const chosen = select.options.length ? select.value : choices[0]?.[0];
  select.replaceChildren(...choices.map(([value, label]) => new Option(label, value)));
  if (choices.some(([value]) => value === chosen)) select.value = chosen;
}

function shown() {
  const order = run.order || [];
  const scenarios = [...new Set(order.map(name => run.rows[name].scenario))];
  $("conditions").hidden = scenarios.length < 2;
  choose($("scenario"), [["*", "those of the cell that runs"], ...scenarios.map(name => [name, name || "as in the spec"])]);
  const wanted = $("scenario").value === "*" ? run.rows[run.current]?.scenario : $("scenario").value;
  return order.filter(name => run.rows[name].scenario === wanted);
}

function colour(method) {
  const style = run.styles?.[method];
  if (!style || style.color === run.styles.allreduce?.color) return css("--baseline");
  return dark.matches ? lighter(style.color) : style.color;
}

/** "#0072b2" on dark ground. */
const lighter = color => `rgb(${[1, 3, 5].map(at => Math.round(0.72 * parseInt(color.slice(at, at + 2), 16) + 0.28 * 255)).join(",")})`;
const dark = matchMedia("(prefers-color-scheme: dark)");
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const mean = values => { const known = values.filter(value => value != null); return known.length ? known.reduce((a, b) => a + b) / known.length : null; };

function drawHead() {
  const {progress} = run, current = run.rows[run.current];
  document.title = `${run.name}: live`;
  text($("name"), run.name || "");
  const state = run.gone ? "gone" : current?.state || "waiting";
  text($("state"), state);
  $("state").classList.toggle("bad", ["gone", "failed", "interrupted", "damaged"].includes(state));
  drawNote();
  if (!progress) return;
  $("progress").value = progress.share;
  const left = progress.left_s == null ? "" : `, about ${duration(progress.left_s)} left`;
  text($("progress-text"), `${progress.done} of ${progress.cells} cells ended${left}`);
  if (current) text($("headline"), `${run.current}: ${duration(current.t_s)}, step ${current.steps}`);
}

function drawNote() {
  const words = lost ? `This page’s server does not answer any more. What was recorded is shown by: testbed watch ${run.name || "RUN"}`
    : run.gone ? "The run directory is no longer there." : "";
  $("note").hidden = !words;
  text($("note"), words);
  if (words) $("controls").disabled = true;
}

function drawProblems() {
  const lines = (run.order || []).flatMap(name => run.rows[name].problems.map(problem => `${name}: ${problem}`));
  $("problems").hidden = !lines.length;
  table($("problem-list"), [...new Set(lines)].slice(0, 50), line => element("li", "", line), () => {});
}

function drawMethods(names) {
  const methods = [...new Set(names.map(name => run.rows[name].method))].sort((a, b) => (a !== "allreduce") - (b !== "allreduce") || (a < b ? -1 : 1));
  const of = method => names.map(name => run.rows[name]).filter(row => row.method === method);
  const baseline = methods.length ? mean(of(methods[0]).map(row => row.samples_per_s)) : null;
  table($("methods"), methods, method => {
    const row = element("tr"), head = row.appendChild(element("td"));
    row.swatch = head.appendChild(element("span", "swatch"));
    head.append(method);
    row.cells_ = cells(row, ["left", "", "", "", "", "", "left", ""]);
    return row;
  }, (row, method) => {
    const own = of(method), active = own.find(cell => cell.state === "running" || cell.state === "starting");
    const ended = own.filter(cell => !["running", "starting", "waiting"].includes(cell.state));
    const rate = mean(own.map(cell => cell.samples_per_s)), newest = active || ended.at(-1) || own[0];
    const counted = own.length > 1 ? `${ended.length} of ${own.length} ended` : own[0].state;
    const states = active && own.length > 1 ? `${counted}, seed ${active.seed} ${active.state}` : counted;
    row.swatch.style.background = colour(method);
    [states, number(rate), rate && baseline ? (rate / baseline).toFixed(2) + "×" : NONE, si(mean(own.map(cell => cell.payload_bytes)), "B"),
      number(newest.loss), percent(newest.accuracy), newest.scheme || NONE, newest.bandwidth_bps == null ? NONE : si(newest.bandwidth_bps, "bit/s")]
      .forEach((value, place) => text(row.cells_[place], value));
    row.cells_[0].classList.toggle("bad", own.some(cell => ["failed", "interrupted", "damaged"].includes(cell.state)));
  });
  table($("legend"), methods, method => {
    const item = element("li");
    item.swatch = item.appendChild(element("span", "swatch"));
    item.append(method);
    return item;
  }, (item, method) => { item.swatch.style.background = colour(method); });
}

function drawLinks() {
  const links = run.links || {}, names = Object.keys(links);
  choose($("link"), [...names.map(name => [name, name]), ...(names.length > 1 ? [[ALL, `all ${names.length} links`]] : [])]);
  table($("links"), names, name => {
    const row = element("tr"), button = element("button", "", name);
    button.type = "button";
    button.title = "Choose this link above";
    button.onclick = () => { $("link").value = name; showChosen(); $("rate-slider").focus(); };
    row.appendChild(element("td")).append(button);
    row.loads = ["up", "down"].map(() => {
      const box = row.appendChild(element("td", "left")).appendChild(element("div", "load")), bar = box.appendChild(element("i"));
      return {bar: bar.appendChild(element("b")), words: box.appendChild(element("span"))};
    });
    row.cells_ = cells(row, ["", "", "", "left"]);
    return row;
  }, (row, name) => {
    const link = links[name], sides = [link.up, link.down].map(side => side || [null, null, null, null]);
    sides.forEach(([most, carried], place) => {
      const {bar, words} = row.loads[place];
      bar.style.width = `${most ? Math.min(100, 100 * carried / most) : 0}%`;
      text(words, `${si(carried, "bit/s")} of ${limit(most)}`);
    });
    const sum = place => sides.map(side => side[place]).reduce((a, b) => a == null ? b : b == null ? a : a + b);
    [si(sum(2), "B"), number(sum(3)), link.delay_s ? si(link.delay_s, "s") : NONE, link.connected ? "connected" : "cut off"]
      .forEach((value, place) => text(row.cells_[place], value));
    row.cells_[3].classList.toggle("bad", !link.connected);
  });
  $("controls").disabled = run.rows[run.current]?.state !== "running" || run.gone || !names.length || lost;
  if (!edited) showChosen();
}

function drawEvents() {
  const events = [...(run.events || [])].reverse();
  const keys = events.map((event, place) => `${events.length - place} ${event.t_s} ${event.kind}`);
  table($("events"), keys, () => { const row = element("tr"); row.cells_ = cells(row, ["", "left", "left", "left"]); return row; }, (row, key) => {
    const event = events[keys.indexOf(key)];
    const rate = event.up_bps === event.down_bps ? limit(event.up_bps) : `up ${limit(event.up_bps)}, down ${limit(event.down_bps)}`;
    const to = event.connected ? rate + (event.delay_s ? `, ${si(event.delay_s, "s")} one way` : "") : "cut off";
    const by = {schedule: "schedule", manual: "manual: by hand"}[event.kind] + (event.confirmed ? "" : ", not confirmed by the kernel");
    [si(event.t_s, "s"), event.links, to, by].forEach((value, place) => text(row.cells_[place], value));
  });
}

// Figures

const throughput = series => {
  const whole = Math.floor(series.reported_s / series.width_s);
  return (series.columns.samples || []).slice(0, whole).map(value => value == null ? null : value / series.width_s);
};
const PAYLOAD = 1448 / 1514 * 0.98;  // as in the report: TCP payload of a full frame, less the acknowledgements
const FIGURES = [
  {title: "Throughput", unit: value => `${number(value)}${SPACE}samples/s`, tick: number, of: throughput,
    caption: "Samples trained per second by all ranks together; the grey area is the tightest limit of any link (right axis).", right: true},
  {title: "Links of the cell that runs", unit: value => si(value, "bit/s"), band: true,
    caption: "What the kernel counted: the mean over all links and directions, and from the idlest to the busiest. Dotted: the tightest limit."},
  {title: "Estimate against truth", unit: value => si(value, "bit/s"), of: series => series.columns.bandwidth_bps, truth: true,
    caption: "The bandwidth that a method reckons with. Dotted: the payload that the tightest link can carry."},
  {title: "What was sent", unit: percent, log: true, of: series => series.columns.ratio,
    caption: "Share of the gradient’s elements that was sent in a step."},
  {title: "Training loss", unit: number, log: true, of: series => series.columns.loss, caption: "Mean over ranks."},
  {title: "Accuracy", unit: percent, dots: true, of: series => series.columns.accuracy, caption: "On the test set, one dot an evaluation."},
];

for (const figure of FIGURES) {
  const box = element("figure", "card");
  box.append(element("h3", "", figure.title));
  figure.canvas = box.appendChild(element("canvas"));
  figure.canvas.tabIndex = 0;
  figure.canvas.setAttribute("role", "img");
  figure.canvas.setAttribute("aria-label", `${figure.title} over time. ${figure.caption} Arrow keys read values.`);
  figure.readout = box.appendChild(element("div", "readout"));
  figure.readout.setAttribute("aria-live", "polite");
  box.append(element("figcaption", "", figure.caption));
  $("figures").append(box);
  const move = share => { figure.at = share; schedule(); };
  figure.canvas.addEventListener("pointermove", event => {
    const {left, width} = figure.canvas.getBoundingClientRect();
    if (figure.plot) move((event.clientX - left - figure.plot.left) / (width - figure.plot.left - figure.plot.right));
  });
  figure.canvas.addEventListener("pointerleave", () => move(null));
  figure.canvas.addEventListener("blur", () => move(null));
  figure.canvas.addEventListener("keydown", event => {
    const by = {ArrowLeft: -0.01, ArrowRight: 0.01}[event.key];
    if (!by) return;
    event.preventDefault();
    move(Math.min(1, Math.max(0, (figure.at ?? 1) + by)));
  });
}

/** Lines of a figure: {name, color, dash, y: [by bin], width_s}, and what lies behind them. */
function content(figure, names) {
  const current = run.series[run.current], limits = current?.columns.limit_bps;
  const tightest = limits && {name: "tightest limit", color: css("--ink"), dash: [2, 3], y: limits, width_s: current.width_s, steps: true};
  if (figure.band) {
    if (!current?.columns.carried_bps) return {lines: []};
    const {carried_bps, least_bps, most_bps} = current.columns;
    const own = {name: "carried", color: colour(run.rows[run.current].method), dash: [], y: carried_bps, width_s: current.width_s};
    return {lines: [own, ...(tightest ? [tightest] : [])], band: {low: least_bps, high: most_bps, color: own.color, width_s: current.width_s}};
  }
  const lines = [];
  for (const name of names) {
    const series = run.series[name], y = series && figure.of(series);
    if (!y || !y.some(value => value != null)) continue;
    const {method} = run.rows[name], dash = {dash: [7, 4], dot: [2, 3], dashdot: [7, 3, 2, 3]}[run.styles[method]?.dash] || [];
    lines.push({name: method, color: colour(method), dash, y, width_s: series.width_s, dots: figure.dots});
  }
  if (figure.truth && lines.length && tightest)
    lines.push({...tightest, name: "payload of the tightest link", y: limits.map(value => value == null ? null : value * PAYLOAD)});
  return {lines, area: figure.right && lines.length ? tightest : null};
}

function ticks(low, high, log) {
  if (!log) {
    const rough = (high - low) / 5 || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 2.5, 5, 10].find(factor => factor * power >= rough), found = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
    return found;
  }
  let found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
  found = found.filter(at => at >= low * 0.999 && at <= high * 1.001);
  return found.length > 6 ? found.filter(at => Math.abs(Math.log10(at) - Math.round(Math.log10(at))) < 1e-9) : found;
}

/** From a value to the height at which it is drawn. */
function scale(columns, log, height) {
  let low = Infinity, high = -Infinity;
  for (const column of columns) for (const value of column || []) if (value != null && (!log || value > 0)) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (high === -Infinity) return null;
  if (log) { low = Math.max(low, high / 1e6); if (low === high) { low /= 1.5; high *= 1.5; } } else { low = Math.min(0, low); high = high > low ? high * 1.05 : low + 1; }
  const place = log ? value => Math.log(Math.max(value, low) / low) / Math.log(high / low) : value => (value - low) / (high - low);
  return {ticks: ticks(low, high, log), at: value => height * (1 - place(value))};
}

function drawFigure(figure, names) {
  const {canvas} = figure, {clientWidth: width, clientHeight: height} = canvas, dense = devicePixelRatio || 1;
  if (!width) return;
  if (canvas.width !== Math.round(width * dense) || canvas.height !== Math.round(height * dense)) {
    canvas.width = Math.round(width * dense);
    canvas.height = Math.round(height * dense);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(dense, 0, 0, dense, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "12px system-ui, sans-serif";
  pen.lineJoin = "round";
  const {lines, band, area} = content(figure, names), soft = css("--soft");
  figure.plot = null;
  if (!lines.length) {
    pen.fillStyle = soft;
    pen.textAlign = "center";
    pen.fillText("nothing recorded yet", width / 2, height / 2);
    return text(figure.readout, "");
  }
  const top = 8, bottom = 22, tall = height - top - bottom;
  const y = scale([...lines.map(line => line.y), band?.high], figure.log, tall), behind = area && scale([area.y], false, tall);
  if (!y) return;
  const widest = marks => Math.max(0, ...marks.map(mark => pen.measureText(mark).width));
  const tick = figure.tick || figure.unit, left = widest(y.ticks.map(tick)) + 8, right = behind ? widest(behind.ticks.map(limit)) + 8 : 4;
  const end_s = Math.max(...[...lines, ...(area ? [area] : [])].map(line => line.y.length * line.width_s)) || 1;
  const wide = width - left - right, x = t_s => left + wide * t_s / end_s;
  figure.plot = {left, right};

  const path = (values, width_s, at, steps) => {
    pen.beginPath();
    let last = null;
    values.forEach((value, bin) => {
      if (value == null) return;
      const across = x((bin + 0.5) * width_s), down = top + at(value);
      if (last == null) pen.moveTo(steps ? x(bin * width_s) : across, down);
      else if (steps) { pen.lineTo(x(bin * width_s), last); pen.lineTo(x(bin * width_s), down); } else pen.lineTo(across, down);
      last = down;
    });
    if (steps && last != null) pen.lineTo(x(values.length * width_s), last);
  };
  if (area) {
    path(area.y, area.width_s, behind.at, true);
    pen.lineTo(x(area.y.length * area.width_s), top + tall);
    pen.lineTo(left, top + tall);
    pen.fillStyle = css("--area");
    pen.fill();
  }
  pen.strokeStyle = css("--grid");
  pen.fillStyle = soft;
  pen.lineWidth = 1;
  pen.textBaseline = "middle";
  const rule = down => { pen.beginPath(); pen.moveTo(left, down); pen.lineTo(width - right, down); pen.stroke(); };
  pen.textAlign = "right";
  for (const mark of y.ticks) { const down = top + y.at(mark); rule(down); pen.fillText(tick(mark), left - 6, down); }
  pen.textAlign = "left";
  for (const mark of behind?.ticks || []) pen.fillText(limit(mark), width - right + 6, top + behind.at(mark));
  pen.textAlign = "center";
  for (const mark of ticks(0, end_s, false)) if (x(mark) < width - 14) pen.fillText(`${mark} s`, Math.max(x(mark), left + 6), height - 9);

  if (band) {
    pen.beginPath();
    const edge = (values, order) => order.forEach(bin => { if (band.low[bin] != null && band.high[bin] != null) pen.lineTo(x((bin + 0.5) * band.width_s), top + y.at(values[bin])); });
    const bins = [...band.high.keys()];
    edge(band.high, bins);
    edge(band.low, bins.reverse());
    pen.globalAlpha = 0.22;
    pen.fillStyle = band.color;
    pen.fill();
    pen.globalAlpha = 1;
  }
  for (const line of lines) {
    pen.strokeStyle = pen.fillStyle = line.color;
    pen.lineWidth = line.steps ? 1 : 1.8;
    pen.setLineDash(line.dash);
    path(line.y, line.width_s, y.at, line.steps);
    pen.stroke();
    pen.setLineDash([]);
    if (line.dots) line.y.forEach((value, bin) => {
      if (value == null) return;
      pen.beginPath();
      pen.arc(x((bin + 0.5) * line.width_s), top + y.at(value), 2.2, 0, 7);
      pen.fill();
    });
  }
  if (figure.at == null || figure.at < 0 || figure.at > 1) return text(figure.readout, "");
  const t_s = figure.at * end_s;
  pen.strokeStyle = soft;
  pen.beginPath();
  pen.moveTo(x(t_s), top);
  pen.lineTo(x(t_s), top + tall);
  pen.stroke();
  const read = lines.map(line => [line.name, line.y[Math.floor(t_s / line.width_s)]]).filter(([, value]) => value != null);
  text(figure.readout, `${number(t_s)}${SPACE}s: ${read.map(([name, value]) => `${name} ${figure.unit(value)}`).join(", ") || NONE}`);
}

let scheduled = false;

function schedule() {
  if (scheduled || document.hidden) return;
  scheduled = true;
  requestAnimationFrame(() => { scheduled = false; draw(); });
}

function draw() {
  const begin = performance.now();
  if (run.order) {
    const names = shown();
    drawHead();
    drawProblems();
    drawMethods(names);
    drawLinks();
    drawEvents();
    for (const figure of FIGURES) drawFigure(figure, names);
    document.documentElement.dataset.drawn = Number(document.documentElement.dataset.drawn || 0) + 1;
  }
  performance.clearMeasures("frame");
  performance.measure("frame", {start: begin, end: performance.now()});
}

// Links by hand

let edited = false;
const SLOWEST = 1e5;

const fastest = () => 10 * Math.max(1e7, ...Object.values(run.links || {}).map(link => link.up?.[0] || 0));
const onSlider = bps => Math.round(1000 * Math.log(Math.max(bps, SLOWEST) / SLOWEST) / Math.log(fastest() / SLOWEST));
const ofSlider = place => Number((SLOWEST * (fastest() / SLOWEST) ** (place / 1000)).toPrecision(2));
const chosen = () => $("link").value === ALL ? Object.values(run.links || {})[0] : run.links?.[$("link").value];

function showChosen() {
  const link = chosen(), all = $("link").value === ALL ? Object.values(run.links || {}) : [link];
  edited = false;
  if (!link) return;
  const rate = link.up?.[0];
  $("rate-slider").value = rate == null ? 1000 : onSlider(rate);
  $("rate-slider").setAttribute("aria-valuetext", limit(rate));
  if (document.activeElement !== $("rate")) $("rate").value = rate == null ? "" : rateText(rate);
  const delayed = all.every(one => one.impaired);
  $("delay").disabled = $("set-delay").disabled = !delayed;
  text($("delay-hint"), delayed ? "" : "Only where the spec gives the link some delay or loss.");
}

async function move(wanted) {
  text($("answer"), "…");
  $("answer").classList.remove("bad");
  const links = $("link").value === ALL ? [] : [$("link").value];
  try {
    const response = await fetch("link", {method: "POST", headers: {"Content-Type": "application/json"},
      body: JSON.stringify({cell: run.current, links, set: wanted})});
    const answer = response.ok ? await response.json() : {error: (await response.text()).trim()};
    if (answer.error) throw new Error(answer.error);
    const [[name, {state}]] = Object.entries(answer.links), many = Object.keys(answer.links).length;
    const now = state.connected ? `up ${limit(state.up.rate_bps)}, down ${limit(state.down.rate_bps)}${state.down.delay_s ? `, ${si(state.down.delay_s, "s")} one way` : ""}` : "cut off";
    text($("answer"), `${many > 1 ? `all ${many} links` : name}: ${now}`);
  } catch (error) {
    text($("answer"), error.message);
    $("answer").classList.add("bad");
  }
  edited = false;
}

let pending;
$("rate-slider").addEventListener("input", () => {
  edited = true;
  const rate = ofSlider($("rate-slider").value);
  $("rate").value = rateText(rate);
  $("rate-slider").setAttribute("aria-valuetext", limit(rate));
});
$("rate-slider").addEventListener("change", () => {  // with the keyboard one comes for every step
  clearTimeout(pending);
  pending = setTimeout(() => move({rate: $("rate").value}), 400);
});
for (const id of ["rate", "delay"]) $(id).addEventListener("input", () => { edited = true; });
$("move").addEventListener("submit", event => {
  event.preventDefault();
  if (document.activeElement === $("delay")) move({delay: $("delay").value});
  else move({rate: $("rate").value});
});
$("set-delay").addEventListener("click", () => move({delay: $("delay").value}));
$("cut").addEventListener("click", () => move({up: false}));
$("join").addEventListener("click", () => move({up: true}));
$("link").addEventListener("change", showChosen);
$("scenario").addEventListener("change", schedule);
dark.addEventListener("change", schedule);
addEventListener("resize", schedule);
document.addEventListener("visibilitychange", schedule);

const source = new EventSource("events");
source.onmessage = event => { lost = false; take(JSON.parse(event.data)); };
source.onerror = () => { lost = true; drawNote(); };
