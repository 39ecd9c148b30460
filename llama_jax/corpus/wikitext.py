"""Wikitext to plain text, without tables, templates and references.

Headings and paragraphs are separated by blank lines; each list item has a line of its own. Formulas
keep their LaTeX between dollar signs.
"""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass

from llama_jax.corpus.wikitext_lines import sections
from llama_jax.corpus.wikitext_removal import HOLE, remove_markup

# Names of the namespaces for media and for categories in English, which work in every language,
# and former names, which a dump does not list: of the languages of LLaMA.
_MEDIA = """
file image media картинка imatge obrázek obrázok soubor billede fil datei bild imagen archivo slika
fichier datoteka mediji medij kép fájl immagine afbeelding bestand plik grafika ficheiro arquivo
imagem multimédia imagine fişier fișier изображение файл медиа медія медіа датотека слика медија
медиј зображення fitxer média medium
"""
_CATEGORIES = """
category категория категорія категорија categoria kategorie kategori categoría catégorie kategorija
kategória categorie kategoria cat
"""
_MEDIA_SUFFIX = re.compile(
    r"\.(?:jpe?g|png|svg|gif|tiff?|webp|xcf|djvu|pdf|og[agv]|webm|mp[34g]|mpeg|mid|wav|flac|stl)$",
    re.IGNORECASE,
)
# Prefixes of links between languages: two or three letters, or a name with a hyphen.
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]+){0,2}|simple")
_NOT_LANGUAGES = frozenset(["doi", "rfc", "mw", "wmf", "bug", "rev", "c", "d"])

# Links with a text are removed only for these: other short prefixes may be of other wikis.
_LARGE_WIKIS = """
ar arz ast az be bg bn ca ce ceb cs cy da de el en eo es et eu fa fi fr gl he hi hr hu hy id it ja
ka kk ko la lt lv mk ms nl nn no pl pt ro ru sh simple sk sl sr sv ta th tr tt uk ur uz vi war zh
"""
_LARGE_LANGUAGES = frozenset(_LARGE_WIKIS.split())

# What a link or tag has inside is replaced first, so these match the innermost ones.
_SINGLE_BRACKETS = r"[^\[\]]*+(?:\[(?!\[)[^\[\]\n]*+\][^\[\]]*+)*+"
_LINK = re.compile(rf"\[\[([^\[\]|\n]*+)(?:\|({_SINGLE_BRACKETS}))?\]\]")
_EXTERNAL_LINK = re.compile(
    r"\[(?:(?:[a-z][a-z0-9+.-]*:)?//|mailto:|news:)[^\s\[\]<>\"]+(?:[ \t]++([^\[\]\n]*+))?\]",
    re.IGNORECASE,
)
_MAX_NESTING = 20
_NEW_LINE = re.compile(r"br|hr|tr|d[td]")
_NEW_PARAGRAPH = re.compile(r"/?(?:p|div|blockquote|center|poem|[oud]l|h[1-6])")
_TAG = re.compile(
    r"<(/?(?:h[1-6]|[biusqap]|br|hr|em|strong|small|big|su[bp]|code|tt|kbd|samp|var|span|div|font|"
    r"center|blockquote|cite|abbr|dfn|del|ins|strike|[oud]l|li|d[td]|table|t[rdh]|caption|thead|"
    r"tbody|tfoot|col|colgroup|ruby|r[tpb]|rtc|bd[io]|time|data|mark|wbr|poem|nowiki|noinclude|"
    r"onlyinclude|includeonly|ref|references|gallery|img|pre|math|chem|ce|source|syntaxhighlight|"
    r"section|imagemap|timeline|score|translate|tvar))(?:\s[^<>]*+)?/?>",
    re.IGNORECASE,
)
_STRAY = re.compile(r"\[\[([^\[\]|:\n]*):[^\[\]\n]*$|\[\[|\]\]", re.MULTILINE)
_ENTITY = re.compile(r"&(?:#\d+|#x[\da-fA-F]+|[a-zA-Z]\w*);")


@dataclass(frozen=True)
class Site:
    """What the text of a page depends on besides its wikitext.

    Attributes:
        removed_prefixes: Lower-case names of namespaces; links to their pages show nothing.
        removed_sections: Lower-case headings of sections that are removed.
        language: Code of the language; a link with it as prefix is a link within the site.
    """

    removed_prefixes: frozenset[str]
    removed_sections: frozenset[str] = frozenset()
    language: str = ""


def site(
    namespaces: dict[int, str], removed_sections: Iterable[str] = (), language: str = ""
) -> Site:
    """A site with the names that its dump gives to the namespaces.

    Args:
        namespaces: Name of each namespace, by number, in the language of the site.
        removed_sections: Headings of sections that are removed.
        language: Code of the language.
    """
    names = [name for key in (-2, 6, 14) if (name := namespaces.get(key))]
    prefixes = {*(_MEDIA + " " + _CATEGORIES).split(), *map(_key, names)}
    titles = frozenset(title.casefold() for title in removed_sections)
    return Site(frozenset(prefixes), titles, language)


