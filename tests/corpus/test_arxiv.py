r"""arXiv archives: main file, included files, first section to end, members that are no papers."""

import gzip
import io
import re
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")

from corpus import inline

from llama_jax.corpus import arxiv, arxiv_paper
from llama_jax.corpus.arxiv_paper import PaperError, decode, join_files, keep_body

RAW = Path(__file__).parents[3] / "shared/data/raw/arxiv"

MAIN = r"""% \documentclass in a comment
\documentclass[a4paper]{article}
\usepackage[latin1]{inputenc}
\usepackage{amsmath, mine}
\input macros
\title{\me's title}
\begin{document}
\maketitle
\begin{abstract} Not kept. \end{abstract}
\section{Introduction}
We \me{} write $a \le \norm{b}$. % a comment
\input{sec/one}
\include{missing}\subfile{sec/sub.tex}
\import{sec/}{three}
\begin{thebibliography}{9}\bibitem{a} \me \end{thebibliography}
\appendix
\section{Proofs} \own
\bibliographystyle{plain} \bibliography{refs}
\end{document}
Nothing here.
"""
FILES = {
    "main.tex": MAIN,
    "macros.tex": "\\newcommand{\\norm}[1]{\\lVert #1 \\rVert}\n\\def\\me{René}\n",
    "mine.sty": "\\newcommand{\\own}{Own package.}",
    "sec/one.tex": "One.\n\\input{sec/two}%\n\\input{../../etc/passwd}\\input{sec/one}\n",
    "sec/two.tex": "Two.\n\\endinput\nAfter the end.\n",
    "sec/sub.tex": "\\documentclass[../main]{subfiles}\\begin{document}\nSub.\n\\end{document}",
    "sec/three.tex": "Three, \\input{four} \\verb|\\end{document}|\n",
    "sec/four.tex": "four.",
    "old.tex": "\\documentclass{article}\\begin{document}\\section{Old}\\end{document}",
    "figure.eps": "%!PS \\documentclass{x}",
}
EXPECTED = r"""\section{Introduction}
We René{} write $a \le \lVert b \rVert$.
One.
Two.

Sub.
Three, four. \verb|\end{document}|

\appendix
\section{Proofs} Own package."""


