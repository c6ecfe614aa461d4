// The chat page: one conversation with /v1/chat/completions, streamed, several samples side by side.
import { render } from "./markdown.js";

const at = (id) => document.getElementById(id);
const log = document.querySelector("#messages .inner");
const FIELDS = ["model", "system", "temperature", "top_p", "top_k", "max_tokens", "n", "seed", "stop"];
const EXAMPLES = ["What is 47 + 38?", "Sort these words: pear, apple, fig", "Count from 3 to 9."];

let messages = []; // what is sent: {role, content}
let running = null; // the AbortController of the answer being streamed
let frame = 0;

// Settings

function restore() {
  const saved = JSON.parse(localStorage.getItem("manta.settings") || "{}");
  for (const id of FIELDS) if (id !== "model" && saved[id] !== undefined) at(id).value = saved[id];
  at("api_key").value = sessionStorage.getItem("manta.api_key") || "";
  setOpen(saved.open ?? window.innerWidth > 704);
  return saved.model;
}

function save() {
  const settings = Object.fromEntries(FIELDS.map((id) => [id, at(id).value]));
  settings.open = !at("settings").hidden;
  localStorage.setItem("manta.settings", JSON.stringify(settings));
  sessionStorage.setItem("manta.api_key", at("api_key").value);
  at("model-name").textContent = at("model").value;
}

function setOpen(open) {
  at("settings").hidden = !open;
  at("toggle-settings").setAttribute("aria-expanded", String(open));
}

function headers() {
  const key = at("api_key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
}

async function loadModels(wanted) {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    const body = await response.json();
    if (!response.ok) throw new Error(body.error?.message || response.status);
    at("model").replaceChildren(...body.data.map((model) => new Option(model.id, model.id)));
    if (body.data.some((model) => model.id === wanted)) at("model").value = wanted;
    save();
  } catch (error) {
    showError("The list of models could not be read: " + error.message);
  }
}

function body() {
  const out = {
    model: at("model").value, messages: [...messages], stream: true, stream_options: { include_usage: true },
  };
  if (at("system").value.trim()) out.messages.unshift({ role: "system", content: at("system").value });
  for (const id of ["temperature", "top_p", "top_k", "max_tokens", "n", "seed"]) {
    if (at(id).value !== "") out[id] = Number(at(id).value);
  }
  if (out.n > 1 && out.temperature === undefined) out.temperature = 0.8; // greedy samples would all be the same
  if (at("stop").value) out.stop = at("stop").value.split("|").filter(Boolean);
  return out;
}

// Showing

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function showEmpty() {
  const box = element("div", "empty");
  box.append(element("p", "", "Ask something."));
  for (const example of EXAMPLES) {
    const button = element("button", "", example);
    button.addEventListener("click", () => ask(example));
    box.append(button);
  }
  log.replaceChildren(box);
}

function showError(text) {
  log.querySelector(".empty")?.remove();
  const box = element("div", "error", text);
  box.setAttribute("role", "alert");
  log.append(box);
  scroll(true);
}

function scroll(force) {
  const box = at("messages");
  if (force || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
}

class Sample {
  constructor(index, turn) {
    this.text = this.reasoning = "";
    this.tokens = 0;
    this.index = index;
    this.node = element("article", "sample");
    this.node.tabIndex = 0;
    this.node.setAttribute("aria-label", "Answer " + (index + 1));
    this.thoughts = element("details");
    this.thoughts.append(element("summary", "", "Reasoning"), element("p"));
    this.content = element("div", "body cursor");
    this.footer = element("footer");
    this.node.append(this.content, this.footer);
    this.node.addEventListener("keydown", (event) => {
      const other = turn[Number(event.key) - 1];
      if (other && event.target === this.node) other.choose(turn);
    });
    this.dirty = false;
  }

  draw() {
    if (!this.dirty) return;
    this.dirty = false;
    if (this.reasoning) {
      if (!this.thoughts.isConnected) this.node.prepend(this.thoughts);
      this.thoughts.lastChild.textContent = this.reasoning;
      this.thoughts.open = !this.text;
    }
    render(this.content, this.text);
  }

  choose(turn) {
    for (const sample of turn) sample.node.classList.toggle("chosen", sample === this);
    turn.message.content = this.text;
    this.node.focus();
  }

  finish(reason, turn) {
    this.dirty = true;
    this.draw();
    this.content.classList.remove("cursor");
    this.footer.replaceChildren();
    if (reason && reason !== "stop") this.footer.append(element("span", "", "ended: " + reason));
    const copy = element("button", "", "Copy");
    copy.addEventListener("click", () => navigator.clipboard?.writeText(this.text));
    this.footer.append(copy);
    if (turn.length > 1) {
      const pick = element("button", "", "Go on from this one");
      pick.addEventListener("click", () => this.choose(turn));
      this.footer.append(pick);
    }
  }
}

// Asking

async function* events(response) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    rest += decoder.decode(value, { stream: true });
    const parts = rest.split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
      if (data === "[DONE]") return;
    }
  }
  throw new Error("the stream ended before its end was told");
}

