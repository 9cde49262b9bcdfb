"use strict";
// The questions, and the choice of colors. All text is set as text: nothing in the data is markup.

const PAGE = 40;
const $ = (id) => document.getElementById(id);

function h(name, options, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(options ?? {})) {
    if (value === false || value === undefined) continue;
    node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// ---- colors

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  $("theme").textContent = dark() ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", dark() ? "Light colors" : "Dark colors");
}

let kept = null;
try { kept = localStorage.getItem("msa-report-theme"); } catch { /* a file may not keep anything */ }
setTheme(kept);
$("theme").removeAttribute("aria-pressed");
$("theme").addEventListener("click", () => {
  setTheme(dark() ? "light" : "dark");
  try { localStorage.setItem("msa-report-theme", document.documentElement.dataset.theme); } catch { /* as above */ }
});

// A link into a section that is folded opens it.
function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
addEventListener("hashchange", unfold);
unfold();

// ---- questions

let data, form, found = [], shown = 0;

async function unpack() {
  const bytes = Uint8Array.from(atob($("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const text = (number) => data.pool[number];
const MOST = 32; // documents of a list
const percent = (score) => (100 * score).toFixed(score === 0 || score === 1 ? 0 : 1);

function option(value, label) {
  return h("option", { value }, label);
}

function fill() {
  form.place.append(option("", "All tasks"));
  data.places.forEach((place, i) => form.place.append(option(i, place.label)));
  data.systems.forEach((system, i) => form.system.append(option(i, system)));
  form.verdict.append(option("wrong", "Wrong"), option("", "All"));
  data.verdicts.forEach((verdict, i) => form.verdict.append(option(i, verdict)));
  if (data.places.some((p) => Object.values(p.answers).some((rows) => rows.some((a) => a?.before)))) {
    form.verdict.append(option("fixed", "better than before"), option("broken", "worse than before"));
  }
}

function fits(answer, wanted) {
  if (wanted === "") return true;
  if (wanted === "wrong") return answer.verdict > 1;
  if (wanted === "fixed") return answer.before !== undefined && answer.score > answer.before.score;
  if (wanted === "broken") return answer.before !== undefined && answer.score < answer.before.score;
  return answer.verdict === Number(wanted);
}

function choose() {
  const words = form.words.value.trim().toLowerCase();
  found = [];
  data.places.forEach((place, i) => {
    if (form.place.value !== "" && Number(form.place.value) !== i) return;
    const answers = place.answers[form.system.value] ?? [];
    place.questions.forEach((question, j) => {
      const answer = answers[j];
      if (!answer || !fits(answer, form.verdict.value)) return;
      if (words && !`${text(question.text)}\n${text(answer.answer)}`.toLowerCase().includes(words)) return;
      found.push([place, question, answer, j]);
    });
  });
  shown = 0;
  $("list").replaceChildren();
  const left = data.left ? ` The page leaves out ${data.left.toLocaleString("en")} questions; all are in runs/.` : "";
  $("found").textContent = `${found.length.toLocaleString("en")} answers of ${data.systems[form.system.value]}.${left}`;
  more();
}

function more() {
  const next = found.slice(shown, shown + PAGE);
  $("list").append(...next.map((each) => h("li", null, item(...each))));
  shown += next.length;
  $("more").hidden = shown >= found.length;
}

function badge(answer) {
  return h("span", { class: "badge" }, h("i", { class: `key v${answer.verdict}` }), data.verdicts[answer.verdict]);
}

function answerText(answer) {
  return text(answer.answer) || (answer.refused ? "(refused)" : "(nothing)");
}

function item(place, question, answer, j) {
  const accepted = question.accepted.length ? question.accepted.map(text).join("; ") : "that there is none";
  const details = h("details", null,
    h("summary", null,
      badge(answer),
      h("span", { class: "asked" }, text(question.text)),
      h("span", { class: "said" }, h("b", null, answerText(answer)), ` · accepted: ${accepted} · ${place.label}`)));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(opened(place, question, answer, j));
  });
  return details;
}

function part(title, ...children) {
  return h("div", null, h("h3", null, title), ...children);
}

function ids(numbers, gold) {
  if (!numbers.length) return h("span", { class: "cost" }, "none");
  const more = numbers.length - MOST;
  return h("ul", { class: "ids" }, ...numbers.slice(0, MOST).map((n) =>
    h("li", { class: gold.has(n) ? "needed" : false, title: gold.has(n) ? "needed" : false }, text(n))),
  more > 0 ? h("li", { class: "cost" }, `and ${more} more`) : null);
}

function opened(place, question, answer, j) {
  const gold = new Set(question.gold);
  const parts = [part("Needed documents", ids(question.gold, gold))];
  if (answer.before) {
    const was = answer.before;
    parts.push(part("Before", h("p", { class: "cost" }, badge(was), ` ${text(was.answer) || "(nothing)"} · score ${percent(was.score)}`)));
  }
  answer.routed.forEach((turn, round) => {
    const layers = Object.entries(turn).map(([layer, numbers]) =>
      h("div", null, h("p", { class: "layer" }, `layer ${layer}`), ids(numbers, gold)));
    parts.push(part(`Round ${round + 1}: routed to`, h("div", { class: "layers" }, ...layers)));
  });
  parts.push(part("Ranking", ids(answer.ranked, gold)), part(`Read, in this order (${answer.named.length})`, ids(answer.named, gold)));
  if (answer.texts.length) {
    parts.push(part(answer.texts.length < answer.named.length ? `Their texts, the first ${answer.texts.length}` : "Their texts", ...answer.texts.map(([id, content]) =>
      h("div", { class: "read" }, ids([id], gold), h("p", null, text(content))))));
  }
  parts.push(part("Every system", everySystem(place, j)), h("p", { class: "cost" }, cost(question, answer)));
  return h("div", { class: "opened" }, ...parts);
}

function everySystem(place, j) {
  const rows = Object.entries(place.answers).filter(([, answers]) => answers[j]).map(([system, answers]) => {
    const other = answers[j];
    return h("tr", null,
      h("th", { scope: "row" }, data.systems[system]),
      h("td", null, badge(other)),
      h("td", null, answerText(other)),
      h("td", null, percent(other.score)),
      h("td", null, other.judge === undefined ? "–" : `${other.judge} of 5`));
  });
  const heads = ["system", "outcome", "answer", "score", "judge"].map((name) => h("th", { scope: "col" }, name));
  const table = h("table", null, h("thead", null, h("tr", null, ...heads)), h("tbody", null, ...rows));
  return h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Answers of every system" }, table);
}

function cost(question, answer) {
  const said = [
    `question ${question.id}`,
    question.kind,
    `score ${percent(answer.score)}`,
    `${answer.rounds} round${answer.rounds === 1 ? "" : "s"}`,
    `ended: ${answer.stopped}`,
    `${answer.seconds.toFixed(2)} s`,
    `${answer.read.toLocaleString("en")} tokens read`,
    `${answer.written.toLocaleString("en")} written`,
    answer.bytes === null ? "" : `${answer.bytes.toLocaleString("en")} bytes of content`,
    answer.span === null ? "" : answer.span ? "a citation holds an accepted answer" : "no citation holds an accepted answer",
  ];
  return said.filter(Boolean).join(" · ");
}

// A score leads to its questions.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a.to");
  if (!link || !data) return;
  const { task, size, system } = link.dataset;
  form.place.value = data.places.findIndex((p) => p.task === task && String(p.size) === size);
  form.system.value = data.systems.indexOf(system);
  form.verdict.value = "";
  form.words.value = "";
  choose();
});

async function start() {
  form = $("choose").elements;
  try {
    data = await unpack();
  } catch (error) {
    $("found").textContent = `The questions cannot be unpacked by this browser (${error.message}).`;
    return;
  }
  fill();
  $("choose").addEventListener("input", choose);
  $("choose").addEventListener("submit", (event) => event.preventDefault());
  $("more").addEventListener("click", more);
  choose();
}
start();
