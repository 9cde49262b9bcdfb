// Adding files: sent, read by a job of the service, and every file's fate shown.

import * as api from "./api.js";
import { $, copy, fromTemplate, make, number, plural, say, seconds, show, toast } from "./dom.js";

/** @typedef {import("./api.js").Job} Job */
/** @typedef {import("./api.js").JobFile} JobFile */

const FIRST = 8; // files that are shown
const MOST_BYTES = 200 * 2 ** 20; // of one request; more files go in several
const WORDS = /** @type {Record<string, string>} */ ({
  queued: "waiting",
  running: "reading",
  done: "added",
  failed: "failed",
  skipped: "skipped",
  cancelled: "not added",
});

/** Jobs that are shown. */
const shown = /** @type {Set<string>} */ (new Set());

let context = { bank: () => "", mayWrite: () => true, changed: () => {}, reveal: () => {} };

/** @param {typeof context} given the page's side: what the bank is, what to do when it changed */
export function startUploads(given) {
  context = given;
  const input = $("files");
  for (const id of ["add-files", "empty-add"]) $(id).addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    add([...input.files]);
    input.value = "";
  });
  let depth = 0;
  const isFiles = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => {
    if (!isFiles(event) || !context.mayWrite()) return;
    depth += 1;
    $("drop-bank").textContent = context.bank();
    $("drop").hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (isFiles(event)) depth = Math.max(0, depth - 1);
    if (!depth) $("drop").hidden = true;
  });
  addEventListener("dragover", (event) => isFiles(event) && event.preventDefault());
  addEventListener("drop", async (event) => {
    if (!isFiles(event)) return;
    event.preventDefault();
    depth = 0;
    $("drop").hidden = true;
    if (!context.mayWrite()) return toast("This key may not add documents.", { alert: true });
    try {
      add(await dropped(/** @type {DataTransfer} */ (event.dataTransfer)));
    } catch (error) {
      toast(`This cannot be read: ${/** @type {Error} */ (error).message}`, { alert: true });
    }
  });
}

/** @param {string} bank show the jobs that add to it now, whoever began them */
export async function showRunning(bank) {
  for (const { id, kind, status } of await api.jobs(bank)) {
    const adds = kind === "index" || kind === "file_batch";
    if (adds && !api.ENDS.includes(status) && !shown.has(id)) new Upload(bank, []).watch(id);
  }
}

/**
 * Show a job until it has ended.
 * @param {string} bank that it adds to
 * @param {Job} job
 */
export function showJob(bank, job) {
  context.reveal();
  return new Upload(bank, []).watch(job.id);
}

/** @param {DataTransfer} data @returns {Promise<File[]>} files, those in folders too */
async function dropped(data) {
  const entries = [...data.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...data.files];
  return (await Promise.all(entries.map(filesOf))).flat();
}

/** @param {any} entry @returns {Promise<File[]>} named by their paths */
async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [new File([file], entry.fullPath.slice(1))];
  }
  const reader = entry.createReader();
  const files = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return files;
    for (const inner of some) files.push(...(await filesOf(inner)));
  }
}

/** @param {File[]} files */
function add(files) {
  if (!context.bank()) return;
  if (!files.length) toast("There is no file in what was dropped.", { alert: true });
  else context.reveal();
  for (const some of batches(files)) new Upload(context.bank(), some).send();
}

/** @param {File[]} files @returns {File[][]} as many together as one request may carry */
function batches(files) {
  const found = /** @type {File[][]} */ ([]);
  let bytes = Infinity;
  for (const file of files) {
    bytes += file.size;
    if (bytes > MOST_BYTES) {
      found.push([]);
      bytes = file.size;
    }
    found[found.length - 1].push(file);
  }
  return found;
}

/** Files on their way into a bank. */
class Upload {
  /** @param {string} bank @param {File[]} files */
  constructor(bank, files) {
    this.bank = bank;
    this.files = files;
    /** @type {Job | null} */
    this.job = null;
    this.control = new AbortController();
    this.element = fromTemplate("job-card");
    $("jobs").prepend(this.element);
    this.part(".cancel").addEventListener("click", () => this.cancel());
    this.part(".dismiss").addEventListener("click", () => this.element.remove());
    this.part(".report").addEventListener("click", () => {
      copy(JSON.stringify(this.job, null, 2), "Report");
    });
    this.part("h2").textContent = `${plural(files.length, "file")} for ${bank}`;
    this.part("progress").setAttribute("aria-label", "Progress");
  }

