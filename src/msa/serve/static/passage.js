// The passage beside the answer: a source, with the answer's words marked in it.

import { passage, permalink } from "./api.js";
import { $, copy, make, marked, number, show, toast } from "./dom.js";

const WIDE = matchMedia("(min-width: 1000px)");
const panel = /** @type {HTMLDialogElement} */ ($("passage"));
/** @type {HTMLElement | null} what opened it, and gets the focus back */
let opener = null;

/**
 * @typedef {{id: string, number: number, title: string | null, text: string,
 *   round?: number, span?: [number, number] | null, metadata?: Record<string, any>}} Source
 */

/**
 * Open a document of a list, of which only the beginning is here.
 * @param {string} bank
 * @param {number} number
 * @param {HTMLElement} from the button that was pressed
 */
export async function openNumber(bank, number, from) {
  try {
    openPassage(bank, await passage(bank, number), from);
  } catch (error) {
    toast(/** @type {Error} */ (error).message, { alert: true });
  }
}

/**
 * @param {string} bank
 * @param {Source} source
 * @param {HTMLElement} from the button that was pressed
 */
export function openPassage(bank, source, from) {
  closePassage();
  opener = from;
  opener.setAttribute("aria-expanded", "true");
  const round = source.round ? `Read in round ${source.round}` : "";
  const stands = source.span ? " · answer marked" : "";
  show($("passage-round"), round && round + stands);
  $("passage-title").textContent = source.title || source.id;
  $("passage-id").textContent = `${source.id} · no. ${number(source.number)}`;
  $("passage-text").replaceChildren(...marked(source.text, source.span));
  showMetadata(source.metadata ?? {});
  const link = permalink(bank, source.number, source.span);
  $("passage-link").href = link;
  $("passage-copy").onclick = () => copy(link, "Link");
  if (WIDE.matches) panel.show();
  else panel.showModal();
  document.body.classList.add("with-passage");
  $("passage-title").focus({ preventScroll: true });
  panel.scrollTop = 0;
  panel.querySelector("mark")?.scrollIntoView({ block: "nearest" });
}

/** @returns {boolean} true if it was open */
export function closePassage() {
  if (!panel.open) return false;
  panel.close();
  return true;
}

/** @param {Record<string, any>} metadata */
function showMetadata(metadata) {
  const rows = Object.entries(metadata).flatMap(([name, value]) => [
    make("dt", {}, name),
    make("dd", {}, typeof value === "string" ? value : JSON.stringify(value)),
  ]);
  $("passage-metadata").replaceChildren(...rows);
  $("passage-metadata").hidden = !rows.length;
}

panel.addEventListener("close", () => {
  document.body.classList.remove("with-passage");
  opener?.setAttribute("aria-expanded", "false");
  if (opener?.isConnected) opener.focus({ preventScroll: true });
  opener = null;
});
$("passage-close").addEventListener("click", closePassage);
WIDE.addEventListener("change", closePassage);
