"""Each client's own metrics of the global, the personalized and the local model."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.algorithms import Ditto
from lightning_fl.callbacks import PersonalizedEvaluation
from tests.helpers.training import Ordinary, Plain, images, loader, trainer, weights

SIZES, VAL_SIZES = (5, 8, 23), (6, 12, 9)


def clients(shuffle: bool = False) -> fl.datamodules.ClientDatasets:
    train = [images(n, seed) for seed, n in enumerate(SIZES)]
    val = [images(n, 10 + seed) for seed, n in enumerate(VAL_SIZES)]
    return fl.datamodules.ClientDatasets(train, val, batch_size=4, shuffle=shuffle)


class Validated(Plain):
    """Logs its loss by step of the validation, and a figure of all of it at its end."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not self.training
        loss = self.training_step(batch, batch_idx)
        self.log("val_loss", loss)
        self.outputs = [*getattr(self, "outputs", []), loss.item()]

    def on_validation_epoch_start(self) -> None:
        self.outputs = []

    def on_validation_epoch_end(self) -> None:
        self.log("worst", max(self.outputs))


def validated(module: L.LightningModule, client: int, **options: Any) -> dict[str, float]:
    data = DataLoader(images(VAL_SIZES[client], 10 + client), batch_size=4)
    return trainer("auto", **options).validate(module, data, verbose=False)[0]


def plain_fit(module: L.LightningModule, client: int, epochs: int, **options: Any) -> L.LightningModule:
    data = DataLoader(images(SIZES[client], client), batch_size=4)
    trainer("auto", epochs, limit_val_batches=0, **options).fit(module, data, data)
    return module


def test_the_three_models_are_what_they_are_called() -> None:
    make = partial(SGD, lr=0.2, momentum=0.9)
    options: dict[str, Any] = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    evaluation, module = PersonalizedEvaluation(finetune_epochs=2), Validated(make_optimizer=make)
    trainer("fedavg", 3, callbacks=[evaluation], limit_val_batches=0, **options).fit(module, clients())
    for client in range(3):
        found = evaluation.metrics[client]
        tuned = Validated(make_optimizer=make)
        tuned.load_state_dict(module.state_dict())
        expected = {
            "global": validated(module, client),
            "personalized": validated(plain_fit(tuned, client, 2, **options), client),
            "local": validated(plain_fit(Validated(make_optimizer=make), client, 3, **options), client),
        }
        assert found.keys() == expected.keys()
        for kind in expected:
            assert found[kind] == pytest.approx(expected[kind], rel=1e-6), (client, kind)
    assert evaluation.num_examples == dict(enumerate(VAL_SIZES))
    total = sum(n * evaluation.metrics[client]["local"]["worst"] for client, n in enumerate(VAL_SIZES))
    assert evaluation.means()["local/worst"] == pytest.approx(total / sum(VAL_SIZES))


@pytest.mark.parametrize(
    "limits", [{"limit_train_batches": 0.5, "limit_val_batches": 0.7}, {"fast_dev_run": 2}, {"overfit_batches": 1}]
)
@pytest.mark.filterwarnings("ignore:Trainer.tune", "ignore:You requested to overfit")
def test_the_trainers_limits_apply(limits: dict[str, Any]) -> None:
    evaluation, module = PersonalizedEvaluation(finetune_epochs=1), Validated()
    trainer("fedavg", 1, callbacks=[evaluation], **limits).fit(module, clients())
    shares, sizes = limits.get("limit_val_batches"), [2, 3, 3]
    passes = [1, 1, 3] if shares else [2, 2, 6]
    counts = [int(size * shares) if shares else min(size, *limits.values()) for size in sizes]
    for client, count in enumerate(counts):
        own = validated(module, client, limit_val_batches=count)
        assert evaluation.metrics[client]["global"] == pytest.approx(own, rel=1e-6)
        length = passes[client] if shares else min(passes[client], *limits.values())
        local = plain_fit(Validated(), client, 1, limit_train_batches=length)
        own = validated(local, client, limit_val_batches=count)
        assert evaluation.metrics[client]["local"] == pytest.approx(own, rel=1e-6)
        assert evaluation.num_examples[client] == min(4 * count, VAL_SIZES[client])


def test_a_share_that_leaves_nothing_to_validate_is_refused() -> None:
    run = trainer("fedavg", callbacks=[PersonalizedEvaluation()], limit_val_batches=0.4)
    with pytest.raises(MisconfigurationException, match=r"limit_val_batches=0\.4 leaves none of 2 batches"):
        run.fit(Validated(), clients())


