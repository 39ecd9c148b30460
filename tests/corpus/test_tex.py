r"""Comments are removed and macros expanded as TeX does it; everything else stays as it is."""

import re
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.corpus import tex_macros
from llama_jax.corpus.arxiv_paper import MAX_CHARACTERS, join_files, keep_body
from llama_jax.corpus.tex import remove_comments, tokens
from llama_jax.corpus.tex_macros import ExpansionError, expand_macros


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50\\% of x % half\ny", "50\\% of x\ny"),
        ("affine-%\n    invariant", "affine-invariant"),
        ("a\\\\% line break, then a comment\nb", "a\\\\b"),
        ("a\n% whole line\n   % another\nb", "a\nb"),
        ("a\n%\n\nb", "a\n\nb"),
        ("a%\n\nb", "a\n\nb"),  # the empty line still ends the paragraph
        ("\\alpha%\nx", "\\alpha x"),
        ("{%\n  % inside\n  x}%", "{x}"),
        ("\\verb|%| \\verb*+%+ \\url{a%20b} % c", "\\verb|%| \\verb*+%+ \\url{a%20b}"),
        (
            "\\begin{verbatim}\n% code\n\\end{verbatim} % c",
            "\\begin{verbatim}\n% code\n\\end{verbatim}",
        ),
        ("\\begin{lstlisting}[x]\na % b\n\\end{lstlisting}",) * 2,
        ("a\n\\begin{comment}\n x\n\\end{comment}\nb", "a\nb"),
        ("a \\iffalse x \\fi b \\iff c", "a  b \\iff c"),
        ("a\n\\iffalse\nx \\iffalse y \\fi z\n\\fi\nb", "a\nb"),
        ("a \\iffalse \\ifx\\p\\q x \\else \\iff y \\fi z % \\fi\n\\\\fi \\fi b", "a  b"),
        ("\\iffalse\nx\n\\else\ny % c\nz\n\\fi\n\\fi", "y\nz\n\\fi"),
        ("\\newif\\ifme\\iffalse \\ifme x \\fi \\ifthenelse{} y \\fi z", "\\newif\\ifme z"),
        ("\\iffalse x \\iffalse y \\fi z", "\\iffalse x  z"),
        ("no comments\n  here", "no comments\n  here"),
    ],
)
def test_comments(text, expected):
    assert remove_comments(text) == expected
    assert remove_comments(expected) == expected


