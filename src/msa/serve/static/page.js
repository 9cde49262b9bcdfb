// The page as a whole: which bank, which view, which colors, who asks, which keys.

import * as api from "./api.js";
import { clearAnswers, openSource, startAsking, stop } from "./ask.js";
import { $, make, plural, show, toast } from "./dom.js";
import { list, sendDeletes, showMemory, startMemory } from "./memory.js";
import { closePassage } from "./passage.js";
import { remember, remembered } from "./storage.js";
import { showRunning, startUploads } from "./upload.js";
import { showUpkeep, startUpkeep } from "./upkeep.js";

const THEMES = ["system", "light", "dark"];
const THEME_NAMES = ["Colors: as the system", "Colors: light", "Colors: dark"];
const NO_KEYS = "msa-no-keys";

let bank = "";
/** @type {any} what the service says of the bank */
let about = null;

// ---- banks

async function start() {
  api.onUnauthorized(signIn);
  startAsking({ bank: () => bank, before: sendDeletes });
  startMemory();
  startUploads({
    bank: () => bank,
    mayWrite,
    changed: () => choose(bank),
    reveal: () => go("memory"),
  });
  startUpkeep({
    bank: () => bank,
    before: sendDeletes,
    changed: () => choose(bank),
    ask: () => go("ask"),
  });
  startColors();
  startKeys();
  addEventListener("hashchange", showView);
  $("banks").addEventListener("change", () => choose($("banks").value));
  $("skip").addEventListener("click", (/** @type {Event} */ event) => {
    event.preventDefault(); // the address tells the view
    $("main").focus();
  });
  $("help").addEventListener("click", () => $("help-box").showModal());
  showView();
  await loadBanks();
}

async function loadBanks() {
  try {
    const names = (await api.banks()).map(({ name }) => name);
    $("banks").replaceChildren(...names.map((name) => new Option(name, name)));
    $("banks").disabled = names.length < 2;
    if (!names.length) return show($("ask-about"), "There is no memory bank for you here.");
    const last = remembered("msa-bank");
    await choose(last && names.includes(last) ? last : names[0]);
  } catch (error) {
    tellWhyNot(/** @type {Error} */ (error));
  }
}

/** @param {Error} error why there are no banks; what passes is tried again */
function tellWhyNot(error) {
  show($("ask-about"), error.message);
  if (!(error instanceof api.ApiError)) return;
  if (error.status === 401) {
    const again = make("button", { type: "button", class: "link", click: loadBanks }, "Sign in");
    $("ask-about").append(" ", again);
  } else if (error.status === 503 || error.status === 0) {
    setTimeout(loadBanks, 1000 * (error.retryAfter ?? 2));
  }
}

/** @param {string} name */
async function choose(name) {
  if (name !== bank) {
    closePassage();
    clearAnswers();
    document.body.classList.remove("asked");
  }
  bank = name;
  $("banks").value = name;
  remember("msa-bank", name);
  try {
    const told = await showMemory(name);
    if (bank !== name) return; // another was chosen meanwhile
    about = told;
  } catch (error) {
    toast(/** @type {Error} */ (error).message, { alert: true, seconds: 8 });
    return;
  }
  const { num_ids: count, num_tokens: tokens } = about.info;
  document.title = `${name} · MSA`;
  $("add-files").hidden = !mayWrite();
  showUpkeep(name, count, mayWrite());
  $("ask-about").textContent = count
    ? `${plural(count, "document")}, ${plural(tokens, "token")}`
    : "Nothing is in it yet";
  if (view() === "memory") await list();
  await showRunning(name).catch(() => {}); // what they add is seen later anyway
}

const mayWrite = () => about?.scopes?.includes("write") ?? true;

// ---- views

const view = () => (location.hash === "#memory" ? "memory" : "ask");

/** @param {string} name */
function go(name) {
  if (view() !== name) location.hash = name;
}

function showView() {
  for (const name of ["ask", "memory"]) {
    $(name).hidden = name !== view();
    if (name === view()) $(`to-${name}`).setAttribute("aria-current", "page");
    else $(`to-${name}`).removeAttribute("aria-current");
  }
  closePassage();
  scrollTo(0, 0);
  if (view() === "memory") list();
  else if (matchMedia("(hover: hover)").matches) $("question").focus();
}

// ---- signing in

/** @type {Promise<boolean> | null} while the box is open, so that it is shown once */
let signingIn = null;

/** @param {string} why @returns {Promise<boolean>} true if a key was given */
function signIn(why) {
  signingIn ??= new Promise((resolve) => {
    const box = /** @type {HTMLDialogElement} */ ($("sign-in"));
    show($("sign-in-why"), api.key() ? why : "This service asks for an API key.");
    $("key").value = "";
    box.returnValue = "cancel";
    box.showModal();
    $("key").focus();
    box.addEventListener(
      "close",
      () => {
        const given = box.returnValue === "ok" ? $("key").value.trim() : "";
        api.setKey(given || null);
        signingIn = null;
        resolve(Boolean(given));
      },
      { once: true },
    );
  });
  return signingIn;
}

$("sign-in-cancel").addEventListener("click", () => $("sign-in").close("cancel"));

// ---- colors

function startColors() {
  const root = document.documentElement;
  const name = () => {
    $("theme-name").textContent = THEME_NAMES[THEMES.indexOf(root.dataset.theme ?? "system")];
    $("theme").title = $("theme-name").textContent;
  };
  $("theme").addEventListener("click", () => {
    const at = THEMES.indexOf(root.dataset.theme ?? "system");
    root.dataset.theme = THEMES[(at + 1) % THEMES.length];
    remember("msa-theme", root.dataset.theme ?? null);
    name();
  });
  name();
}

// ---- keys

function startKeys() {
  const box = $("use-keys");
  box.checked = remembered(NO_KEYS) !== "1";
  box.addEventListener("change", () => remember(NO_KEYS, box.checked ? null : "1"));
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog:modal")) return;
    if (event.key === "Escape") {
      if (!closePassage()) stop();
      return;
    }
    const target = /** @type {HTMLElement} */ (event.target);
    const typing = target.matches("input, textarea, select");
    if (typing || !box.checked || event.ctrlKey || event.metaKey || event.altKey) return;
    if (press(event.key)) event.preventDefault();
  });
}

/** @param {string} key @returns {boolean} true if it does something */
function press(key) {
  if (key === "/") {
    go("ask");
    $("question").focus();
  } else if (key === "m") go("memory");
  else if (key === "a") go("ask");
  else if (key === "u") $("toasts").lastElementChild?.querySelector("button")?.click();
  else if (key === "?") $("help-box").showModal();
  else if (/^[1-9]$/.test(key) && view() === "ask") openSource(Number(key));
  else return false;
  return true;
}

await start();
