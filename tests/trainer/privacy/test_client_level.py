"""Client-level privacy through the real Trainer: noise once, ledger in the checkpoint, self-checks in every round."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.aggregation import Transform
from lightning_fl.privacy import (
    AdaptiveClip,
    BandMF,
    ClientLevelDP,
    FixedSize,
    Full,
    Gaussian,
    Ledger,
    Poisson,
    PrivacyBudgetExceeded,
    PrivacyError,
    SecureNoise,
    load_ledger,
)
from tests.helpers.training import Plain, image_clients, loader, trainer, weights

SIZES = (4,) * 8


def private(**options: Any) -> ClientLevelDP:
    return ClientLevelDP(**{"clip": 0.5, "noise_multiplier": 1.0, "method": "rdp", **options})


def fit(
    transform: Transform, rounds: int = 1, lr: float = 0.1, algorithm: Any = "fedavg", **options: Any
) -> tuple[FederatedStrategy, Tensor]:
    """Trains a small network; gives the strategy, and how far the model has moved."""
    of_fit = {key: options.pop(key) for key in ("ckpt_path", "weights_only") if key in options}
    of_trainer = {
        key: options.pop(key) for key in ("callbacks", "logger", "enable_checkpointing", "min_epochs") if key in options
    }
    clients = options.pop("clients", None)
    strategy = FederatedStrategy(algorithm, transforms=[transform], **options)
    module = Plain(lr=lr)
    start = weights(module)
    run = trainer(strategy, rounds, **of_trainer)
    run.fit(module, image_clients(SIZES) if clients is None else clients, **of_fit)
    return strategy, weights(module) - start


def ledger_of(strategy: FederatedStrategy) -> Ledger:
    return load_ledger(strategy.active_driver.state.transforms[0])


def recorded(*events: tuple[Gaussian, int]) -> Ledger:
    wanted = Ledger()
    for event, count in events:
        wanted.record(event, count)
    return wanted


def still(mode: str, num_rounds: int) -> tuple[Tensor, list[Any]]:
    """Clients that learn nothing: the model moves by the noise alone."""
    strategy, moved = fit(private(mode=mode, noise_multiplier=4.0), num_rounds, lr=0.0)
    return moved, ledger_of(strategy).state_dict()["events"]


@pytest.mark.parametrize("mode", ["central", "local"])
@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_noise_is_added_once_on_any_number_of_ranks(run_ranks: Any, world_size: int, mode: str) -> None:
    ranks = run_ranks(world_size, still, mode, 4)
    moved, events = ranks[0]
    assert all(torch.equal(other, moved) and own == events for other, own in ranks)
    expected = 4.0 * 0.5 / len(SIZES) * 4**0.5 * (1.0 if mode == "central" else len(SIZES) ** 0.5)
    assert float(moved.std()) == pytest.approx(expected, rel=5 / (2 * len(moved)) ** 0.5)
    hidden_from: Any = "model" if mode == "central" else "server"
    assert events == recorded((Gaussian(4.0, adversary=hidden_from), 4)).state_dict()["events"]


def test_the_clipped_mean_is_what_is_released_besides_noise() -> None:
    _, alone = fit(private(noise_multiplier=0.0, clip=1e6), weighting=None)
    _, plain = fit(fl.aggregation.Transform(), weighting="uniform")
    torch.testing.assert_close(alone, plain, rtol=1e-12, atol=1e-15)
    _, clipped = fit(private(noise_multiplier=0.0, clip=1e-3))
    assert float(clipped.norm()) <= 1e-3
    _, noisy = fit(private(noise_multiplier=1e-4, clip=1e-3))
    torch.testing.assert_close(noisy, clipped, rtol=0, atol=1e-6)
    assert not (noisy == clipped).any()


def test_poisson_cohorts_are_recorded_and_an_empty_one_still_releases_noise() -> None:
    seen: list[tuple[int, Tensor]] = []

    class Watch(fl.callbacks.FederatedCallback):
        def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any) -> None:
            self.cohort, self.before = cohort, weights(module)

        def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any) -> None:
            seen.append((len(self.cohort), weights(module) - self.before))

    strategy, _ = fit(private(), 12, cohort=fl.clients.Poisson(0.05), callbacks=[Watch()])
    sizes = [size for size, _ in seen]
    assert 0 in sizes
    for _, moved in seen:
        assert float(moved.std()) > 0.5 * 0.5 / (0.05 * 8)
    assert len(strategy.history) == 12
    assert ledger_of(strategy) == recorded((Gaussian(1.0, Poisson(0.05)), 12))
    assert strategy.history[-1]["dp_epsilon"] == ledger_of(strategy).epsilon(1e-5, "rdp")


class First(fl.clients.Uniform):
    """Always the same clients: what it inherits as its description does not hold."""

    def draw(self, sampling: Any, round: int, rng: Any, prepared: Any) -> Any:
        return torch.arange(int(sampling.size)).numpy()


class Described(fl.clients.Uniform):
    """One of the user's own that draws what it declares."""

    def sampling(self, num_clients: int, clients_per_round: Any) -> Any:
        return super().sampling(num_clients, clients_per_round)

    def draw(self, sampling: Any, round: int, rng: Any, prepared: Any) -> Any:
        return rng.permutation(sampling.num_clients)[: int(sampling.size)]


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({"clients_per_round": 3, "cohort": First()}, Full()),
        ({"clients_per_round": 3, "cohort": Described()}, FixedSize(3, 8)),
        ({}, Full()),
        ({"clients_per_round": 3}, FixedSize(3, 8)),
        ({"clients_per_round": 3, "cohort": fl.clients.RoundRobin()}, Full()),
    ],
)
@pytest.mark.spread(2)
def test_other_cohorts_are_recorded_as_what_they_are(options: dict[str, Any], sampling: Any) -> None:
    strategy, _ = fit(private(), 2, **options)
    assert ledger_of(strategy) == recorded((Gaussian(1.0, sampling), 2))


