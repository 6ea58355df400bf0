"use strict";
// Everything that comes from the cluster is put into the page as text, never as markup.

const STALE_MS = 3500;
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#2f7ed8", "#d9622b", "#2e9e55", "#9560c9", "#c0429b", "#8a7a1f", "#1c9aa8", "#7d7d7d"];
const PARTS = [["router", "#8c8c8c"], ["queue", "#b98a2e"], ["prefill", "#d9622b"], ["exposed transfer", "#9560c9"],
  ["first step", "#2e9e55"], ["output", "#2f7ed8"]];
const POINTS = 600;

const $ = (id) => document.getElementById(id);
let points = [], chosen = "", lastAt = 0, key = sessionStorage.getItem("prfaas-key") || "";

function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [k, v] of Object.entries(attributes)) made.setAttribute(k, v);
  made.append(...children);
  return made;
}
function svg(name, attributes = {}, text) {
  const made = document.createElementNS(SVG, name);
  for (const [k, v] of Object.entries(attributes)) made.setAttribute(k, v);
  if (text !== undefined) made.textContent = text;
  return made;
}
const whole = (n) => n == null ? "–" : Math.round(n).toLocaleString("en");
const fixed = (n, digits = 2) => n == null ? "–" : n.toFixed(digits);
const percent = (n) => `${Math.round(100 * n)} %`;
const clock = (s) => new Date(1000 * s).toLocaleTimeString("en-GB");

// -- the stream ----------------------------------------------------------------------------------------------------

async function follow() {
  for (;;) {
    try {
      await listen();
    } catch (error) {
      said(`no connection (${error.message}); trying again`, true);
    }
    await new Promise((done) => setTimeout(done, 1000));
  }
}

async function listen() {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const response = await fetch("console/events", { headers, cache: "no-store" });
  if (response.status === 401) return askForKey();
  if (!response.ok) throw new Error(`status ${response.status}`);
  $("key-form").hidden = true;
  points = [];
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the router ended it");
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    // Of several that came together only the newest is drawn; none of their points is lost.
    const states = events.filter((e) => e.startsWith("data: ")).map((e) => JSON.parse(e.slice(6)));
    for (const state of states) {
      for (const point of state.points) if (!points.length || point.at_s > points[points.length - 1].at_s) points.push(point);
    }
    points = points.slice(-POINTS);
    if (states.length) draw(states[states.length - 1]);
  }
}

function askForKey() {
  said(key ? "the router refuses this key" : "an API key is needed", true);
  $("key-form").hidden = false;
  $("key").value = "";
  $("key").focus();
  return new Promise((done) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      key = $("key").value.trim();
      sessionStorage.setItem("prfaas-key", key);
      done();
    };
  });
}

function said(text, stale = false) {
  if ($("live").textContent !== text) $("live").textContent = text;
  $("live").classList.toggle("stale", stale);
}

setInterval(() => {
  if (lastAt && Date.now() - lastAt > STALE_MS) said(`no news for ${Math.round((Date.now() - lastAt) / 1000)} s`, true);
}, 1000);

// -- a state -------------------------------------------------------------------------------------------------------

function draw(state) {
  lastAt = Date.now();
  said("live");
  $("who").textContent = `router ${state.router} · ${state.model || "no model yet"} · version ${state.version}`;
  const point = points[points.length - 1];
  const down = state.nodes.filter((n) => n.state === "lost" || n.state === "unreachable").length;
  tiles([["requests a second", point ? fixed(point.requests_per_s, 1) : "–"], ["running", whole(state.inflight)],
    ["offloaded", point ? percent(point.offloaded) : "–"], ["ended", whole(state.ended)],
    ["nodes", down ? `${state.nodes.length - down} of ${state.nodes.length}` : whole(state.nodes.length)],
    ...state.regions.map((r) => [`threshold, ${r.name}`, r.threshold_tokens == null ? "none" : whole(r.threshold_tokens)])]);
  $("why").replaceChildren(...state.regions.filter((r) => r.why).map((r) => el("p", {}, el("b", {}, r.name + ": "), r.why)),
    ...reasons(state.reasons));
  charts(state);
  links(state.links);
  nodes(state.nodes);
  if (!$("list").matches(":hover") && !$("list").contains(document.activeElement)) list(state.requests);
}

