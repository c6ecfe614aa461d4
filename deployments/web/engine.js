// The engine page: what the driver is doing now, from engine/state. All history is kept in this page.

const at = (id) => document.getElementById(id);
const HISTORY_MS = 120_000;
const history = []; // {time, running, waiting, generated, prompt} a poll
let state = null;
let owners = new Map(); // request id → hue
let timer = 0;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const whole = (value) => Math.round(value).toLocaleString("en");
const share = (part, all) => (all ? Math.round((100 * part) / all) + " %" : "–");
const bound = (value) => (value < 1 ? Number((value * 1e3).toPrecision(2)) + " ms" : Number(value.toPrecision(2)) + " s");
const seconds = (value) => (value < 1 ? (value * 1e3).toFixed(value < 0.01 ? 1 : 0) + " ms" : value.toFixed(2) + " s");

function decode(text) {
  return Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
}

function canvas(id) {
  const node = at(id);
  const ratio = window.devicePixelRatio || 1;
  const width = node.clientWidth;
  const height = Number(node.dataset.height || (node.dataset.height = node.getAttribute("height")));
  if (node.width !== Math.round(width * ratio) || node.height !== Math.round(height * ratio)) {
    node.width = Math.round(width * ratio);
    node.height = Math.round(height * ratio);
    node.style.height = height + "px";
  }
  const pen = node.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "11px system-ui, sans-serif";
  return { pen, width, height };
}

function hue(owner) {
  if (!owners.has(owner)) owners.set(owner, (owners.size * 47) % 360);
  return owners.get(owner);
}

function grid(width, height, count) {
  let size = Math.max(2, Math.floor(Math.sqrt((width * height) / Math.max(1, count))));
  while (size > 2 && Math.floor(width / size) * Math.floor(height / size) < count) size--;
  size = Math.min(size, 18);
  return { size, columns: Math.max(1, Math.floor(width / size)) };
}

function drawBlocks() {
  const { pen, width, height } = canvas("blocks");
  const kinds = decode(state.blocks.state);
  const owner = new Int16Array(decode(state.blocks.owner).buffer);
  const { size, columns } = grid(width, height, kinds.length);
  const colours = [css("--free"), css("--cached"), css("--owned"), css("--shared")];
  const light = matchMedia("(prefers-color-scheme: dark)").matches ? 62 : 36;
  const gap = size > 4 ? 1 : 0;
  const rows = Math.ceil(kinds.length / columns);
  const shown = Math.min(rows, Math.floor(height / size)) * columns;
  for (let block = 0; block < Math.min(kinds.length, shown); block++) {
    const kind = kinds[block];
    const request = owner[block] >= 0 ? state.requests[owner[block]] : null;
    pen.fillStyle = kind === 2 && request ? `hsl(${hue(request.id)} 55% ${light}%)` : colours[kind];
    pen.fillRect((block % columns) * size, Math.floor(block / columns) * size, size - gap, size - gap);
  }
  const b = state.blocks;
  at("blocks-text").textContent =
    `${whole(b.total)} of ${b.block_size} tokens: ${whole(b.used)} owned, ${whole(b.shared)} of them shared, ` +
    `${whole(b.cached)} cached, ${whole(b.free)} free` + (shown < kinds.length ? ` (the first ${whole(shown)} shown)` : "");
  at("blocks").onmousemove = (event) => {
    const block = Math.floor(event.offsetY / size) * columns + Math.floor(event.offsetX / size);
    if (block < 0 || block >= kinds.length) return;
    const request = owner[block] >= 0 ? state.requests[owner[block]] : null;
    at("hover").textContent = `block ${block}: ${["free", "cached", "owned", "shared"][kinds[block]]}` + (request ? `, ${request.id}` : "");
  };
}

function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 4, 6, 8, 10].find((step) => step * power >= value * 0.999);
}

function drawLines(id, series) {
  const { pen, width, height } = canvas(id);
  const left = 44;
  const bottom = height - 16;
  const now = history.at(-1).time;
  const top = ceiling(Math.max(2, ...history.flatMap((entry) => series.map((line) => line.value(entry)))));
  pen.strokeStyle = css("--line");
  pen.fillStyle = css("--soft");
  pen.textAlign = "right";
  for (const part of [0, 0.5, 1]) {
    const y = bottom - part * (bottom - 8);
    pen.beginPath();
    pen.moveTo(left, y);
    pen.lineTo(width, y);
    pen.stroke();
    pen.fillText(whole(part * top), left - 6, y + 4);
  }
  pen.fillText("now", width, height - 3);
  pen.textAlign = "left";
  pen.fillText("2 min ago", left, height - 3);
  for (const line of series) {
    pen.strokeStyle = css(line.colour);
    pen.lineWidth = 2;
    pen.beginPath();
    history.forEach((entry, k) => {
      const x = width - ((now - entry.time) / HISTORY_MS) * (width - left);
      const y = bottom - (line.value(entry) / top) * (bottom - 8);
      if (k) pen.lineTo(x, y);
      else pen.moveTo(x, y);
    });
    pen.stroke();
    pen.lineWidth = 1;
  }
}

