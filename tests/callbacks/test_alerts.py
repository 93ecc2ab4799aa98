"""When an alert comes, to whom, and that nobody waits for it."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_fl as fl
from lightning_fl.callbacks import Alert, Alerts
from lightning_fl.callbacks.alerts import Rule
from tests.helpers.training import Plain, Quadratic, image_clients, quadratic_clients, trainer


class Scripted(Plain):
    """Logs a given value in each round."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", self.values[self.trainer.current_epoch], batch_size=len(batch[0]))


def told(rules: list[str], values: list[float]) -> list[tuple[str, int]]:
    found: list[Alert] = []
    trainer("fedavg", len(values), callbacks=[Alerts(rules, found.append)], num_sanity_val_steps=0).fit(
        Scripted(values), image_clients(validate=True)
    )
    return [(alert.rule, alert.round) for alert in found]


def test_an_alert_comes_when_its_rule_begins_to_hold() -> None:
    low, nan, long = "score < 1", "score is nan", "score <= 2 for 3 rounds"
    found = told([low, nan, long], [0.0, 0.5, 2.0, 3.0, float("nan"), 0.0])
    assert found == [(low, 1), (long, 3), (nan, 5), (low, 6)]


def test_rules_about_rounds_know_clients_that_were_left_out() -> None:
    found: list[Alert] = []
    bad = quadratic_clients(e=(0.0, float("nan"), 4.0))
    with pytest.warns(UserWarning, match="NaN|refused"):
        trainer("fedavg", callbacks=[Alerts(["fl/num_left_out >= 1"], found.append)]).fit(Quadratic(), bad)
    assert [(alert.value, alert.round) for alert in found] == [(1.0, 1)]
    assert found[0].text == "Round 1: fl/num_left_out is 1 (fl/num_left_out >= 1)."


def test_where_privacy_hides_clients_no_rule_can_count_them() -> None:
    dp = fl.privacy.ClientLevelDP(clip=0.1, noise_multiplier=1.0)
    alerts = Alerts(["fl/num_left_out >= 0", "fl/num_examples > 0"], to=print)
    fit = trainer(fl.FederatedStrategy("fedavg", transforms=[dp]), callbacks=[alerts])
    with pytest.warns(UserWarning, match=r"num_left_out.*num_examples.* are about figures that were never logged"):
        fit.fit(Plain(), image_clients())


class Fails(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise RuntimeError("patient 7")


def test_a_run_that_fails_says_so_without_the_errors_words() -> None:
    found: list[Alert] = []
    with pytest.raises(RuntimeError):
        trainer("fedavg", callbacks=[Fails(), Alerts(["failed"], found.append)]).fit(Plain(), image_clients())
    assert [alert.text for alert in found] == ["Round 1: the run has failed (RuntimeError)."]


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_after_a_resume_nothing_comes_twice() -> None:
    found: list[Alert] = []
    values = [0.0, 0.0, 0.0]

    def fit(rounds: int, ckpt_path: str | None = None) -> None:
        callbacks = [Alerts(["score < 1"], found.append), ModelCheckpoint(f"first{rounds}", filename="last")]
        fit = trainer("fedavg", rounds, callbacks=callbacks, enable_checkpointing=True, num_sanity_val_steps=0)
        fit.fit(Scripted(values), image_clients(validate=True), ckpt_path=ckpt_path)

    fit(1)
    fit(3, "first1/last.ckpt")
    assert [alert.round for alert in found] == [1]


@pytest.mark.parametrize("text", ["val_acc", "val_acc <", "a < b", "a < 1 for 0 rounds", "a < 1 for ever", ""])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rule; expected, for example,"):
        Rule.parse(text)


def test_other_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one rule"):
        Alerts([], print)
    with pytest.raises(ValueError, match="not a webhook"):
        Alerts(["failed"], "ftp://example.org")


def test_a_function_that_raises_does_not_end_the_run() -> None:
    def broken(alert: Alert) -> None:
        raise OSError("no mail today")

    with pytest.warns(UserWarning, match="An alert could not be sent: OSError: no mail today"):
        trainer("fedavg", callbacks=[Alerts(["fl/update_norm > 0"], broken)]).fit(Plain(), image_clients())


@pytest.fixture
def webhook() -> Any:
    """A webhook that keeps the calls, each after a while."""
    calls: list[dict[str, Any]] = []
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            released.wait(30)
            calls.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", calls, released
    released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_webhook_gets_the_alert_and_one_that_hangs_slows_no_round(
    webhook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, calls, released = webhook
    monkeypatch.setattr("lightning_fl.callbacks.alerts.PATIENCE", 0.2)
    alerts = Alerts(["score < 1"], address)
    start = time.monotonic()
    trainer("fedavg", 3, callbacks=[alerts], num_sanity_val_steps=0).fit(
        Scripted([0.0, 1.0, 0.0]), image_clients(validate=True)
    )
    assert time.monotonic() - start < 20  # the webhook would take 30
    assert calls == []
    released.set()
    alerts.to._waiting.join()
    assert [(call["rule"], call["round"], call["value"]) for call in calls] == [("score < 1", n, 0.0) for n in (1, 3)]


def test_a_webhook_that_is_not_there_is_told_without_its_address(caplog: pytest.LogCaptureFixture) -> None:
    alerts = Alerts(["fl/update_norm > 0"], "http://127.0.0.1:9/secret")
    trainer("fedavg", callbacks=[alerts]).fit(Plain(), image_clients())
    assert "The webhook could not be reached" in caplog.text
    assert "secret" not in caplog.text