def test_personal_tensors_are_put_in_place_and_not_trained_further() -> None:
    evaluation, module = PersonalizedEvaluation(local_epochs=0), Validated()
    callbacks = [evaluation, ModelCheckpoint("ckpt", save_last=True)]
    strategy = FederatedStrategy("fedper", personal=["net.3.*"])
    trainer(strategy, 2, callbacks=callbacks, enable_checkpointing=True).fit(module, clients())
    for client in range(3):
        own = Validated()
        own.load_state_dict(fl.load_client("ckpt/last.ckpt", client))
        assert evaluation.metrics[client]["personalized"] == pytest.approx(validated(own, client), rel=1e-6)
        assert evaluation.metrics[client].keys() == {"global", "personalized"}


def test_with_ditto_it_is_the_clients_own_model() -> None:
    evaluation, strategy = PersonalizedEvaluation(), FederatedStrategy(Ditto(lam=0.1))
    trainer(strategy, 2, callbacks=[evaluation], limit_val_batches=0).fit(Validated(), clients())
    for client in range(3):
        own = Validated()
        own.load_state_dict(strategy.active_driver.store.get(client)["personal"])
        assert evaluation.metrics[client]["personalized"] == pytest.approx(validated(own, client), rel=1e-6)


class Noisy(Ordinary):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, nn.Dropout(0.3))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.scratch += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("client_optimizer", ["reset", "keep"])
@pytest.mark.spread(1)
def test_it_changes_no_training_and_no_other_metric(client_optimizer: Any) -> None:
    def train(*callbacks: Any) -> tuple[Tensor, dict[str, float], Tensor, int]:
        torch.manual_seed(1)
        module = Noisy()
        strategy = FederatedStrategy("scaffold", client_optimizer=client_optimizer)
        run = trainer(strategy, 3, callbacks=list(callbacks))
        with pytest.warns(UserWarning, match="derived for plain SGD"):
            run.fit(module, clients(shuffle=True))
        figures = {name: value.item() for name, value in run.callback_metrics.items() if "/" not in name}
        assert module.training
        return weights(module), figures, torch.get_rng_state(), module.scratch.item()

    plain, evaluated = train(), train(PersonalizedEvaluation(finetune_epochs=1, local_epochs=1, every_n_rounds=1))
    assert torch.equal(evaluated[0], plain[0])
    assert evaluated[1] == plain[1]
    assert torch.equal(evaluated[2], plain[2])
    assert evaluated[3] == plain[3]


def test_means_are_logged_in_the_rounds_that_were_asked_for() -> None:
    class Seen(L.Callback):
        rounds: list[bool] = []  # noqa: RUF012

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.rounds.append("personalized/val_loss" in trainer.callback_metrics)

    evaluation, seen = PersonalizedEvaluation(every_n_rounds=2), Seen()
    run = trainer("fedavg", 4, callbacks=[evaluation, seen])
    run.fit(Validated(), clients())
    assert seen.rounds[:3] == [False, False, True]
    for name, value in evaluation.means().items():
        assert run.callback_metrics[name].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory .* exists")
def test_a_resumed_run_evaluates_the_same_local_models() -> None:
    found = []
    for ckpt_path in (None, "ckpt/epoch=0.ckpt"):
        evaluation, module = PersonalizedEvaluation(), Validated()
        if ckpt_path:
            module.net[1].weight.data.zero_()
        callbacks = [evaluation, ModelCheckpoint("ckpt", filename="{epoch}", save_top_k=-1)]
        run = trainer("fedavg", 2, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0)
        run.fit(module, clients(), ckpt_path=ckpt_path, weights_only=True)
        found.append(evaluation.metrics)
    assert found[0] == found[1]


def test_local_models_need_the_first_one() -> None:
    first = trainer("fedavg", 1)
    first.fit(Validated(), clients())
    first.save_checkpoint("first.ckpt")
    message = r"which this run, continued after round 1, does not have\. Set local_epochs=0"
    with pytest.raises(MisconfigurationException, match=message):
        trainer("fedavg", 2, callbacks=[PersonalizedEvaluation()]).fit(Validated(), clients(), ckpt_path="first.ckpt")
    evaluation = PersonalizedEvaluation(local_epochs=0)
    trainer("fedavg", 2, callbacks=[evaluation]).fit(Validated(), clients(), ckpt_path="first.ckpt")
    assert evaluation.metrics[0].keys() == {"global", "personalized"}


