// The service's native API, as this page uses it. Nothing else here makes a request.

import { remember, remembered } from "./storage.js";

/**
 * @typedef {{id: string, number: number, title: string | null, text: string, round: number,
 *   span: [number, number] | null}} Citation
 * @typedef {{id: string, number: number, score: number}} Routed
 * @typedef {{id: string, number: number, score: number, prior: number, layers: number[],
 *   lexical: number | null, judged: number | null}} Ranked
 * @typedef {{index: number, routed: Record<string, Routed[]>, read: Citation[],
 *   ranked: Ranked[]}} Round
 * @typedef {{question: string, text: string, citations: Citation[], rounds: Round[],
 *   usage: {prompt_tokens: number, generated_tokens: number, routing_seconds: number,
 *   total_seconds: number}, stopped: string}} Answer
 * @typedef {{id: string, number: number, title: string | null, text?: string, snippet?: string,
 *   metadata: Record<string, any>, num_tokens?: number, part_of?: string | null,
 *   part?: number, num_parts?: number, score?: number}} StoredDocument a document of a list; what
 *   is found by meaning has its text and a score, what is listed a snippet
 * @typedef {{file: string, status: string, reason?: string | null}} JobFile
 * @typedef {{id: string, kind: string, status: string, done: number, total: number, tokens: number,
 *   files: JobFile[], eta_s: number | null, message: string | null, result: any}} Job
 */

/** An answer of the service that is an error. */
export class ApiError extends Error {
  /**
   * @param {number} status of HTTP; 0 where the service was not reached
   * @param {string} code
   * @param {string} message
   * @param {number | null} retryAfter seconds
   */
  constructor(status, code, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

const KEY = "msa-api-key";
let held = remembered(KEY, "sessionStorage");

/** @returns {string | null} the key that was given in this tab */
export const key = () => held;

/** @param {string | null} value */
export function setKey(value) {
  held = value;
  remember(KEY, value, "sessionStorage");
}

/** @type {(why: string) => Promise<boolean>} asks the user for a key; set by the page */
let askForKey = async () => false;
/** @param {(why: string) => Promise<boolean>} ask */
export const onUnauthorized = (ask) => {
  askForKey = ask;
};

/** @param {string} path @returns {string} its whole address, below that of this page */
export const address = (path) => new URL(path, document.baseURI.split("#")[0]).href;

/** @param {string} name @param {string} [rest] */
const ofBank = (name, rest = "") => `api/banks/${encodeURIComponent(name)}${rest}`;

/**
 * @param {string} bank
 * @param {number} number
 * @param {[number, number] | null} [span] marked there
 * @returns {string} where a document stays
 */
export function permalink(bank, number, span) {
  const marked = span ? `?span=${span[0]}-${span[1]}#answer` : "";
  return address(`d/${encodeURIComponent(bank)}/${number}${marked}`);
}

/**
 * @param {string} bank
 * @param {number} number
 * @returns {Promise<StoredDocument & {text: string}>} with its whole text
 */
export const passage = (bank, number) => json(`d/${encodeURIComponent(bank)}/${number}`);

/** @returns {Record<string, string>} */
function headers() {
  return { Accept: "application/json", ...(held ? { Authorization: `Bearer ${held}` } : {}) };
}

/**
 * @param {string} path
 * @param {{method?: string, body?: any, signal?: AbortSignal, keepalive?: boolean,
 *   accept?: string}} [options] an object as body is sent as JSON, a list as a line for each
 * @returns {Promise<Response>} one that is no error
 */
async function request(path, { body, accept, ...rest } = {}) {
  const options = { ...rest, headers: headers(), ...(body && { body: written(body) }) };
  const kind = Array.isArray(body) ? "application/jsonl" : "application/json";
  if (body) options.headers["Content-Type"] = kind;
  if (accept) options.headers.Accept = accept;
  let response;
  try {
    response = await fetch(address(path), options);
  } catch (error) {
    if (rest.signal?.aborted) throw error;
    throw new ApiError(0, "unreachable", "The service cannot be reached.");
  }
  if (response.ok) return response;
  const failure = await errorOf(response);
  if (response.status === 401 && !rest.keepalive && (await askForKey(failure.message))) {
    return request(path, { body, accept, ...rest });
  }
  throw failure;
}

/** @param {object | object[]} body @returns {string} */
const written = (body) =>
  Array.isArray(body) ? body.map((line) => JSON.stringify(line)).join("\n") : JSON.stringify(body);

/** @param {Response} response */
async function errorOf(response) {
  const body = await response.json().catch(() => ({}));
  const wait = Number(response.headers.get("Retry-After")) || null;
  return apiError(response.status, body.error, wait);
}

/**
 * @param {number} status
 * @param {{code?: string, message?: string} | undefined} error
 * @param {number | null} [wait]
 */
function apiError(status, error, wait = null) {
  const message = error?.message ?? `The service answered with status ${status}.`;
  return new ApiError(status, error?.code ?? "unknown", message, wait);
}

/** @param {string} path @param {object} [options] @returns {Promise<any>} */
const json = async (path, options) => (await request(path, options)).json();

/** @returns {Promise<{name: string}[]>} */
export const banks = async () => (await json("api/banks")).data;

/** @param {string} bank @returns {Promise<any>} its figures, plan and what this key may do */
export const bankInfo = (bank) => json(ofBank(bank));

/**
 * Ask, and get the events as they come: routing, reading, token, and at last answer.
 * @param {string} bank
 * @param {{question: string, filter?: object}} body
 * @param {AbortSignal} signal stops the model too
 * @returns {AsyncGenerator<{event: string, data: any}>}
 */
export async function* ask(bank, body, signal) {
  const response = await request(ofBank(bank, "/ask"), {
    method: "POST",
    body: { ...body, trace: true, stream: true },
    accept: "text/event-stream",
    signal,
  });
  for await (const event of events(response)) {
    if (event.event === "error") throw apiError(response.status, event.data.error);
    yield event;
  }
}

/**
 * @param {string} bank
 * @param {string} query
 * @param {object} [filter]
 * @returns {Promise<StoredDocument[]>} best first
 */
export async function search(bank, query, filter) {
  const body = { query, top_k: 20, filter };
  return (await json(ofBank(bank, "/search"), { method: "POST", body })).data;
}

/**
 * @param {string} bank
 * @param {{after?: number | null, filter?: object, words?: string}} options
 * @returns {Promise<{data: StoredDocument[], has_more: boolean, next: number | null}>}
 */
export function documents(bank, { after = null, filter, words }) {
  const query = new URLSearchParams({ limit: "50" });
  if (after !== null) query.set("after", String(after));
  if (words) query.set("q", words);
  if (filter) query.set("filter", JSON.stringify(filter));
  return json(ofBank(bank, `/documents?${query}`));
}

/**
 * @param {string} bank
 * @param {string[]} ids
 * @param {boolean} [leaving] true while the page goes away
 */
export const deleteDocuments = (bank, ids, leaving = false) =>
  json(ofBank(bank, "/documents:delete"), { method: "POST", body: { ids }, keepalive: leaving });

/**
 * Send files; the job that reads them is the answer.
 * @param {string} bank
 * @param {File[]} files
 * @param {(share: number) => void} onProgress share of the bytes that are sent
 * @param {AbortSignal} signal
 * @returns {Promise<Job>}
 */
export async function upload(bank, files, onProgress, signal) {
  const form = new FormData();
  for (const file of files) form.append("files", file);
  const sent = await sentForm(address(ofBank(bank, "/jobs")), form, onProgress, signal);
  if (sent.status === 401 && (await askForKey("This API key is not valid."))) {
    return upload(bank, files, onProgress, signal);
  }
  if (sent.status >= 300) throw apiError(sent.status, sent.body?.error);
  return sent.body;
}

/**
 * Add documents; the job that reads them is the answer.
 * @param {string} bank
 * @param {object[]} lines id, text and title of each
 * @returns {Promise<Job>}
 */
export const addDocuments = (bank, lines) =>
  json(ofBank(bank, "/documents:batch"), { method: "POST", body: lines });

/** @returns {Promise<{documents: object[], questions: string[]}>} to look around with */
export const demo = () => json("api/demo");

/**
 * @param {string} bank
 * @param {"compact" | "verify"} kind
 * @returns {Promise<Job>}
 */
export const maintain = (bank, kind) => json(`${ofBank(bank)}:${kind}`, { method: "POST" });

/**
 * As `fetch`, which cannot say how much is sent.
 * @param {string} url
 * @param {FormData} form
 * @param {(share: number) => void} onProgress
 * @param {AbortSignal} signal
 * @returns {Promise<{status: number, body: any}>}
 */
function sentForm(url, form, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const sender = new XMLHttpRequest();
    sender.open("POST", url);
    for (const [name, value] of Object.entries(headers())) sender.setRequestHeader(name, value);
    sender.responseType = "json";
    sender.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    sender.onload = () => resolve({ status: sender.status, body: sender.response });
    sender.onerror = () => {
      reject(new ApiError(0, "unreachable", "The files could not be sent."));
    };
    sender.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal.addEventListener("abort", () => sender.abort());
    sender.send(form);
  });
}