function drawHistogram(id, histogram) {
  const { pen, width, height } = canvas(id);
  const total = histogram.counts.reduce((a, b) => a + b, 0);
  pen.fillStyle = css("--soft");
  pen.textAlign = "center";
  if (!total) {
    pen.fillText("nothing yet", width / 2, height / 2);
    return;
  }
  const first = histogram.counts.findIndex((count) => count > 0);
  const last = histogram.counts.findLastIndex((count) => count > 0);
  const from = Math.max(0, first - 1);
  const to = Math.min(histogram.counts.length - 1, last + 1);
  const top = Math.max(...histogram.counts);
  const step = width / (to - from + 1);
  const label = (text, x, y) => {
    const half = pen.measureText(text).width / 2;
    pen.fillText(text, Math.min(Math.max(x, half), width - half), y);
  };
  for (let k = from; k <= to; k++) {
    const size = (histogram.counts[k] / top) * (height - 40);
    pen.fillStyle = css("--owned");
    pen.fillRect((k - from) * step + 2, height - 18 - size, step - 4, size);
    pen.fillStyle = css("--soft");
    const middle = (k - from + 0.5) * step;
    const part = Math.round((100 * histogram.counts[k]) / total) + "%";
    if (histogram.counts[k] / total >= 0.005 && pen.measureText(part).width < step) label(part, middle, height - 22 - size);
    const edge = histogram.bounds[k] === undefined ? "more" : "≤ " + bound(histogram.bounds[k]);
    if ((k - from) % Math.ceil(62 / step) === 0) label(edge, middle, height - 4);
  }
}

function drawTiles() {
  const now = history.at(-1);
  const c = state.counters;
  const tiles = [
    ["running", `${state.running} / ${state.max_num_seqs}`], ["waiting", whole(state.waiting)], ["tokens / s", whole(now.generated)],
    ["prompt tokens / s", whole(now.prompt)], ["KV in use", share(state.blocks.used, state.blocks.total)],
    ["prefix cache hits", share(c.prefix_hit_tokens, c.prefix_query_tokens)], ["blocks saved", whole(state.blocks.saved)],
    ["step", seconds(state.step_s)], ["preemptions", whole(c.preemptions)], ["recoveries", whole(c.recoveries)],
  ];
  at("tiles").replaceChildren(
    ...tiles.map(([name, value]) => {
      const tile = document.createElement("div");
      tile.className = "tile";
      const number = document.createElement("b");
      number.textContent = value;
      const label = document.createElement("span");
      label.textContent = name;
      tile.append(number, label);
      return tile;
    }),
  );
}

function drawRequests() {
  const head = ["request", "state", "sequences", "prompt", "from cache", "generated", "blocks", "age"];
  const cells = (tag, values) => {
    const row = document.createElement("tr");
    for (const value of values) {
      const cell = document.createElement(tag);
      cell.textContent = value;
      row.append(cell);
    }
    return row;
  };
  at("requests-text").textContent = state.requests.length > 50 ? `the first 50 of ${state.requests.length}` : "";
  at("requests").replaceChildren(
    cells("th", head),
    ...state.requests.slice(0, 50).map((r) =>
      cells("td", [r.id, r.state, r.sequences, r.prompt_tokens, r.cached_tokens, r.output_tokens, r.blocks, seconds(r.age_s)])),
  );
}

function remember(fresh) {
  const last = history.at(-1);
  const span = last ? Math.max(1e-3, (fresh.time - last.wall) / 1) : 0;
  const rate = (now, before) => (last && fresh.time > last.wall ? Math.max(0, (now - before) / span) : 0);
  history.push({
    time: performance.now(), wall: fresh.time, running: fresh.running, waiting: fresh.waiting,
    generated: rate(fresh.counters.generated_tokens, last?.totals.generated), prompt: rate(fresh.counters.prompt_tokens, last?.totals.prompt),
    totals: { generated: fresh.counters.generated_tokens, prompt: fresh.counters.prompt_tokens },
  });
  while (history.length > 2 && performance.now() - history[0].time > HISTORY_MS) history.shift();
  const live = new Set(fresh.requests.map((request) => request.id));
  if (owners.size > 500) owners = new Map([...owners].filter(([id]) => live.has(id)));
}

function draw() {
  if (!state) return;
  at("model").textContent = `${state.model}, tensor parallel ${state.tensor_parallel_size}`;
  drawTiles();
  drawBlocks();
  drawLines("batch", [
    { colour: "--owned", value: (entry) => entry.running },
    { colour: "--shared", value: (entry) => entry.waiting },
  ]);
  drawLines("rate", [
    { colour: "--owned", value: (entry) => entry.generated },
    { colour: "--shared", value: (entry) => entry.prompt },
  ]);
  drawHistogram("ttft", state.ttft);
  drawHistogram("gap", state.gap);
  drawRequests();
}

async function poll() {
  clearTimeout(timer);
  const period = Number(at("period").value);
  if (!period) return;
  try {
    const key = sessionStorage.getItem("manta.api_key");
    const response = await fetch("engine/state", {
      headers: key ? { Authorization: "Bearer " + key } : {}, signal: AbortSignal.timeout(10_000),
    });
    const body = await response.json();
    if (!response.ok) throw new Error(body.error?.message || `the server answered ${response.status}`);
    state = body;
    remember(state);
    at("error").hidden = true;
    draw();
  } catch (error) {
    at("error").textContent = "No news from the engine: " + error.message;
    at("error").hidden = false;
  }
  timer = setTimeout(poll, period);
}

at("period").addEventListener("change", poll);
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
poll();
