"""Draws docs/images/rooms.svg, the rooms of the package and their imports, from the source: run it after a change.

A room stands above all that it imports. An arrow that other arrows imply is left out.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lightning_fl"
PICTURE = ROOT / "docs" / "images" / "rooms.svg"
BASE = "types, tree, seeding"
"""The modules at the top of the package, drawn as one box."""
WIDTH, ROW, BOX_HEIGHT, MARGIN, SWEEPS = 860, 92, 40, 24, 8
COLOURS = {False: ("#eaf1fb", "#1f5fbf"), True: ("#fdf3ea", "#b3541e")}

Graph = dict[str, set[str]]


def read_rooms(package: Path) -> tuple[Graph, set[str]]:
    """What each room imports of the others, and the rooms that import Lightning themselves."""
    graph: Graph = {}
    with_lightning = set()
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        if parts[0].startswith("__") or "starter" in parts:
            continue
        room = _room(parts[0].removesuffix(".py"), package)
        imports = graph.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                top, _, rest = name.partition(".")
                if top == PACKAGE and rest:
                    imports.add(_room(rest.split(".")[0], package))
                elif top == "lightning":
                    with_lightning.add(room)
        imports.discard(room)
    return graph, with_lightning


def _room(name: str, package: Path) -> str:
    return name if (package / name).is_dir() else BASE


def heights(graph: Graph) -> dict[str, int]:
    """How many rooms stand below each, one upon the other; one that imports nothing stands just below its importers."""
    found: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in found:
            found[room] = max((height(below) + 1 for below in graph[room]), default=0)
        return found[room]

    for room in graph:
        height(room)
    for room in graph:
        if not graph[room]:
            found[room] = min((found[other] - 1 for other in graph if room in graph[other]), default=0)
    return found


def reachable(graph: Graph, room: str) -> set[str]:
    """All that a room imports, also through others."""
    return graph[room].union(*(reachable(graph, below) for below in graph[room]))


def draw(graph: Graph, with_lightning: set[str]) -> str:
    """The picture as SVG."""
    arrows = [
        (room, below)
        for room in sorted(graph)
        for below in sorted(graph[room])
        if not any(below in reachable(graph, other) for other in graph[room])
    ]
    level = heights(graph)
    rows: list[list[str]] = [sorted(room for room in graph if level[room] == height) for height in range(len(graph))]
    rows = [row for row in rows if row]
    # A long arrow passes each row between through a place of its own, so that it is never hidden behind a box.
    paths = []
    for room, below in arrows:
        steps = [f"{room} > {below} > {height}" for height in range(level[room] - 1, level[below], -1)]
        for height, step in zip(range(level[room] - 1, level[below], -1), steps, strict=True):
            rows[height].append(step)
        paths.append([room, *steps, below])
    places = _places(_untangled(rows, paths))
    bottom = len(rows) * ROW + MARGIN
    title = "The rooms of lightning_fl and what they import"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 16}" '
        f'font-family="system-ui, -apple-system, \'Segoe UI\', Roboto, sans-serif" font-size="15" role="img" '
        f'aria-label="{title}">',
        '  <defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L10 5L0 10z" fill="#7d8692"/></marker></defs>',
        f'  <rect width="{WIDTH}" height="{bottom + 16}" rx="10" fill="#ffffff"/>',
        '  <g fill="none" stroke="#7d8692" stroke-width="1.3">',
        *(f"    {_arrow([places[step] for step in path])}" for path in paths),
        "  </g>",
        *(f"  {_box(room, places, graph, room in with_lightning)}" for room in sorted(graph)),
        f'  <text x="{MARGIN}" y="{bottom}" fill="#5f6b7a" font-size="13">An arrow points to what a room imports. '
        f'<tspan fill="{COLOURS[False][1]}">Blue</tspan>: without Lightning. '
        f'<tspan fill="{COLOURS[True][1]}">Orange</tspan>: on Lightning.</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _untangled(rows: list[list[str]], paths: list[list[str]]) -> list[list[str]]:
    """The rows ordered so that each place stands near its neighbours in the rows above and below."""
    neighbours: dict[str, list[str]] = {place: [] for row in rows for place in row}
    for path in paths:
        for upper, lower in pairwise(path):
            neighbours[upper].append(lower)
            neighbours[lower].append(upper)
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 else reversed(rows):
            x = {place: (index + 1) / (len(other) + 1) for other in rows for index, place in enumerate(other)}
            row.sort(key=lambda place: sum(x[other] for other in neighbours[place]) / max(1, len(neighbours[place])))
    return rows


def _width(place: str) -> int:
    return 10 if ">" in place else 9 * len(place) + 28


def _places(rows: list[list[str]]) -> dict[str, tuple[float, float]]:
    """The centre of each place, a row's places spread over the width."""
    places = {}
    for number, row in enumerate(reversed(rows)):
        gap = (WIDTH - 2 * MARGIN - sum(map(_width, row))) / (len(row) + 1)
        left = MARGIN + gap
        for place in row:
            places[place] = (left + _width(place) / 2, MARGIN + number * ROW + BOX_HEIGHT / 2)
            left += _width(place) + gap
    return places


def _arrow(places: list[tuple[float, float]]) -> str:
    """A curve from the first box down to the last one."""
    half, bend = BOX_HEIGHT / 2, (ROW - BOX_HEIGHT) / 2
    curve = f"M{places[0][0]:.0f} {places[0][1] + half:.0f}"
    for (x0, y0), (x1, y1) in pairwise(places):
        start, end = y0 + half, y1 - half
        curve += f"L{x0:.0f} {start:.0f}C{x0:.0f} {start + bend:.0f} {x1:.0f} {end - bend:.0f} {x1:.0f} {end:.0f}"
    return f'<path d="{curve}" marker-end="url(#head)"/>'


def _box(room: str, places: Mapping[str, tuple[float, float]], graph: Graph, has_lightning: bool) -> str:
    (x, y), (fill, stroke) = places[room], COLOURS[has_lightning]
    imports = ", ".join(sorted(graph[room])) or "none"
    rect = f'<rect x="{x - _width(room) / 2:.0f}" y="{y - BOX_HEIGHT / 2:.0f}" width="{_width(room)}"'
    return (
        f"<g><title>{room} imports: {imports}</title>{rect} "
        f'height="{BOX_HEIGHT}" rx="8" fill="{fill}" stroke="{stroke}" stroke-width="1.6"/>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}" fill="#1c2430" text-anchor="middle">{room}</text></g>'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(*read_rooms(ROOT / PACKAGE)), encoding="utf-8")
