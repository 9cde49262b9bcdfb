// What is done to a memory as a whole: the demo's documents, verifying, compacting.

import * as api from "./api.js";
import { $, make, plural, show, size, toast } from "./dom.js";
import { showJob } from "./upload.js";

const DOING = { verify: "Verifying…", compact: "Compacting…" };

/** Bank -> questions for the demo's documents, which were loaded into it. */
const demos = /** @type {Map<string, string[]>} */ (new Map());
const before = [...$("examples").children];

let context = { bank: () => "", before: async () => {}, changed: async () => {}, ask: () => {} };
let shown = "";

/** @param {typeof context} given the page's side; `before` is awaited before a bank is changed */
export function startUpkeep(given) {
  context = given;
  $("verify").addEventListener("click", () => maintain("verify"));
  $("compact").addEventListener("click", () => maintain("compact"));
  $("load-demo").addEventListener("click", loadDemo);
}

/**
 * What a bank offers: help where it is empty, questions where it holds the demo, its upkeep.
 * @param {string} bank
 * @param {number} count of its documents
 * @param {boolean} mayWrite
 */
export function showUpkeep(bank, count, mayWrite) {
  const questions = count ? demos.get(bank) : undefined;
  $("empty").hidden = count > 0 && !questions;
  $("empty").classList.toggle("filled", count > 0);
  $("empty-text").hidden = count > 0;
  $("empty-how").hidden = !mayWrite;
  $("examples-about").textContent = questions
    ? "The demo is in this memory; ask what it says, also across several documents:"
    : "Once it holds documents, ask what they say, also across several of them:";
  $("examples").replaceChildren(...(questions?.map(example) ?? before));
  $("upkeep").hidden = !mayWrite;
  if (bank !== shown) $("upkeep-about").textContent = "";
  shown = bank;
}

/** @param {string} question */
const example = (question) => make("li", {}, make("button", { type: "button" }, question));

async function loadDemo() {
  const bank = context.bank();
  $("load-demo").disabled = true;
  try {
    const { documents, questions } = await api.demo();
    const job = await api.addDocuments(bank, documents);
    demos.set(bank, questions);
    await showJob(bank, job);
    if (context.bank() === bank) context.ask();
  } catch (error) {
    toast(/** @type {Error} */ (error).message, { alert: true, seconds: 8 });
  } finally {
    $("load-demo").disabled = false;
  }
}

/** @param {"verify" | "compact"} kind */
async function maintain(kind) {
  const bank = context.bank();
  const tell = (/** @type {string} */ text) => bank === shown && show($("upkeep-about"), text);
  for (const id of ["verify", "compact"]) $(id).disabled = true;
  tell(DOING[kind]);
  try {
    await context.before();
    const job = await api.ended((await api.maintain(bank, kind)).id);
    if (job.status !== "done") tell(job.message ?? `It was ${job.status}.`);
    else tell(kind === "verify" ? verified(job.result) : compacted(job.result));
    await context.changed();
  } catch (error) {
    tell(/** @type {Error} */ (error).message);
  } finally {
    for (const id of ["verify", "compact"]) $(id).disabled = false;
  }
}

/** @param {{problems: string[], num_documents: number, num_bytes: number}} found */
function verified({ problems, num_documents, num_bytes }) {
  const checked = `${plural(num_documents, "document")}, ${size(num_bytes)}`;
  if (!problems.length) return `Sound: ${checked} are as they were written.`;
  return `${plural(problems.length, "problem")} in ${checked}: ${problems.join("; ")}`;
}

/** @param {{bytes_before: number, bytes_after: number, dropped: number}} done */
function compacted({ bytes_before, bytes_after, dropped }) {
  const freed = Math.max(0, bytes_before - bytes_after);
  if (!dropped && !freed) return "Nothing to drop.";
  return `${plural(dropped, "deleted document")} dropped, ${size(freed)} freed.`;
}