@pytest.mark.slow
def test_cohorts_do_not_depend_on_the_seed() -> None:
    drawn = []
    for _ in range(2):
        cohorts: list[Any] = []

        class Watch(fl.callbacks.FederatedCallback):
            def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any, own: Any = cohorts) -> None:
                own.append(tuple(cohort))

        fit(private(), 8, clients_per_round=4, seed=0, callbacks=[Watch()])
        drawn.append(cohorts)
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("algorithm", ["scaffold", "fedadam", "fedavgm", "fedprox"])
def test_every_kind_of_algorithm(algorithm: str) -> None:
    transform = private(clip=AdaptiveClip(initial=0.1), noise_multiplier=0.3)
    strategy, moved = fit(transform, 3, algorithm=algorithm, cohort=fl.clients.Poisson(0.5))
    assert strategy.weighting == "uniform"
    assert bool(torch.isfinite(moved).all())
    clips = [entry["dp_clip"] for entry in strategy.history]
    assert clips[0] == 0.1
    assert clips[1] != clips[0]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_knows_what_has_been_spent() -> None:
    # A round that happened to have no clients would save no checkpoint.
    options: dict[str, Any] = {"cohort": fl.clients.Poisson(0.95)}
    transform = private(clip=AdaptiveClip(initial=0.1))
    callback = ModelCheckpoint("ckpt", filename="{epoch}", save_top_k=-1)
    whole, moved = fit(transform, 4, callbacks=[callback], enable_checkpointing=True, **options)
    resumed, other = fit(transform, 4, ckpt_path="ckpt/epoch=1.ckpt", weights_only=True, **options)
    assert ledger_of(resumed) == ledger_of(whole) == recorded((Gaussian(1.0, Poisson(0.95)), 4))
    assert resumed.history[-1]["dp_epsilon"] == whole.history[-1]["dp_epsilon"]
    assert resumed.history[2]["dp_clip"] == whole.history[2]["dp_clip"] != 0.1
    assert not torch.equal(moved, other)  # the noise after a resume is new
    packed = torch.load("ckpt/epoch=3.ckpt", weights_only=True)["lightning_fl"]
    assert load_ledger(packed["transforms"][0]) == ledger_of(whole)
    changed, _ = fit(private(noise_multiplier=2.0), 3, ckpt_path="ckpt/epoch=1.ckpt", weights_only=True, **options)
    sampling = Poisson(0.95)
    assert ledger_of(changed) == recorded((Gaussian(1.0, sampling), 2), (Gaussian(2.0, sampling), 1))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:insecure_test_seed")
