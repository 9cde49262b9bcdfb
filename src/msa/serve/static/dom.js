// What all parts of the page share: elements, numbers in words, copying, messages.
// Texts of documents become text nodes only; nothing here makes HTML of a string.

/**
 * @param {string} id
 * @returns {any} the element
 */
export const $ = (id) => document.getElementById(id);

/**
 * An element with attributes and children; functions become event listeners.
 * @param {string} tag
 * @param {Record<string, any>} [attributes]
 * @param {...(Node | string | null)} children
 * @returns {any}
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, String(value));
    }
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/**
 * A copy of a template's only element.
 * @param {string} id
 * @returns {any}
 */
export const fromTemplate = (id) => $(id).content.firstElementChild.cloneNode(true);

/** @param {any} element @param {string | null} text shown; null hides the element */
export function show(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

/** @param {number} value @returns {string} 1234567 as 1,234,567 */
export const number = (value) => Math.round(value).toLocaleString("en");

/** @param {number} count @param {string} noun @returns {string} `1 document`, `2 documents` */
export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

/** @param {number} value @returns {string} seconds in words */
export const seconds = (value) =>
  value < 60 ? `${value.toFixed(1)} s` : `${Math.round(value / 60)} min`;

/** @param {number} value @returns {string} bytes in decimal units */
export function size(value) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return unit ? `${value.toFixed(1)} ${units[unit]}` : `${number(value)} bytes`;
}

/**
 * A text with one stretch of it marked.
 * @param {string} text
 * @param {[number, number] | null | undefined} span first character and first behind it, counted
 *   in Unicode's code points as the service does, not in UTF-16 units as JavaScript does
 * @returns {(Node | string)[]}
 */
export function marked(text, span) {
  if (!span) return [text];
  const points = Array.from(text);
  const piece = (/** @type {number} */ from, to = points.length) =>
    points.slice(from, to).join("");
  const mark = make("mark", {}, piece(span[0], span[1]));
  return [piece(0, span[0]), mark, piece(span[1])];
}

/** @param {string} text said once by a screen reader */
export function say(text) {
  $("live").textContent = text;
}

/**
 * A message at the lower edge.
 * @param {string} text
 * @param {{action?: string, onAction?: () => void, seconds?: number, alert?: boolean}} [options]
 * @returns {() => void} takes it away
 */
export function toast(text, { action, onAction, seconds: stays = 4, alert = false } = {}) {
  const element = make(
    "div",
    { class: "toast", role: alert ? "alert" : "status" },
    make("span", {}, text),
  );
  const close = () => {
    clearTimeout(timer);
    element.remove();
  };
  if (action) {
    const press = () => {
      close();
      onAction?.();
    };
    element.append(make("button", { type: "button", class: "link", click: press }, action));
  }
  const timer = setTimeout(close, stays * 1000);
  $("toasts").append(element);
  return close;
}

/** @param {string} text @param {string} what it is, such as "Answer" */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    toast(`${what} copied`);
  } catch {
    $("code").textContent = text;
    $("code-box").showModal();
  }
}

/**
 * `user=anna, year>=1990`, or a filter as JSON, as the service reads it. A value that is a number
 * is met by the number and by its text, since columns of tables are text.
 * @param {string} text
 * @returns {Record<string, any> | undefined} undefined for an empty text
 */
export function parseFilter(text) {
  text = text.trim();
  if (!text) return undefined;
  if (text.startsWith("{")) {
    try {
      return JSON.parse(text);
    } catch {
      throw new Error("The filter is no JSON object; give one, or such as user=anna, year>=1990.");
    }
  }
  const conditions = text.split(",").map(condition);
  return conditions.length === 1 ? conditions[0] : { and: conditions };
}

const OPERATORS = { ">=": "gte", "<=": "lte", "!=": "ne", ">": "gt", "<": "lt", "=": "eq" };

/** @param {string} text */
function condition(text) {
  const [, name, sign, value] = /^\s*([^=<>!]+?)\s*(>=|<=|!=|>|<|=)\s*(.+?)\s*$/.exec(text) ?? [];
  if (!name) throw new Error(`“${text.trim()}” is no condition; write such as user=anna.`);
  const operator = OPERATORS[/** @type {keyof typeof OPERATORS} */ (sign)];
  const plain = /^".*"$/.test(value) ? value.slice(1, -1) : value;
  const asNumber = plain === value && value !== "" ? Number(value) : NaN;
  if (Number.isNaN(asNumber)) return { [name]: { [operator]: plain } };
  if (operator === "eq") return { [name]: { in: [asNumber, value] } };
  if (operator === "ne") return { [name]: { nin: [asNumber, value] } };
  return { [name]: { [operator]: asNumber } };
}
