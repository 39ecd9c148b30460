// Makes elements: from tag, properties and children, and from the Markdown of a model's answer.
// Text becomes text nodes; nothing is parsed as HTML.

/** h("button", {className: "x", onclick}, "Text"): an element; "aria-" and "data-" are attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== false));
  return element;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not allowed on http pages of other hosts
    const field = document.body.appendChild(h("textarea", { value: text }));
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

export function copyButton(text, label = "Copy") {
  const button = h("button", { type: "button", className: "quiet" }, label);
  button.onclick = async () => {
    await copy(text());
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = label; }, 1500);
  };
  return button;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*)/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;

/** Elements for the Markdown of `text`: paragraphs, headings, lists, quotes, code. */
export function markdown(text) {
  return blocks(text.replaceAll("\t", "    ").split("\n"), 0);
}

function blocks(lines, depth) {
  const out = [];
  let i = 0;
  const takeWhile = (test) => {
    const start = i;
    while (i < lines.length && test(lines[i])) i += 1;
    return lines.slice(start, i);
  };
  while (i < lines.length) {
    const line = lines[i];
    let match;
    if (!line.trim()) i += 1;
    else if ((match = FENCE.exec(line))) {
      const fence = match[1];
      i += 1;
      const code = takeWhile((l) => !(l.trim().startsWith(fence) && !l.trim().replaceAll(fence[0], "")));
      i += 1;
      out.push(codeBlock(code.join("\n"), match[2]));
    } else if ((match = HEADING.exec(line))) {
      i += 1;
      out.push(h(`h${Math.min(6, match[1].length + 2)}`, {}, inline(match[2])));
    } else if (RULE.test(line)) {
      i += 1;
      out.push(h("hr"));
    } else if (QUOTE.test(line) && depth < 8) {
      const quoted = takeWhile((l) => QUOTE.test(l)).map((l) => l.replace(QUOTE, ""));
      out.push(h("blockquote", {}, blocks(quoted, depth + 1)));
    } else if ((match = ITEM.exec(line)) && depth < 8) {
      const ordered = /\d/.test(match[2]);
      const list = h(ordered ? "ol" : "ul", ordered ? { start: parseInt(match[2], 10) } : {});
      const sameList = (m) => m && m[1].length < match[1].length + 2 && /\d/.test(m[2]) === ordered;
      let item;
      while (i < lines.length && sameList((item = ITEM.exec(lines[i]))) && !RULE.test(lines[i])) {
        const indent = item[1].length + 2;
        const first = lines[i].slice(item[0].length);
        i += 1;
        const isInside = (l) => l?.startsWith(" ".repeat(indent));
        const rest = takeWhile((l) => isInside(l) || (l.trim() ? !starts(l) : isInside(lines[i + 1])));
        const margin = Math.min(...rest.filter((l) => l.trim()).map((l) => l.search(/\S/)), item[0].length);
        const children = blocks([first, ...rest.map((l) => l.slice(Math.min(margin, l.search(/\S|$/))))], depth + 1);
        const lone = children[0]?.tagName === "P" ? [...children.shift().childNodes] : [];
        list.append(h("li", {}, lone, children));
        while (i + 1 < lines.length && !lines[i].trim() && sameList(ITEM.exec(lines[i + 1]))) i += 1;
      }
      out.push(list);
    } else {
      const first = i;
      const paragraph = takeWhile((l) => i === first || (l.trim() && !starts(l)));
      out.push(h("p", {}, inline(paragraph.map((l) => l.trim()).join("\n"))));
    }
  }
  return out;
}

const starts = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((block) => block.test(line));

function codeBlock(code, language) {
  return h("div", { className: "code" },
    h("div", { className: "code-bar" }, h("span", {}, language), copyButton(() => code)),
    h("pre", { tabIndex: 0, "aria-label": "Code" }, h("code", {}, code)));
}

const STYLES = [["**", "strong"], ["__", "strong"], ["*", "em"], ["_", "em"], ["~~", "s"]];
const URL_START = /https?:\/\/[^\s<>"'`]+/y;

/** Text with code, bold, italic and links. Takes time proportional to the length of the text. */
function inline(text) {
  const out = [];
  const unclosed = new Set(); // delimiters that do not occur after this place
  let plain = 0;
  let i = 0;
  const find = (delimiter, from) => {
    if (unclosed.has(delimiter)) return -1;
    const at = text.indexOf(delimiter, from);
    if (at < 0) unclosed.add(delimiter);
    return at;
  };
  const emit = (element, end) => {
    if (plain < i) out.push(text.slice(plain, i));
    out.push(element);
    plain = i = end;
  };
  const special = /[`*_~[\\h\n]/g;
  while (i < text.length) {
    special.lastIndex = i;
    const next = special.exec(text);
    if (!next) break;
    i = next.index;
    const c = next[0];
    const before = text[i - 1] ?? " ";
    if (c === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      emit(text[i + 1], i + 2);
    } else if (c === "\n") {
      emit(h("br"), i + 1);
    } else if (c === "`") {
      const ticks = /`+/y;
      ticks.lastIndex = i;
      const delimiter = ticks.exec(text)[0];
      const end = find(delimiter, i + delimiter.length);
      if (end < 0) i += delimiter.length;
      else {
        const code = text.slice(i + delimiter.length, end).replace(/^ (.+) $/, "$1");
        emit(h("code", {}, code), end + delimiter.length);
      }
    } else if (c === "[") {
      const middle = find("](", i + 1);
      const end = middle < 0 ? -1 : find(")", middle);
      const url = end < 0 ? null : safeUrl(text.slice(middle + 2, end).split(" ")[0]);
      if (url && !text.slice(i, middle).includes("\n")) emit(link(url, inline(text.slice(i + 1, middle))), end + 1);
      else i += 1;
    } else if (c === "h") {
      URL_START.lastIndex = i;
      const match = /\w/.test(before) ? null : URL_START.exec(text);
      const found = match?.[0].replace(/[.,;:!?)\]*_]+$/, "");
      const url = found && safeUrl(found);
      if (url) emit(link(url, found), i + found.length);
      else i += 1;
    } else {
      const style = STYLES.find(([delimiter]) => text.startsWith(delimiter, i));
      const [delimiter, tag] = style ?? ["~"];
      const start = i + delimiter.length;
      const opens = tag && /\S/.test(text[start] ?? " ") && !(c === "_" && /\w/.test(before));
      const end = opens ? find(delimiter, start) : -1;
      if (end > start && /\S/.test(text[end - 1])) {
        emit(h(tag, {}, inline(text.slice(start, end))), end + delimiter.length);
      } else {
        i = start;
      }
    }
  }
  if (plain < text.length) out.push(text.slice(plain));
  return out;
}

function safeUrl(text) {
  const url = URL.canParse(text) ? new URL(text) : null;
  return url && ["http:", "https:"].includes(url.protocol) ? url : null;
}

const link = (url, children) => h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" }, children);
