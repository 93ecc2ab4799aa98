"""Exports a run's figures to Prometheus."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_fl.callbacks.round_end import RoundEndCallback
from lightning_fl.federation.history import figures, left_out
from lightning_fl.strategies import FederatedStrategy


class Prometheus(RoundEndCallback):
    """Answers ``GET /metrics`` on rank 0 with the figures of the last round, while the Trainer runs.

    | metric | meaning |
    |---|---|
    | ``lightning_fl_rounds_total`` | finished rounds |
    | ``lightning_fl_last_round_timestamp_seconds`` | when the last round finished, to detect a run that hangs |
    | ``lightning_fl_metric{name}`` | metrics that the module logs, such as ``val_acc`` |
    | ``lightning_fl_figure{name}`` | figures of the round, such as ``num_clients``, ``update_norm``, ``dp_epsilon`` |
    | ``lightning_fl_phase_seconds{phase}`` | the round's time by phase |
    | ``lightning_fl_sent_bytes_total`` | bytes that this rank has sent |
    | ``lightning_fl_clients_left_out_total{reason}`` | clients whose update was not used |

    None of them is about a single client. Under client-level differential privacy and secure aggregation, exact figures
    about the clients are left out, as they are for loggers. There is no authentication: by default only this host can
    connect; see ``host``. ``deploy/grafana.json`` is a dashboard of these metrics.

    Args:
        port: The port; 0 takes a free one, which is then :attr:`port`. Default 9464.
        host: The address to listen on; ``0.0.0.0`` for all. Default ``127.0.0.1``.

    Raises:
        ImportError: If prometheus-client is not installed.
        MisconfigurationException: When training starts, if the port is taken.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(strategy="fedavg", callbacks=[Prometheus(port=9464)], accelerator="cpu")
    """

    def __init__(self, port: int = 9464, host: str = "127.0.0.1") -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge
        except ImportError as error:
            raise ImportError('Prometheus needs a package: pip install "lightning-fl[tracking]"') from error
        self.port = port
        self.host = host
        self._server: Any = None
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"lightning_fl_{name}", what, labels, registry=self.registry)

        def gauge(name: str, what: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"lightning_fl_{name}", what, labels, registry=self.registry)

        self._rounds = counter("rounds", "Finished rounds.")
        self._when = gauge("last_round_timestamp_seconds", "When the last round finished.")
        self._metric = gauge("metric", "Metrics that the module logs.", ("name",))
        self._figure = gauge("figure", "Figures of the round.", ("name",))
        self._phase = gauge("phase_seconds", "Seconds of the last round, by phase.", ("phase",))
        self._sent = counter("sent_bytes", "Bytes that this rank has sent.")
        self._left_out = counter("clients_left_out", "Clients whose update was not used.", ("reason",))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the server."""
        super().on_train_start(trainer, pl_module)
        if not trainer.is_global_zero or self._server is not None:
            return
        from prometheus_client import start_http_server

        try:
            self._server, _ = start_http_server(self.port, self.host, registry=self.registry)
        except OSError as error:
            raise MisconfigurationException(
                f"Prometheus can't listen on {self.host}:{self.port}: {error}. Give the callback another port; 0 takes "
                "a free one."
            ) from error
        self.port = self._server.server_port

    def on_round_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Sets the figures of the round, after the global model's validation."""
        if not trainer.is_global_zero:
            return
        self._rounds.inc()
        self._when.set(time.time())
        for name, value in trainer.callback_metrics.items():
            if not name.startswith("fl/"):
                self._metric.labels(name).set(float(value))
        strategy = trainer.strategy
        if not isinstance(strategy, FederatedStrategy):
            return
        entry, hides_clients = strategy.history[-1], strategy.view.settings.hides_clients
        for name, figure in figures(entry, hides_clients).items():
            short = name.removeprefix("fl/")
            if short.startswith("seconds_"):
                self._phase.labels(short.removeprefix("seconds_")).set(figure)
            elif short == "num_bytes":
                self._sent.inc(figure)
            elif short != "round":
                self._figure.labels(short).set(figure)
        if not hides_clients:
            for reason, count in left_out(entry).items():
                self._left_out.labels(reason).inc(count)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stops the server."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