def to_text(wikitext: str, site: Site) -> str:
    """Plain text of a page; empty if the page shows none."""
    text, verbatim = remove_markup(wikitext)
    text = _remove_language_conversion(_remove_magic_words(text))
    text = "\n".join(_remove_quotes(line) if "''" in line else line for line in text.split("\n"))
    text = _replace_links(text, site)
    text = _TAG.sub(lambda match: _spacing(match[1].lower()), text)
    text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    text = text.replace("\u00a0", " ").replace("\u200b", "").replace("\u00ad", "")
    return verbatim.restore("\n\n".join(sections(text, site.removed_sections))).strip()


def _spacing(tag: str) -> str:
    """What stands for an HTML tag in the text."""
    if tag == "li":
        return "\n* "
    if _NEW_PARAGRAPH.fullmatch(tag):
        return "\n\n"
    return "\n" if _NEW_LINE.fullmatch(tag) else ""


def _key(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _remove_magic_words(text: str) -> str:
    if "__" not in text:
        return text
    word = re.compile(r"__([^\W_]+(?:_[^\W_]+)*)__")
    return word.sub(lambda match: "" if match[1].isupper() else match[0], text)


def _remove_language_conversion(text: str) -> str:
    """Unwraps ``-{ }-``, with which Serbian pages control the conversion between alphabets."""
    if "-{" not in text:
        return text

    def shown(match: re.Match[str]) -> str:
        content = match[1].rpartition("|")[2]
        variant = re.search(r"(?<![\w-])[\w-]++\s*+:\s*([^;]*)", content)
        return variant[1].strip() if variant and ";" in content else content

    return re.sub(r"-\{(?!\{)([^{}]*)\}-", shown, text)


def _remove_quotes(line: str) -> str:
    """Removes bold and italics as MediaWiki finds them, and keeps apostrophes: l''''a''' is l'a."""
    parts = re.split(r"('{2,})", line)
    marks = [len(part) for part in parts[1::2]]
    apostrophes = [1 if n == 4 else max(0, n - 5) for n in marks]
    sizes = [n - extra for n, extra in zip(marks, apostrophes, strict=True)]
    odd_bold = sum(n in (3, 5) for n in sizes) % 2
    odd_italics = sum(n in (2, 5) for n in sizes) % 2
    if odd_bold and odd_italics and (index := _apostrophe(parts, sizes, apostrophes)) is not None:
        apostrophes[index] += 1
    for i, count in enumerate(apostrophes):
        parts[2 * i + 1] = "'" * count
    return "".join(parts)


def _apostrophe(parts: list[str], sizes: list[int], apostrophes: list[int]) -> int | None:
    """Which of the marks of three quotes is an apostrophe and the start or end of italics.

    MediaWiki prefers one after a word of one letter, then one after another word.
    """
    found: dict[int, int] = {}
    for index, size in enumerate(sizes):
        if size != 3:
            continue
        before = (parts[2 * index] + "'" * apostrophes[index])[-2:]
        after_space = before.endswith(" ")
        one_letter = not after_space and before.startswith(" ")
        found.setdefault(2 if after_space else 0 if one_letter else 1, index)
    return found[min(found)] if found else None


def _replace_links(text: str, site: Site) -> str:
    def stray(match: re.Match[str]) -> str:
        is_removed = match[1] and _key(match[1]) in site.removed_prefixes
        return HOLE if is_removed or not match[1] else match[0][2:]

    for _ in range(_MAX_NESTING):
        before = text
        text = _LINK.sub(lambda match: _shown(match[1], match[2], site), text)
        text = _EXTERNAL_LINK.sub(lambda match: match[1] or "", text)
        if text == before:
            break
    return _STRAY.sub(stray, text)


def _is_language_link(prefix: str, has_text: bool, site: Site) -> bool:
    """Whether MediaWiki lists a link beside the page, as a link to the page in another language."""
    if prefix == site.language or prefix in _NOT_LANGUAGES:
        return False
    return prefix in _LARGE_LANGUAGES if has_text else bool(_LANGUAGE.fullmatch(prefix))


def _shown(target: str, text: str | None, site: Site) -> str:
    """What a reader sees of ``[[target|text]]``."""
    target = html.unescape(target).replace(HOLE, "").strip()
    prefix, colon, page = target.partition(":")
    if page.startswith("//"):  # an external link in two pairs of brackets
        return target.partition(" ")[2]
    if colon and prefix:
        if _key(prefix) in site.removed_prefixes or _MEDIA_SUFFIX.search(page):
            return HOLE
        if _is_language_link(prefix.strip(), text is not None, site):
            return ""
    if text is None:
        return target.removeprefix(":")
    if text.strip():
        return text
    # "[[Paris (Texas)|]]" shows "Paris".
    return re.sub(r"(?<!\s)\s*\([^()]*\)$|,.*$", "", target.rpartition(":")[2])
