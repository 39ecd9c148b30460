"""``python -m llama_jax.report``: one HTML page with tables, losses, pictures and samples.

The page contains its pictures, and loads nothing.
"""

import argparse
import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.io import atomic_write, file_error, read_limited
from llama_jax.storage.paths import path_argument

MAX_BYTES = 16 << 20
METRICS = "metrics.jsonl"
STYLE = (
    "body{max-width:70rem;margin:2rem auto;padding:0 1rem;font-family:sans-serif}"
    "pre{overflow-x:auto;background:#f4f4f4;padding:.8rem}"
    "pre.text{white-space:pre-wrap}img{max-width:100%}"
)
EPILOG = """\
A RESULT is one of

  a run of `llama-jax train`            its losses, loss.png and benchmarks.png
  a folder with a report.md             of `llama-jax evaluate` or `llama-jax corpus report`, and its pictures
  a text file                           such as samples

Example:

  llama-jax report page.html corpus/report checkpoints/tiny evaluations/tiny samples.txt
"""  # noqa: E501


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.page.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"{options.page}: give the page a name that ends in .html")
        content = page(options.title, options.results)
        options.page.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(options.page, content.encode())
    except (ValueError, OSError) as e:
        print(f"error: {file_error(e)}", file=sys.stderr)
        return 1
    print(f"{options.page}: {len(content):,} bytes")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-jax report",
        description="Collect results of other commands on one HTML page.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("page", type=Path, metavar="PAGE.html", help="file to write")
    parser.add_argument(
        "results", type=path_argument, nargs="+", metavar="RESULT", help="see below"
    )
    parser.add_argument("--title", default="Results", help="of the page (default: Results)")
    return parser


def page(title: str, results: Sequence[Path]) -> str:
    """The page as HTML.

    Args:
      title: of the page.
      results: folders and text files, in the order of the page.

    Raises:
      ValueError: a result has nothing to show, or is damaged; says what is expected.
      OSError: missing or not readable.
    """
    sections = [_section(path) for path in results]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(sections) + "\n</html>\n"
    )


def _section(path: Path) -> str:
    if not path.exists():
        raise ValueError(f"{path} does not exist; see --help for what is shown")
    parts = [f"<h2>{html.escape(str(path))}</h2>"]
    if not path.is_dir():
        return "\n".join([*parts, _pre(_text(path), "text")])
    if (path / METRICS).is_file():
        parts.append(_pre(run_summary(path)))
    if (path / "report.md").is_file():
        lines = _text(path / "report.md").splitlines()
        parts.append(_pre("\n".join(line for line in lines if not line.startswith("!["))))
    if len(parts) == 1:
        raise ValueError(f"{path} has no {METRICS} and no report.md; see --help for what is shown")
    return "\n".join([*parts, *(_image(picture) for picture in sorted(path.glob("*.png")))])


def _text(path: Path) -> str:
    try:
        return read_limited(path, MAX_BYTES).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def _pre(text: str, kind: str = "table") -> str:
    return f'<pre class="{kind}">{html.escape(text.strip())}</pre>'


def _image(path: Path) -> str:
    content = base64.b64encode(read_limited(path, MAX_BYTES)).decode()
    return f'<img alt="{html.escape(path.name)}" src="data:image/png;base64,{content}">'


def run_summary(folder: Path) -> str:
    """The newest training loss of a run, and the newest validation loss of each source.

    Raises:
      ValueError: ``metrics.jsonl`` has no training loss.
    """
    newest: dict[str, Any] = {}
    for line in _text(folder / METRICS).splitlines():
        try:
            record = json.loads(line)
            newest[record["kind"]] = record
        except (ValueError, KeyError, TypeError):  # cut off by a crash
            break
    if "train" not in newest:
        raise ValueError(f"{folder / METRICS} has no training loss; the run has not logged any yet")
    train = newest["train"]
    tokens, loss = train["tokens"], train["loss"]
    lines = [f"step {train['step']:,}, {tokens:,} tokens: training loss {loss:.3f}"]
    if "eval" in newest:
        sources = newest["eval"]["sources"]
        sources = sources | ({"mixture": newest["eval"]} if len(sources) > 1 else {})
        lines += [f"step {newest['eval']['step']:,}, validation:"]
        lines += [f"  {name}: {_losses(losses)}" for name, losses in sources.items()]
    return "\n".join(lines)


def _losses(losses: dict[str, Any]) -> str:
    text = f"loss {losses['loss']:.3f}"
    if "unigram_entropy" in losses:
        bits, baseline = losses["bits_per_byte"], losses["unigram_entropy"]
        text += f" ({bits:.2f} bits/byte), unigram baseline {baseline:.3f}"
    return text


if __name__ == "__main__":
    sys.exit(main())