def test_noise_over_turns_goes_on_after_a_resume() -> None:
    options: dict[str, Any] = {"cohort": fl.clients.RoundRobin(), "clients_per_round": 2}
    transform = private(mechanism=BandMF(4), insecure_test_seed=1)
    callback = ModelCheckpoint("ckpt", filename="{epoch}", save_top_k=-1)
    whole, moved = fit(transform, 6, callbacks=[callback], enable_checkpointing=True, **options)
    resumed, other = fit(transform, 6, ckpt_path="ckpt/epoch=2.ckpt", weights_only=True, **options)
    assert torch.equal(moved, other)
    assert ledger_of(resumed) == ledger_of(whole) == recorded((Gaussian(1.0), 2))
    assert whole.history[3]["dp_epsilon"] < whole.history[4]["dp_epsilon"] == whole.history[5]["dp_epsilon"]
    # The noise that later rounds take back is in the file, which nobody else may read.
    state = torch.load("ckpt/epoch=2.ckpt", weights_only=True)["lightning_fl"]["transforms"][0]
    assert [len(tensor) for tensor in state["noise"].values()] == [3]
    assert Path("ckpt/epoch=2.ckpt").stat().st_mode & 0o777 == 0o600


def turns(num_rounds: int) -> tuple[Tensor, Any]:
    strategy, moved = fit(
        private(mechanism=BandMF(4), noise_multiplier=4.0),
        num_rounds,
        lr=0.0,
        cohort=fl.clients.RoundRobin(),
        clients_per_round=2,
    )
    return moved, strategy.active_driver.state.transforms[0]


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_noise_over_turns_cancels_on_any_number_of_ranks(run_ranks: Any, world_size: int) -> None:
    ranks = run_ranks(world_size, turns, 4)
    moved, state = ranks[0]
    for other, own in ranks:
        assert torch.equal(other, moved)
        torch.testing.assert_close(dict(own), dict(state), rtol=0, atol=0)
    # The sum of the four rounds' noises is the last row of A C^-1.
    of_first, found = [1.0], BandMF(4).coefficients
    for number in range(1, 4):
        of_first.append(-sum(found[j] * of_first[number - j] for j in range(1, number + 1)))
    sums = torch.tensor(of_first).cumsum(0).norm()
    expected = 4.0 * 0.5 / 2 * BandMF(4).norm * float(sums)
    assert expected < 0.8 * 4.0 * 0.5 / 2 * 4**0.5  # that of independent noise
    assert float(moved.std()) == pytest.approx(expected, rel=5 / (2 * len(moved)) ** 0.5)


@pytest.mark.parametrize("options", [{}, {"clients_per_round": 3, "cohort": fl.clients.RoundRobin()}])
def test_clients_that_return_too_soon_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"no client may take part twice in 4 rounds"):
        fit(private(mechanism=BandMF(4)), 1, **options)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_private_rounds_after_others_are_not_private() -> None:
    callback = ModelCheckpoint("ckpt", filename="{epoch}", save_top_k=-1)
    fit(fl.aggregation.Transform(), 2, callbacks=[callback], enable_checkpointing=True)
    strategy, _ = fit(private(), 3, ckpt_path="ckpt/epoch=1.ckpt", weights_only=True)
    assert strategy.history[-1]["dp_epsilon"] == float("inf")
    assert strategy.history[-1]["dp_guarantee"] == "NOT PRIVATE"


