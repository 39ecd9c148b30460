// Answers as tokens shaded by probability, with the alternatives of a token on hover or focus.

import { h } from "./dom.js";

const tip = document.getElementById("tip");
const shown = new WeakMap(); // element -> token

const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 0.1 ? `${p.toFixed(1)} %` : p >= 0.001 ? `${p.toFixed(3)} %` : "under 0.001 %";
};
const SIGNS = { "\n": "⏎", "\t": "⇥", " ": "␣" };
const visible = (text) => text.replace(/[\n\t ]/g, (c) => SIGNS[c]) || "(part of a character)";

function shade(logprob) {
  const p = Math.exp(logprob);
  return p < 0.05 ? "p1" : p < 0.2 ? "p2" : p < 0.5 ? "p3" : p < 0.8 ? "p4" : "";
}

/** Fills `body` with `tokens`, [text, log p, [[text, log p] of alternatives]]; adds to what is there. */
export function showTokens(body, tokens) {
  let list = body.querySelector(":scope > .tokens");
  if (!list || list.childElementCount > tokens.length) {
    list = h("div", { className: "tokens", role: "group", "aria-label": "Tokens: arrow keys move between them" });
    body.replaceChildren(list);
  }
  for (const token of tokens.slice(list.childElementCount)) {
    const tabIndex = list.childElementCount ? -1 : 0; // arrow keys move on from the first
    const element = h("span", { className: `token ${shade(token[1])}`, tabIndex }, token[0]);
    shown.set(element, token);
    list.append(element);
  }
}

function showTip(element) {
  const token = shown.get(element);
  tip.hidden = !token;
  if (!token) return;
  const [text, logprob, top] = token;
  const others = top.filter(([name]) => name !== text);
  const rows = [[text, logprob], ...others].sort((a, b) => b[1] - a[1]);
  tip.replaceChildren(h("table", {}, rows.map(([name, value]) => h("tr", { className: name === text ? "chosen" : "" },
    h("td", {}, visible(name)), h("td", {}, percent(value))))));
  const place = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const left = Math.min(place.left, innerWidth - tip.offsetWidth - 8);
  const below = place.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? place.bottom + 6 : place.top - tip.offsetHeight - 6}px`;
  element.setAttribute("aria-describedby", "tip");
}

document.addEventListener("pointerover", (event) => showTip(event.target));
document.addEventListener("focusin", (event) => showTip(event.target));
document.addEventListener("scroll", () => { tip.hidden = true; }, true);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") tip.hidden = true;
  const sibling = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  const next = sibling && shown.has(event.target) && event.target[sibling];
  if (next) {
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
});
