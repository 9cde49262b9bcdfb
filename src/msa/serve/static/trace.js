// How an answer was found: per round what each layer routed to, and what of it was read.

import { make, number, plural } from "./dom.js";

/** @typedef {import("./api.js").Round} Round */

const FIRST = 5; // bars that are shown at once

/**
 * @param {Round[]} rounds
 * @returns {HTMLElement[]}
 */
export const trace = (rounds) => rounds.map(roundElement);

/** @param {Round} round @returns {HTMLElement} */
function roundElement(round) {
  const read = new Set(round.read.map((citation) => citation.number));
  const titles = new Map(round.read.map((citation) => [citation.number, citation.title]));
  const routed = new Set(Object.values(round.routed).flatMap((some) => some.map((d) => d.number)));
  const others = [...routed].filter((one) => !read.has(one)).length;
  const done = read.size ? `${plural(read.size, "document")} read` : "nothing more was read";
  const about = `${done}, ${number(others)} routed and not read`;
  const layers = Object.entries(round.routed).map(([layer, documents]) =>
    bars(
      `Layer ${layer}`,
      documents.map((d) => ({ ...d, name: titles.get(d.number) || d.id, read: read.has(d.number) })),
    ),
  );
  const together = bars(
    "All layers together",
    round.ranked.map((d) => ({
      score: d.prior,
      name: titles.get(d.number) || d.id,
      read: read.has(d.number),
    })),
    (score) => `${(100 * score).toFixed(0)}%`,
  );
  return make(
    "section",
    { class: "round" },
    make("h3", {}, `Round ${round.index}`, make("span", { class: "about" }, about)),
    make("div", { class: "layers" }, ...layers, round.ranked.length ? together : null),
  );
}

/**
 * @param {string} title
 * @param {{name: string, score: number, read: boolean}[]} documents best first
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
 * @param {{name: string, read: boolean}} document
 * @param {number} share of the longest bar
 * @param {string} score in words
 */
function bar({ name, read }, share, score) {
  const fill = make("span", { class: "fill" });
  fill.style.width = `${Math.max(1, 100 * Math.max(0, share))}%`;
  return make(
    "li",
    { class: read ? "read" : null },
    make("span", { class: "name", title: name }, name),
    make("span", { class: "score" }, read ? make("b", {}, "read ") : null, score),
    make("span", { class: "track", "aria-hidden": "true" }, fill),
  );
}
