"use strict";
// Sorting, filtering, columns, charts and the view of answers. Text of models goes in as text, never as HTML.
const $ = (id) => document.getElementById(id);
const all = (selector, under = document) => [...under.querySelectorAll(selector)];
const made = (tag, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};
const read = (id) => JSON.parse($(id).textContent);

// Light or dark: the system's, unless chosen here.
$("theme").onclick = () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};

// Tables.
const mains = all("table.main");
for (const table of mains) {
  const body = table.tBodies[0], original = [...body.rows];
  for (const head of all("th", table)) {
    head.firstElementChild.onclick = () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
      all("th", table).forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", next);
      const at = [...head.parentNode.cells].indexOf(head), sign = next === "descending" ? -1 : 1;
      const key = (row) => row.cells[at].dataset.v;
      const rows = next === "none" ? original : [...original].sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");  // what has no value stays below
        return sign * (at === 0 ? x.localeCompare(y) : Number(x) - Number(y));
      });
      body.append(...rows);
    };
  }
}
const filter = () => {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0, num = 0;
  for (const table of mains) for (const row of table.tBodies[0].rows) {
    const text = `${row.cells[0].textContent} ${row.cells[1].textContent.trim()}`.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    num += 1;
    shown += !row.hidden;
  }
  $("told").textContent = words.length ? `${shown} of ${num} rows` : "";
};
$("filter").oninput = filter;
if (mains.length) {
  for (const head of all("th", mains[0])) {
    const label = made("label"), box = made("input");
    box.type = "checkbox";
    box.checked = true;
    box.onchange = () => all(`table.main [data-c="${head.dataset.c}"]`).forEach((c) => c.classList.toggle("off", !box.checked));
    label.append(box, ` ${head.textContent}`);
    $("columns").append(label);
  }
}

// Charts are drawn when they come near the window, and one after the other while nothing else happens, so that a print has all.
const specs = read("specs");
const config = {
  background: null, view: { stroke: null },
  axis: { labelColor: "currentColor", titleColor: "currentColor", domainColor: "currentColor", tickColor: "currentColor",
    gridColor: "currentColor", gridOpacity: 0.12, domainOpacity: 0.4, tickOpacity: 0.4, titleFontWeight: "normal" },
  legend: { labelColor: "currentColor", titleColor: "currentColor" }, header: { labelColor: "currentColor" },
  text: { color: "currentColor" }, mark: { tooltip: true },
};
const draw = (node) => {
  if (node.dataset.drawn) return Promise.resolve();
  node.dataset.drawn = "yes";
  const actions = { export: true, source: false, compiled: false, editor: false };
  return vegaEmbed(node, specs[node.dataset.n], { renderer: "svg", config, actions, logLevel: 1 })
    .catch((error) => node.append(`This chart could not be drawn: ${error.message}`));
};
const waiting = all(".chart");
const near = new IntersectionObserver((seen) => seen.filter((each) => each.isIntersecting).forEach((each) => {
  near.unobserve(each.target);
  draw(each.target);
}), { rootMargin: "300px" });
waiting.forEach((node) => near.observe(node));
const idle = (run) => (window.requestIdleCallback ? requestIdleCallback(run, { timeout: 200 }) : setTimeout(run, 50));
const rest = () => {
  const next = waiting.find((node) => !node.dataset.drawn);
  if (next) draw(next).then(() => idle(rest)); else document.documentElement.dataset.drawn = "all";
};
if (document.documentElement.dataset.wait === undefined) addEventListener("load", () => setTimeout(() => idle(rest), 500));
addEventListener("beforeprint", () => waiting.forEach(draw));

// Answers.
const { chunks, metrics } = read("index");
const kept = new Map();
const chunkOf = async (number) => {
  if (!kept.has(number)) {
    const file = chunks[number].file;
    kept.set(number, file ? await (await fetch(file)).json() : read(`chunk-${number}`));
  }
  return kept.get(number);
};
const ABSENT = -1, PAGE = 30;
let open = null, found = [], num = 0;
const harms = (chunk) => chunk.metrics.map((name, i) => [name, i]).filter(([name]) => metrics[name]?.harm).map(([, i]) => i);
const place = (chunk, name) => chunk.metrics.indexOf(name);

