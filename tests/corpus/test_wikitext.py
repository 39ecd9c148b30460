"""Wikitext to plain text, compared with texts written by hand."""

import time

import pytest

from llama_jax.corpus.wikitext import site, to_text

SITE = site({-2: "Медия", 6: "Файл", 14: "Категория"}, ["See also", "Примечания"], "en")

PAGE = """{{Infobox person
| name = Ada {{small|(b. 1815)}}
| image = [[File:A.jpg|thumb]]
| text = <ref name="a">{{cite|x}}</ref>
|}}
<!-- a comment
over two lines -->
'''Ada''' ({{IPA|x}}; born [[1815|10 December 1815]]) was a [[mathematician]].<ref>{{cite web
|url=http://x|title=[[X]]}}</ref> She wrote ''notes''{{cn}} on [[loom]]s<ref name=a />.
[[File:Ada.jpg|thumb|left|A [[portrait]] of ''Ada'']]

== Early life ==
{| class="wikitable"
|-
| cell || {{x|{{y}}}}
{| nested
| cell
|}
|}
Her father was [[Lord Byron]] [http://example.org (website)], [http://example.org].

=== Empty ===
{{main|X}}

== Works ==
# First
# Second
## Nested
* Other
** Deeper
; Term : definition

=== Code ===
 for i in x:
   print(i)
<syntaxhighlight lang="c">
int a[[1]] = {{0}};

  return 0;
</syntaxhighlight>

== See also ==
* [[Charles Babbage]]
=== Deeper ===
text
== Formulas ==
Here <math>E = m
c^2_{{a}}</math> and H<sub>2</sub>O, &lt;b&gt; AT&amp;T, 5&nbsp;km<br />next.
<gallery>
File:A.jpg|caption
</gallery>
__NOTOC__
[[Категория:Math]] [[:Category:Math]] [[fr:Ada]] [[Category:Women|Ada]]
[[Файл:x.png]]
"""

TEXT = """Ada (born 10 December 1815) was a mathematician. She wrote notes on looms.

Early life

Her father was Lord Byron (website), .

Works

1. First
2. Second
  1. Nested
- Other
  - Deeper
Term : definition

Code

for i in x:
  print(i)

int a[[1]] = {{0}};

  return 0;

Formulas

Here $E = m c^2_{{a}}$ and H2O, <b> AT&T, 5 km
next.

Category:Math"""


