// The memory: its documents, found, filtered, deleted; and its numbers.

import * as api from "./api.js";
import { $, make, number, parseFilter, plural, show, size, toast } from "./dom.js";
import { openNumber } from "./passage.js";

/** @typedef {import("./api.js").StoredDocument} StoredDocument */

const UNDO_SECONDS = 6;

let bank = "";
let mayWrite = false;
/** Where the next page of the list begins. */
let next = /** @type {number | null} */ (null);
/** Grows with every listing, so that a late answer to an earlier one is dropped. */
let listing = 0;
/** Deletes that can still be undone: id of the document -> what sends or forgets them. */
const pending = /** @type {Map<string, {bank: string, close: () => void, timer: number}>} */ (
  new Map()
);

/** Done when it is known what the document that is to be deleted is a part of. */
let looking = Promise.resolve();

export function startMemory() {
  $("search-form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    list();
  });
  $("search").addEventListener("search", () => $("search").value || list());
  $("search-by").addEventListener("change", () => $("search").value && list());
  $("more").addEventListener("click", () => page(filterOrProblem()));
  addEventListener("pagehide", () => sendDeletes(true));
}

/**
 * Show another bank, or the same one as it is now.
 * @param {string} name
 * @returns {Promise<any>} its information
 */
export async function showMemory(name) {
  if (name !== bank) await sendDeletes();
  bank = name;
  const about = await api.bankInfo(name);
  if (name !== bank) return about;
  mayWrite = about.scopes?.includes("write") ?? true;
  showNumbers(about);
  return about;
}

/** @returns {Record<string, any> | undefined | null} null where what was typed is no filter */
function filterOrProblem() {
  show($("search-problem"), null);
  try {
    return parseFilter($("list-filter").value);
  } catch (error) {
    show($("search-problem"), /** @type {Error} */ (error).message);
    return null;
  }
}

/** The list from its beginning, or what is found. */
export async function list() {
  const filter = filterOrProblem();
  if (filter === null || !bank) return;
  const query = $("search").value.trim();
  next = null;
  if (query && $("search-by").value === "meaning") await find(query, filter);
  else await page(filter, true);
}

/** @param {string} query @param {Record<string, any> | undefined} filter */
async function find(query, filter) {
  const mine = (listing += 1);
  $("list-about").textContent = "Searching…";
  $("more").hidden = true;
  await shown(mine, async () => {
    await sendDeletes();
    const found = await api.search(bank, query, filter);
    if (mine !== listing) return;
    $("documents").replaceChildren(...found.map(row));
    $("list-about").textContent = found.length
      ? `${plural(found.length, "document")}, nearest first`
      : "Nothing found";
  });
}

/** @param {Record<string, any> | undefined | null} filter @param {boolean} [first] */
async function page(filter, first = false) {
  if (filter === null) return;
  const mine = (listing += 1);
  await shown(mine, async () => {
    const words = $("search").value.trim();
    const found = await api.documents(bank, { after: next, filter, words });
    if (mine !== listing) return;
    if (first) $("documents").replaceChildren();
    $("documents").append(...found.data.map(row));
    next = found.next ?? null;
    $("more").hidden = !found.has_more;
    const count = $("documents").childElementCount;
    const all = found.has_more ? "The first " : "";
    $("list-about").textContent = count ? `${all}${plural(count, "document")}` : "No documents";
  });
}

/** @param {number} mine @param {() => Promise<void>} work its errors are shown */
async function shown(mine, work) {
  try {
    await work();
  } catch (error) {
    if (mine !== listing) return;
    $("list-about").textContent = "";
    const empty = error instanceof api.ApiError && error.code === "empty_bank";
    if (empty) $("documents").replaceChildren();
    show($("search-problem"), empty ? null : /** @type {Error} */ (error).message);
    if (empty) $("list-about").textContent = "Nothing found";
  }
}

/** @param {StoredDocument} stored */
function row(stored) {
  const name = stored.title || stored.id;
  const open = make("button", { type: "button", class: "name", "aria-expanded": "false" }, name);
  open.addEventListener("click", () => openNumber(bank, stored.number, open));
  const part = stored.part_of ? `part ${stored.part} of ${stored.num_parts}` : null;
  const facts = [
    stored.id === name ? null : stored.id,
    part,
    stored.num_tokens ? plural(stored.num_tokens, "token") : null,
    stored.score === undefined ? null : `score ${stored.score.toFixed(2)}`,
    ...Object.entries(stored.metadata ?? {}).map(([key, value]) => `${key}=${plain(value)}`),
  ];
  const element = make(
    "li",
    { "data-id": stored.id },
    open,
    make("p", { class: "snippet" }, stored.snippet ?? stored.text?.slice(0, 400) ?? ""),
    make("p", { class: "id" }, facts.filter(Boolean).join(" · ")),
  );
  element.dataset.source = stored.part_of || stored.id;
  element.hidden = pending.has(element.dataset.source);
  if (mayWrite) element.append(removeButton(stored));
  return element;
}

/** @param {any} value of metadata */
const plain = (value) => (typeof value === "string" ? value : JSON.stringify(value));

/** @param {StoredDocument} stored */
function removeButton(stored) {
  const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  icon.setAttribute("viewBox", "0 0 20 20");
  icon.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", "M4 6h12M8 6V4h4v2m-6 0 .7 10h6.6L14 6M8.5 9v4.5m3-4.5v4.5");
  icon.append(path);
  const button = make("button", { type: "button", class: "icon remove", title: "Delete" }, icon);
  button.setAttribute("aria-label", `Delete ${stored.title || stored.id}`);
  button.addEventListener("click", () => {
    looking = removeWhole(stored);
  });
  return button;
}

