// Conversations, settings and unsent text in the browser's storage.
//
// A conversation is a tree, so that editing and retrying keep what was there before. Its nodes are
// turns {id, user, answers, next, pick}: `answers` maps a model to its answer, `next` lists the
// turns that may follow, and `pick` is the one that is shown. The conversation itself, {id, title,
// system, models, updated, next, pick}, is the root.

const PREFIX = "llama_jax.";
const CHAT = PREFIX + "chat.";

export const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);

export const newConversation = (id, models) =>
  ({ id, title: "", system: "", models, updated: Date.now(), next: [], pick: 0 });

export const newTurn = (user) => ({ id: newId(), user, answers: {}, next: [], pick: 0 });

/** The turns that are shown, each with the node before it. */
export function path(conversation) {
  const turns = [];
  for (let parent = conversation; parent.next.length; parent = parent.next[parent.pick]) {
    turns.push({ parent, turn: parent.next[parent.pick] });
  }
  return turns;
}

/** Adds a turn after `parent`, beside those that are there, and shows it. */
export function addTurn(parent, turn) {
  parent.pick = parent.next.push(turn) - 1;
}

/** Removes one turn; those after it now follow `parent`. */
export function removeTurn(parent, turn) {
  const at = parent.next.indexOf(turn);
  parent.next.splice(at, 1, ...turn.next);
  const pick = turn.next.length ? at + turn.pick : at;
  parent.pick = Math.max(0, Math.min(pick, parent.next.length - 1));
}

/** The messages that `model` gets to answer `turn`. */
export function messages(conversation, turn, model) {
  const list = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const { turn: earlier } of path(conversation)) {
    const last = list.at(-1);
    if (last?.role === "user") last.content += "\n\n" + earlier.user; // the answer before failed
    else list.push({ role: "user", content: earlier.user });
    if (earlier === turn) break;
    const answer = earlier.answers[model]?.text ? earlier.answers[model]
      : Object.values(earlier.answers).find((a) => a.text);
    if (answer) list.push({ role: "assistant", content: answer.text });
  }
  return list;
}

/** Calls `fn` with each answer of a conversation. */
export function visit(node, fn) {
  for (const turn of node.next) {
    Object.values(turn.answers).forEach(fn);
    visit(turn, fn);
  }
}

export const get = (name, otherwise) => {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
};

/** Stores a value; null removes it. Returns whether there was space. */
export function set(name, value) {
  try {
    if (value === null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const ids = () => Object.keys(localStorage).filter((k) => k.startsWith(CHAT))
  .map((k) => k.slice(CHAT.length));

/** All conversations, the newest first. */
export const conversations = () => ids().map(load).filter(Boolean)
  .sort((a, b) => b.updated - a.updated);

/** A stored conversation, or undefined. */
export function load(id) {
  const conversation = checked(get("chat." + id));
  if (conversation) visit(conversation, (a) => { if (!a.finish) a.finish = "interrupted"; });
  return conversation;
}

/** Stores a conversation. Without space for all, token probabilities are dropped, first those of
 *  the other conversations. Returns whether it is stored. */
export function save(conversation) {
  const write = () => set("chat." + conversation.id, conversation);
  if (write()) return true;
  for (const other of conversations()) {
    if (other.id === conversation.id) continue;
    visit(other, (a) => delete a.tokens);
    set("chat." + other.id, other);
  }
  if (write()) return true;
  visit(conversation, (a) => delete a.tokens);
  return write();
}

export const remove = (id) => set("chat." + id, null);

export const exportAll = () => JSON.stringify({ conversations: conversations() });

/** Stores the conversations of an exported file beside those that are here; returns their number. */
export function importAll(text) {
  let found;
  try {
    found = JSON.parse(text).conversations.map((each) => checked(each));
  } catch {
    found = [];
  }
  if (!found.length || !found.every(Boolean)) throw new Error("This file holds no exported conversations.");
  for (const conversation of found) {
    const here = load(conversation.id);
    if (here && JSON.stringify(here) !== JSON.stringify(conversation)) conversation.id = newId();
    if (!save(conversation)) throw new Error("The browser's storage is full.");
  }
  return found.length;
}

const text = (x) => (typeof x === "string" ? x : "");
const number = (x) => (Number.isFinite(x) ? x : undefined);

/** A copy that has the form which the page expects, whatever a file or the storage contains. */
function checked(data, isTurn) {
  if (typeof data !== "object" || !data || !Array.isArray(data.next)) return undefined;
  const next = data.next.map((turn) => checked(turn, true)).filter(Boolean);
  const pick = Math.max(0, Math.min(Math.trunc(data.pick) || 0, next.length - 1));
  const id = /^\w+$/.test(data.id) ? data.id : newId();
  if (isTurn) {
    const answers = Object.entries(data.answers ?? {}).map(([model, a]) => [model, checkedAnswer(a)]);
    return { id, user: text(data.user), answers: Object.fromEntries(answers), next, pick };
  }
  const models = Array.isArray(data.models) ? data.models.map(text) : [];
  const updated = number(data.updated) ?? Date.now();
  return { id, title: text(data.title), system: text(data.system), models, updated, next, pick };
}

function checkedAnswer(a) {
  const token = (t) => [text(t?.[0]), number(t?.[1]) ?? 0];
  const list = (x) => (Array.isArray(x) ? x : []);
  const tokens = list(a?.tokens).map((t) => [...token(t), list(t?.[2]).map(token)]);
  const { prompt, cached, completion } = a?.usage ?? {};
  const usage = { prompt: number(prompt), cached: number(cached), completion: number(completion) };
  return {
    text: text(a?.text), seed: number(a?.seed) ?? 0, finish: text(a?.finish), error: text(a?.error) || undefined,
    tokens: tokens.length ? tokens : undefined, usage: usage.completion === undefined ? undefined : usage,
    first: number(a?.first), seconds: number(a?.seconds),
  };
}