def test_what_is_never_closed_takes_linear_time():
    start = time.process_time()
    for unit in (r"\begin{comment}", r"\begin{verbatim}", r"\iffalse", r"\iffalse\else\fi\iffalse",
                 r"\iffalse\fi", r"\usepackage[", r"\printbibliography["):  # fmt: skip
        text = rf"\documentclass{{a}}{f'{unit} x' * 15_000}%"
        text = join_files({"a.tex": text.encode()}).text
        tokens(text)
        keep_body(text, without_section=True)
    for text in (
        r"\section",
        r"\section{\x",
        r"\usepackage",
        r"\def\a#1" + "a" * 10_000 + r"b{x}\a",
    ):
        text = rf"\documentclass{{a}}\begin{{document}}{text}" + " " * 10_000 + "a" * 20_000
        keep_body(expand_macros(join_files({"a.tex": text.encode()}).text), without_section=True)
    assert time.process_time() - start < 2.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            r"\newcommand{\R}{\mathbb{R}}$x \in \R^n$, \R{} \RR",
            r"$x \in \mathbb{R}^n$, \mathbb{R}{} \RR",
        ),
        (
            r"\newcommand*\norm[2][2]{\|#2\|_{#1}}\norm{x} \norm[1]{y} \norm [p] z",
            r"\|x\|_{2} \|y\|_{1} \|z\|_{p}",
        ),
        (
            r"\newcommand{\a}{1}\renewcommand{\a}{2}\providecommand{\a}{3}\providecommand{\b}{4}\a\b",
            "24",
        ),
        (
            r"\newcommand{\this}{\project{emcee}}\newcommand{\project}[1]{{\sffamily #1}}\this\ x",
            r"{\sffamily emcee}\ x",
        ),
        (r"\def\cd{\tproj0}\newcommand{\tproj}[2]{|#2|_{#1}}\cd{a}", "|a|_{0}"),
        (r"\long\def\pair#1:#2;{<#2,#1>}\pair a:{b;}; \pair{c}:d;", "<b;,a> <d,c>"),
        (r"\def\frac#1#2{(#1)/(#2)}\frac12 \frac{a}\b", r"(1)/(2) (a)/(\b)"),
        (r"\newcommand{\v}[1]{#1x}\v{\alpha}y \v\beta", r"\alpha xy \beta x"),
        (
            r"\let\oldvec\vec\renewcommand{\vec}[1]{\mathbf{\oldvec{#1}}}\vec{x}",
            r"\mathbf{\vec{x}}",
        ),
        (r"\let\nc=\newcommand\nc{\q}{Q}\q", "Q"),
        (r"\newcommand{\x}{y}\let\z\x\renewcommand{\x}{w}\z\x", "yw"),
        (r"\DeclareMathOperator{\tr}{tr}$\tr A$", r"$\operatorname{tr} A$"),
        (r"\DeclareMathOperator*\am{arg\,min}$\am_x$", r"$\operatorname*{arg\,min}_x$"),
        (
            r"\DeclarePairedDelimiter{\abs}{|}{|}\abs{x}\abs*{y}\abs[\big]{z}",
            r"|x|\left|y\right|\big|z\big|",
        ),
        (r"\NewDocumentCommand{\z}{O{1} +m}{<#1#2>}\z{a}\z[2]{b}", "<1a><2b>"),
        (r"\def\on{\gdef\note##1{[##1]}}\on\note{hi}", "[hi]"),
        ("text\n  \\newcommand{\\a}[1]%\n  {b}\n\\def\\c{d}\nnext \\a{x}\\c", "text\nnext bd"),
        (
            r"\newcommand{\be}{\begin{equation}}\newcommand{\ee}{\end{equation}}\be x\ee",
            r"\begin{equation} x\end{equation}",
        ),
        # Not expanded: recursion, conditionals, internal commands, sectioning, verbatim text.
        (r"\newcommand{\x}{\y}\newcommand{\y}{(\x)}\x \y", r"\x \y"),
        (r"\def\s{\ifmmode a\else b\fi}\newcommand{\t}{\s}\s \t \iff", r"\s \t \iff"),
        (r"\def\prd#1{\@ifnextchar\bgroup{#1}{}}\prd{x}", r"\prd{x}"),
        (r"\renewcommand{\section}{\large}\section{A}", r"\section{A}"),
        (
            r"\newcommand{\R}{X}\verb|\R| \begin{verbatim}\R\end{verbatim}\R",
            r"\verb|\R| \begin{verbatim}\R\end{verbatim}X",
        ),
        (
            r"\newenvironment{prf}[1][P]{\par\textbf{#1}}{\qed}\begin{prf}x\end{prf}",
            r"\begin{prf}x\end{prf}",
        ),
        # Incomplete definitions and calls stay as they are.
        (
            r"\newcommand{\a}[1]{<#1>}x {\a} \newcommand{\b}{unclosed",
            r"x {\a} \newcommand{\b}{unclosed",
        ),
        (r"\newcommand{\a}[1]{<#1>}\a" + "\n\nx", r"\a" + "\n\nx"),
        (r"\def\a#1.{<#1>}\a no delimiter", r"\a no delimiter"),
    ],
)
def test_macros(text, expected):
    assert expand_macros(remove_comments(text)) == expected
    assert expand_macros(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        r"\def\a{\b\b\b\b\b\b\b\b}\def\b{\c\c\c\c\c\c\c\c}\def\c{\d\d\d\d\d\d\d\d}"
        r"\def\d{\e\e\e\e\e\e\e\e}\def\e{\f\f\f\f\f\f\f\f}\def\f{xxxxxxxx}\a",
        r"\def\a#1{#1#1}" + r"\a{" * 30 + "x" + "}" * 30,
        r"\def\a{" + "x" * 100_000 + "}" + r"\a" * 500,
    ],
)
def test_expansion_bombs(text, monkeypatch):
    monkeypatch.setattr(tex_macros, "MAX_EXPANSIONS", 20_000)
    with pytest.raises(ExpansionError, match="macros expand"):
        expand_macros(text)


def test_the_tokens_of_the_longest_paper_fit_in_memory():
    text = "".join(chr(0x4E00 + i % 20_000) + "{" for i in range(100_000))
    tracemalloc.start()
    expand_macros(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / len(text) * MAX_CHARACTERS < 1.4e9


MACROS = ["\\newcommand{\\A}{x_1}", "\\newcommand{\\B}[1]{\\A^{#1}}", "\\def\\C#1#2{\\B{#2}#1}"]
PLAIN = st.lists(
    st.sampled_from(
        ["word", "\\alpha", " ", "\n", "{", "}", "[", "]", "$", "#1", "\\\\", "\\%", "\\verb|%|",
         "~", "2", "\\begin{verbatim}\\A\\end{verbatim}", "é", "\\x"]
    )
).map("".join)  # fmt: skip
CALLS = st.lists(
    st.sampled_from(["\\A", "\\B{y}", "\\C{\\A}{\\gamma}", "\\C 1 {\\B2}", " word ", "$", "\n"])
).map("".join)


@given(PLAIN)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_text_without_macros_does_not_change(text):
    assert expand_macros(text) == text
    assert remove_comments(text) == text


@given(CALLS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_defined_name_is_left_and_expansion_is_idempotent(text):
    once = expand_macros("\n".join([*MACROS, text]))
    assert not re.search(r"\\(?:newcommand|def|A|B|C)(?![A-Za-z])", once)
    assert expand_macros("\n".join([*MACROS, once])) == once