def tar_bytes(entries, mode="w"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def paper(files):
    return tar_bytes({name: text.encode("latin-1") for name, text in files.items()}, "w:gz")


def tex(body):
    return gzip.compress(f"\\documentclass{{a}}\\begin{{document}}{body}".encode())


BOMB = r"\def\a{\b\b\b\b\b\b\b\b\b}\def\b{\c\c\c\c\c\c\c\c\c}\def\c{\d\d\d\d\d\d\d\d\d}"
BOMB += (
    r"\def\d{\e\e\e\e\e\e\e\e\e}\def\e{\f\f\f\f\f\f\f\f\f}\def\f{xxxxxxxxx}\section{A}" + r"\a" * 9
)

MEMBERS = {
    "0711/0711.0001.gz": paper(FILES),
    "0711/0711.0002.gz": tex(r"\section{Two} version 1"),
    "0711/0711.0003.pdf": b"%PDF-1.4",
    "0711/0711.0004.gz": gzip.compress(b"%!PS-Adobe"),
    "0711/0711.0005.gz": gzip.compress(b"%auto-ignore\nThis paper has been withdrawn."),
    "0711/0711.0006.gz": tex(r"\begin{abstract}A\end{abstract} A letter."),
    "0711/0711.0007.gz": tex(r"\section{Seven} " + "text " * 50)[:-12],
    "0711/0711.0008.gz": tex(BOMB),
    "0711/0711.0009.gz": gzip.compress(b"<html><body>x"),
    "0711/0711.0010.gz": tar_bytes({"a.txt": b"no TeX", "x.png": b"\x89PNG"}, "w:gz"),
    "0711/0711.0011.gz": tar_bytes({"../up.tex": b"x", "a.tex": b"\\section{Up} x"}, "w:gz"),
    "0711/0711.0012.gz": gzip.compress(b"%!TEX root = a.tex\n\\section{Twelve} x"),
    "9701/hep-th9701001.gz": gzip.compress(
        b"\\magnification=1200 \\def\\x{plain} \\x\\ TeX\n\\bye"
    ),
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arxiv")
    (folder / "arXiv_src_0711_001.tar").write_bytes(tar_bytes(MEMBERS))
    (folder / "0711.0002v3.tar.gz").write_bytes(
        tar_bytes({"x.tex": b"\\section{Two} version 3"}, "w:gz")
    )
    (folder / "0711.0002v2.tex").write_bytes(b"\\section{Two} version 2")
    documents, dropped, _ = inline.run("arxiv", [folder], folder / "out")
    return {d["id"]: d for d in documents}, {d["id"]: d for d in dropped}


def test_a_paper_of_several_files(result):
    document = result[0]["arxiv/0711.0001"]
    assert document["text"] == EXPECTED
    assert document["url"] == "https://arxiv.org/abs/0711.0001"
    assert document["metadata"]["missing_files"] == 3  # missing, passwd, and one in itself


def test_which_papers_are_kept(result):
    documents, dropped = result
    assert {key: documents[key]["text"] for key in sorted(documents)[1:]} == {
        "arxiv/0711.0002": r"\section{Two} version 3",
        "arxiv/0711.0006": "A letter.",
        "arxiv/0711.0007": documents["arxiv/0711.0007"]["text"],
        "arxiv/0711.0011": r"\section{Up} x",
        "arxiv/0711.0012": r"\section{Twelve} x",
        "arxiv/hep-th/9701001": "\\magnification=1200  plain\\ TeX\n\\bye",
    }
    assert documents["arxiv/0711.0007"]["text"].startswith(r"\section{Seven} tex")
    assert documents["arxiv/0711.0002"]["metadata"]["version"] == 3
    bulk = "arXiv_src_0711_001.tar: 0711/0711."
    assert {key: (d["step"], d["reason"]) for key, d in dropped.items()} == {
        "arxiv/0711.0002": ("read", "a newer version, or the same one, is in the input"),
        "arxiv/0711.0003": ("read", "PDF only"),
        "arxiv/0711.0004": ("read", "PostScript only"),
        "arxiv/0711.0005": ("read", "withdrawn"),
        "arxiv/0711.0008": ("macros", "macros expand too often or to too much text"),
        "arxiv/0711.0009": ("read", "HTML only"),
        "arxiv/0711.0010": ("join", "no TeX file"),
        f"{bulk}0007.gz: byte 0": ("read", "a truncated gzip member"),
        f"{bulk}0011.gz: ../up.tex": ("read", "a member name with .."),
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\begin{document}a\part*{P} b\end{document}", r"\part*{P} b\end{document}"),
        (r"\section[s]{A} \begin{references} x \end{references} B", r"\section[s]{A}  B"),
        (r"\section{A} a \section*{References} x y \section{B} b", r"\section{A} a \section{B} b"),
        (r"\section{A} \begin{thebibliography}{9} never closed", r"\section{A}"),
        (r"\section {A} \printbibliography[title=x] \partial", r"\section {A}  \partial"),
        (
            r"\section{A} \begin{bibdiv}\begin{biblist}\bib{A}{book}{}\end{biblist}\end{bibdiv} B",
            r"\section{A}  B",
        ),
        (r"\section{A} \begin{biblist*} \bib{A}{book}{} \end{biblist*} B", r"\section{A}  B"),
        (
            r"\section{A} a \Refs\ref\key 1\by B\endref\endRefs \enddocument",
            r"\section{A} a  \enddocument",
        ),
        (r"\section{A} \Refsection \nobibliography{x}", r"\section{A} \Refsection"),
        (r"\sectionmark{x} \partial{x} no section", None),
    ],
)
def test_first_section_to_end_without_bibliography(text, expected):
    assert keep_body(text, without_section=False) == expected


def test_encodings():
    assert decode("é\r\n\u2019\r".encode()) == "é\n\u2019\n"
    assert decode(b"\xe9") == "é"
    assert decode(b"\xb9", "latin2") == "š"
    assert decode(b"\xd0\xc1", "koi8-r") == "па"
    assert decode(b"\x81\xe9", "latin1") == "\x81é"
    assert decode("é".encode("utf-16")) == "é"
    accents = "naïve “café” " * 9  # one damaged character does not change the others
    assert decode(accents.encode() + b"\xff x") == accents + "\ufffd x"
    assert decode((accents + "é").encode()[:-1], "utf8") == accents + "\ufffd"
    assert decode("é è à".encode("latin-1"), "utf8") == "é è à"


def test_limits_of_included_files(monkeypatch):
    chain = {f"{n}.tex": f"{n}\\input{{{n + 1}}}" for n in range(1, 40)}
    joined = join_files(
        {"m.tex": b"\\documentclass{a}\\input{1}"} | {k: v.encode() for k, v in chain.items()}
    )
    assert joined.text.endswith(f"{arxiv_paper.MAX_DEPTH - 1}")
    assert joined.missing == [f"{arxiv_paper.MAX_DEPTH}"]
    monkeypatch.setattr(arxiv_paper, "MAX_CHARACTERS", 10_000)
    bomb = {
        "m.tex": b"\\documentclass{a}" + b"\\input{b}" * 20,
        "b.tex": b"\\input{c}" * 20,
        "c.tex": b"x" * 99,
    }
    with pytest.raises(PaperError, match="more than 10,000 characters"):
        join_files(bomb)
    with pytest.raises(PaperError, match="more than 10,000 characters"):
        join_files({"m.tex": b"\\documentclass{a}" + b"%\n" * 10_000})
    with pytest.raises(PaperError, match="no TeX file"):
        join_files({"readme": b"text"})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0711/0711.0001.gz", ("0711.0001", 0)),
        ("1202.3665v2.tar.gz", ("1202.3665", 2)),
        ("math.AG0601001v1.tex", ("math/0601001", 1)),
        ("hep-th9901001", ("hep-th/9901001", 0)),
        ("arXiv_src_0711_001.tar", None),
    ],
)
def test_identifiers(name, expected):
    assert arxiv.paper_id(name) == expected


