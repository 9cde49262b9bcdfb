// Asking: a card per question, filled while the service's events come.

import * as api from "./api.js";
import { $, copy, fromTemplate, make, parseFilter, say, show } from "./dom.js";
import { number, plural, seconds } from "./dom.js";
import { openPassage } from "./passage.js";
import { trace } from "./trace.js";

/** @typedef {import("./api.js").Answer} Answer */
/** @typedef {import("./api.js").Citation} Citation */

const WHY = /** @type {Record<string, string>} */ ({
  not_found: "What was read does not hold the answer.",
  max_tokens: "The answer was cut: it became too long.",
  max_rounds: "It stopped reading after the last round that it is given.",
  max_positions: "It stopped reading: there was no room for the next document.",
});

const field = $("question");
/** @type {AbortController | null} of the question that is being answered */
let running = null;

/** What the rest of the page gives: the bank's name, and what must happen before a question. */
let context = { bank: () => "", before: async () => {} };

/** @param {typeof context} given */
export function startAsking(given) {
  context = given;
  $("question-form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    if (running) stop();
    else ask(field.value.trim());
  });
  field.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) ask(field.value.trim());
  });
  field.addEventListener("input", grow);
  $("examples").addEventListener("click", (/** @type {Event} */ event) => {
    const button = /** @type {HTMLElement} */ (event.target).closest("button");
    if (!button) return;
    field.value = button.textContent;
    grow();
    field.focus();
  });
}

/** As many lines as the question has. */
function grow() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

/** @returns {boolean} true if there was something to stop */
export function stop() {
  if (!running) return false;
  running.abort();
  return true;
}

/** Forget the answers: they are another bank's. */
export function clearAnswers() {
  stop();
  $("answers").replaceChildren();
}

/** @param {number} place from 1 */
export const openSource = (place) =>
  $("answers").firstElementChild?.querySelectorAll(".chips button")[place - 1]?.click();

/** @param {string} question */
async function ask(question) {
  show($("question-problem"), null);
  if (!question || !context.bank()) return;
  let filter;
  try {
    filter = parseFilter($("ask-filter").value);
  } catch (error) {
    show($("question-problem"), /** @type {Error} */ (error).message);
    return;
  }
  const card = new Card(context.bank(), { question, ...(filter && { filter }) });
  $("answers").prepend(card.element);
  document.body.classList.add("asked");
  if (matchMedia("(hover: hover)").matches) field.select();
  else field.blur(); // the keyboard makes room for the answer
  await run(card);
}

/** @param {Card} card */
async function run(card) {
  const control = new AbortController();
  running = control;
  $("ask-button").textContent = "Stop";
  $("ask-button").classList.add("stop");
  card.start();
  try {
    await context.before();
    for await (const event of api.ask(card.bank, card.body, control.signal)) card.take(event);
    card.end();
  } catch (error) {
    if (control.signal.aborted) card.stopped();
    else card.fail(/** @type {Error} */ (error));
  } finally {
    if (running === control) running = null;
    $("ask-button").textContent = "Ask";
    $("ask-button").classList.remove("stop");
  }
}

/** A question and its answer. */
class Card {
  /**
   * @param {string} bank
   * @param {{question: string, filter?: object}} body
   */
  constructor(bank, body) {
    this.bank = bank;
    this.body = body;
    this.element = fromTemplate("answer-card");
    /** @type {Answer | null} */
    this.answer = null;
    /** @type {Citation[]} */
    this.read = [];
    this.text = "";
    this.began = this.route = 0;
    this.part(".asked").textContent = body.question;
    for (const button of this.element.querySelectorAll("[data-copy]")) {
      button.addEventListener("click", () => this.copy(button.dataset.copy));
    }
  }

  /** @param {string} selector @returns {any} */
  part(selector) {
    return this.element.querySelector(selector);
  }

  start() {
    this.began = performance.now();
    this.text = "";
    this.read = [];
    this.route = 0;
    this.element.setAttribute("aria-busy", "true");
    this.stage = "Routing";
    this.ticks = setInterval(() => this.showStages(), 100);
    this.showStages();
    say("Looking for documents");
  }

  get elapsed() {
    return (performance.now() - this.began) / 1000;
  }

  /** The stages behind us with their times, and the one that runs. */
  showStages() {
    const done = [];
    if (this.route) done.push(`routed in ${seconds(this.route)}`);
    if (this.read.length) done.push(`read ${plural(this.read.length, "document")}`);
    const now = this.stage && `${this.stage} ${seconds(this.elapsed)}`;
    this.part(".stages").replaceChildren(
      ...done.map((text) => make("span", {}, text)),
      ...(now ? [make("span", { class: "now" }, now)] : []),
    );
  }

  /** @param {{event: string, data: any}} event */
  take({ event, data }) {
    if (event === "routing") {
      this.route ||= this.elapsed;
      this.stage = "Reading";
    } else if (event === "reading") {
      this.read.push(data);
      this.stage = "Answering";
      this.showChips(this.read);
      say(`Reading ${data.title || data.id}`);
    } else if (event === "token") {
      this.stage = "Answering";
      this.text += data;
      this.part(".answer").textContent = this.text;
    } else if (event === "answer") {
      this.answer = data;
    }
    this.showStages();
  }

