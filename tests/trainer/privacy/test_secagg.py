"""Secure aggregation through the Trainer: simulated clients of one process."""

from __future__ import annotations

import base64
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

import lightning_fl as fl
from lightning_fl.privacy.secagg import SecureAggregation, SecureAggregationError, primitives
from tests.helpers.training import Ordinary, Plain, image_clients, loader, minimise, quadratic_clients, trainer, weights

SIZES = (4, 7, 23, 8)


def train(algorithm: str, aggregator: Any, rounds: int = 2, **options: Any) -> tuple[Tensor, dict[str, float], Any]:
    module = Ordinary()
    fit = trainer(fl.FederatedStrategy(algorithm, aggregator=aggregator, **options), rounds)
    fit.fit(module, image_clients(SIZES, validate=True))
    metrics = {name: value.item() for name, value in fit.callback_metrics.items()}
    return weights(module), metrics, fit.strategy


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fedexp"])
@pytest.mark.filterwarnings("ignore:SCAFFOLD's control variate is derived")
def test_the_model_is_that_of_the_plain_run(algorithm: str) -> None:
    """With BatchNorm's buffers, SCAFFOLD's and FedExP's side channels, in float32."""
    plain, metrics, _ = train(algorithm, None)
    for protocol in ("pairwise", "bonawitz"):
        secure, secure_metrics, strategy = train(algorithm, SecureAggregation(protocol))  # type: ignore[arg-type]
        assert (secure - plain).abs().max() < 2e-5
        assert secure_metrics == pytest.approx(metrics, rel=1e-3)
        assert [entry["num_clients"] for entry in strategy.history] == [4, 4]
        assert [entry["num_examples"] for entry in strategy.history] == [sum(SIZES)] * 2


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_one_round_is_within_the_bound(weighting: Any) -> None:
    """The mean is within n * clip * max_weight / (2^b - 1) / sum of weights; uniform: clip / (2^b - 1)."""
    models = []
    for aggregator in (None, SecureAggregation(clip=4.0)):
        module = Plain()
        strategy = fl.FederatedStrategy("fedavg", aggregator=aggregator, weighting=weighting)
        trainer(strategy).fit(module, image_clients(SIZES))
        models.append(weights(module))
    max_weight, total = (32, sum(SIZES)) if weighting == "examples" else (1, 4)
    bound = 4 * (4.0 / (2**29 - 1)) * max_weight / total
    assert aggregator is not None
    assert aggregator.ranges.quantizer("delta", 4).bits == 29
    assert 0 < (models[1] - models[0]).abs().max() <= bound


def test_the_registered_name() -> None:
    fit = trainer("secagg")
    fit.fit(Plain(), loader(24))
    assert isinstance(fit.strategy.aggregator, SecureAggregation)
    assert isinstance(fit.strategy.algorithm, fl.algorithms.FedAvg)
    assert fit.strategy.history[0]["num_clients"] == 10


def test_fewer_than_three_clients_stop_before_training() -> None:
    with pytest.raises(ValueError, match="no sum over fewer than 3"):
        trainer(fl.FederatedStrategy(aggregator=SecureAggregation(), num_clients=2)).fit(Plain(), loader(24))
    strategy = fl.FederatedStrategy(aggregator=SecureAggregation(), clients_per_round=2)
    with pytest.raises(ValueError, match="no sum over fewer than 3"):
        trainer(strategy).fit(Plain(), image_clients(SIZES))


@pytest.mark.parametrize("protocol", ["pairwise", "bonawitz"])
def test_a_client_with_nan_refuses_itself(protocol: Any) -> None:
    clients = quadratic_clients((0.0, 1.0, 4.0, float("nan"), 2.0), (1.0,) * 5, (1,) * 5)
    strategy = fl.FederatedStrategy(aggregator=SecureAggregation(protocol))
    with pytest.warns(UserWarning, match="updates of 3 hold NaN or Inf"):
        found = minimise(strategy, 1, clients)
    mean_of_others = sum((0.0, 1.0, 4.0, 2.0)) / 4
    assert found == pytest.approx(10 - 0.1 * (10 - mean_of_others), abs=1e-6)
    assert strategy.history[0]["refused"] == [3]
    assert strategy.history[0]["num_clients"] == 4


def test_dropouts_in_each_round_leave_the_survivors_sum() -> None:
    strategy = fl.FederatedStrategy(
        "scaffold", aggregator=SecureAggregation("bonawitz", dropout=0.2), num_clients=10, seed=0
    )

    class Expect(fl.callbacks.FederatedCallback):
        """Adds up the updates of those that did not vanish before they had sent them."""

        def on_round_start(self, *args: Any) -> None:
            self.updates: list[Any] = []

        def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
            if update is not None:
                self.updates.append(update)

        def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any) -> None:
            for name, total in aggregate.delta.items():
                expected = sum(update.weight * update.delta[name] for update in self.updates)
                torch.testing.assert_close(total, expected, rtol=0, atol=1e-5)
                control = sum(update.aux["control"][name] for update in self.updates)
                torch.testing.assert_close(aggregate.aux["control"][name], control, rtol=0, atol=1e-3)

    module = Plain()
    trainer(strategy, 4, callbacks=[Expect()]).fit(module, loader(40))
    lost = [entry["lost"] for entry in strategy.history]
    assert [entry["num_clients"] for entry in strategy.history] == [10 - len(clients) for clients in lost]
    assert all(len(clients) <= 2 for clients in lost)
    assert 0 < sum(map(len, lost)) < 8, "some vanish before their vectors have arrived, others after"
    assert len(set(map(tuple, lost))) > 1


