"""Removes what Project Gutenberg adds to a book: header, licence, credits and footer."""

import re
from dataclasses import dataclass

# The last line of a header. Files before 2003 have a licence, "the small print", at the start.
_HEADER_END = re.compile(
    r"\W*START OF (?:THE |THIS )?(?:COPYRIGHTED )?PROJECT GUTENBERG|\W*END\W*THE SMALL PRINT",
    re.IGNORECASE,
)
# The first line of a footer.
_FOOTER_START = re.compile(
    r"\W*(?:THE |THIS IS THE )?END OF (?:THE |THIS )?(?:COPYRIGHTED )?PROJECT GUTENBERG"
    r"|\W*(?:ENDE DIESES|FIN D[EU]) PROJE[KC]?T GUTENBERG|\*+ ?START: FULL LICENSE"
    r"|\W*THE FULL PROJECT GUTENBERG LICENSE",
    re.IGNORECASE,
)
_HEADER_LINES = 800
_CREDITS = re.compile(
    r"\W*(?:(?:this )?(?:e-?text|e-?book|file|text|html version)s? (?:was |were )?"
    r"(?:first )?(?:produced|prepared|created|transcribed|scanned|converted)"
    r"|(?:produced|prepared|scanned|typed|digiti[sz]ed|proofed|proofread|transcribed) (?:by|from)"
    r"|credits:|note: project gutenberg|note: images of the original"
    r"|images? (?:generously )?(?:made available|provided))",
    re.IGNORECASE,
)
_CREDITS_PARAGRAPHS = 8
_FIELD = re.compile(r"^(Title|Author|Language):[ \t]*(\S.*(?:\n[ \t]+\S.*)*)", re.MULTILINE)
_NUMBER = re.compile(r"\[E(?:book|text) ?#(\d+)\]", re.IGNORECASE)
_OLD_TITLE = re.compile(
    r"^\W*(?:The )?Project Gutenberg(?:'s)? (?:E-?(?:text|book) (?:of|Edition of) )?(.+?)"
    r"(?:,? by ([^*\n]+?))?\W*$",
    re.IGNORECASE | re.MULTILINE,
)
_LANGUAGES = {
    "afrikaans": "af", "arabic": "ar", "bulgarian": "bg", "catalan": "ca", "chinese": "zh",
    "czech": "cs", "danish": "da", "dutch": "nl", "english": "en", "esperanto": "eo",
    "estonian": "et", "finnish": "fi", "french": "fr", "frisian": "fy", "galician": "gl",
    "german": "de", "greek": "el", "hebrew": "he", "hungarian": "hu", "icelandic": "is",
    "irish": "ga", "italian": "it", "japanese": "ja", "korean": "ko", "latin": "la",
    "lithuanian": "lt", "norwegian": "no", "occitan": "oc", "polish": "pl", "portuguese": "pt",
    "romanian": "ro", "russian": "ru", "serbian": "sr", "slovenian": "sl", "spanish": "es",
    "swedish": "sv", "tagalog": "tl", "welsh": "cy", "yiddish": "yi", "middle english": "enm",
    "old english": "ang",
}  # fmt: skip


@dataclass(frozen=True)
class Book:
    """A book without what Project Gutenberg added, and what its header says."""

    text: str
    title: str | None = None
    author: str | None = None
    language: str | None = None
    number: str | None = None


def remove_gutenberg(text: str) -> Book:
    """Separates a book from its header and footer; a text without them is returned as it is.

    Args:
        text: With line feeds as line ends.
    """
    lines = text.split("\n")
    start = _header_end(lines)
    footers = (i for i in range(start, len(lines)) if _FOOTER_START.match(lines[i]))
    end = next(footers, len(lines))
    body = "\n".join(lines[start:end]).strip("\n")
    if not start:
        return Book(body)
    header = "\n".join(lines[:start])
    fields = {key: " ".join(value.split()) for key, value in reversed(_FIELD.findall(header))}
    old = _OLD_TITLE.search(header)
    number = _NUMBER.search(header)
    return Book(
        _without_credits(body),
        fields.get("Title") or (old[1] if old else None),
        fields.get("Author") or (old[2] if old else None),
        _LANGUAGES.get(fields.get("Language", "").lower()),
        number[1] if number else None,
    )


def _header_end(lines: list[str]) -> int:
    """Number of lines of the header."""
    end = 0
    for i, line in enumerate(lines[:_HEADER_LINES]):
        if end and _FOOTER_START.match(line):
            break
        if _HEADER_END.match(line):
            end = i + 1
            if line.lstrip().startswith("***"):  # a long title continues on the next lines
                while not lines[end - 1].rstrip().endswith("***") and end < min(i + 4, len(lines)):
                    end += 1
                if not lines[end - 1].rstrip().endswith("***"):
                    end = i + 1
    return end


def _without_credits(body: str) -> str:
    """Removes paragraphs at the start that say who made the file."""
    paragraphs = re.split(r"\n(?:[ \t]*\n)+", body, maxsplit=_CREDITS_PARAGRAPHS)
    is_credits = [bool(_CREDITS.match(paragraph)) for paragraph in paragraphs[:_CREDITS_PARAGRAPHS]]
    if not any(is_credits):
        return body
    last = len(is_credits) - 1 - is_credits[::-1].index(True)
    kept = [p for p, credits in zip(paragraphs[:last], is_credits, strict=False) if not credits]
    position = 0
    for paragraph in paragraphs[: last + 1]:
        position = body.index(paragraph, position) + len(paragraph)
    return "\n\n".join([*kept, body[position:].lstrip("\n")])