def test_a_round_that_failed_stays_recorded_when_it_is_run_again() -> None:
    class Fails(fl.callbacks.FederatedCallback):
        fails = True

        def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
            if trainer.current_epoch == 1 and self.fails:
                self.fails = False
                raise RuntimeError("power cut")

    strategy = FederatedStrategy("fedavg", transforms=[private()])
    run, module, clients = trainer(strategy, 3, callbacks=[Fails()]), Plain(), image_clients(SIZES)
    with pytest.raises(RuntimeError, match="power cut"):
        run.fit(module, clients)
    assert ledger_of(strategy) == recorded((Gaussian(1.0), 2))
    run.fit(module, clients)
    assert len(strategy.history) == 3
    assert ledger_of(strategy) == recorded((Gaussian(1.0), 4))


def test_the_budget_stops_training_before_it_is_exceeded(recwarn: Any) -> None:
    budget = float(recorded((Gaussian(5.0), 3)).epsilon(1e-5, "rdp"))
    strategy, _ = fit(private(noise_multiplier=5.0, max_epsilon=budget), 10)
    assert len(strategy.history) == 3
    assert strategy.history[-1]["dp_epsilon"] == pytest.approx(budget)
    with pytest.raises(PrivacyBudgetExceeded, match="Round 3"):
        fit(private(noise_multiplier=5.0, max_epsilon=budget), 10, min_epochs=5)


def test_the_loggers_get_numbers_each_round_and_words_once() -> None:
    logger = CSVLogger(".", name="", version="")
    fit(private(), 2, logger=logger, cohort=fl.clients.Poisson(0.5))
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("fl/round")]
    epsilons = [float(row["fl/dp_epsilon"]) for row in rows]
    assert 0 < epsilons[0] < epsilons[1]
    for key, value in {"dp_delta": 1e-5, "dp_noise_multiplier": 1.0, "dp_clip": 0.5, "dp_is_private": 1.0}.items():
        assert [float(row[f"fl/{key}"]) for row in rows] == [value, value]
    exact = {"fl/num_clients", "fl/num_examples", "fl/num_steps", "fl/update_spread", "fl/num_bytes"}
    assert not exact & rows[0].keys()
    assert not [name for name in rows[0] if name.startswith("fl/seconds")]
    words = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert words["fl/dp_guarantee"] == "epsilon-delta, add_or_remove_one"
    assert (words["fl/dp_mode"], words["fl/dp_unit"]) == ("central", "client")
    assert "not the server" in words["fl/dp_adversary"]


def test_a_test_seed_repeats_and_is_marked_in_the_loggers() -> None:
    moved = []
    for version in ("first", "second"):
        logger = CSVLogger(".", name="", version=version)
        with pytest.warns(fl.privacy.InsecureNoiseWarning, match="NOT PRIVATE"):
            transform = private(insecure_test_seed=1)
        moved.append(fit(transform, 2, logger=logger)[1])
        assert "NOT PRIVATE" in Path(logger.log_dir, "hparams.yaml").read_text()
    assert torch.equal(*moved)


def test_a_client_with_nan_is_named_and_counts_as_zero() -> None:
    class Spoils(fl.callbacks.FederatedCallback):
        def on_client_start(self, trainer: Any, module: Any, client: Any) -> None:
            if client == 3:
                module.net[1].weight.data.fill_(float("nan"))

    with pytest.warns(UserWarning, match="updates of 3 hold NaN"):
        strategy, moved = fit(private(), 1, callbacks=[Spoils()])
    assert bool(torch.isfinite(moved).all())
    assert strategy.history[0]["refused"] == [3]


@pytest.mark.parametrize(
    ("target", "name", "broken", "message"),
    [
        (SecureNoise, "normal", lambda self, size, std=1.0: torch.randn(size) * 0, "standard deviation|repeats"),
        (SecureNoise, "normal", lambda self, size, std=1.0: torch.randn(size) * std / 2, "standard deviation"),
        (fl.privacy.client_level.mechanism, "clip_update", lambda update, clip: update, "after clipping"),
        (fl.clients.Poisson, "draw", lambda self, sampling, *_: torch.arange(sampling.num_clients).numpy(), "Poisson"),
    ],
)
def test_breaking_a_part_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, broken: Any, message: str
) -> None:
    monkeypatch.setattr(target, name, broken)
    before = weights(Plain())
    module = Plain()
    cohort = fl.clients.Poisson(0.01) if name == "draw" else None
    strategy = FederatedStrategy("fedavg", transforms=[private(clip=1e-3)], cohort=cohort)
    with pytest.raises(PrivacyError, match=message):
        trainer(strategy, 3).fit(module, image_clients(SIZES))
    assert torch.equal(weights(module), before)