async function ask(text) {
  if (running || !text.trim()) return;
  save();
  log.querySelector(".empty")?.remove();
  messages.push({ role: "user", content: text });
  log.append(element("div", "user", text));
  const row = element("div", "samples");
  log.append(row);
  const turn = [];
  const request = body();
  for (let index = 0; index < (request.n || 1); index++) {
    turn.push(new Sample(index, turn));
    row.append(turn[index].node);
  }
  turn.message = { role: "assistant", content: "" };
  const reasons = {};
  const stats = element("p", "stats");
  const begun = performance.now();
  let first = 0;
  let usage = null;
  running = new AbortController();
  setRunning(true);
  scroll(true);
  const paint = () => {
    frame = 0;
    turn.forEach((sample) => sample.draw());
    scroll(false);
  };
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request), signal: running.signal,
    });
    if (!response.ok) {
      const answer = await response.json().catch(() => ({}));
      throw new Error(answer.error?.message || `the server answered ${response.status}`);
    }
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      for (const choice of event.choices) {
        const sample = turn[choice.index];
        const delta = choice.delta || {};
        if ((delta.content || delta.reasoning) && !first) first = performance.now() - begun;
        sample.text += delta.content || "";
        sample.reasoning += delta.reasoning || delta.reasoning_content || "";
        sample.dirty = true;
        if (choice.finish_reason) reasons[choice.index] = choice.finish_reason;
      }
      if (!frame) frame = requestAnimationFrame(paint);
    }
  } catch (error) {
    if (error.name !== "AbortError") showError(error.message);
  } finally {
    const seconds = (performance.now() - begun) / 1e3;
    turn.forEach((sample, index) => sample.finish(running.signal.aborted ? "stopped" : reasons[index], turn));
    if (usage) {
      stats.textContent = `${usage.completion_tokens} tokens, ${(usage.completion_tokens / seconds).toFixed(0)} a second, ` +
        `first after ${first.toFixed(0)} ms`;
      row.after(stats);
    }
    if (turn.length > 1) turn[0].node.classList.add("chosen");
    if (turn.some((sample) => sample.text)) {
      turn.message.content = turn[0].text;
      messages.push(turn.message);
    }
    running = null;
    setRunning(false);
    scroll(false);
  }
}

function setRunning(on) {
  at("send").hidden = on;
  at("stop-button").hidden = !on;
  if (!on && window.innerWidth > 704) at("prompt").focus();
}

function newChat() {
  running?.abort();
  messages = [];
  showEmpty();
  at("prompt").focus();
}

function grow() {
  at("prompt").style.height = "auto";
  at("prompt").style.height = at("prompt").scrollHeight + 2 + "px";
}

function send() {
  const text = at("prompt").value;
  if (running || !text.trim()) return;
  at("prompt").value = "";
  grow();
  ask(text);
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("prompt").addEventListener("input", grow);
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !at("prompt").value && !running) {
    const last = messages.filter((message) => message.role === "user").at(-1);
    if (last) {
      event.preventDefault();
      at("prompt").value = last.content;
      grow();
    }
  }
});
at("stop-button").addEventListener("click", () => running?.abort());
at("new-chat").addEventListener("click", newChat);
at("toggle-settings").addEventListener("click", () => {
  setOpen(at("settings").hidden);
  save();
});
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("settings").addEventListener("change", save);
at("api_key").addEventListener("change", () => loadModels(at("model").value));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if ((event.ctrlKey || event.metaKey) && event.key === "k") {
    event.preventDefault();
    newChat();
  }
  if ((event.ctrlKey || event.metaKey) && event.key === ",") {
    event.preventDefault();
    at("toggle-settings").click();
  }
});

showEmpty();
loadModels(restore());
