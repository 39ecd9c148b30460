// The chat page: shows one conversation, sends messages, and streams the answers of one model or of
// several side by side.

import { chat, models as fetchModels, ServerError, setKey } from "./client.js";
import {
  $, button, focusInput, grow, notice, openSettings, samplingFields, sends, settings, showMenu,
} from "./controls.js";
import { copyButton, h, markdown } from "./dom.js";
import { exportFile, importFile, showList } from "./sidebar.js";
import * as store from "./store.js";
import { showTokens } from "./tokens.js";

const running = new Map(); // answer -> AbortController
const views = new WeakMap(); // answer -> function that shows its present state
const kept = new Map(); // id -> conversation that was opened: its answers may still arrive
const removed = new Set(); // ids of deleted conversations
let available = []; // names of models
let conversation;
let editing = null; // id of the turn whose message is being edited
let showProbabilities = store.get("probabilities", false);

// ---------------------------------------------------------------- messages

const lastNode = () => store.path(conversation).at(-1)?.turn ?? conversation;
const answersShown = () => store.path(conversation).flatMap(({ turn }) => Object.values(turn.answers));
const isBusy = () => answersShown().some((answer) => running.has(answer));
const chosenModels = () => {
  const known = conversation.models.filter((name) => available.includes(name));
  return known.length ? known : available.slice(0, 1);
};

function save(which = conversation) {
  if (removed.has(which.id)) return;
  which.updated = Date.now();
  if (!store.save(which)) {
    notice("The browser's storage is full: this conversation is lost when you close the page. "
      + "Export it, or delete others.");
  }
  showConversations();
}

/** Adds a turn after `parent` and asks the chosen models. */
function ask(parent, text, keep = {}, seeds = {}) {
  const turn = store.newTurn(text);
  const models = Object.keys(seeds).length ? Object.keys(seeds) : chosenModels();
  for (const model of models) {
    turn.answers[model] = { text: "", seed: seeds[model] ?? settings.seed, finish: "" };
  }
  turn.answers = { ...keep, ...turn.answers };
  store.addTurn(parent, turn);
  conversation.title ||= text.trim().replace(/\s+/g, " ").slice(0, 60);
  save();
  show();
  $("scroller").scrollTop = $("scroller").scrollHeight;
  for (const model of models) run(conversation, turn, model);
}

async function send() {
  const text = $("input").value;
  if (!text.trim() || isBusy()) return;
  if (!available.length) await loadModels(); // the page has just been opened
  if (!available.length || isBusy() || $("input").value !== text) return;
  ask(lastNode(), text);
  $("input").value = "";
  keepDraft(conversation.id, "");
  grow($("input"));
}

/** Generates one answer and keeps it in `turn`. */
async function run(where, turn, model) {
  const answer = turn.answers[model];
  const controller = new AbortController();
  Object.assign(answer, { text: "", finish: "", error: undefined, tokens: undefined, usage: undefined, wait: 0 });
  running.set(answer, controller);
  update(answer);
  showState();
  const messages = store.messages(where, turn, model);
  const body = { model, messages, ...samplingFields(), seed: answer.seed };
  if (showProbabilities) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  for (let again = true, attempts = 0; again; attempts += 1) {
    again = false;
    try {
      await receive(answer, body, controller.signal, () => removed.has(where.id) || store.save(where));
    } catch (error) {
      again = await recover(error, answer, body, controller.signal, attempts);
    }
  }
  running.delete(answer);
  answer.finish ||= "stop";
  save(where);
  update(answer);
  showState();
  $("live").textContent = answer.error ?? `${model} answered: ${answer.text.slice(0, 1500)}`;
}

/** Handles an error of an attempt; returns whether to try again. */
async function recover(error, answer, body, signal, attempts) {
  if (signal.aborted) {
    answer.finish = "stopped";
  } else if (error.code === "context_length_exceeded" && body.max_completion_tokens) {
    delete body.max_completion_tokens; // as many as fit
    return true;
  } else if (error.status === 429 && attempts < 20) {
    for (answer.wait = error.wait; answer.wait > 0 && !signal.aborted; answer.wait -= 1) {
      update(answer);
      await new Promise((resolve) => {
        setTimeout(resolve, 1000);
        signal.addEventListener("abort", resolve);
      });
    }
    if (!signal.aborted) return true;
    answer.finish = "stopped";
  } else {
    if (!(error instanceof ServerError)) console.error(error);
    answer.error = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
    answer.finish = "error";
    if (error.status === 401) askForKey(error.message);
    if (error.code === "model_not_found") loadModels(); // another server has started here
  }
  return false;
}