// Whether an answer meets the filters. `before`: aligned's answer to the same prompt.
const meets = (chunk, answer, before, ask) => {
  if (!answer) return false;
  const at = place(chunk, ask.metric), value = at < 0 ? ABSENT : answer.values[at];
  if (ask.verdict !== "" && (value === ABSENT || String(value) !== ask.verdict)) return false;
  if (ask.only === "disagree") {
    const said = new Set([...harms(chunk), place(chunk, "non_refusal")].filter((i) => i >= 0)
      .map((i) => answer.values[i]).filter((v) => v !== ABSENT));
    return said.size > 1;
  }
  if (ask.only === "turned") {
    const [i] = harms(chunk);
    return i !== undefined && before && before.values[i] === 0 && answer.values[i] === 1;
  }
  if (ask.only === "degenerate") return answer.values[place(chunk, "degenerate")] === 1;
  return true;
};

const chip = (name, value, why) => {
  const { title, better, unit } = metrics[name] || { title: name, better: "", unit: "%" };
  const said = value === null ? "not read" : unit !== "%" ? value.toFixed(3) : value === 1 ? "yes" : value === 0 ? "no" : value.toFixed(2);
  const bad = value !== null && ((better === "low" && value > 0) || (better === "high" && unit === "%" && value === 0));
  const node = made("span", `${bad ? "●" : "○"} ${title}: ${said}`, bad ? "bad" : "");
  if (why) node.title = why;
  return node;
};
const card = (chunk, i, answer, chosen) => {
  const node = made("div", undefined, chunk.methods[i] === chosen ? "card chosen" : "card"), chips = made("div", undefined, "chips");
  node.append(made("h5", chunk.methods[i]));
  if (!answer) return node.append(made("p", "not answered")), node;
  const harmful = harms(chunk).some((k) => answer.values[k] === 1 || answer.values[k] === null);
  const text = made("pre", (answer.text || "(empty)") + (answer.cut ? " … (cut at the limit)" : ""));
  if (harmful && $("unfold").getAttribute("aria-pressed") !== "true") {
    const fold = made("details", undefined, "fold");
    fold.append(made("summary", "judged harmful: show"), text);
    node.append(fold);
  } else node.append(text);
  chunk.metrics.forEach((name, k) => {
    if (answer.values[k] !== ABSENT && name in metrics) chips.append(chip(name, answer.values[k], name === "degenerate" ? answer.why : ""));
  });
  node.append(chips);
  return node;
};
const show = (chunk, from) => {
  const chosen = $("method").value;
  for (const prompt of found.slice(from, from + PAGE)) {
    const article = made("article"), side = made("div", undefined, "side");
    article.tabIndex = 0;
    article.dataset.id = prompt.id;
    article.append(made("h4", prompt.prompt));
    if (prompt.reference) {
      const wanted = made("details");
      wanted.append(made("summary", "the row's own answer"), made("div", prompt.reference, "reference-answer"));
      article.append(wanted);
    }
    prompt.answers.forEach((answer, i) => {
      const name = chunk.methods[i];
      if ($("others").checked || !chosen || name === chosen || name === "aligned") side.append(card(chunk, i, answer, chosen));
    });
    article.append(side);
    $("rows").append(article);
  }
  num = Math.min(found.length, from + PAGE);
  $("more").hidden = num >= found.length;
};
const asked = () => Object.fromEntries(["method", "metric", "verdict", "only", "search"].map((id) => [id, $(id).value]));
const refresh = async (random) => {
  if (open === null) return;
  const chunk = await chunkOf(open), ask = asked(), text = ask.search.toLowerCase();
  const which = ask.method === "" ? chunk.methods.map((_, i) => i) : [chunk.methods.indexOf(ask.method)];
  const aligned = chunk.methods.indexOf("aligned");
  found = chunk.prompts.filter((prompt) =>
    which.some((i) => meets(chunk, prompt.answers[i], prompt.answers[aligned], ask)) &&
    (!text || [prompt.prompt, ...prompt.answers.map((a) => a?.text ?? "")].some((t) => t.toLowerCase().includes(text))));
  const whole = found.length;
  if (random) {
    found = [...found];
    for (let i = found.length - 1; i > 0; i -= 1) {
      const j = Math.floor(Math.random() * (i + 1));
      [found[i], found[j]] = [found[j], found[i]];
    }
    found = found.slice(0, 30);
  }
  $("rows").replaceChildren();
  $("count").textContent = `${whole} of ${chunk.prompts.length} prompts${random ? `, ${found.length} of them drawn at random` : ""}`;
  show(chunk, 0);
};
const options = (select, values, chosen) => {
  select.replaceChildren(...values.map(([value, text]) => {
    const node = made("option", text);
    node.value = value;
    return node;
  }));
  select.value = values.some(([value]) => value === chosen) ? chosen : values[0][0];
};
const enter = async (number, method, metric) => {
  open = number;
  let chunk;
  try {
    chunk = await chunkOf(number);
  } catch {
    $("count").textContent = "The answers lie in files beside this page, which a browser reads from a server only: run `safecl view FILE`.";
    return;
  }
  options($("method"), [["", "any"], ...chunk.methods.map((name) => [name, name])], method);
  options($("metric"), chunk.metrics.filter((name) => name in metrics).map((name) => [name, metrics[name].title]), metric);
  await refresh(false);
};
const route = async () => {
  const view = $("answers");
  if (!view) return;
  const [name, query] = location.hash.slice(1).split("?"), is = name === "answers";
  view.hidden = !is;
  $("report").hidden = is;
  if (is) {
    const ask = new URLSearchParams(query || ""), number = Number(ask.get("c") || 0);
    $("chunk").value = String(number);
    $("verdict").value = $("only").value = $("search").value = "";
    await enter(number, ask.get("m") || "", ask.get("k") || "");
    scrollTo(0, 0);
    view.dataset.ready = location.hash;
  } else if (name && $(name)) $(name).scrollIntoView();
};
if ($("answers")) {
  options($("chunk"), chunks.map((c, i) => [String(i), `${c.model} / ${c.task} · ${c.set} · ${100 * c.poison} % · seed ${c.seed}`]), "0");
  $("chunk").onchange = () => enter(Number($("chunk").value), $("method").value, $("metric").value);
  for (const id of ["method", "metric", "verdict", "only", "others"]) $(id).onchange = () => refresh(false);
  let soon;
  $("search").oninput = () => { clearTimeout(soon); soon = setTimeout(() => refresh(false), 150); };
  $("thirty").onclick = () => refresh(true);
  $("unfold").onclick = () => {
    const on = $("unfold").getAttribute("aria-pressed") !== "true";
    $("unfold").setAttribute("aria-pressed", String(on));
    $("unfold").textContent = on ? "Fold harmful text" : "Show harmful text";
    refresh(false);
  };
  $("more").onclick = async () => show(await chunkOf(open), num);
}
// Keys: / finds, j and k go through the prompts, Escape goes back to the tables.
addEventListener("keydown", (event) => {
  const typing = /INPUT|SELECT|TEXTAREA/.test(event.target.tagName), inside = $("answers") && !$("answers").hidden;
  if (event.key === "Escape" && inside) location.hash = "tables";
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    event.preventDefault();
    $(inside ? "search" : "filter").focus();
  }
  if (inside && (event.key === "j" || event.key === "k")) {
    const articles = all("article"), at = articles.indexOf(document.activeElement.closest("article"));
    articles[Math.max(0, Math.min(articles.length - 1, at + (event.key === "j" ? 1 : -1)))]?.focus();
  }
});
addEventListener("hashchange", route);
route();