  /** No more events come. */
  settle() {
    clearInterval(this.ticks);
    this.stage = "";
    this.element.removeAttribute("aria-busy");
    this.showStages();
    this.part(".foot").hidden = false;
    this.part("[data-copy=answer]").hidden = !this.text;
  }

  end() {
    if (!this.answer) throw new api.ApiError(0, "cut", "The answer broke off; ask once more.");
    const { text, citations, rounds, usage, stopped } = this.answer;
    const refused = stopped === "not_found";
    this.text = text;
    this.read = rounds.flatMap((round) => round.read);
    this.settle();
    this.part(".answer").textContent = refused ? "" : text;
    this.part(".refused").hidden = !refused;
    this.part(".refused span").textContent = WHY.not_found;
    show(this.part(".problem"), refused ? null : WHY[stopped] ?? (text ? null : "No answer came."));
    this.part(".problem").classList.add("mild");
    this.showChips(refused ? this.read : citations, refused);
    this.part(".trace").hidden = !rounds.length;
    this.part(".trace > div").replaceChildren(...trace(rounds));
    this.part(".cost").textContent = [
      plural(rounds.length, "round"),
      `${number(usage.prompt_tokens)} + ${number(usage.generated_tokens)} tokens`,
      seconds(usage.total_seconds),
    ].join(" · ");
    say(refused ? `Not in this memory. ${WHY.not_found}` : `Answer: ${text}`);
  }

  stopped() {
    this.settle();
    show(this.part(".problem"), "Stopped.");
    this.part(".problem").classList.add("mild");
    say("Stopped");
  }

  /** @param {Error} error */
  fail(error) {
    this.settle();
    const wait = error instanceof api.ApiError && error.retryAfter;
    const problem = this.part(".problem");
    show(problem, error.message + (wait ? ` Come again in ${wait} s.` : ""));
    problem.classList.remove("mild");
    const again = make("button", { type: "button", class: "link" }, "Ask again");
    again.addEventListener("click", () => {
      if (running) return;
      show(problem, null);
      this.part(".answer").textContent = "";
      run(this);
    });
    problem.append(" ", again);
    say(error.message);
  }

  /**
   * @param {Citation[]} citations
   * @param {boolean} [refused] they were read, and the answer does not rest on them
   */
  showChips(citations, refused = false) {
    const chips = this.part(".chips");
    chips.setAttribute("aria-label", refused ? "Read, without finding the answer" : "Sources");
    chips.replaceChildren(
      ...citations.map((citation, place) => make("li", {}, this.chip(citation, place + 1))),
    );
  }

  /** @param {Citation} citation @param {number} place */
  chip(citation, place) {
    const name = citation.title || citation.id;
    const about = `Source ${place}: ${name}, read in round ${citation.round}`;
    const holds = citation.span ? "; the answer stands in it" : "";
    const button = make(
      "button",
      {
        type: "button",
        class: citation.span ? "chip holds" : "chip",
        "aria-label": about + holds,
        "aria-expanded": "false",
        title: `Read in round ${citation.round}`,
      },
      make("b", {}, String(place)),
      make("span", {}, name),
    );
    button.addEventListener("click", () => openPassage(this.bank, citation, button));
    return button;
  }

  /** @param {string} what "answer", "curl" or "python" */
  copy(what) {
    if (what === "answer") return copy(this.text, "Answer");
    if (what === "curl") return copy(asCurl(this.bank, this.body), "curl command");
    return copy(asPython(this.bank, this.body), "Python code");
  }
}

/** @param {string} bank @param {{question: string, filter?: object}} body */
function asCurl(bank, body) {
  const url = api.address(`api/banks/${encodeURIComponent(bank)}/ask`);
  const data = JSON.stringify({ ...body, stream: false }).replaceAll("'", "'\\''");
  const lines = [`curl '${url}'`, `-H 'Content-Type: application/json'`];
  if (api.key()) lines.push(`-H "Authorization: Bearer $MSA_API_KEY"`);
  return [...lines, `-d '${data}'`].join(" \\\n  ");
}

/** @param {string} bank @param {{question: string, filter?: object}} body */
function asPython(bank, { question, filter }) {
  const text = asLiteral;
  const key = api.key() ? 'os.environ["MSA_API_KEY"]' : '"none"';
  const lines = [
    ...(api.key() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${text(api.address("v1"))}, api_key=${key})`,
    "answer = client.chat.completions.create(",
    `    model=${text(`msa/${bank}`)},`,
    `    messages=[{"role": "user", "content": ${text(question)}}],`,
    ...(filter ? [`    extra_body={"msa": {"filter": ${text(filter)}}},`] : []),
    ")",
    "print(answer.choices[0].message.content)",
  ];
  return `${lines.join("\n")}\n`;
}

/** @param {any} value of JSON @returns {string} the same in Python */
function asLiteral(value) {
  if (Array.isArray(value)) return `[${value.map(asLiteral).join(", ")}]`;
  if (typeof value === "boolean") return value ? "True" : "False";
  if (value === null) return "None";
  if (typeof value !== "object") return JSON.stringify(value);
  const pairs = Object.entries(value);
  return `{${pairs.map((pair) => pair.map(asLiteral).join(": ")).join(", ")}}`;
}
