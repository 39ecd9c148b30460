// Controls around the conversation: sampling settings, theme, notices, and helpers for fields.

import { h } from "./dom.js";
import * as store from "./store.js";

export const $ = (id) => document.getElementById(id);

export const button = (label, onclick, properties = {}) =>
  h("button", { type: "button", className: "quiet", onclick, ...properties }, label);

// `none` is the value without effect, which is not sent.
const SAMPLING = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8,
    hint: "0 always takes the most likely token." },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, value: 0.95, none: 1,
    hint: "Keeps the most likely tokens that reach this probability together." },
  { name: "top_k", label: "Top k", min: 0, max: 200, step: 1, value: 0, none: 0,
    hint: "Keeps the k most likely tokens; 0 keeps all." },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, value: 0, none: 0,
    hint: "Drops tokens below this fraction of the largest probability." },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, value: 0, none: 0,
    hint: "Subtracted from the logits of tokens that the answer contains." },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, value: 0, none: 0,
    hint: "Subtracted once for each time they occur." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, value: 1, none: 1,
    hint: "Divides the logits of tokens seen before; 1 has no effect." },
  { name: "max_completion_tokens", label: "Longest answer, in tokens", min: 1, max: 131072, step: 1, value: 1024 },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 32 - 1, step: 1, value: 1, hint: "“Retry” uses the next one." },
];
const DEFAULTS = Object.fromEntries(SAMPLING.map(({ name, value }) => [name, value]));
export const settings = { ...DEFAULTS, ...store.get("settings", {}) };

/** The settings as fields of a request. */
export const samplingFields = () => {
  const effective = SAMPLING.filter(({ name, none }) => settings[name] !== none);
  return Object.fromEntries(effective.map(({ name }) => [name, settings[name]]));
};

function settingElement({ name, label, min, max, step, hint }) {
  const value = settings[name];
  const field = h("input", { type: "number", min, max, step: "any", value, id: `set-${name}`, inputMode: "decimal" });
  const slider = max <= 200 && h("input", { type: "range", min, max, step, value, "aria-label": label });
  const change = (text) => {
    const given = text === "" || !Number.isFinite(Number(text)) ? DEFAULTS[name] : Number(text);
    const inside = Math.min(max, Math.max(min, given));
    settings[name] = step === 1 ? Math.round(inside) : inside;
    field.value = settings[name];
    if (slider) slider.value = settings[name];
    store.set("settings", settings);
  };
  field.onchange = () => change(field.value);
  if (slider) slider.oninput = () => change(slider.value);
  return h("div", { className: "setting" },
    h("label", { htmlFor: field.id }, label), field, slider, hint && h("p", { className: "hint" }, hint));
}

const showSettings = () => $("sampling").replaceChildren(...SAMPLING.map(settingElement));

export function openSettings(visible) {
  $("settings").hidden = !visible;
  $("open-settings").setAttribute("aria-expanded", visible);
  (visible ? $("close-settings") : $("open-settings")).focus();
}

export function showMenu(visible) {
  document.body.classList.toggle("menu", visible);
  $("menu").setAttribute("aria-expanded", visible);
}

function showTheme() {
  const theme = store.get("theme", "system");
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
}

/** Shows a message, with one action; the empty text hides it. */
export function notice(text, label, action) {
  clearTimeout(notice.timer);
  $("notice").hidden = !text;
  const act = label && button(label, () => { notice(""); action(); });
  const parts = [h("span", {}, text), h("span", { className: "space" }), act, button("Close", () => notice(""))];
  $("notice").replaceChildren(...parts.filter(Boolean));
  if (text && label !== "Try again") notice.timer = setTimeout(() => notice(""), 20000);
}

/** Fits the height of a text field to its text. */
export function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

const isTouch = () => matchMedia("(pointer: coarse)").matches;

/** Focuses the message field; on a phone that would open the keyboard. */
export const focusInput = () => { if (!isTouch()) $("input").focus(); };

/** Whether a key press sends: Enter alone, not while an input method composes, not on a phone. */
export const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing
  && event.keyCode !== 229 && !isTouch();

$("menu").onclick = () => showMenu(!document.body.classList.contains("menu"));
$("open-settings").onclick = () => openSettings($("settings").hidden);
$("close-settings").onclick = () => openSettings(false);
$("reset").onclick = () => {
  Object.assign(settings, DEFAULTS);
  store.set("settings", null);
  showSettings();
};
$("theme").onclick = () => {
  const themes = ["system", "light", "dark"];
  store.set("theme", themes[(themes.indexOf(store.get("theme", "system")) + 1) % 3]);
  showTheme();
};
showTheme();
showSettings();
