"""What Prometheus gets to see, over HTTP, and the dashboard's queries."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from prometheus_client.parser import text_string_to_metric_families

import lightning_fl as fl
from lightning_fl.callbacks import Prometheus
from lightning_fl.callbacks.round_end import RoundEndCallback
from tests.helpers.training import Ordinary, Plain, image_clients, measured, trainer

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"


class Scrapes(RoundEndCallback):
    """Reads what the callback before it answers after each round."""

    def __init__(self, prometheus: Prometheus) -> None:
        self.prometheus = prometheus
        self.seen: list[dict[Any, float]] = []

    def on_round_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.prometheus.port}/metrics", timeout=30) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        self.seen.append({(one.name, *one.labels.values()): one.value for family in families for one in family.samples})


def scrape(
    strategy: Any, rounds: int = 2, module: type[L.LightningModule] = Ordinary
) -> tuple[L.Trainer, list[dict[Any, float]]]:
    prometheus = Prometheus(port=0)
    scrapes = Scrapes(prometheus)
    fit = trainer(strategy, rounds, callbacks=[prometheus, scrapes])
    fit.fit(module(), image_clients(validate=module is Ordinary))
    with pytest.raises(OSError, match="refused"):  # it ends with the Trainer
        urllib.request.urlopen(f"http://127.0.0.1:{prometheus.port}/metrics", timeout=30)
    return fit, scrapes.seen


def test_each_round_is_what_history_and_loggers_say() -> None:
    strategy = fl.FederatedStrategy("fedavg")
    fit, seen = scrape(strategy)
    assert [one["lightning_fl_rounds_total",] for one in seen] == [1, 2]
    last, entry = seen[-1], strategy.history[-1]
    assert last["lightning_fl_metric", "val_acc"] == measured(fit)["val_acc"]
    assert last["lightning_fl_figure", "num_examples"] == entry["num_examples"] == 31
    assert last["lightning_fl_figure", "update_norm"] == entry["update_norm"]
    assert last["lightning_fl_phase_seconds", "train"] == entry["seconds"]["train"]
    assert last["lightning_fl_clients_left_out_total", "refused"] == 0
    names = {name for name, *_ in last}
    wanted = set(re.findall(r"lightning_fl_\w+", json.dumps([panel["targets"] for panel in panels()])))
    served = {"lightning_fl_requests_total", "lightning_fl_request_seconds_bucket"}  # of `lightning-fl serve`
    of_gateway = {name for name in wanted if re.search("updates_accepted|refused|training|arrived|wanted", name)}
    assert wanted <= names | served | of_gateway  # those of the gateway are compared in tests/devices
    assert {name for name in names if not name.endswith("_created")} <= wanted


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating"} <= dashboard.keys()
    every, taken = dashboard["panels"], set()
    assert len({panel["id"] for panel in every}) == len(every)
    for panel in every:
        x, y, w, h = (panel["gridPos"][name] for name in "xywh")
        cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert x + w <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in panels():
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(panel)))
        assert used <= variables | {"__rate_interval"}, panel["title"]
        for target in panel["targets"]:
            assert all(target["expr"].count(left) == target["expr"].count(right) for left, right in ("()", "[]", "{}"))


def test_exact_figures_of_clients_are_left_out_where_privacy_hides_them() -> None:
    dp = fl.privacy.ClientLevelDP(clip=0.1, noise_multiplier=1.0)
    _, (seen,) = scrape(fl.FederatedStrategy("fedavg", transforms=[dp]), 1, Plain)
    assert ("lightning_fl_figure", "dp_epsilon") in seen
    told = {name for names in seen for name in names}
    assert not told & {"num_clients", "num_examples", "num_steps", "update_spread", "train", "refused", "0", "1"}


def test_a_port_that_is_taken_is_told_before_training() -> None:
    first, second = Prometheus(port=0), None
    fit = trainer("fedavg")
    first.on_train_start(fit, Ordinary())
    try:
        second = Prometheus(first.port)
        with pytest.raises(MisconfigurationException, match="Give the callback another port"):
            second.on_train_start(fit, Ordinary())
    finally:
        first.teardown(fit, Ordinary(), "fit")