def test_looks_like():
    assert arxiv.looks_like(tar_bytes(MEMBERS), "x.tar")
    assert arxiv.looks_like(MAIN.encode(), "x.tex")
    assert not arxiv.looks_like(tar_bytes({"src/a.py": b"import x"}), "x.tar")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    if not RAW.is_dir():
        pytest.skip("needs the shared sample of arXiv")
    return inline.run("arxiv", [RAW], tmp_path_factory.mktemp("shared"))


def test_real_papers(shared):
    documents, dropped, _ = shared
    emcee, hott = documents
    assert [d["reason"] for d in dropped] == ["PDF only"]
    for text in (emcee["text"], hott["text"]):
        assert not re.search(r"\\(?:re)?newcommand|\\def(?![A-Za-z])|\\input|\\include\{", text)
    # Macros within macros, with arguments: \pr{\model | \data}, where \model uses \vector.
    assert emcee["text"].startswith("\\section{Introduction}\n\nProbabilistic data analysis---")
    math = r"""\ensuremath{p(\ensuremath{\Theta} | \ensuremath{D})} = \int
        \ensuremath{p( \ensuremath{\Theta}, \ensuremath{\alpha} | \ensuremath{D})} \,
        \mathrm{d}  \ensuremath{\alpha} \quad,"""
    assert math in emcee["text"]
    assert "\\begin{lstlisting}\n% pip install emcee\n\\end{lstlisting}" in emcee["text"]
    assert "thebibliography" not in emcee["text"]
    titles = ["{Preface}", "{Introduction}", "{Foundations}", "{Type theory}", "{Sets and logic}",
              "{Mathematics}", "{Appendix}", "{Index of symbols}"]  # fmt: skip
    assert re.findall(r"\\(?:part|chapter)\*?(\{[^}]*\})", hott["text"]) == titles
    assert r"$f \equiv \lam{x} f(x)$" in hott["text"]
    assert r"$\ensuremath{\mathsf{Id}_{A}}\xspace$ of identifications" in hott["text"]
