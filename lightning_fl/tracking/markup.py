"""The building blocks of a page: sections, tables and figures in one HTML file.

Everything that comes from a run has to be escaped: names of metrics and clients could otherwise inject scripts.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lightning_fl.tracking import interactive, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5f6b7a; --line: #e3e7ec; --accent: #1f5fbf;
  --page: #f5f7f9; --box: #fff; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa6b5; --line: #313a46; --accent: #7fb0ff; --page: #12161c; --box: #1b212a;
    --bad: #ff8a80; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink);
  background: var(--page); margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 6px; overflow-wrap: anywhere; }
p code { overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 10px; }
.lead { color: var(--soft); margin: 0 0 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-bottom: 18px; }
.card, section { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.card b { display: block; font-size: 22px; font-weight: 600; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: 13px; }
section { margin-bottom: 18px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 14px; }
figure { margin: 0; min-width: 0; }
a { color: var(--accent); }
figcaption { color: var(--soft); font-size: 13px; }
img { max-width: 100%; height: auto; display: block; background: #fff; border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
td:not([class]) { overflow-wrap: anywhere; min-width: 7.5em; }
caption { text-align: left; color: var(--soft); }
td.whole { white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px; overflow-x: auto;
  font-size: 13px; margin: 0 0 10px; }
summary { cursor: pointer; color: var(--accent); }
.bad { color: var(--bad); }
@media (max-width: 520px) { .figures { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


def page(title: str, content: str) -> str:
    """A complete page with the given content, in which everything that comes from a run has to be escaped."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{interactive.POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{interactive.STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{content}</main>\n<script>{interactive.SCRIPT.read_text(encoding='utf-8')}</script>\n</body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    """A section; an empty string without content."""
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>\n" if content else ""


def figures(images: Iterable[str]) -> str:
    """Figures side by side."""
    return f'<div class="figures">{"".join(images)}</div>'


def image(
    figure: Figure, caption: str, curves: plots.Curves | None = None, ylabel: str = "", xlabel: str = "round"
) -> str:
    """A figure with its caption; the page's script replaces curves by a zoomable chart."""
    # An image, not inline SVG, in which the ids and styles of several figures would clash.
    data = base64.b64encode(plots.as_svg(figure)).decode()
    text = escape(caption)
    image = f'<img alt="{text}" src="data:image/svg+xml;base64,{data}">'
    shown = interactive.curves(curves, xlabel, ylabel, image) if curves else image
    return f"<figure>{shown}<figcaption>{text}</figcaption></figure>\n"


def table(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table; columns of numbers are right-aligned."""
    by_column = [[row[index] for row in rows] for index in range(len(columns))]
    numeric = [all(cell is None or isinstance(cell, int | float) for cell in cells) for cells in by_column]
    head = _line("th", map(str, columns), numeric)
    body = "\n".join(_line("td", map(_cell, row), numeric) for row in rows)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'


def _line(tag: str, cells: Iterable[str], numeric: Sequence[bool]) -> str:
    kinds = (' class="number"' if is_number else "" for is_number in numeric)
    joined = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
    return f"<tr>{joined}</tr>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """A number with its significant digits."""
    return f"{value:.4g}"
