"""Renders the formulas of docstrings for a terminal: ``x ← x + η_s mean_i (y_i - x)`` instead of LaTeX."""

from __future__ import annotations

import re
import textwrap

_SYMBOLS = {
    **{name: chr(code) for code, name in enumerate(["alpha", "beta", "gamma", "delta"], 0x3B1)},
    **{"varepsilon": "ε", "eta": "η", "theta": "θ", "lambda": "λ", "mu": "μ", "tau": "τ", "Delta": "Δ", "Pi": "Π"},
    **{"rho": "\N{GREEK SMALL LETTER RHO}", "ell": "\N{SCRIPT SMALL L}", "times": "\N{MULTIPLICATION SIGN}"},
    **{"leftarrow": "←", "sum": "Σ", "nabla": "∇", "in": "∈", "ge": "≥", "sqrt": "√", "bmod": "mod"},
    **dict.fromkeys(["left", "right", "big", "Big"], ""),
}
"""The text for each LaTeX command; other commands, such as ``min``, are written as their names."""
_DIRECTIVE = re.compile(r"^( *)\.\. math::[ ]*(.*(?:\n(?:\1 +.*|(?=\n\1 )))*)", re.MULTILINE)
_ROLE = re.compile(r":math:`([^`]*)`")
_ARGUMENT = r"\{((?:[^{}]|\{[^{}]*\})*)\}"


def readable(text: str) -> str:
    """A docstring with its formulas as plain text.

    Args:
        text: A docstring with ``.. math::`` and ``:math:`` in it.
    """
    text = _DIRECTIVE.sub(lambda found: textwrap.indent(plain(found[2]), found[1] + "    "), text)
    return _ROLE.sub(lambda found: plain(found[1]), text)


def plain(latex: str) -> str:
    """A formula as text, one line per row."""
    text = re.sub(r"\\text\{([^{}]*)\}", lambda found: re.sub(r"``|\\", "", found[1]), " ".join(latex.split()))
    text = re.sub(r"\\(?:mathrm|mathbb)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\bar (\w)", "\\1\u0304", text)
    for _ in range(2):  # fractions may be nested
        text = re.sub(rf"\\t?frac{_ARGUMENT}\s*{_ARGUMENT}", _fraction, text)
    text = re.sub(r"\\sqrt\{(\w)\}", r"√\1", text)
    text = re.sub(rf"([_^]){_ARGUMENT}", lambda found: found[1] + _group(found[2]), text)
    rows = text.replace("&", "").replace(r"\qquad", "   ").replace(r"\quad", "  ").split(r"\\")
    return "\n".join(_row(row) for row in rows)


def _row(text: str) -> str:
    text = re.sub(r"\s*\\rVert", "‖", re.sub(r"\\lVert\s*", "‖", re.sub(r"\\[,;]", "", text)))
    text = re.sub(r"\\([A-Za-z]+) ?", lambda f: _SYMBOLS.get(f[1], f" {f[1]} ") + " " * (f[0][-1] == " "), text)
    text = text.replace(r"\{", "{").replace(r"\}", "}")
    text = re.sub(r"(?<=[∇(]) | (?=[_)])|(?<=max) +(?=\()", "", text.strip())
    return re.sub(r" {4,}", "   ", re.sub(r"(?<=\S)  (?=\S)", " ", text))


def _fraction(found: re.Match[str]) -> str:
    above, below = _group(found[1]), _group(found[2])
    return f"{above} / {below}" if "(" in above + below else f"{above}/{below}"


def _group(text: str) -> str:
    """Adds brackets, except around a single word."""
    text = text.strip()
    return text if re.fullmatch(r"\\?\w+", text) else f"({text})"
