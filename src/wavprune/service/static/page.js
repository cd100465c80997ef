// Small things: finding and making elements, and numbers as people read them.

export const find = (selector) => document.querySelector(selector);

export function element(name, attributes, ...children) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  found.append(...children);
  return found;
}

export const count = (number) => number.toLocaleString("en-US");
export const percent = (share, digits) => `${(100 * share).toFixed(digits)}%`;

export function bytes(number) {
  const units = ["B", "kB", "MB", "GB"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(number || 1) / 3)));
  return `${+(number / 1000 ** power).toPrecision(3)} ${units[power]}`;
}

// Puts other rows into a list; what had the focus has it afterwards, in the row of the same key.
export function replaceRows(list, rows) {
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const key = focused?.closest("[data-key]")?.dataset.key;
  list.replaceChildren(...rows);
  if (key === undefined) return;
  const row = rows.find((one) => one.dataset.key === key);
  const controls = [...(row?.querySelectorAll("button, a") ?? [])];
  const again = controls.find((one) => one === focused || one.textContent === focused.textContent);
  (again ?? controls[0])?.focus({ preventScroll: true });
}

// A sentence on what went wrong, until the next thing that is done; null takes it away.
export function show(problem) {
  const box = find("#problem");
  box.hidden = problem === null;
  box.firstElementChild.textContent = problem ?? "";
  if (problem !== null) box.scrollIntoView({ block: "nearest" });
}