function tiles(pairs) {
  const old = $("tiles").children;
  if (old.length === pairs.length) {
    pairs.forEach(([name, value], i) => {
      if (old[i].firstChild.textContent !== name) old[i].firstChild.textContent = name;
      if (old[i].lastChild.textContent !== value) old[i].lastChild.textContent = value;
    });
    return;
  }
  $("tiles").replaceChildren(...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function reasons(counts) {
  const all = Object.entries(counts).sort((a, b) => b[1] - a[1]);
  if (!all.length) return [];
  return [el("p", {}, el("b", {}, "decided: "), all.map(([word, n]) => `${word} ${whole(n)}`).join(", "))];
}

function bar(share, hot = 0.9) {
  const inner = el("i");
  inner.style.width = `${Math.min(100, Math.max(0, 100 * share))}%`;
  return el("span", { class: share >= hot ? "bar hot" : "bar", "aria-hidden": "true" }, inner);
}

function links(all) {
  const rows = all.map((link) => el("tr", {}, el("th", { scope: "row" }, `${link.source} → ${link.target}`),
    el("td", {}, bar(link.utilisation), percent(link.utilisation)),
    el("td", {}, fixed(8 * link.bandwidth_bytes_per_s / 1e9)), el("td", {}, fixed(link.queued_bytes / 1e6, 1)),
    el("td", {}, fixed(1e3 * link.rtt_s, 1))));
  if (!rows.length) rows.push(el("tr", {}, el("td", { colspan: "5" }, "nothing has crossed regions yet")));
  $("links").tBodies[0].replaceChildren(...rows);
}

// Rows stay and only what changed in them is written: 200 nodes a second would else be thousands of new elements.
const rowsOf = new Map();

function nodes(all) {
  const groups = new Map();
  for (const node of all) {
    const name = `${node.region}: ${node.role}`;
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(node);
  }
  const wanted = [...groups.keys()].sort();
  const there = [...$("nodes").children].map((each) => each.dataset.group);
  if (wanted.join("\n") !== there.join("\n")) {
    rowsOf.clear();
    $("nodes").replaceChildren(...wanted.map((name) => group(name)));
  }
  for (const box of $("nodes").children) fill(box, groups.get(box.dataset.group));
}

function group(name) {
  const load = name.endsWith("decode") ? "batch" : "queue, s";
  const head = ["node", "state", "requests", load, "memory used"].map((text) => el("th", { scope: "col" }, text));
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody"));
  const box = el("div", {}, el("h3", {}, name),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, table));
  box.dataset.group = name;
  return box;
}

function fill(box, members) {
  const body = box.querySelector("tbody");
  const names = members.map((n) => n.name).join("\n");
  if (body.dataset.names !== names) {
    body.dataset.names = names;
    body.replaceChildren(...members.map((node) => {
      const cells = [0, 1, 2, 3].map(() => el("td"));
      const row = el("tr", {}, el("th", { scope: "row" }, node.name), ...cells);
      rowsOf.set(`${box.dataset.group}/${node.name}`, { cells, shown: [] });
      return row;
    }));
  }
  for (const node of members) {
    const { cells, shown } = rowsOf.get(`${box.dataset.group}/${node.name}`);
    const decodes = node.role === "decode";
    const full = node.places ? node.batch / node.places : 0;
    const values = [node.next_role ? `becomes ${node.next_role}` : node.state, whole(node.requests),
      decodes ? `${node.batch} of ${node.places}${node.waiting ? `, ${node.waiting} wait` : ""}` : fixed(node.queue_s, 1),
      percent(node.kv_used)];
    values.forEach((value, i) => {
      if (shown[i] === value) return;
      shown[i] = value;
      const bars = { 2: decodes ? full : node.queue_s / 10, 3: node.kv_used };
      cells[i].replaceChildren(...(i in bars ? [bar(bars[i])] : []), value);
      if (i === 0) cells[i].className = `state-${node.next_role ? "draining" : node.state}`;
    });
  }
}

// -- charts --------------------------------------------------------------------------------------------------------

function charts(state) {
  const names = state.regions.map((r) => r.name);
  const of = (pick) => names.map((name) => [name, points.map((p) => p.regions[name] ? pick(p.regions[name]) : null)]);
  chart("chart-threshold", of((r) => r[0]), whole);
  chart("chart-split", of((r) => r[1]), whole);
  chart("chart-rate", [["all", points.map((p) => p.requests_per_s)]], (n) => fixed(n, 1));
  chart("chart-offloaded", [["all", points.map((p) => p.offloaded)]], percent, 1);
}

function chart(id, series, show, top = 0) {
  const [width, height, left, right, high, low] = [400, 130, 46, 6, 8, 18];
  const values = series.flatMap(([, ys]) => ys).filter((y) => y != null);
  const most = top || Math.max(1e-9, ...values) * 1.08;
  const x = (i) => left + (width - left - right) * (i + POINTS - points.length) / (POINTS - 1);
  const y = (v) => height - low - (height - low - high) * Math.min(1, v / most);
  const at_half = most / 2;
  const now = series.map(([name, ys]) => `${name} ${ys.length && ys[ys.length - 1] != null ? show(ys[ys.length - 1]) : "none"}`);
  const made = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `now: ${now.join(", ")}` });
  for (const share of [0, 0.5, 1]) {
    const at = y(share * most);
    made.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: at, y2: at }));
    if (share !== 0.5 || show(at_half) !== show(most)) {
      made.append(svg("text", { x: left - 5, y: at + 4, "text-anchor": "end" }, show(share * most)));
    }
  }
  made.append(svg("text", { x: left, y: height - 4 }, "10 min ago"), svg("text", { x: width - right, y: height - 4, "text-anchor": "end" }, "now"));
  series.forEach(([, ys], n) => {
    let path = "", pen = "M";
    ys.forEach((v, i) => {
      if (v == null) { pen = "M"; return; }
      path += `${pen}${x(i).toFixed(1)} ${y(v).toFixed(1)}`;
      pen = "L";
    });
    made.append(svg("path", { class: "line", d: path || "M0 0", stroke: COLOURS[n % COLOURS.length] }));
  });
  const legend = series.length > 1 ? [el("ul", { class: "legend" }, ...series.map(([name], n) => key_(name, COLOURS[n % COLOURS.length])))] : [];
  $(id).replaceChildren(made, ...legend);
}

