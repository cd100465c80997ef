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

// A sentence on what went wrong, until the next thing that is done; null takes it away.
export function show(problem) {
  const box = find("#problem");
  box.hidden = problem === null;
  box.firstElementChild.textContent = problem ?? "";
  if (problem !== null) box.scrollIntoView({ block: "nearest" });
}
