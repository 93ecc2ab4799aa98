"""What the sums between silos must not tell: restarts with fewer updates, figures of one silo, other frozen tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_fl as fl
from lightning_fl.aggregation import FederationFacts, RoundContext
from lightning_fl.clients.local_work import LocalWork
from lightning_fl.communication import Group, LocalGroup, Message
from lightning_fl.federation.errors import ConfigurationError
from lightning_fl.federation.report_masking import check_steps, mask, unmask
from lightning_fl.federation.round import FederationSettings
from lightning_fl.privacy.secagg import RetryRefused, SecureAggregation, SecureAggregationError
from lightning_fl.privacy.secagg.keys import KeyFolder
from lightning_fl.privacy.secagg.session import Session
from lightning_fl.types import Update
from tests.helpers.training import Plain, loader, trainer, weights
from tests.privacy.secagg.test_aggregator import CPU, Ranks, aggregate, assert_no_sum, updates

EVERYONE = range(4)


@pytest.fixture
def keys(tmp_path: Path) -> str:
    """Folders of four silos that trust each other, with their ranks in the place of ``{rank}``."""
    folders = [KeyFolder(tmp_path / f"silo{number}") for number in EVERYONE]
    public = [folder.create() for folder in folders]
    for folder in folders:
        folder.trust(public)
    return str(tmp_path / "silo{rank}")


def silo(group: Group, keys: str) -> tuple[SecureAggregation, Session]:
    """A silo's aggregator and session as a new process has them."""
    secure = SecureAggregation(keys=keys, max_weight=4.0)
    return secure, secure.open(group, FederationFacts(True, 4, True))


def train(keys: str, who: Collection[int], frozen: Callable[[int], float] = lambda rank: 0.0) -> list[Any]:
    """One round from the same model, in which the silos ``who`` have an update; all take part."""
    given = updates(4)

    def merge(group: Group) -> Any:
        secure, session = silo(group, keys)
        ctx = RoundContext(
            7, EVERYONE, 4, group=group, silos=True, frozen={"head": torch.full((2,), frozen(group.rank))}
        )
        like = Update({name: torch.zeros_like(tensor) for name, tensor in given[0].delta.items()})
        acc = secure.init(like, CPU, session)
        if group.rank in who:
            acc = secure.add(acc, Update(given[group.rank].delta), replace(ctx, client=group.rank))
        report = Message({"refused": [], "sums": {"num_steps": float(10 + group.rank)}})
        acc, messages = secure.merge(acc, group, report, ctx)
        return secure.result(acc, ctx), messages

    return Ranks(4).run(merge)


def test_a_restart_in_which_one_silo_has_no_update_is_refused(keys: str) -> None:
    """The same four silos are there, but the loader of the last one fails: the two sums would differ by its update."""
    assert not any(isinstance(result, Exception) for result in train(keys, EVERYONE))
    assert not any(isinstance(result, Exception) for result in train(keys, EVERYONE)), "the same sum tells nothing new"
    results = train(keys, [0, 1, 2])
    assert any(isinstance(result, RetryRefused) for result in results)
    assert all(isinstance(result, Exception) for result in results)


def test_a_restart_in_which_a_silo_has_an_update_at_last_is_refused(keys: str) -> None:
    assert not any(isinstance(result, Exception) for result in train(keys, [0, 1, 2]))
    assert all(isinstance(result, Exception) for result in train(keys, EVERYONE))


def test_a_silo_without_update_adds_nothing_to_the_figures(keys: str) -> None:
    for found, messages in train(keys, [0, 1, 3]):
        assert found.num_clients == 3
        assert messages[0].fields["sums"] == {"num_steps": 10 + 11 + 13}


def test_two_updates_among_four_silos_are_not_summed(keys: str) -> None:
    assert_no_sum(train(keys, [0, 2]), "has 2 update(s) left")


