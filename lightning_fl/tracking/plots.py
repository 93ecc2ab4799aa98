"""Plots of a federation: its partition, curves over the rounds, and each client in each round."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_fl.tracking.partition import PartitionSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Rounds and values, by label."""
MAX_LABELLED_CLIENTS = 40
MAX_LEGEND = 12
MAX_CHARACTERS = 40
GREY = "#5f6b7a"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, created without pyplot, whose global state stays unchanged.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "lightning-fl[tracking]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def is_available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def as_text(name: Any) -> str:
    """A user's name as text for a figure: shortened to fit, and escaped so that it is not parsed as a formula."""
    text = str(name)
    shown = text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}\u2026"
    return shown.replace("$", r"\$")


def as_png(figure: Figure, dpi: int = 120) -> bytes:
    """The figure as a PNG file."""
    return _saved(figure, "png", dpi)


def as_svg(figure: Figure) -> bytes:
    """The figure as an SVG file with text as outlines, so that it looks the same everywhere."""
    return _saved(figure, "svg", 120)


def _saved(figure: Figure, kind: str, dpi: int) -> bytes:
    file = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None  # without the date, the same figure gives the same file
    figure.savefig(file, format=kind, dpi=dpi, metadata=metadata)
    return file.getvalue()


def partition_figure(summary: PartitionSummary) -> Figure:
    """A bar per client, as long as its number of examples and coloured by label."""
    num_shown = len(summary.ids)
    with_labels = len(summary.counts) > 0
    figure = new_figure(8, min(2.2 + 0.26 * num_shown, 9) if num_shown <= MAX_LABELLED_CLIENTS else 4.5)
    axes = axes_of(figure)
    if num_shown > MAX_LABELLED_CLIENTS:
        _many_clients(axes, summary)
    else:
        _few_clients(axes, summary)
    if with_labels:
        columns = math.ceil(min(len(summary.labels), 20) / 20)
        axes.legend(
            title="label", fontsize=8, title_fontsize=8, frameon=False, ncols=columns, loc="center left",
            bbox_to_anchor=(1, 0.5), reverse=num_shown > MAX_LABELLED_CLIENTS,
        )  # fmt: skip
    axes.set_title(_partition_title(summary), fontsize=10, loc="left")
    return figure


def _partition_title(summary: PartitionSummary) -> str:
    shown = f"{len(summary.ids):,} of " if len(summary.ids) < summary.num_clients else ""
    skew = "" if summary.label_skew is None else f", label skew {summary.label_skew:.2f}"
    iid = "" if summary.label_skew_if_iid is None else f" (by chance {summary.label_skew_if_iid:.2f})"
    return f"{shown}{summary.num_clients:,} clients{skew}{iid}"


def _layers(summary: PartitionSummary, order: Sequence[int]) -> list[tuple[str | None, np.ndarray, Any]]:
    """Per label: its name, its examples per client, its colour; one layer of sizes if the labels are unknown."""
    if not len(summary.counts):
        return [(None, np.asarray([summary.sizes[row] or 0 for row in order]), "#4c78a8")]
    counts = np.asarray(summary.counts)[list(order)]
    colours = label_colours(len(summary.labels))
    return [
        (as_text(name) if column < 20 else None, counts[:, column], colours[column])
        for column, name in enumerate(summary.labels)
    ]


def _few_clients(axes: Axes, summary: PartitionSummary) -> None:
    rows = np.arange(len(summary.ids))
    left = np.zeros(len(rows))
    for name, values, colour in _layers(summary, rows.tolist()):
        axes.barh(rows, values, left=left, color=colour, label=name, height=0.8, edgecolor="white", linewidth=0.4)
        left += values
    axes.set_yticks(rows, list(map(as_text, summary.ids)), fontsize=8)
    axes.invert_yaxis()
    axes.set_ylabel("client", fontsize=9)
    axes.set_xlabel("examples", fontsize=9)


def _many_clients(axes: Axes, summary: PartitionSummary) -> None:
    order = np.argsort([-(size or 0) for size in summary.sizes], kind="stable").tolist()
    rows = np.arange(len(order))
    bottom = np.zeros(len(rows))
    for name, values, colour in _layers(summary, order):
        axes.bar(rows, values, bottom=bottom, color=colour, label=name, width=1.0, linewidth=0)
        bottom += values
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_xlabel("clients, the largest first", fontsize=9)
    axes.set_ylabel("examples", fontsize=9)


def label_colours(count: int) -> list[Any]:
    """Distinct colours: strong ones for up to 20 labels, a gradient for more."""
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](index) for index in range(count)]
    if count <= 20:
        return [colormaps["tab20"](index) for index in range(count)]
    return [colormaps["turbo"](value) for value in np.linspace(0.03, 0.97, count)]


def curves_figure(
    curves: Curves,
    ylabel: str,
    width: float = 6.4,
    height: float = 3.4,
    bands: Mapping[str, Sequence[float]] | None = None,
    xlabel: str = "round",
) -> Figure:
    """Lines over the rounds; also with markers if there are fewer than three rounds.

    Args:
        curves: The lines.
        ylabel: Label of the y-axis.
        width: Width in inches.
        height: Height in inches.
        bands: By label, the half-width of a band around the line.
        xlabel: Label of the x-axis. Default ``"round"``.
    """
    figure = new_figure(width, height)
    axes = axes_of(figure)
    draw_curves(axes, curves, ylabel, bands)
    axes.set_xlabel(xlabel, fontsize=9)
    return figure


