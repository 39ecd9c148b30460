// The list of conversations: open, rename, delete, export, import.

import { $, button, notice } from "./controls.js";
import { h } from "./dom.js";
import * as store from "./store.js";

/** Shows the list. `app` has the functions that act on conversations. */
export function showList(current, app) {
  $("conversations").replaceChildren(...store.conversations().map(({ id, title: given }) => {
    const title = given || "Not sent yet";
    const item = h("li", { className: id === current ? "open" : "" },
      h("button", { type: "button", className: "title", title, onclick: () => app.open(id) }, title),
      button("Rename", () => rename(item, id, title, app), { "aria-label": `Rename ${title}` }),
      button("Delete", () => app.remove(id), { "aria-label": `Delete ${title}` }));
    if (id === current) item.firstChild.setAttribute("aria-current", "true");
    return item;
  }));
}

function rename(item, id, title, app) {
  const field = h("input", { value: title, "aria-label": "Title" });
  let done = false;
  const finish = (keep) => {
    if (!done) app.rename(id, keep && field.value.trim());
    done = true;
  };
  field.onblur = () => finish(true);
  field.onkeydown = (event) => {
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") {
      event.stopPropagation();
      finish(false);
    }
  };
  item.replaceChildren(field);
  field.select();
}

export function exportFile() {
  const url = URL.createObjectURL(new Blob([store.exportAll()], { type: "application/json" }));
  h("a", { href: url, download: `conversations-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

export async function importFile() {
  const [file] = $("file").files;
  try {
    const count = store.importAll(await file.text());
    notice(count === 1 ? "One conversation was imported." : `${count} conversations were imported.`);
  } catch (error) {
    notice(error.message);
  }
  $("file").value = ""; // the same file can be chosen again
}