def test_pairwise_dropouts_vanish_before_the_sum() -> None:
    strategy = fl.FederatedStrategy(aggregator=SecureAggregation(dropout=0.2), num_clients=10, seed=0)
    trainer(strategy, 3).fit(Plain(), loader(40))
    assert [len(entry["lost"]) for entry in strategy.history] == [2, 2, 2]
    assert [entry["num_clients"] for entry in strategy.history] == [8, 8, 8]


def test_too_many_refusals_end_the_round_without_a_sum() -> None:
    clients = quadratic_clients((0.0, 1.0, float("nan"), float("nan")), (1.0,) * 4, (1,) * 4)
    for protocol in ("pairwise", "bonawitz"):
        strategy = fl.FederatedStrategy(aggregator=SecureAggregation(protocol))  # type: ignore[arg-type]
        with pytest.raises(SecureAggregationError, match=r"2 (update\(s\) left|of 4 clients have sent)"):
            minimise(strategy, 1, clients)


def test_an_interrupted_round_can_be_trained_again() -> None:
    class Interrupt(fl.callbacks.FederatedCallback):
        is_armed = True

        def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
            if self.is_armed and client == 2:
                self.is_armed = False
                raise RuntimeError("stop here")

    for protocol in ("pairwise", "bonawitz"):
        strategy = fl.FederatedStrategy(aggregator=SecureAggregation(protocol))  # type: ignore[arg-type]
        fit, module = trainer(strategy, callbacks=[Interrupt()]), Plain()
        with pytest.raises(RuntimeError, match="stop here"):
            fit.fit(module, image_clients(SIZES))
        fit.fit(module, image_clients(SIZES))
        assert strategy.history[0]["num_clients"] == 4


def train_on_ranks() -> tuple[Tensor, dict[str, float], list[Any]]:
    model, metrics, strategy = train("scaffold", SecureAggregation(), rounds=1)
    return model, metrics, strategy.history


@pytest.mark.filterwarnings("ignore:SCAFFOLD's control variate is derived")
def test_simulated_clients_on_several_ranks(run_ranks: Any) -> None:
    plain, metrics, strategy = train("scaffold", None, rounds=1)
    for model, found, history in run_ranks(3, train_on_ranks_quietly):
        assert (model - plain).abs().max() < 1e-5
        assert found == pytest.approx(metrics, rel=1e-4)
        assert history[0]["num_examples"] == strategy.history[0]["num_examples"]


def train_on_ranks_quietly() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SCAFFOLD's control variate is derived")
        return train_on_ranks()


def test_keys_of_a_simulation_would_be_ignored() -> None:
    strategy = fl.FederatedStrategy(aggregator=SecureAggregation(keys="keys"), num_clients=4)
    with pytest.warns(UserWarning, match="keys='keys' is not used: simulated clients"):
        trainer(strategy).fit(Plain(), loader(24))


# ---- secrets


class Collected:
    """Every secret that a run makes: private keys, and what is derived from them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.secrets: list[bytes] = []
        for kind in (primitives.SigningKey, primitives.AgreementKey):
            monkeypatch.setattr(kind, "__init__", self._watch_key(kind.__init__))
        derive = primitives.derive
        for module in ("participant", "primitives"):
            target = f"lightning_fl.privacy.secagg.{module}.derive"
            monkeypatch.setattr(target, lambda *args: self._keep(derive(*args)))

    def _watch_key(self, init: Any) -> Any:
        def watched(key: Any, *args: Any) -> None:
            init(key, *args)
            self._keep(key.private_bytes())

        return watched

    def _keep(self, secret: bytes) -> bytes:
        self.secrets.append(secret)
        return secret

    def found_in(self, content: bytes) -> bool:
        forms = [form for secret in self.secrets for form in (secret, secret.hex().encode(), base64.b64encode(secret))]
        return any(form in content for form in forms)


@pytest.mark.parametrize("protocol", ["pairwise", "bonawitz"])
def test_no_secret_is_in_what_a_run_leaves_behind(
    protocol: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    collected = Collected(monkeypatch)
    caplog.set_level(logging.DEBUG)
    aggregator = SecureAggregation(protocol)
    strategy = fl.FederatedStrategy("fedavg", num_clients=4, aggregator=aggregator, client_optimizer="keep")
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tensorboard")]
    fit = L.Trainer(
        strategy=strategy,
        max_epochs=2,
        accelerator="cpu",
        logger=loggers,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(tmp_path / "checkpoints", save_last=True)],
    )
    fit.fit(Plain(), loader(24))
    for logger in loggers:
        logger.log_hyperparams({"aggregator": aggregator, "settings": repr(vars(aggregator))})
        logger.save()
    (tmp_path / "aggregator.pickle").write_bytes(pickle.dumps(aggregator))
    assert len(collected.secrets) > 20
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".ckpt", ".csv", ".yaml", ".pickle"}
    assert not [path for path in files if collected.found_in(path.read_bytes())]
    output = capfd.readouterr()
    assert not collected.found_in((caplog.text + output.out + output.err).encode())
    (tmp_path / "leak").write_text(collected.secrets[7].hex())
    assert collected.found_in((tmp_path / "leak").read_bytes()), "the search finds a secret that is there"
