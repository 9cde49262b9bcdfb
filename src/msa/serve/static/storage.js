// What the browser keeps for this page; nothing, where it is told to keep nothing.

/** @typedef {"localStorage" | "sessionStorage"} Where for this browser, or only for this tab */

/** @param {string} name @param {Where} [where] @returns {string | null} */
export function remembered(name, where = "localStorage") {
  try {
    return window[where].getItem(name);
  } catch {
    return null;
  }
}

/** @param {string} name @param {string | null} value null forgets it @param {Where} [where] */
export function remember(name, value, where = "localStorage") {
  try {
    if (value === null) window[where].removeItem(name);
    else window[where].setItem(name, value);
  } catch {
    // it lasts as long as the page
  }
}