class Unfreezes(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.net[1].requires_grad_(trainer.current_epoch > 0)


def test_checkpoints_hold_of_the_first_model_what_is_trained() -> None:
    def first(module: Validated, *callbacks: L.Callback, rounds: int = 1, **kwargs: Any) -> Any:
        evaluation = PersonalizedEvaluation(**kwargs)
        run = trainer("fedavg", rounds, callbacks=[*callbacks, evaluation])
        run.fit(module, clients())
        assert all(kinds for kinds in evaluation.metrics.values())
        return evaluation.state_dict()["first"]

    frozen = Validated()
    frozen.net[1].requires_grad_(False)
    assert first(frozen).keys() == {"net.3.weight", "net.3.bias"}
    assert not first(Validated(), local_epochs=0)
    later = first(Validated(), Unfreezes(), rounds=2)
    torch.testing.assert_close(later, dict(Validated().state_dict()), rtol=0, atol=0)


def evaluate() -> Any:
    evaluation = PersonalizedEvaluation(every_n_rounds=2, local_epochs=1)
    strategy = FederatedStrategy("fedavg", clients_per_round=2)
    run = trainer(strategy, 2, callbacks=[evaluation])
    run.fit(Validated(), clients(shuffle=True))
    return evaluation.metrics, run.callback_metrics["local/val_loss"].item()


def test_two_ranks_find_what_one_does(run_ranks: Any) -> None:
    metrics, mean = evaluate()
    for found, found_mean in run_ranks(2, evaluate):
        assert list(found) == list(metrics)
        for client, kinds in metrics.items():
            for kind, values in kinds.items():
                assert found[client][kind] == pytest.approx(values, rel=1e-6)
        assert found_mean == pytest.approx(mean, rel=1e-6)


def test_validation_data_may_be_given_for_some_clients() -> None:
    evaluation = PersonalizedEvaluation({1: loader(6, seed=3), 0: lambda: loader(4, seed=4)}, local_epochs=0)
    trainer("fedavg", callbacks=[evaluation]).fit(Validated(), clients())
    assert evaluation.num_examples == {0: 4, 1: 6}


class Manual(Validated):
    automatic_optimization = False


@pytest.mark.filterwarnings("ignore:You (passed in a|defined a) .val")
@pytest.mark.parametrize(
    ("evaluation", "strategy", "module", "data", "message"),
    [
        ({}, "fedavg", Plain, None, "calls `validation_step`, which the module lacks"),
        ({}, "fedavg", Manual, None, r"only with automatic optimization .* Set finetune_epochs=0 and local_epochs=0"),
        ({}, "fedavg", Validated, loader(40), "needs validation data of the federation's clients, found none"),
        ({"val": {"x": loader()}}, "fedavg", Validated, None, "found data of the unknown client 'x'"),
    ],
    ids=["no validation_step", "manual", "no data", "unknown client"],
)
def test_what_it_cannot_do_is_refused(evaluation: Any, strategy: str, module: Any, data: Any, message: str) -> None:
    run = trainer(strategy, callbacks=[PersonalizedEvaluation(**evaluation)], limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(module(), clients() if data is None else data)


def test_a_strategy_without_clients_has_nothing_to_evaluate() -> None:
    evaluation = PersonalizedEvaluation()
    trainer("auto", callbacks=[evaluation]).fit(Validated(), clients())
    assert evaluation.metrics == {}


@pytest.mark.parametrize("options", [{"finetune_epochs": -1}, {"local_epochs": -2}, {"every_n_rounds": 0}], ids=str)
def test_numbers_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"=(-1|-2|0) must be None or a whole number"):
        PersonalizedEvaluation(**options)


def test_validation_with_personal_tensors_warns_unless_they_are_evaluated() -> None:
    strategy = FederatedStrategy("fedavg", personal=["net.3.*"])
    with pytest.warns(UserWarning, match="PersonalizedEvaluation evaluates each client's model"):
        trainer(strategy).fit(Validated(), clients())


def evaluate_silos() -> Any:
    evaluation = PersonalizedEvaluation()
    run = trainer("fedavg", 2, callbacks=[evaluation])
    train, val = (DataLoader(images(n, seed + run.global_rank), batch_size=4) for n, seed in ((8, 0), (6, 10)))
    run.fit(Validated(), train, val)
    return evaluation.metrics


def test_each_silo_is_evaluated_on_its_own_validation_data(run_ranks: Any) -> None:
    first, second = run_ranks(2, evaluate_silos)
    assert first == second
    simulated = PersonalizedEvaluation()
    data = [[images(n, seed + rank) for rank in range(2)] for n, seed in ((8, 0), (6, 10))]
    trainer("fedavg", 2, callbacks=[simulated]).fit(
        Validated(), fl.datamodules.ClientDatasets(*data, batch_size=4, shuffle=False)
    )
    for client in range(2):
        for kind, values in simulated.metrics[client].items():
            assert first[client][kind] == pytest.approx(values, rel=1e-6)