def silos(mode: str) -> tuple[str, Tensor]:
    module, strategy = Plain(), FederatedStrategy("fedavg", transforms=[private(mode=mode)])
    error = ""
    try:
        run = trainer(strategy, 2)
        run.fit(module, loader(8, seed=strategy.global_rank))
    except ValueError as refused:
        error = str(refused)
    return error, weights(module)


def test_silos_take_local_noise_only(run_ranks: Any) -> None:
    for error, _ in run_ranks(2, silos, "central"):
        assert "needs a server that adds the noise" in error
    (error, first), (_, second) = run_ranks(2, silos, "local")
    assert error == ""
    assert torch.equal(first, second)
    assert not torch.equal(first, weights(Plain()))


@pytest.mark.parametrize("callback", [fl.callbacks.ClientMetrics, fl.callbacks.PersonalizedEvaluation])
def test_what_shows_single_clients_is_refused(callback: Any) -> None:
    with pytest.raises(MisconfigurationException, match="exact figures of single clients, which ClientLevelDP"):
        fit(private(), callbacks=[callback()])


class Monitored(Plain):
    """Logs its training loss, which a schedule waits for."""

    def __init__(self, monitor: str | None) -> None:
        super().__init__()
        self.monitor = monitor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("own_loss", loss, on_epoch=True, on_step=self.monitor == "own_loss_epoch")
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": self.monitor}}


@pytest.mark.parametrize("monitor", ["own_loss", "own_loss_epoch"])
@pytest.mark.parametrize("protected", ["nobody", "clients", "examples"])
@pytest.mark.spread(2)
def test_who_decides_by_exact_figures_is_warned_of(monitor: str, protected: str, tmp_path: Path) -> None:
    transforms = [private()] if protected == "clients" else []
    callbacks = [EarlyStopping(monitor), ModelCheckpoint(tmp_path, monitor=monitor)]
    callbacks += [fl.callbacks.SampleLevelDP(noise_multiplier=1.0)] if protected == "examples" else []
    run = trainer(FederatedStrategy("fedavg", transforms=transforms), 2, callbacks=callbacks, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Monitored(monitor), image_clients(SIZES))
    found = [str(warning.message) for warning in caught if "exact figure" in str(warning.message)]
    judges = [] if protected == "nobody" else ["ReduceLROnPlateau", "EarlyStopping", "ModelCheckpoint"]
    assert [text.partition(" ")[0] for text in found] == judges


def test_a_second_fit_of_a_module_warns_that_its_ledger_is_new(recwarn: Any) -> None:
    module, clients = Plain(), image_clients(SIZES)
    run = trainer(FederatedStrategy("fedavg", transforms=[private()]), 1)
    run.fit(module, clients)
    run.fit_loop.max_epochs = 2
    run.fit(module, clients)
    assert ledger_of(run.strategy) == recorded((Gaussian(1.0), 2))
    assert not [warning for warning in recwarn if "epsilon starts at 0" in str(warning.message)]
    with pytest.warns(UserWarning, match="epsilon starts at 0"):
        trainer(FederatedStrategy("fedavg", transforms=[private()]), 1).fit(module, clients)


def test_yaml_gives_it_by_its_short_class_name() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--transform", type=Transform)
    clip = {"class_path": "AdaptiveClip", "init_args": {"initial": 0.2}}
    for given, expected in ((0.5, 0.5), (clip, AdaptiveClip(0.2)), ({"initial": 0.2}, AdaptiveClip(0.2))):
        init_args = {"clip": given, "noise_multiplier": 1.1}
        config = parser.parse_object({"transform": {"class_path": "ClientLevelDP", "init_args": init_args}})
        assert parser.instantiate_classes(config).transform == ClientLevelDP(clip=expected, noise_multiplier=1.1)
