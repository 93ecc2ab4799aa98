"""Plots of answers from federated analytics: survival curves, counts, estimates with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_fl.tracking.plots import as_text, axes_of, label_colours, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORMAL_95 = 1.959963984540054
"""Half the width of a 95% confidence interval, in standard errors."""


def survival_figure(curves: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str) -> Figure:
    """Survival curves as steps, with pointwise 95% confidence intervals.

    Args:
        curves: By group, the lists ``time``, ``share`` and ``se``.
        xlabel: Label of the time axis.
    """
    figure = new_figure(6.4, 3.4)
    axes = axes_of(figure)
    for (group, curve), colour in zip(curves.items(), label_colours(len(curves)), strict=True):
        time = np.array([0.0, *curve["time"]])
        share, error = np.array([1.0, *curve["share"]]), NORMAL_95 * np.array([0.0, *curve["se"]])
        axes.step(time, share, where="post", color=colour, linewidth=1.8, label=as_text(group))
        low, high = (share - error).clip(0, 1), (share + error).clip(0, 1)
        axes.fill_between(time, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(as_text(xlabel), fontsize=9)
    axes.set_ylabel("share without an event", fontsize=9)
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False)
    return figure


def bars_figure(values: Mapping[str, float | None], xlabel: str, ylabel: str = "") -> Figure:
    """A bar for each name; names without a value are shown without a bar."""
    figure = new_figure(6.4, min(1.2 + 0.28 * len(values), 8.0))
    axes = axes_of(figure)
    rows = np.arange(len(values))
    axes.barh(rows, [0.0 if value is None else value for value in values.values()], color="#4c78a8", height=0.7)
    names = [as_text(name) + (" (withheld)" if value is None else "") for name, value in values.items()]
    axes.set_yticks(rows, names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="#c3cad2", linewidth=0.8)
    axes.set_xlabel(as_text(xlabel), fontsize=9)
    axes.set_ylabel(as_text(ylabel), fontsize=9)
    return figure


def intervals_figure(
    estimates: Mapping[str, tuple[float, float]], xlabel: str, reference: float | None = None, log: bool = False
) -> Figure:
    """A point for each estimate, with its 95% confidence interval.

    Args:
        estimates: By name, the estimate and its standard error; with ``log``, those of the logarithm.
        xlabel: Label of the axis of estimates.
        reference: Position of a reference line, such as a ratio of 1. None: no line.
        log: Whether estimates are ratios on a logarithmic axis.
    """
    figure = new_figure(6.4, min(1.4 + 0.32 * len(estimates), 8.0))
    axes = axes_of(figure)
    rows = np.arange(len(estimates))
    middle, error = (np.array(values, dtype=float) for values in zip(*estimates.values(), strict=True))
    low, high = middle - NORMAL_95 * error, middle + NORMAL_95 * error
    if log:
        low, middle, high = np.exp(low), np.exp(middle), np.exp(high)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    axes.errorbar(middle, rows, xerr=[middle - low, high - middle], fmt="o", color="#4c78a8", capsize=3)
    if reference is not None:
        axes.axvline(reference, color="#c3cad2", linewidth=0.8)
    axes.set_yticks(rows, list(map(as_text, estimates)), fontsize=8)
    axes.set_ylim(len(estimates) - 0.5, -0.5)
    axes.set_xlabel(as_text(xlabel), fontsize=9)
    return figure


def is_number(value: Any) -> bool:
    """Whether a value can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool)