/** @param {string} bank @returns {Promise<Job[]>} newest first, without their files */
export const jobs = async (bank) => (await json(ofBank(bank, "/jobs"))).data;

/** @param {string} id @returns {Promise<Job>} */
export const job = (id) => json(`api/jobs/${encodeURIComponent(id)}`);

const POLL_MS = 500;
/** What a job, or a file of it, is when nothing more happens to it; files are skipped too. */
export const ENDS = ["done", "failed", "cancelled"];

/**
 * @param {string} id
 * @param {(now: Job) => void} [onChange] told how it stands
 * @returns {Promise<Job>} the job when it has ended
 */
export async function ended(id, onChange = () => {}) {
  for (;;) {
    const now = await job(id);
    onChange(now);
    if (ENDS.includes(now.status)) return now;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

/** @param {string} id @returns {Promise<Response>} */
export const cancelJob = (id) =>
  request(`api/jobs/${encodeURIComponent(id)}`, { method: "DELETE" });

/**
 * Server-sent events of a response, with their data read as JSON.
 * @param {Response} response
 * @returns {AsyncGenerator<{event: string, data: any}>}
 */
async function* events(response) {
  const reader = /** @type {ReadableStream} */ (response.body)
    .pipeThrough(new TextDecoderStream())
    .getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop() ?? "";
      yield* blocks.map(parsedEvent).filter((event) => event !== null);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * @param {string} block lines between two empty ones
 * @returns {{event: string, data: any} | null} null where there are only comments
 */
function parsedEvent(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  return data.length ? { event, data: JSON.parse(data.join("\n")) } : null;
}
