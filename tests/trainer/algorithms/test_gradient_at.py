"""Algorithms that look at the gradient of a batch at other points: their known answers, and what a look must not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.algorithms import APFL, Algorithm, FedAvg, FedSAM, PerFedAvg, PFedMe
from lightning_fl.types import Context, Tree
from tests.contract.engine_runs import scaling
from tests.helpers.training import Ordinary, Plain, Quadratic, image_clients, quadratic_clients, trainer, weights

LOOKERS = [PerFedAvg(alpha=0.1), PerFedAvg(alpha=0.1, first_order=True), PFedMe(inner_steps=3), FedSAM(rho=0.1)]
every_looker = pytest.mark.parametrize("algorithm", LOOKERS, ids=repr)


@pytest.mark.parametrize(
    ("algorithm", "limit", "rounds"),
    [
        (PerFedAvg(alpha=0.1), 1.2618206808, [6.9518986877, 4.9670533777]),
        (PerFedAvg(alpha=0.1, first_order=True), 1.2317243899, [6.5694416297, 4.4810776948]),
        (PFedMe(inner_steps=12, inner_lr=0.06), 1.2197241800, [6.4013723308, 4.2776551732]),
        (FedSAM(), 1.1730566896, [6.143767724, 3.9689157857]),
    ],
    ids=repr,
)
def test_they_go_where_the_quadratics_say(algorithm: Algorithm, limit: float, rounds: list[float]) -> None:
    strategy = FederatedStrategy(algorithm, local_steps=5)
    assert move(strategy, limit, 1) == pytest.approx(limit, rel=1e-9)  # and they stay where they settle
    assert move(FederatedStrategy(algorithm, local_steps=5), 10.0, 2) == pytest.approx(rounds[1], rel=1e-9)


def move(strategy: FederatedStrategy, start: float, rounds: int) -> float:
    module = Quadratic(start)
    trainer(strategy, rounds).fit(module, quadratic_clients())
    return module.x.item()


def test_the_own_models_of_apfl_settle_where_the_quadratics_say() -> None:
    # Each of n own steps brings v nearer to its limit by a known factor, so that two rounds tell where it goes.
    strategy, found, start = FederatedStrategy(APFL(alpha=0.5, own_epochs=10), local_steps=5), [], 1.2057623029717208
    move(strategy, start, 2)
    for client, h in enumerate((1.0, 2.0, 0.5)):
        state = strategy.active_driver.store.get(client)
        mixture, trained = state["personal"]["x"].item(), state["algorithm"]["trained"]["x"].item()
        own, rest = (mixture - 0.5 * trained) / 0.5, (1 - 0.1 * 0.5**2 * h) ** 20
        found.append((own - rest * start) / (1 - rest))
    assert found == pytest.approx([-0.7119905823, 0.9325758086, 6.1621278648], rel=1e-8)


@every_looker
@pytest.mark.spread(1)
def test_clients_side_by_side_hooked_and_alone_are_the_same(algorithm: Algorithm) -> None:
    found = []
    for engine, callbacks in (("sequential", []), ("sequential", [Watching()]), ("vectorized", [])):
        module = Plain()
        fit = trainer(FederatedStrategy(algorithm, engine=engine), 2, callbacks=callbacks)
        fit.fit(module, image_clients((8, 8, 12)))
        found.append(weights(module))
    assert any(len(group) > 1 for group in fit.strategy.active_driver.trained_groups)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2], found[0], rtol=1e-10, atol=1e-12)
    module = Plain()
    trainer(FederatedStrategy(FedAvg(), weighting="uniform"), 2).fit(module, image_clients((8, 8, 12)))
    assert not torch.allclose(weights(module), found[0])


class Watching(fl.callbacks.FederatedCallback):
    """Looks at batches, so that each passes Lightning's hooks."""

    def on_train_batch_end(self, *args: Any) -> None:
        pass


class Looking(Algorithm):
    """FedAvg that looks at a gradient far away, and goes on with its own."""

    needs_gradient_at = True

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        far = {name: param + 1 for name, param in params.items()}
        found = ctx["gradient_at"](far)
        assert found.keys() == grads.keys()
        assert not any(torch.equal(found[name], grads[name]) for name in grads)
        same = ctx["gradient_at"](params)
        for name in grads:
            torch.testing.assert_close(same[name], grads[name])
        return grads


class LookingTogether(Algorithm):
    """The same without assertions, for clients side by side; also at a point that all clients share."""

    needs_gradient_at = True

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        ctx["gradient_at"].hessian_product({name: param + 1 for name, param in params.items()}, grads)
        ctx["gradient_at"](ctx["params"])
        return grads


@pytest.mark.parametrize("hooked", [False, True])
def test_a_look_leaves_no_trace(hooked: bool) -> None:
    """BatchNorm, torchmetrics, logged values, Adam, a schedule by step."""
    found = []
    for algorithm in (FedAvg(), Looking()):
        module = Ordinary(torch.float64)
        strategy = FederatedStrategy(algorithm, engine="sequential")
        fit = trainer(strategy, 2, callbacks=[Watching()] if hooked else [])
        fit.fit(module, image_clients((5, 7, 23), validate=True))
        found.append(
            (weights(module), {name: v.item() for name, v in fit.callback_metrics.items() if "sec" not in name})
        )
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


class Logging(Plain):
    """With BatchNorm statistics, and a logged loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.BatchNorm1d(4, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_a_look_leaves_no_trace_in_what_is_logged_by_epoch(engine: str) -> None:
    found = []
    for algorithm in (FedAvg(), LookingTogether()):
        module = Logging()
        fit = trainer(FederatedStrategy(algorithm, engine=engine), 2)
        fit.fit(module, image_clients((8, 8, 12)))
        sizes = map(len, fit.strategy.active_driver.trained_groups)
        assert max(sizes) == (2 if engine == "vectorized" else 1)
        found.append((weights(module), fit.callback_metrics["loss"].item()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_the_hessian_is_that_of_the_loss() -> None:
    """Against finite differences of the gradient."""
    seen = []

    class Measuring(Algorithm):
        needs_gradient_at = True

        def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
            at, step = ctx["gradient_at"], 1e-5
            ahead, behind = (at({n: p + s * grads[n] for n, p in params.items()}) for s in (step, -step))
            exact = at.hessian_product(params, grads)
            for name in grads:
                torch.testing.assert_close(exact[name], (ahead[name] - behind[name]) / (2 * step), rtol=1e-6, atol=1e-9)
            seen.append(max(value.abs().max().item() for value in exact.values()))
            return grads

    trainer(FederatedStrategy(Measuring(), engine="sequential")).fit(Plain(), image_clients((8,)))
    assert max(seen) > 1e-3


@pytest.mark.parametrize(
    ("kwargs", "match"), [({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"), (scaling(), "16-mixed")]
)
def test_where_a_batch_has_no_second_gradient_it_is_refused(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        trainer(FederatedStrategy(FedSAM()), **kwargs).fit(Plain(torch.float32), image_clients((8, 8)))


def test_manual_optimization_and_privacy_of_examples_are_refused() -> None:
    module = Plain()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        trainer(FederatedStrategy(FedSAM())).fit(module, image_clients((8, 8)))
    dp = fl.callbacks.SampleLevelDP(noise_multiplier=1.0, max_grad_norm=1.0)
    with pytest.raises(MisconfigurationException, match="without noise"):
        trainer(FederatedStrategy(FedSAM()), callbacks=[dp]).fit(Plain(), image_clients((8, 8)))