def draw_curves(axes: Axes, curves: Curves, ylabel: str, bands: Mapping[str, Sequence[float]] | None = None) -> None:
    """Draws lines over the rounds."""
    colours = label_colours(len(curves))
    for (label, (rounds, values)), colour in zip(curves.items(), colours, strict=True):
        marker = "o" if len(rounds) < 3 else None
        axes.plot(rounds, values, label=as_text(label), linewidth=1.8, marker=marker, color=colour)
        if bands and label in bands:
            middle, around = np.asarray(values), np.asarray(bands[label])
            axes.fill_between(rounds, middle - around, middle + around, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("round", fontsize=9)
    axes.set_ylabel(as_text(ylabel), fontsize=9)
    axes.grid(visible=True, color="#e3e7ec", linewidth=0.8)
    _count_rounds(axes)
    if 1 < len(curves) <= MAX_LEGEND:
        axes.legend(fontsize=8, frameon=False)
    elif len(curves) > MAX_LEGEND:
        axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), ncols=-(-len(curves) // 30))


def clock_figure(seconds: Sequence[float], values: Sequence[float], ylabel: str) -> Figure:
    """A line over the time of a simulated clock, in seconds."""
    figure = new_figure(6.4, 3.4)
    axes = axes_of(figure)
    axes.plot(seconds, values, linewidth=1.8, color="#4c78a8", marker="o" if len(seconds) < 3 else None)
    axes.set_xlabel("simulated seconds", fontsize=9)
    axes.set_ylabel(as_text(ylabel), fontsize=9)
    axes.grid(visible=True, color="#e3e7ec", linewidth=0.8)
    return figure


def counts_figure(counts: Sequence[int], xlabel: str, ylabel: str) -> Figure:
    """A bar for each of 0, 1, 2, ..."""
    figure = new_figure(6.4, 2.8)
    axes = axes_of(figure)
    axes.bar(range(len(counts)), counts, color="#4c78a8")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    _count_rounds(axes)
    return figure


def panels_figure(panels: Mapping[str, Curves], columns: int = 2) -> Figure:
    """One panel per y-axis label."""
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(5.2 * min(columns, len(panels)), 3.1 * rows)
    for index, (ylabel, curves) in enumerate(panels.items()):
        draw_curves(axes_of(figure, rows, min(columns, len(panels)), index + 1), curves, ylabel)
    return figure


def phases_figure(rounds: Sequence[float], seconds: Mapping[str, Sequence[float]]) -> Figure:
    """The phases of each round's time, stacked."""
    figure = new_figure(6.4, 3.0)
    axes = axes_of(figure)
    axes.stackplot(rounds, list(seconds.values()), labels=list(seconds), alpha=0.9, step="mid")
    axes.set_ylim(0, 1.25 * max(map(sum, zip(*seconds.values(), strict=True))) or 1)  # room for the legend
    axes.set_xlim(min(rounds) - 0.5, max(rounds) + 0.5)
    axes.set_xlabel("round", fontsize=9)
    axes.set_ylabel("seconds", fontsize=9)
    _count_rounds(axes)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=3)
    return figure


def heat_map_figure(rows: Iterable[Mapping[str, Any]], value: str, label: str) -> Figure:
    """A cell per client and round; white if a client took no part, a cross if its update was refused."""
    rows = list(rows)
    clients = sorted({row["client"] for row in rows}, key=lambda client: (isinstance(client, str), client))
    rounds = sorted({row["round"] for row in rows})
    column = {number: index for index, number in enumerate(rounds)}
    line = {client: index for index, client in enumerate(clients)}
    grid = np.full((len(clients), len(rounds)), np.nan)
    for row in rows:
        found = row.get(value)
        grid[line[row["client"]], column[row["round"]]] = math.nan if found is None else found
    figure = new_figure(6.4, min(1.6 + 0.22 * len(clients), 7))
    axes = axes_of(figure)
    extent = (0.5, len(rounds) + 0.5, len(clients) - 0.5, -0.5)
    finite = grid[np.isfinite(grid)]
    top = np.quantile(finite, 0.99) if finite.size else 1.0  # so that one diverging client does not darken all others
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", extent=extent, vmax=top)
    refused = [row for row in rows if row.get("refused")]
    if refused:
        places = [(column[row["round"]] + 1, line[row["client"]]) for row in refused]
        across, down = zip(*places, strict=True)
        axes.scatter(across, down, marker="x", color="#d62728", s=24, label="refused")
        axes.legend(fontsize=8, loc="upper right")
    figure.colorbar(
        image, ax=axes, label=as_text(label), extend="max" if finite.size and finite.max() > top else "neither"
    )
    if len(clients) <= MAX_LABELLED_CLIENTS:
        axes.set_yticks(range(len(clients)), list(map(as_text, clients)), fontsize=8)
    axes.set_ylabel("client", fontsize=9)
    axes.set_xlabel("round", fontsize=9)
    _count_rounds(axes)
    return figure


def _count_rounds(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def axes_of(figure: Figure, rows: int = 1, columns: int = 1, index: int = 1) -> Axes:
    """The axes of one panel of a figure, without a frame."""
    axes = figure.add_subplot(rows, columns, index)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c3cad2")
    axes.tick_params(colors=GREY, labelsize=8)
    return axes
