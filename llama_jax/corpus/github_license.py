"""The license of a repository: from its name, or from the license files of a checkout."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from llama_jax.corpus.files import Unreadable, open_stream

MAX_LICENSE_BYTES = 1 << 20

_LICENSE_FILE = re.compile(r"(?i)(?:un)?(?:licen[sc]e|copying)(?:[-_.][^/]*)?$")
_CODE = re.compile(r"(?i)\.(?:py|js|ts|go|java|c|h|cpp|rb|rs|php|cs|sh|json|xml|html|css)$")
_METADATA = {"PKG-INFO", "package.json", "Cargo.toml", "pyproject.toml", "setup.cfg"}
# The first that a text mentions is its license.
_TEXTS = re.compile(
    r"(?P<copyleft>GNU\s+(?:\w+\s+)?General\s+Public|\b[AL]?GPL|Mozilla\s+Public|Eclipse\s+Public"
    r"|Creative\s+Commons|CeCILL|European\s+Union\s+Public)"
    r"|(?P<apache>Apache\s+Licen[sc]e)"
    r"|(?P<mit>Permission\s+is\s+hereby\s+granted,\s+free\s+of\s+charge,?\s+to\s+any\s+person"
    r"|\bMIT\s+Licen[sc]e)"
    r"|(?P<bsd>Redistribution\s+and\s+use\s+in\s+source\s+and\s+binary\s+forms|\bBSD\b)",
    re.IGNORECASE,
)


def is_wanted(name: str | None, wanted: Iterable[str]) -> bool:
    """Whether a license is one of those wanted, as ``MIT``, ``bsd-3-clause`` or ``MIT OR GPL-2.0``.

    Args:
        name: Name or SPDX expression.
        wanted: Beginnings of names, in lower case.
    """
    prefixes = tuple(wanted)
    alternatives = re.split(" or |[/|]", " ".join((name or "").lower().split()))
    return any(
        all(_plain(part).startswith(prefixes) for part in alternative.split(" and "))
        for alternative in alternatives
    )


def _plain(name: str) -> str:
    return re.sub(r"^(?:osi approved ::|the|new|modified|simplified|\W)*\s*", "", name.strip(" ()"))


def licenses_by_folder(files: Mapping[str, Path]) -> dict[str, str]:
    """The license that each folder with license files or package metadata states.

    Args:
        files: The files of checkouts by their name.

    Returns:
        ``mit``, ``bsd``, ``apache``, ``copyleft`` or what the metadata states, or ``unknown``.
    """
    stated: dict[str, list[str]] = {}
    metadata: dict[str, list[str]] = {}
    for name, path in files.items():
        base, folder = PurePosixPath(name).name, str(PurePosixPath(name).parent)
        if is_license_file(name):
            stated.setdefault(folder, []).append(license_of_text(_read(path)))
        elif base in _METADATA and (found := _license_of_metadata(base, _read(path))):
            metadata.setdefault(folder, []).append(found)
    out = {}
    for folder in stated.keys() | metadata.keys():
        names = [name for name in stated.get(folder, ()) if name != "unknown"]
        names = names or metadata.get(folder) or ["unknown"]
        out[folder] = "copyleft" if "copyleft" in names else names[0]
    return dict(sorted(out.items()))


def is_license_file(name: str) -> bool:
    base = PurePosixPath(name).name
    return bool(_LICENSE_FILE.match(base)) and not _CODE.search(base)


def license_of_text(text: str) -> str:
    found = _TEXTS.search(text)
    return (found and found.lastgroup) or "unknown"


def _license_of_metadata(base: str, text: str) -> str | None:
    if base == "package.json":
        try:
            value = json.loads(text).get("license")
        except (ValueError, AttributeError, RecursionError):
            return None
        value = value.get("type") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None
    found = re.search(
        r"(?im)^license(?:-expression)?\s*[:=]\s*[\"']?(?!UNKNOWN)([\w.() +-]+)"
        r"|^Classifier: License :: (?:OSI Approved :: )?(.+)"
        r"|^license\s*=\s*\{\s*text\s*=\s*[\"']([^\"']+)",
        text,
    )
    return next(filter(None, found.groups()), "").strip() if found else None


def _read(path: Path) -> str:
    try:
        return open_stream(path).read_all(MAX_LICENSE_BYTES).decode("utf-8", "replace")
    except Unreadable:
        return ""
