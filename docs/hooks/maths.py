"""The mathematics of docstrings as MathML, which browsers show without a script; the titles of papers as links.

Docstrings write it as Sphinx does; :class:`SphinxToMarkdown` turns that into what pymdownx.arithmatex takes, and
:func:`on_page_content` turns what arithmatex gives into MathML.
"""

from __future__ import annotations

import re
import textwrap
from html import unescape
from typing import Any
from urllib.parse import quote

import griffe
from latex2mathml.converter import convert

INDENTED = r"(?:(?P=indent)[ \t]+[^\n]*\n?|[ \t]*\n)*"
BLOCK = re.compile(rf"^(?P<indent>[ \t]*)\.\. math::(?P<rest>[^\n]*)\n(?P<body>{INDENTED})", re.MULTILINE)
PAPERS = re.compile(r"^(?P<indent>[ \t]*)References?:\n(?P<body>" + INDENTED + ")", re.MULTILINE)
TITLE = re.compile(r'"([^"]{12,})"')
MATHS = re.compile(r"<(span|div) class=\"arithmatex\">\s*\\[(\[](.*?)\\[)\]]\s*</\1>", re.DOTALL)


class SphinxToMarkdown(griffe.Extension):
    """Rewrites Sphinx's roles and its ``math`` directive in docstrings."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """A docstring in Markdown."""
    text = BLOCK.sub(_block, text + "\n").rstrip("\n")
    text = PAPERS.sub(lambda match: TITLE.sub(_paper, match[0]), text)
    text = re.sub(r":math:`([^`]*)`", r"\\(\1\\)", text)
    return re.sub(r":(?:class|func|meth|attr|data|mod):`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)


def _block(match: re.Match[str]) -> str:
    lines = [match["rest"].strip(), textwrap.dedent(match["body"])]
    formula = " ".join(" ".join(lines).split())
    if "&" in formula or r"\\" in formula:
        formula = rf"\begin{{split}}{formula}\end{{split}}"
    return f"{match['indent']}\\[{formula}\\]\n\n"


def _paper(match: re.Match[str]) -> str:
    """A search by title, which stays right where an address may not."""
    title = " ".join(match[1].split())
    return f'"[{title}](https://scholar.google.com/scholar?q={quote(title)})"'


def on_page_content(html: str, **kwargs: Any) -> str:
    """MkDocs' hook: the page's formulas as MathML."""
    return MATHS.sub(lambda match: _mathml(unescape(match[2]), match[1]), html)


def _mathml(formula: str, tag: str) -> str:
    return convert(formula.strip(), display="block" if tag == "div" else "inline")