/** Adds the parts of an answer to it as they arrive. */
async function receive(answer, body, signal, keep) {
  const start = performance.now();
  const decoder = new TextDecoder(); // the bytes of one character may be in several tokens
  let saved = start;
  for await (const { choices: [choice] = [], usage } of chat(body, signal)) {
    const now = performance.now();
    if (choice?.delta?.content) {
      if (!answer.text) answer.first = (now - start) / 1000;
      answer.text += choice.delta.content;
      answer.seconds = (now - start) / 1000;
    }
    for (const token of choice?.logprobs?.content ?? []) {
      const text = token.bytes?.length ? decoder.decode(new Uint8Array(token.bytes), { stream: true }) : token.token;
      (answer.tokens ??= []).push([text, token.logprob, token.top_logprobs.map((t) => [t.token, t.logprob])]);
    }
    if (choice?.finish_reason) answer.finish = choice.finish_reason;
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      answer.usage = { prompt: usage.prompt_tokens, completion: usage.completion_tokens, cached };
    }
    if (now - saved > 2000) {
      saved = now;
      keep();
    }
    update(answer);
  }
}

function stop() {
  answersShown().forEach((answer) => running.get(answer)?.abort());
}

// ---------------------------------------------------------------- display

/** Shows an answer's present state with the next frame, and follows it if the end is in view. */
const pending = new Set();
function update(answer) {
  if (!pending.size) {
    requestAnimationFrame(() => {
      const scroller = $("scroller");
      const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
      for (const each of pending) views.get(each)?.();
      pending.clear();
      if (atEnd) scroller.scrollTop = scroller.scrollHeight;
    });
  }
  pending.add(answer);
}

/** Shows the conversation. The focused control keeps the focus. */
function show() {
  const { key } = document.activeElement?.dataset ?? {};
  const turns = store.path(conversation).map(turnElement);
  $("turns").replaceChildren(...turns);
  $("turns").querySelectorAll("textarea").forEach(grow);
  if (key) $("turns").querySelector(`[data-key="${key}"]`)?.focus();
  if (document.activeElement === document.body) focusInput(); // the control is gone
  $("empty").hidden = turns.length > 0;
  document.body.classList.toggle("compare", answersShown().length > turns.length);
  showState();
}

function showState() {
  const busy = isBusy();
  $("send").textContent = busy ? "Stop" : "Send";
  $("send").classList.toggle("stop", busy);
  document.title = conversation.title ? `${conversation.title} – llama_jax` : "llama_jax";
}

function turnElement({ parent, turn }) {
  const models = Object.keys(turn.answers);
  return h("section", { className: "turn" },
    editing === turn.id ? editor(parent, turn) : message(parent, turn),
    h("div", { className: "answers" }, models.map((model) => answerElement(parent, turn, model, models.length > 1))));
}

function message(parent, turn) {
  const at = parent.next.indexOf(turn);
  const count = parent.next.length;
  const go = (label, sign, step) => {
    const pick = () => {
      parent.pick = (at + step + count) % count;
      store.save(conversation);
      show();
    };
    return button(sign, pick, { "aria-label": label, "data-key": `${parent.id} ${label}` });
  };
  const versions = count > 1 && h("span", { className: "versions" },
    go("Previous version", "‹", -1), `${at + 1}/${count}`, go("Next version", "›", 1));
  return h("article", { className: "user", "aria-label": "You" },
    h("div", { className: "text", dir: "auto" }, turn.user),
    h("div", { className: "tools" }, versions, copyButton(() => turn.user),
      button("Edit", () => edit(turn)), button("Delete", () => deleteTurn(parent, turn))));
}