def test_a_page():
    assert to_text(PAGE, SITE).splitlines() == TEXT.splitlines()


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        # Bold, italics and apostrophes.
        ("L''''armonium''' o '''armonio'''", "L'armonium o armonio"),
        ("nell'''Iliade'' e nell'''Odissea''", "nellIliade e nellOdissea"),
        ("di l'''Iliade'' e ''altro'' '''x'''", "di l'Iliade e altro x"),
        ("'''''both''''' it's '90s", "both it's '90s"),
        ("un'''unione'', che", "un'unione, che"),
        # Links.
        ("[[Paris (Texas)|]] [[a b]]s [[x|''y'' [z]]]", "Paris a bs y [z]"),
        ("[[wikt:word|text]] [[s:Book]] [[Star Wars: A Film]]", "text s:Book Star Wars: A Film"),
        ("[[Image:a.png|thumb|a [[b|c]] [http://x d]]] e", "e"),
        ("[[Bild:a.png|mini|x]] [[Unbekannt:a.svg|mini|x]] e", "e"),
        ("[[ file : a.png | x ]]a [[КАТЕГОРИЯ:Б]]b [[image_:x]]", "a b"),
        (
            "see http://a.b/c?x=1&copy=2 [//x.org y] [mailto:a@b c]",
            "see http://a.b/c?x=1&copy=2 y c",
        ),
        ("[[be-x-old:X]][[zh-min-nan:X]][[simple:X]]a [[doi:10.1/x]]", "a doi:10.1/x"),
        ("a [[fr:Foo|x]][[:fr:Foo|y]] [[en:Foo|z]] [[en:Foo]] [[wp:Foo|w]]", "a y z en:Foo w"),
        ("[[Foo<!-- x -->|bar]] [[bad\nlink]] [[a{b|c]]", "bar bad\nlink c"),
        (
            "[[http://a.b/c A title]] and [http://a.b] [sic] [[File:x.png|thumb|[1] [[a]]]]",
            "A title and [sic]",
        ),
        ("[[File:x.png|thumb|open [[a]] b\nc [[d", "c d"),
        ("a <y and z> <b>b</b> 1 < 2 > 1", "a <y and z> b 1 < 2 > 1"),
        # Templates and tables, also those that are not closed.
        ("a {{b|{{{c|{{d}}}}}}} e", "a e"),
        ("{{{{{1}}}|x}} a", "a"),
        ("a\n\n{{open|x\n|y=1\n|z\n\nb", "a\n\nb"),
        ("a }} b\n\n|}\nc", "a b\n\nc"),
        ("a {{cite} b c", "a b c"),
        ("{|\n| a\n\nb\n== H ==\nc", "H\n\nc"),
        ("a\n:{| x\n| {{t|\n|}} |\n|}\nb", "a\nb"),
        ("a<table><tr><td>b<table></table></td></tr></table>c", "ac"),
        ("a ({{x}}) b ({{x}}, c) d (e; {{x}}) f() g (h{{x}})", "a b (c) d (e) f() g (h)"),
        ("* {{cite}}.\n* {{cite}}, ISBN 1\n* a {{b}}.\n{{lang|x}}, b", "- ISBN 1\n- a.\nb"),
        # Elements.
        ("a<ref>b c", "ab c"),
        ("a<ref name='x'/>b<REF\ngroup=n>c</Ref >d", "abd"),
        ("a<!-- b", "a"),
        ("a\n<!-- b -->\nc", "a\nc"),
        ("<nowiki>[[a]] {{b}} &amp;</nowiki> ''c''<nowiki/>'", "[[a]] {{b}} & c'"),
        ("<pre>\n a\n\n  [[b]]\n</pre>", "a\n\n  [[b]]"),
        ("<div style='x'>a</div><span>b</span><u>c", "a\n\nbc"),
        ("<ul><li>a</li><li>b</ul>", "- a\n- b"),
        ("x <chem>H2O</chem>", r"x $\ce{H2O}$"),
        ("-{a}- -{sr-ec:б; sr-el:b}- -{{{x}}}-", "a б --"),
        ("a __БЕЗ_ОГЛАВЛЕНИЯ__ b __init__", "a b __init__"),
        # Sections.
        ("== A ==\n=== B ===\n{{x}}\n== C ==\nd\n=== E ===", "C\n\nd"),
        ("a\n== Примечания ==\nb\n=== C ===\nd\n== E ==\nf", "a\n\nE\n\nf"),
        (
            "== A <!-- x --> ==\n''b''\n== ''C'' [[d|e]] ==\nf\n=g=\nh",
            "A\n\nb\n\nC e\n\nf\n\ng\n\nh",
        ),
        ("{{only|a template}}\n[[Category:X]]", ""),
        ("a\n----\nb\n-----c\n--d\n# e\n----\n# f", "a\n\nb\n\nc\n\n--d\n1. e\n\n1. f"),
    ],
)
def test_cases(wikitext, text):
    assert to_text(wikitext, SITE) == text


def test_damaged_pages_take_linear_time():
    start = time.process_time()
    for unit in ["{{a|", "[[a|", "''b", "<ref>", "{|\n", "<b>", "}}", "<!--", "* ", "=", "x ("]:
        to_text(unit * (40_000 // len(unit)), SITE)
        to_text((unit * 20 + "\n") * (8_000 // 20 // len(unit)), SITE)
    n = 10_000
    for text in (
        "{{a}} " * n + "x )", "a" + " " * n + "b ({{a}})", "[http://a" + " " * n,
        "[[a" + " " * n + "b|]]", "-{" + "a" * n + ";}-", "{|\n" * n + "}} " * n,
        "{{a " * n + "\n|}\n" * n, "<table>" * n + "}} " * n,
    ):  # fmt: skip
        to_text(text, SITE)
    assert time.process_time() - start < 4