/** @param {StoredDocument} stored a document, or a part of one */
async function removeWhole(stored) {
  try {
    const { part_of, num_parts } = await partOf(stored);
    const name = part_of ? `${part_of}, all ${num_parts} parts` : stored.title || stored.id;
    remove(part_of || stored.id, name);
  } catch (error) {
    toast(`Not deleted: ${/** @type {Error} */ (error).message}`, { alert: true });
  }
}

/**
 * What a document is a part of. Lists say so; of what was found it has to be asked.
 * @param {StoredDocument} stored
 * @returns {Promise<StoredDocument>}
 */
async function partOf(stored) {
  if (stored.part_of !== undefined) return stored;
  const about = await api.passage(bank, stored.number);
  for (const element of $("documents").children) {
    const { id } = element.dataset;
    if (about.part_of && id.startsWith(`${about.part_of}#`)) element.dataset.source = about.part_of;
  }
  return about;
}

/**
 * Hide a document, and delete it unless that is undone in time.
 * @param {string} id
 * @param {string} name
 */
function remove(id, name) {
  const rows = /** @type {HTMLElement[]} */ ([...$("documents").children]);
  const place = rows.findIndex((element) => element.dataset.source === id);
  setHidden(id, true);
  const after = [...rows.slice(place), ...rows.slice(0, place).reverse()].find((r) => !r.hidden);
  (after?.querySelector("button") ?? $("search")).focus();
  const undo = () => {
    clearTimeout(pending.get(id)?.timer);
    pending.delete(id);
    setHidden(id, false);
    const back = rows[place]?.querySelector("button");
    if (back?.isConnected) back.focus();
  };
  const close = toast(`“${name}” is deleted`, {
    action: "Undo",
    onAction: undo,
    seconds: UNDO_SECONDS + 1,
  });
  const timer = setTimeout(() => sendDeletes(), UNDO_SECONDS * 1000);
  pending.set(id, { bank, close, timer });
}

/** @param {string} id @param {boolean} hidden */
function setHidden(id, hidden) {
  for (const element of $("documents").children) {
    if (element.dataset.source === id) element.hidden = hidden;
  }
}

/**
 * Send the deletes that were not undone: nothing may find what was deleted before it was asked.
 * @param {boolean} [leaving] true while the page goes away
 */
export async function sendDeletes(leaving = false) {
  if (!leaving) await looking;
  const all = [...pending];
  pending.clear();
  for (const [, { close, timer }] of all) {
    clearTimeout(timer);
    close();
  }
  for (const from of new Set(all.map(([, deleted]) => deleted.bank))) {
    const ids = all.filter(([, deleted]) => deleted.bank === from).map(([id]) => id);
    try {
      await api.deleteDocuments(from, ids, leaving);
    } catch (error) {
      if (leaving) return;
      ids.forEach((id) => setHidden(id, false));
      toast(`Not deleted: ${/** @type {Error} */ (error).message}`, { alert: true, seconds: 8 });
    }
  }
  if (all.length && !leaving && bank) showNumbers(await api.bankInfo(bank));
}

// ---- numbers

/** @param {any} about as the service tells of a bank */
function showNumbers({ info, plan }) {
  const rows = [
    ["Documents", number(info.num_ids)],
    info.num_documents === info.num_ids ? null : ["Parts", number(info.num_documents)],
    ["Tokens", number(info.num_tokens)],
    ["On disk", size(info.segment_bytes + info.catalog_bytes)],
    info.num_deleted ? ["Deleted, not compacted", number(info.num_deleted)] : null,
    ["Generation", number(info.generation)],
    ["Model", info.model],
    ["Routing layers", info.routing_layers.join(", ")],
    ["Longest part", plural(info.max_document_tokens, "token")],
    ["Made", info.created.slice(0, 10)],
  ];
  $("figures").replaceChildren(
    make("h2", {}, "This memory"),
    make("dl", {}, ...rows.filter((pair) => pair !== null).flatMap(pairOf)),
    ...(plan ? planElements(plan) : []),
  );
}

/** @param {string[]} pair */
const pairOf = ([name, value]) => [make("dt", {}, name), make("dd", {}, value)];

/** @param {any} plan bytes of everything that is loaded */
function planElements(plan) {
  const held = plan.content === "held";
  const device = plan.keys_device === "cpu" ? "RAM" : plan.keys_device;
  const parts = [
    [`Routing keys, ${plan.keys_dtype}, in ${device}`, plan.keys_bytes + (plan.pruned_bytes ?? 0)],
    [held ? "Content, in RAM" : "Content, mapped from disk", plan.content_bytes],
    ["Rows", plan.rows_bytes],
    ["A batch of questions", plan.question_bytes],
  ];
  const whole = parts.reduce((sum, [, bytes]) => sum + bytes, 0) || 1;
  const pieces = parts.map(([, bytes], place) => {
    const piece = make("span", { class: `piece p${place}` });
    piece.style.flexGrow = String(bytes / whole);
    return piece;
  });
  const legend = parts.flatMap(([name, bytes], place) => [
    make("dt", { class: `p${place}` }, name),
    make("dd", {}, size(bytes)),
  ]);
  const free = plan.memory_available ? ` of ${size(plan.memory_available)} free` : "";
  return [
    make("h2", {}, "In memory"),
    make("p", { class: "about" }, `At most ${size(plan.memory_bytes)}${free}`),
    make("div", { class: "plan", "aria-hidden": "true" }, ...pieces),
    make("dl", { class: "legend" }, ...legend),
    make("p", { class: "about why" }, plan.why.length ? `${plan.why.join("; ")}.` : ""),
  ];
}