function answerElement(parent, turn, model, named) {
  const answer = turn.answers[model];
  const body = h("div", { className: "text", dir: "auto" });
  const state = h("span", { className: "state" });
  const tools = h("div", { className: "tools" });
  const retry = () => {
    if (available.length && !available.includes(model)) ask(parent, turn.user);
    else if (answer.error) run(conversation, turn, model);
    else ask(parent, turn.user, turn.answers, { [model]: (answer.seed + 1) % 2 ** 32 });
  };
  views.set(answer, () => {
    if (showProbabilities && answer.tokens) showTokens(body, answer.tokens);
    else patch(body, markdown(answer.text));
    const busy = running.has(answer);
    body.classList.toggle("writing", busy);
    state.textContent = busy ? progress(answer) : summary(answer);
    state.classList.toggle("error", Boolean(answer.error));
    const label = busy ? "" : answer.error ? "Try again" : "Retry";
    if (tools.dataset.label === label) return;
    tools.dataset.label = label;
    const hint = { title: answer.error ? "" : "with the next seed" };
    tools.replaceChildren(...(busy ? [] : [copyButton(() => answer.text), button(label, retry, hint)]));
  });
  views.get(answer)();
  return h("article", { className: "answer", "aria-label": model },
    named && h("h2", {}, model), body, h("footer", {}, state, tools));
}

const progress = (answer) => {
  if (answer.wait) return `The server is busy: too many requests are waiting. Trying again in ${answer.wait} s.`;
  return answer.text ? "" : "Waiting for the first token …";
};

const ENDS = { length: "cut at the longest length", stopped: "stopped", interrupted: "interrupted" };

/** Usage and speed of an answer in words. */
function summary({ usage, first, seconds, seed, finish, error }) {
  if (error) return error;
  const parts = [];
  if (usage) {
    const cached = usage.cached ? ` (${usage.cached} cached)` : "";
    parts.push(`${usage.prompt}${cached} + ${usage.completion} tokens`);
    if (usage.completion > 1 && seconds > first) {
      parts.push(`${((usage.completion - 1) / (seconds - first)).toFixed(1)} tokens/s`);
    }
    if (first) parts.push(`first after ${first.toFixed(2)} s`);
  }
  parts.push(`seed ${seed}`);
  if (ENDS[finish]) parts.push(ENDS[finish]);
  return parts.join(" · ");
}

/** Replaces the children that differ, so that a selection in others stays. */
function patch(parent, fresh) {
  fresh.forEach((node, i) => {
    const old = parent.children[i];
    if (!old) parent.append(node);
    else if (!old.isEqualNode(node)) old.replaceWith(node);
  });
  while (parent.children.length > fresh.length) parent.lastElementChild.remove();
}

// ---------------------------------------------------------------- editing

function edit(turn) {
  editing = turn.id;
  show();
  const field = document.querySelector(".editor textarea");
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
}

function editor(parent, turn) {
  const value = store.get(`draft.${turn.id}`, turn.user);
  const field = h("textarea", { value, dir: "auto", "aria-label": "Edit the message" });
  const close = () => { editing = null; keepDraft(turn.id, ""); show(); focusInput(); };
  const submit = async () => {
    if (!field.value.trim()) return;
    if (!available.length) await loadModels();
    if (!available.length || !field.isConnected) return;
    close();
    ask(parent, field.value);
  };
  const cancel = () => {
    if (field.value === turn.user || confirm("Discard your changes to this message?")) close();
  };
  field.oninput = () => { keepDraft(turn.id, field.value); grow(field); };
  field.onkeydown = (event) => {
    if (sends(event)) { event.preventDefault(); submit(); }
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
  };
  return h("article", { className: "user editor" }, field,
    h("div", { className: "tools" }, button("Send", submit), button("Cancel", cancel),
      h("span", { className: "hint" }, "The present version is kept.")));
}

function deleteTurn(parent, turn) {
  const before = { next: [...parent.next], pick: parent.pick };
  const where = conversation;
  Object.values(turn.answers).forEach((answer) => running.get(answer)?.abort());
  store.removeTurn(parent, turn);
  save();
  show();
  notice("The message and its answers are deleted.", "Undo", () => {
    Object.assign(parent, before);
    save(where);
    show();
  });
}

// ---------------------------------------------------------------- conversations

function open(id = store.newId()) {
  editing = null;
  conversation = kept.get(id) ?? store.load(id) ?? store.newConversation(id, conversation?.models ?? []);
  kept.set(id, conversation);
  sessionStorage.setItem("llama_jax.open", id);
  $("system").value = conversation.system;
  $("input").value = store.get(`draft.${id}`, "");
  [$("system"), $("input")].forEach(grow);
  showChoices();
  showConversations();
  show();
  $("scroller").scrollTop = $("scroller").scrollHeight;
  showMenu(false);
  focusInput();
}

const showConversations = () => showList(conversation.id, { open, remove, rename });

function rename(id, title) {
  const which = kept.get(id) ?? store.load(id);
  if (title && which) {
    which.title = title;
    store.save(which);
  }
  showConversations();
  showState();
}

