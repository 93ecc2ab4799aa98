"""Rules that look at updates with data of the server: a validation check, and FLTrust's root as a data set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl.aggregation import Aggregator, FLTrust, Median, NearestNeighborMixing, Screened, ValidationCheck
from tests.helpers.training import Ordinary, Plain, image_clients, images, trainer, weights
from tests.trainer.robust.test_known_answers import U7, Rows, Sends, aggregate, loaders

ENGINES = ["sequential", "vectorized"]


def root_of(row: tuple[float, float]) -> DataLoader:
    return DataLoader(Rows(torch.tensor(row, dtype=torch.float64)))


# ---- FLTrust


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("row", "expected"), [((1, 1), (0.86553772, 0.92086165)), ((-1, -1), (0, 0))])
def test_the_server_trains_on_its_own_data(
    row: tuple[float, float], expected: tuple[float, float], engine: str
) -> None:
    """The known answers of a root client, without one."""
    found, history = aggregate(FLTrust(root_of(row), 1), U7, engine=engine)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=6e-8)
    assert (history["num_clients"], history["num_examples"]) == (7, 7)
    assert 0 in history["left_out"]  # its update is zero, which points nowhere


class Forward(Ordinary):
    """With a forward pass that gives class scores."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.net[0].weight.dtype))


SIZES = (8, 8, 8, 8, 8, 8, 8)


def fit(rule: Aggregator | None, rounds: int = 2, **strategy: Any) -> Any:
    module = Forward()
    run = trainer(fl.FederatedStrategy("fedavg", aggregator=rule, seed=0, **strategy), rounds)
    run.fit(module, image_clients(SIZES, validate=True))
    return module, run


def fltrust(**strategy: Any) -> tuple[list[float], dict[str, float]]:
    rule = FLTrust(DataLoader(images(12, 50), batch_size=4, shuffle=True), 1)
    module, run = fit(rule, **strategy)
    logged = {name: value.item() for name, value in run.callback_metrics.items() if "seconds" not in name}
    return weights(module).tolist(), {name: value for name, value in logged.items() if name != "fl/num_bytes"}


def test_the_root_leaves_no_trace_in_metrics_and_counts() -> None:
    """It trains with BatchNorm, Adam and a schedule; figures are those of the clients."""
    found, logged = fltrust(engine="sequential")
    _, run = fit(None, engine="sequential", weighting="uniform")
    entry = run.strategy.history[-1]
    assert logged["fl/num_steps"] == entry["num_steps"]
    assert logged["fl/num_examples"] == entry["num_examples"]
    assert run.global_step == 2 * entry["num_steps"]
    assert np.isfinite(found).all()
    # The loss that is logged is that of the clients' first round in both.
    rule = FLTrust(DataLoader(images(12, 50), batch_size=4), 1)
    _, with_root = fit(rule, 1, engine="sequential")
    _, without = fit(None, 1, engine="sequential", weighting="uniform")
    for name in ("loss_epoch", "default", "train_acc"):
        assert with_root.callback_metrics[name].item() == without.callback_metrics[name].item()


@pytest.mark.slow
def test_engines_and_ranks_train_the_same_root(run_ranks: Any) -> None:
    alone, logged = fltrust(engine="sequential")
    together, _ = fltrust(engine="vectorized")
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    ranks = run_ranks(2, both)
    for name, expected in {"fltrust": (alone, logged), "screened": screened()}.items():
        assert ranks[0][name][0] == ranks[1][name][0]
        np.testing.assert_allclose(ranks[0][name][0], expected[0], rtol=1e-4, atol=1e-4)
        assert ranks[0][name][1] == pytest.approx(expected[1], rel=1e-4)


def test_a_run_with_a_root_resumes_exactly(tmp_path: Any) -> None:
    found = []
    for stops in ([2], [1, 2]):
        path = None
        for stop in stops:
            module = Plain()
            strategy = fl.FederatedStrategy("fedavg", aggregator=FLTrust(images(12, 50), 1), seed=0)
            run = trainer(strategy, stop)
            run.fit(module, image_clients(SIZES), ckpt_path=path)
            path = str(tmp_path / f"{stop}.ckpt")
            run.save_checkpoint(path)
        found.append(weights(module))
    assert torch.equal(*found)


# ---- ValidationCheck


