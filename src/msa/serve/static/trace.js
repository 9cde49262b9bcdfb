// How an answer was found: per round what each layer routed to, and what of it was read.

import { make, number, plural } from "./dom.js";

/** @typedef {import("./api.js").Round} Round */

const FIRST = 5; // bars that are shown at once

/**
 * @param {Round[]} rounds
 * @returns {HTMLElement[]}
 */
export function trace(rounds) {
  const titles = new Map(rounds.flatMap((r) => r.read.map((c) => [c.number, c.title])));
  const before = /** @type {Set<number>} */ (new Set());
  return rounds.map((round) => {
    const element = roundElement(round, titles, new Set(before));
    round.read.forEach((citation) => before.add(citation.number));
    return element;
  });
}

/**
 * @param {Round} round
 * @param {Map<number, string | null>} titles of what was read in any round
 * @param {Set<number>} before numbers of what was read in earlier ones
 * @returns {HTMLElement}
 */
function roundElement(round, titles, before) {
  const read = new Set(round.read.map((citation) => citation.number));
  const routed = new Set(Object.values(round.routed).flatMap((some) => some.map((d) => d.number)));
  const others = [...routed].filter((one) => !read.has(one) && !before.has(one)).length;
  const done = read.size ? `${plural(read.size, "document")} read` : "nothing more was read";
  const about = `${done}, ${number(others)} routed and not read`;
  const told = (/** @type {{id: string, number: number}} */ { id, number: one }) => ({
    name: titles.get(one) || id,
    state: read.has(one) ? "read" : before.has(one) ? "read before" : "",
  });
  const layers = Object.entries(round.routed).map(([layer, documents]) =>
    bars(`Layer ${layer}`, documents.map((d) => ({ ...told(d), score: d.score }))),
  );
  const together = round.ranked.map((d) => ({ ...told(d), score: d.prior }));
  const tried = round.ranked.flatMap((d) =>
    d.judged === null ? [] : [{ ...told(d), score: d.judged }],
  );
  const alone = tried.length ? [bars("The question follows from it", tried, percent)] : [];
  return make(
    "section",
    { class: "round" },
    make("h3", {}, `Round ${round.index}`, make("span", { class: "about" }, about)),
    make("div", { class: "layers" }, ...layers, bars("All layers together", together, percent), ...alone),
  );
}

/** @param {number} share @returns {string} */
const percent = (share) => (share < 0.005 ? "<1%" : `${(100 * share).toFixed(0)}%`);

/**
 * @param {string} title
 * @param {{name: string, score: number, state: string}[]} documents best first
 * @param {(score: number) => string} written
 * @returns {HTMLElement}
 */
function bars(title, documents, written = (score) => score.toFixed(2)) {
  const best = Math.max(...documents.map((d) => d.score), Number.EPSILON);
  const rows = documents.map((d) => bar(d, d.score / best, written(d.score)));
  const list = make("ol", { class: "bars" }, ...rows.slice(0, FIRST));
  const element = make("div", { class: "layer" }, make("h4", {}, title), list);
  if (rows.length > FIRST) {
    const more = make("button", { type: "button", class: "link" }, `${rows.length - FIRST} more`);
    more.addEventListener("click", () => {
      list.append(...rows.slice(FIRST));
      list.tabIndex = -1;
      list.focus();
      more.remove();
    });
    element.append(more);
  }
  return element;
}

/**
 * @param {{name: string, state: string}} document
 * @param {number} share of the longest bar
 * @param {string} score in words
 */
function bar({ name, state }, share, score) {
  const fill = make("span", { class: "fill" });
  fill.style.width = `${Math.max(1, 100 * Math.max(0, share))}%`;
  return make(
    "li",
    { class: state ? "read" : null },
    make("span", { class: "name", title: name }, name),
    make("span", { class: "score" }, state ? make("b", {}, `${state} `) : null, score),
    make("span", { class: "track", "aria-hidden": "true" }, fill),
  );
}
