from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from lightning_fl.tracking import plots
from lightning_fl.tracking.partition import PartitionSummary

NAMES = [r"price $\frac{1}{0$", "x" * 400, "plain"]


def test_names_of_clients_and_metrics_are_no_formulas_and_not_too_long() -> None:
    rows = [{"client": name, "round": 0, "loss": 0.5} for name in NAMES]
    assert plots.as_png(plots.heat_map_figure(rows, "loss", NAMES[0]))
    assert plots.as_svg(plots.partition_figure(PartitionSummary(3, NAMES, [1, 2, 3], [NAMES[0]], [[1], [2], [3]])))
    assert plots.as_svg(plots.curves_figure({name: ([0, 1], [1.0, 2.0]) for name in NAMES}, NAMES[0]))