def test_other_frozen_tensors_are_another_model(keys: str) -> None:
    """A dead layer before the trained one would blind a silo, and isolate what the others send."""
    results = train(keys, EVERYONE, frozen=lambda rank: float(rank == 3))
    assert all(isinstance(result, Exception) for result in results)
    told = [str(result) for result in results if isinstance(result, SecureAggregationError)]
    assert told
    assert all("starts from another global model" in text for text in told)


def evaluate(keys: str, own: Callable[[int], dict[str, float]]) -> list[Any]:
    def gather(group: Group) -> Any:
        entries = {
            name: {"name": name, "reduction": "mean", "value": value, "weight": 10.0, "is_tensor": True}
            for name, value in own(group.rank).items()
        }
        report = Message({"metrics": entries, "metric_states": {}})
        secure, session = silo(group, keys)
        merged = secure.gather(session, group, mask(report), "evaluation")
        return {name: entry["value"] for name, entry in unmask(merged)[0].fields["metrics"].items()}

    return Ranks(4).run(gather)


@pytest.mark.parametrize("num_silos", [1, 2, 3])
def test_a_figure_that_few_silos_log_is_left_out(keys: str, num_silos: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = evaluate(keys, lambda rank: {"loss": 1.0 * rank, **({"rare": 42.5} if rank < num_silos else {})})
    left_out = [
        str(warning.message) for warning in caught if "Too few silos have logged 'rare'" in str(warning.message)
    ]
    for found in results:
        assert found == ({"loss": 6.0} if num_silos < 3 else {"loss": 6.0, "rare": 3 * 42.5})
    assert bool(left_out) is (num_silos < 3)


def test_an_evaluation_again_with_the_figures_of_fewer_silos_is_refused(keys: str) -> None:
    scalars = {"loss": 0.5}
    assert evaluate(keys, lambda rank: scalars) == [{"loss": 2.0}] * 4
    results = evaluate(keys, lambda rank: scalars if rank < 3 else {})
    assert any(isinstance(result, RetryRefused) for result in results)
    assert all(isinstance(result, Exception) for result in results)


@pytest.mark.parametrize(
    ("algorithm", "local_steps"),
    [(fl.algorithms.FedRep(), 3), (fl.algorithms.Ditto(own_epochs=2), 3), (fl.algorithms.FedAvg(), None)],
)
def test_schedules_by_step_need_equally_many_in_every_phase(algorithm: Any, local_steps: int | None) -> None:
    """The head of FedRep, and one's own model in Ditto, train by epochs of their own."""
    settings = FederationSettings(algorithm, SecureAggregation(), [], "uniform", 0, 3, silos=True)
    with pytest.raises(ConfigurationError, match="the number of steps of the largest silo"):
        check_steps("It", settings, LocalWork(steps=local_steps))
    check_steps("It", replace(settings, silos=False), LocalWork(steps=local_steps))
    check_steps("It", replace(settings, algorithm=fl.algorithms.FedAvg()), LocalWork(steps=3))


@pytest.mark.parametrize("least", [0, 2])
def test_cohorts_that_may_be_too_small_are_refused_before_training(least: int) -> None:
    with pytest.raises(ValueError, match=f"may have {least} .* by chance"):
        SecureAggregation().open(LocalGroup(), FederationFacts(False, 10, True, min_cohort_size=least))
    SecureAggregation().open(LocalGroup(), FederationFacts(False, 10, True, min_cohort_size=3))


def test_poisson_cohorts_are_refused_before_training() -> None:
    strategy = fl.FederatedStrategy(aggregator=SecureAggregation(), num_clients=6, cohort=fl.clients.Poisson(0.9))
    module = Plain()
    before = weights(module)
    with pytest.raises(ValueError, match="by chance"):
        trainer(strategy).fit(module, loader(24))
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("protocol", ["pairwise", "bonawitz"])
def test_tensors_without_elements(protocol: Any) -> None:
    given = [Update({"none": torch.zeros(0, 3), "one": torch.ones(1)}) for _ in range(3)]
    found = aggregate(SecureAggregation(protocol), given)
    assert found.delta["none"].shape == (0, 3)
    assert found.delta["one"].item() == pytest.approx(3.0)