function key_(name, colour) {
  const box = el("i", { "aria-hidden": "true" });
  box.style.background = colour;
  return el("li", {}, box, name);
}

// -- requests ------------------------------------------------------------------------------------------------------

function list(all) {
  const rows = all.map((r) => {
    const link = el("a", { href: `#request=${encodeURIComponent(r.request_id)}` }, r.request_id.slice(0, 12));
    const bad = r.outcome === "done" ? "" : "failed";
    const why = el("td", { class: `wrap ${bad}` }, r.outcome === "done" ? r.reason : `${r.outcome}, ${r.reason}`,
      r.fallbacks.length ? ` (${r.fallbacks.join(", ")})` : "");
    return el("tr", r.request_id === chosen ? { class: "chosen" } : {}, el("td", {}, clock(r.ended_s)), el("td", {}, link), why,
      el("td", {}, r.prefill ? `${r.prefill} → ${r.decode}` : r.decode),
      el("td", {}, `${whole(r.prompt_tokens)} + ${whole(r.output_tokens)}`), el("td", {}, fixed(r.ttft_s, 3)),
      el("td", {}, fixed(r.e2e_s)));
  });
  if (!rows.length) rows.push(el("tr", {}, el("td", { colspan: "7" }, "none has ended yet")));
  $("list").tBodies[0].replaceChildren(...rows);
}