class Scores(Sends):
    """Three classes whose scores are the weights: the update decides what is called right."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), -1) * x


ROOT = TensorDataset(torch.ones(60, 1, dtype=torch.float64), torch.tensor([0] * 48 + [1] * 12))
CLAIMS = ((3, 0, 0), (2, 1, 0), (1, 0, 0.5), (2, 0, 0), (3, 1, 1), (0, 5, 0), (0, 0, 9))
"""Five call all 0 (80 % right), one all 1 (20 %), one all 2 (none)."""


def check(metric: Any = "accuracy", inner: Any = None, engine: str = "sequential", **strategy: Any) -> Any:
    module = Scores(3, torch.float64)
    rule = Screened(inner, [ValidationCheck(ROOT, metric)], num_attackers=2)
    run = trainer(fl.FederatedStrategy("fedavg", aggregator=rule, engine=engine, **strategy))
    run.fit(module, loaders(CLAIMS, torch.float64))
    return module.w.tolist(), run.strategy.history[-1]["left_out"]


@pytest.mark.parametrize("engine", ENGINES)
def test_clients_whose_model_is_worse_are_left_out(engine: str) -> None:
    for metric in ("accuracy", "loss"):
        found, left_out = check(metric, engine=engine)
        assert left_out == dict.fromkeys([5, 6], "did not pass ValidationCheck")
        np.testing.assert_allclose(found, np.mean(CLAIMS[:5], axis=0))
    found, left_out = check(inner=Median(1), engine=engine)
    np.testing.assert_allclose(found, np.median(CLAIMS[:5], axis=0))


def test_a_difference_within_the_error_of_the_data_counts_for_nothing() -> None:
    """48 of 60 right with an error of 3 examples: 45 pass, 36 do not, although all others agree."""
    for right, passes in ((45, True), (36, False)):
        labels = torch.tensor([0] * right + [1] * (48 - right) + [2] * 12)
        # The last client calls the examples that are marked 1, the others all 0 or 1, whichever is right.
        root = TensorDataset(torch.stack([(labels == 0), (labels == 1), labels == 3], 1).double(), labels)
        module = Scores(3, torch.float64)
        rule = Screened(None, [ValidationCheck(DataLoader(root, batch_size=7))], num_attackers=1)
        run = trainer(fl.FederatedStrategy("fedavg", aggregator=rule))
        run.fit(module, loaders([(1, 1, 0)] * 6 + [(1, 0, 0)], torch.float64))
        assert (6 not in run.strategy.history[-1]["left_out"]) == passes


def screened(**strategy: Any) -> tuple[list[float], dict[Any, str]]:
    rule = Screened(None, [ValidationCheck(images(60, 50), "loss", z=0.3)])
    module, run = fit(rule, **{"engine": "sequential", **strategy})
    return weights(module).tolist(), dict.fromkeys(run.strategy.history[-1]["left_out"], 1.0)


def both() -> dict[str, Any]:
    return {"fltrust": fltrust(engine="sequential"), "screened": screened()}


def test_with_batch_norm_the_model_is_tried_in_evaluation_mode() -> None:
    found, left_out = screened()
    together, left_out_together = screened(engine="vectorized")
    assert left_out == left_out_together
    assert 0 < len(left_out) < 7
    np.testing.assert_allclose(together, found, rtol=1e-4, atol=1e-4)


def test_what_is_measured_is_the_clients_own_model() -> None:
    """The same numbers as each client's update gives when it is the only one."""
    seen: list[float] = []

    class Spy(ValidationCheck):
        def measure(self, update: Any, ctx: Any) -> float:
            seen.append(super().measure(update, ctx))
            return seen[-1]

    fit(Screened(None, [Spy(images(60, 50))]), 1, engine="sequential")
    for index, value in enumerate(seen):
        module = Forward()
        one = fl.datamodules.ClientLoaders({index: image_clients(SIZES).train_dataloader()[index]})
        strategy = fl.FederatedStrategy("fedavg", seed=0, engine="sequential")
        trainer(strategy).fit(module, one, DataLoader(images(4)))
        module.eval()
        x, y = images(60, 50)[:]
        assert (module(x).argmax(1) == y).double().mean().item() == pytest.approx(value, abs=1e-6)


def among_silos(rule: Aggregator) -> None:
    fit_data = DataLoader(Rows(torch.ones(2, dtype=torch.float64)))
    trainer(fl.FederatedStrategy("fedavg", aggregator=rule)).fit(Sends(2, torch.float64), fit_data)


def test_wrong_arguments_and_silos_are_refused(run_ranks: Any, tmp_path: Any) -> None:
    for make, message in (
        (lambda: ValidationCheck(3), "DataLoader or a data set"),
        (lambda: ValidationCheck(ROOT, "auc"), "expected 'accuracy' or 'loss'"),
        (lambda: ValidationCheck(ROOT, z=0.0), "z=0"),
        (lambda: FLTrust([1, 2]), "DataLoader or a data set"),
        (
            lambda: Screened(None, [ValidationCheck(ROOT)], before=[NearestNeighborMixing()]),
            "evaluates each client's model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    rule = Screened(None, [ValidationCheck(ROOT)])
    with pytest.raises(ValueError, match="a coordinator holds no model"):
        fl.FederatedStrategy("fedavg", aggregator=rule, federation="https://localhost:1", kit=tmp_path)
    with pytest.raises(Exception, match="silos have no server"):
        run_ranks(2, among_silos, rule)


def test_ranks_compare_the_data_by_what_they_are() -> None:
    """Not by an address in memory, which would differ."""
    assert repr(FLTrust(ROOT)) == "FLTrust(root=TensorDataset of 60 examples, num_attackers=0.2)"
    expected = "ValidationCheck(root=TensorDataset of 60 examples, metric='accuracy', z=3.0)"
    assert repr(ValidationCheck(DataLoader(ROOT))) == expected
