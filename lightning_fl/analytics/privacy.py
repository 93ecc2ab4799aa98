"""Row-level differential privacy: noise on every sum, recorded in a ledger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_fl.aggregation import Aggregator
from lightning_fl.analytics.question import Question, by_question
from lightning_fl.analytics.spent import Spent
from lightning_fl.communication import Group
from lightning_fl.privacy.accounting.ledger import Gaussian, Ledger
from lightning_fl.privacy.client_level.mechanism import PrivacyBudgetExceeded
from lightning_fl.privacy.noise import SecureNoise, add_noise, check_added, check_source, warn_of_test_seed
from lightning_fl.types import Tree


@dataclass(frozen=True)
class RowLevelDP:
    r"""Gaussian noise on every sum, which hides any single row: :math:`\sum_i x_i + \mathcal{N}(0, z^2 C^2)`.

    :math:`C` is the sensitivity: the largest norm of one row's contribution to the sums of a question, which follows
    from the ranges that the question declares. Each step of each question is one release in the ledger. In a
    simulation, with all clients in one process or spread over ranks, the noise is added once to the sum. Silos under
    ``SecureAggregation`` each add a share: the shares of the smallest allowed number of silos in a sum, minus one that
    an adversary may know, already have the full noise.

    A person with several rows is protected as a group of as many rows: ``ledger.epsilon(delta, group=rows)``.

    Args:
        noise_multiplier: The noise :math:`z`, relative to :math:`C`. 0: NOT PRIVATE.
        delta: The delta of the reported epsilon. Default 1e-5; choose it well below 1 / rows.
        max_epsilon: Releases that would exceed this epsilon are refused. None: no limit.
        insecure_test_seed: Makes the noise reproducible, for tests. The answers are then NOT PRIVATE.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If the ``privacy`` extra is not installed.

    Reference:
        Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", 2014.
    """

    noise_multiplier: float
    delta: float = 1e-5
    max_epsilon: float | None = None
    insecure_test_seed: int | None = None

    def __post_init__(self) -> None:
        Gaussian(self.noise_multiplier)
        SecureNoise()
        if not 0 < self.delta < 1 or (self.max_epsilon is not None and not self.max_epsilon > 0):
            raise ValueError(
                f"RowLevelDP got delta={self.delta} and max_epsilon={self.max_epsilon}; expected delta in (0, 1) and a "
                "positive epsilon."
            )
        if self.insecure_test_seed is not None:
            warn_of_test_seed()

    def check_silos(self, aggregator: Aggregator) -> None:
        """Refuses an aggregator under which silos would see each other's sums before these have enough noise.

        Raises:
            ValueError: If the aggregator reveals single sums.
        """
        if aggregator.integer_bits is None:
            raise ValueError(
                "A federation of silos has no server that could add secret noise. Use "
                "aggregator=fl.privacy.SecureAggregation(), with which each silo adds a share of it (--secure)."
            )

    def event(self, silos: bool) -> Gaussian:
        """The ledger's entry for one release.

        Args:
            silos: Whether silos add the noise, which then also hides rows from the other silos.
        """
        noise = 0.0 if self.insecure_test_seed is not None else self.noise_multiplier
        return Gaussian(noise, adversary="server" if silos else "model")

    def check_budget(self, spent: Spent, count: int, own: Sequence[tuple[float, float]]) -> None:
        """Checks that the releases of a step stay within the budget.

        Args:
            spent: The earlier releases.
            count: Number of releases in the step.
            own: Epsilon and delta of questions that are private by themselves.

        Raises:
            PrivacyBudgetExceeded: If they would exceed ``max_epsilon``.
        """
        if self.max_epsilon is None:
            return
        planned = Spent(spent.releases + Ledger(), [*spent.own, *own])
        if count:
            planned.releases.record(Gaussian(self.noise_multiplier), count)
        epsilon, _ = planned.epsilon(self.delta)
        if epsilon > self.max_epsilon:
            raise PrivacyBudgetExceeded(
                f"The next step would raise epsilon to {epsilon:.4g}, above max_epsilon={self.max_epsilon:g}. Ask "
                "fewer questions, or add more noise."
            )

    def add(self, total: Tree, questions: Sequence[Question], states: Sequence[Any], step: int, group: Group) -> Tree:
        """The sums with noise, the same on all ranks."""
        noisy = self._noised(total, questions, states, ("sum", step), 1.0)
        return {name: group.broadcast(value) for name, value in noisy.items()}

    def share(
        self, own: Tree, questions: Sequence[Question], states: Sequence[Any], step: int, rank: int, num_shares: int
    ) -> Tree:
        """A silo's sums with its share of the noise."""
        return self._noised(own, questions, states, ("share", step, rank), math.sqrt(1 / (num_shares - 1)))

    def _noised(
        self,
        sums: Tree,
        questions: Sequence[Question],
        states: Sequence[Any],
        purpose: tuple[int | str, ...],
        factor: float,
    ) -> Tree:
        if self.insecure_test_seed is None:
            check_source()
        noisy = dict(sums)
        for place, own in by_question(noisy).items():
            if questions[place].is_private_by_itself:
                continue
            std = self.noise_multiplier * questions[place].sensitivity(states[place]) * factor
            flat = {torch.float64: torch.cat([value.reshape(-1) for value in own.values()])}
            found = add_noise(flat, std, SecureNoise(self.insecure_test_seed, "analytics", place, *purpose))
            check_added(flat, found, std)
            parts = found[torch.float64].split([value.numel() for value in own.values()])
            for (name, value), part in zip(own.items(), parts, strict=True):
                noisy[f"{place}/{name}"] = part.view_as(value)
        return noisy