async function showChosen() {
  const match = location.hash.match(/^#request=(.+)$/);
  if (!match) return;
  chosen = decodeURIComponent(match[1]);
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  try {
    const response = await fetch(`requests/${encodeURIComponent(chosen)}/timeline`, { headers });
    const body = await response.json();
    if (!response.ok) throw new Error(body.error ? body.error.message : `status ${response.status}`);
    waterfall(body);
  } catch (error) {
    $("waterfall").replaceChildren(el("p", { class: "failed" }, error.message));
  }
}

function waterfall(t) {
  const end = Math.max(t.ended_s || 0, t.last_token_s || 0, t.ttft_s || 0, 1e-6);
  const rows = bars(t, end);
  const [width, label, row] = [900, 118, 15];
  const height = rows.length * row + 24;
  const x = (s) => label + (width - label - 10) * Math.min(1, Math.max(0, s / end));
  const made = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": rows.map((r) => r.text).join("; ") });
  rows.forEach((r, i) => {
    made.append(svg("text", { x: label - 6, y: i * row + 11, "text-anchor": "end" }, r.name));
    for (const [from, to, colour] of r.pieces) {
      if (from == null || to == null) continue;
      made.append(svg("rect", { x: x(from).toFixed(1), y: i * row + 2, width: Math.max(1, x(to) - x(from)).toFixed(1),
        height: row - 4, fill: colour }));
    }
  });
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    made.append(svg("text", { x: x(share * end), y: height - 6, "text-anchor": share === 1 ? "end" : share ? "middle" : "start" },
      `${(share * end).toFixed(3)} s`));
  }
  const kv = t.kv_raw_bytes ? `, KV ${fixed(t.kv_raw_bytes / 1e6, 2)} MB (${fixed(t.kv_wire_bytes / 1e6, 2)} on the wire)` : "";
  const parts = t.ttft_parts ? Object.entries(t.ttft_parts).map(([k, v]) => `${k.replace(/_s$/, "")} ${fixed(v, 3)}`).join(", ") : "";
  $("waterfall").replaceChildren(el("p", {}, el("b", {}, t.request_id)),
    el("p", {}, `${t.outcome}: ${t.decision}, ${t.prefill_node ? `prefill on ${t.prefill_node}, ` : ""}decode on ${t.decode_node}; ` +
      `${whole(t.prompt_tokens)} + ${whole(t.output_tokens)} tokens${kv}`),
    el("p", {}, `first token after ${fixed(t.ttft_s, 3)} s${parts ? ` (${parts})` : ""}, all after ${fixed(t.ended_s, 3)} s` +
      (t.fallbacks.length ? `; on the way: ${t.fallbacks.join(", ")}` : "")),
    el("ul", { class: "legend" }, ...PARTS.map(([name, colour]) => key_(name, colour)), key_("transfer", "#1c9aa8")),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "waterfall" }, made));
}

function bars(t, end) {
  const found = [];
  if (t.ttft_parts) {
    let at = 0;
    const values = ["router_s", "queue_s", "prefill_s", "exposed_s", "first_step_s"].map((k) => t.ttft_parts[k]);
    const pieces = values.map((v, i) => { const piece = [at, at + v, PARTS[i][1]]; at += v; return piece; });
    found.push({ name: "request", pieces: [...pieces, [at, t.last_token_s ?? end, PARTS[5][1]]],
      text: PARTS.slice(0, 5).map(([name], i) => `${name} ${values[i].toFixed(3)} s`).join(", ") });
  } else {
    found.push({ name: "request", pieces: [[0, t.ttft_s, PARTS[0][1]], [t.ttft_s, end, PARTS[5][1]]], text: "whole" });
  }
  let before = t.prefill_started_s;
  for (const layer of t.layers) {
    found.push({ name: `layer ${layer.layer}`, pieces: [[before, layer.computed_s, PARTS[2][1]],
      [layer.computed_s ?? layer.sent_s, layer.arrived_s, "#1c9aa8"]], text: `layer ${layer.layer} arrived at ${fixed(layer.arrived_s, 3)} s` });
    before = layer.computed_s ?? before;
  }
  return found;
}

addEventListener("hashchange", showChosen);
showChosen();
follow();