function remove(id) {
  const which = kept.get(id) ?? store.load(id);
  if (which) store.visit(which, (answer) => running.get(answer)?.abort());
  store.remove(id);
  removed.add(id);
  kept.delete(id);
  if (id === conversation.id) open(store.conversations()[0]?.id);
  else showConversations();
  if (which) notice(`“${which.title || "Not sent yet"}” is deleted.`, "Undo", () => {
    removed.delete(id);
    kept.set(id, which);
    store.save(which);
    open(id);
  });
}

/** Keeps text that was not sent: of a turn that is edited, or of a conversation. */
function keepDraft(id, text) {
  store.set(`draft.${id}`, text || null);
  const isNew = id === conversation.id && !conversation.next.length && !conversation.title;
  if (!isNew) return;
  if (text) store.save(conversation); // so that it is found again
  else if (!conversation.system) store.remove(id);
}

// ---------------------------------------------------------------- models and the key

async function loadModels() {
  try {
    available = await fetchModels();
    $("key").hidden = true;
    notice("");
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    else notice(error.message, "Try again", loadModels);
  }
  showChoices();
}

function askForKey(message) {
  $("key").hidden = false;
  $("key-text").textContent = message;
  $("key-field").focus();
}

async function useKey(event) {
  event.preventDefault();
  setKey($("key-field").value.trim());
  $("key-field").value = "";
  await loadModels();
  if (!$("key").hidden) return;
  const { turn } = store.path(conversation).at(-1) ?? {};
  for (const [model, answer] of Object.entries(turn?.answers ?? {})) {
    if (answer.error && !running.has(answer)) run(conversation, turn, model);
  }
  focusInput();
}

function showChoices() {
  const chosen = chosenModels();
  $("chosen").textContent = chosen.join(" · ") || "No model";
  $("choices").replaceChildren(...available.map((name) => {
    const onchange = (event) => choose(name, event.target);
    return h("label", {}, h("input", { type: "checkbox", checked: chosen.includes(name), onchange }), name);
  }));
}

function choose(name, box) {
  const chosen = new Set(chosenModels());
  if (box.checked) chosen.add(name);
  else chosen.delete(name);
  if (!chosen.size) box.checked = true; // at least one
  else conversation.models = available.filter((each) => chosen.has(each));
  $("chosen").textContent = chosenModels().join(" · ");
  if (conversation.next.length) save();
}

// ---------------------------------------------------------------- start

$("composer").onsubmit = (event) => { event.preventDefault(); if (isBusy()) stop(); else send(); };
$("input").oninput = () => { keepDraft(conversation.id, $("input").value); grow($("input")); };
$("input").onkeydown = (event) => {
  if (sends(event)) { event.preventDefault(); send(); }
  const { turn } = store.path(conversation).at(-1) ?? {};
  if (event.key === "ArrowUp" && !$("input").value && turn) { event.preventDefault(); edit(turn); }
};
$("system").oninput = () => {
  conversation.system = $("system").value;
  grow($("system"));
  store.save(conversation);
};
$("system").onchange = () => save();
$("new").onclick = () => open();
$("export").onclick = exportFile;
$("import").onclick = () => $("file").click();
$("file").onchange = () => importFile().then(showConversations);
$("key").onsubmit = useKey;
$("probabilities").onclick = () => {
  showProbabilities = !showProbabilities;
  store.set("probabilities", showProbabilities);
  $("probabilities").setAttribute("aria-pressed", showProbabilities);
  show();
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if ($("models").open) $("models").open = false;
  else if (isBusy()) stop();
  else if (!$("settings").hidden) openSettings(false);
  else showMenu(false);
});
document.addEventListener("click", (event) => {
  if (!$("models").contains(event.target)) $("models").open = false;
  if (!$("sidebar").contains(event.target) && event.target !== $("menu")) showMenu(false);
});
addEventListener("storage", ({ key }) => { // another tab wrote
  if (key === `llama_jax.chat.${conversation.id}` && !isBusy() && !editing && store.load(conversation.id)) {
    kept.delete(conversation.id);
    open(conversation.id);
  } else {
    showConversations();
  }
});
addEventListener("pagehide", () => { if (isBusy()) save(); });

$("probabilities").setAttribute("aria-pressed", showProbabilities);
open(sessionStorage.getItem("llama_jax.open") ?? store.conversations()[0]?.id);
loadModels();