  /** @param {string} selector @returns {any} */
  part(selector) {
    return this.element.querySelector(selector);
  }

  async send() {
    this.showSent(0);
    try {
      const onProgress = (/** @type {number} */ share) => this.showSent(share);
      const job = await api.upload(this.bank, this.files, onProgress, this.control.signal);
      this.show(job);
      await this.watch(job.id);
    } catch (error) {
      const stopped = this.control.signal.aborted;
      this.fail(stopped ? "Cancelled; nothing was added." : /** @type {Error} */ (error).message);
    }
  }

  /** @param {string} id look at the job until it ends */
  async watch(id) {
    shown.add(id);
    try {
      const job = await api.ended(id, (now) => this.show(now));
      this.end(job);
    } catch (error) {
      this.fail(/** @type {Error} */ (error).message);
    }
  }

  async cancel() {
    if (!this.job) return this.control.abort();
    this.part(".cancel").disabled = true;
    try {
      await api.cancelJob(this.job.id);
    } catch (error) {
      this.part(".cancel").disabled = false;
      toast(/** @type {Error} */ (error).message, { alert: true });
    }
  }

  /** @param {number} share of all bytes; the files are sent one behind the other */
  showSent(share) {
    this.part("progress").value = share;
    this.part(".about").textContent = `Sending, ${Math.round(100 * share)}%`;
    let begin = 0;
    const whole = this.files.reduce((sum, file) => sum + file.size, 0) || 1;
    const rows = this.files.map((file) => {
      const sent = Math.min(1, Math.max(0, (share * whole - begin) / (file.size || 1)));
      begin += file.size;
      return { file: file.name, status: sent === 1 ? "queued" : "sending", sent };
    });
    this.showFiles(rows);
  }

  /** @param {Job} job */
  show(job) {
    this.job = job;
    this.part("h2").textContent = `${plural(job.total, "file")} for ${this.bank}`;
    const bar = this.part("progress");
    bar.value = job.total ? job.done / job.total : 0;
    this.part(".about").textContent = [
      job.status === "queued" ? "Waiting for its turn" : "Reading",
      `${number(job.done)} of ${plural(job.total, "file")}`,
      job.tokens ? plural(job.tokens, "token") : null,
      job.eta_s ? `${seconds(job.eta_s)} left` : null,
    ]
      .filter(Boolean)
      .join(" · ");
    this.showFiles(job.files);
  }

  /** @param {Job} job */
  end(job) {
    const counts = ["done", "failed", "skipped", "cancelled"].map((status) => {
      const count = job.files.filter((file) => file.status === status).length;
      return count ? `${number(count)} ${WORDS[status]}` : null;
    });
    const tokens = job.tokens ? plural(job.tokens, "token") : null;
    const summary = [counts.filter(Boolean).join(", "), tokens, job.message];
    this.finish(summary.filter(Boolean).join(" · "));
    context.changed();
  }

  /** @param {string} why */
  fail(why) {
    this.finish(why);
    this.part(".about").classList.add("problem");
  }

  /** @param {string} text */
  finish(text) {
    this.element.classList.add("finished");
    this.part("progress").hidden = true;
    this.part(".cancel").hidden = true;
    this.part(".foot").hidden = false;
    this.part(".report").hidden = !this.job;
    show(this.part(".about"), text);
    say(`${this.part("h2").textContent}: ${text}`);
  }

  /** @param {(JobFile & {sent?: number})[]} files those that failed first */
  showFiles(files) {
    const order = (/** @type {JobFile} */ file) =>
      ["failed", "skipped"].includes(file.status) ? 0 : 1;
    const sorted = [...files].sort((a, b) => order(a) - order(b));
    const rest = sorted.length - FIRST;
    this.part(".files").replaceChildren(
      ...sorted.slice(0, FIRST).map(fileRow),
      rest > 0 ? make("li", { class: "about" }, `and ${plural(rest, "more file")}`) : "",
    );
  }
}

/** @param {JobFile & {sent?: number}} file */
function fileRow(file) {
  const fill = make("span", { class: "fill" });
  fill.style.width = `${100 * (file.sent ?? (api.ENDS.includes(file.status) ? 1 : 0))}%`;
  return make(
    "li",
    { class: file.status },
    make("span", { class: "name", title: file.file }, file.file),
    make("span", { class: "score" }, WORDS[file.status] ?? file.status),
    make("span", { class: "track", "aria-hidden": "true" }, fill),
    file.reason ? make("p", { class: "reason" }, file.reason) : null,
  );
}
