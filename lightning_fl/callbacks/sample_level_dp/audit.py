"""An attack on the user's own module and data: the influence of one example, and the epsilon that it proves."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, Subset

from lightning_fl.callbacks.federated import FederatedCallback
from lightning_fl.callbacks.sample_level_dp.callback import SampleLevelDP
from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.targets import stored_labels
from lightning_fl.privacy.accounting.ledger import Gaussian, Ledger
from lightning_fl.privacy.noise import PrivacyError
from lightning_fl.privacy.sample_level.poisson_loader import PoissonBatches
from lightning_fl.privacy.sample_level.self_check import unlike_examples
from lightning_fl.privacy.sample_level.tensor_watch import TensorWatch
from lightning_fl.strategies import FederatedStrategy
from lightning_fl.strategies.round_view import RoundView
from lightning_fl.types import ClientId, LocalRun, Update

CONFIDENCE = 0.999
SIZES, NUM_WITHOUT = (8, 31), 64


@dataclass(frozen=True)
class Audit:
    """The result of an audit of one noisy step on a batch of all examples.

    Args:
        claimed: The epsilon that the ledger claims.
        proven: The lower bound on epsilon that the attack proves, with 99.9% confidence.
        moved: The largest influence of one example on the update, relative to the noise of one step with noise
            multiplier 1. A sound module stays at or below 1.
        refusal: Why the self-checks stop the module; None if they do not.
        num_trials: Number of trials of the attack.
        delta: The delta of both epsilons.
    """

    claimed: float
    proven: float
    moved: float
    refusal: str | None
    num_trials: int
    delta: float

    @property
    def is_sound(self) -> bool:
        """Whether the proven epsilon does not exceed the claimed one."""
        return self.proven <= self.claimed


def audit(
    module: L.LightningModule,
    data: Any,
    noise_multiplier: float = 1.0,
    max_grad_norm: float = 1.0,
    delta: float = 1e-5,
    num_trials: int = 400,
    strict: bool = False,
    precision: Any = "32-true",
    seed: int = 0,
) -> Audit:
    """Attacks a module on its own data, through ``Trainer.fit`` with the checks of :class:`SampleLevelDP` switched off.

    Each trial is a client that takes one step on all of its examples. A coin decides whether one of them, the canary,
    is included. From the first half of the trials the attacker learns how the canary's presence affects the update; for
    the others it has to guess. Its error rates give a lower bound on epsilon.

    Args:
        module: The module; it is copied.
        data: A datamodule, a ``DataLoader`` or ``ClientLoaders``, of which one client's loader is used.
        noise_multiplier: The noise of a step. Default 1.
        max_grad_norm: The clip norm. Default 1.
        delta: The delta at which epsilon is claimed and proven. Default 1e-5.
        num_trials: Number of trials; more give a tighter bound. Default 400.
        strict: As for :class:`SampleLevelDP`. Default False.
        precision: The Trainer's precision. Default ``"32-true"``.
        seed: Seed of the coins, and of the choice of examples. Default 0.

    Raises:
        MisconfigurationException: If :class:`SampleLevelDP` can't train the module at all.

    Reference:
        Nasr et al., "Tight Auditing of Differentially Private Machine Learning", USENIX Security 2023.
    """
    attack = _Attack(module, data, max_grad_norm, strict, precision)
    rng = np.random.default_rng(seed)
    refusal = attack.refusal()
    candidates = attack.candidates(rng)
    # Find the candidate with the largest influence, without noise.
    quiet = attack.updates([(*candidate, there) for candidate in candidates for there in (False, True)], 0.0)
    # Times the number of examples, by which a step's sum is divided.
    shown = [
        float((there - away).norm()) * len(base)
        for (base, _), away, there in zip(candidates, quiet[::2], quiet[1::2], strict=True)
    ]
    most = shown.index(max(shown))
    (base, canary), direction = candidates[most], quiet[2 * most + 1] - quiet[2 * most]
    # The noise of updates without the canary.
    away = torch.stack(attack.updates([(base, canary, False)] * NUM_WITHOUT, noise_multiplier))
    middle, variance = away.mean(0), away.var(0)
    weights = direction / (variance + 1e-9 * variance.mean() + 1e-30)
    threshold = float(weights @ (middle + direction / 2))
    coins = rng.integers(2, size=num_trials).astype(bool)
    found = attack.updates([(base, canary, bool(coin)) for coin in coins], noise_multiplier)
    guesses = np.array([float(weights @ update) > threshold for update in found])
    errors = [_upper_limit(int((guesses != coin)[coins == coin].sum()), int((coins == coin).sum())) for coin in (0, 1)]
    claim = Ledger()
    claim.record(Gaussian(noise_multiplier))
    moved = float((direction @ weights).clamp(min=0).sqrt()) * noise_multiplier
    return Audit(float(claim.epsilon(delta)), _proven(errors, delta), moved, refusal, num_trials, delta)


class _Attack:
    """The trials of one module and data set."""

    def __init__(self, module: L.LightningModule, data: Any, clip: float, strict: bool, precision: Any) -> None:
        self.module = module
        self.options: dict[str, Any] = {"max_grad_norm": clip, "strict": strict}
        self.precision = precision
        self.datamodule = data if isinstance(data, L.LightningDataModule) else None
        loader = _loader_of(data)
        if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
            raise MisconfigurationException(
                f"An audit needs a DataLoader over a map-style data set, found {type(loader).__name__}."
            )
        self.dataset: Any = loader.dataset
        self.collate_fn = loader.collate_fn
        num_examples = len(loader.dataset)
        if num_examples < 3:
            raise MisconfigurationException(f"An audit needs at least 3 examples, found {num_examples}.")

    def candidates(self, rng: np.random.Generator) -> list[tuple[list[int], int]]:
        """Canaries, including rare labels, each with few or many other examples that are always included."""
        labels, found = stored_labels(self.dataset), []
        for canary in unlike_examples(self.dataset):
            is_other = np.arange(len(self.dataset)) != canary
            # An example has the largest influence among examples of other labels.
            if labels is not None and (labels != labels[canary]).sum() > 1:
                is_other &= labels != labels[canary]
            others = rng.permutation(np.flatnonzero(is_other))
            found += [(others[:size].tolist(), canary) for size in SIZES]
        return found

    def refusal(self) -> str | None:
        """Why the self-checks stop the module; None if they do not."""
        size = min(len(self.dataset), 128)
        loader = self._loader(range(size), max(1, size // 4))
        try:
            self._fit(SampleLevelDP(noise_multiplier=1.0, method="rdp", **self.options), [loader, loader], [], 2)
        except PrivacyError as error:
            return str(error)
        return None

    def updates(self, trials: Sequence[tuple[list[int], int, bool]], noise_multiplier: float) -> list[Tensor]:
        """The updates of clients with the given examples and a canary, which is included or not."""
        loaders = [self._loader([*base, canary], len(base) + 1) for base, canary, _ in trials]
        without = {number: len(base) for number, (base, _, is_there) in enumerate(trials) if not is_there}
        callback = _Unchecked(without, noise_multiplier, **self.options)
        watch = _Eavesdrop()
        self._fit(callback, loaders, [watch], 1, local_steps=1)
        return [watch.seen[number] for number in range(len(trials))]

    def _loader(self, examples: Sequence[int], batch_size: int) -> DataLoader:
        return DataLoader(Subset(self.dataset, list(examples)), batch_size, collate_fn=self.collate_fn)

    def _fit(
        self, private: SampleLevelDP, loaders: list[DataLoader], callbacks: list[L.Callback], rounds: int, **work: Any
    ) -> None:
        clients = ClientLoaders(loaders)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = L.Trainer(
                strategy=FederatedStrategy("fedavg", **work),
                max_epochs=rounds,
                callbacks=[private, *callbacks],
                precision=self.precision,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
            )
            module = copy.deepcopy(self.module)
            if self.datamodule is None:
                trainer.fit(module, clients)
                return
            # The same datamodule with its transfer hooks, but with the trials' loaders.
            own: Any = copy.copy(self.datamodule)
            own.prepare_data = own.setup = lambda *args, **kwargs: None
            own.train_dataloader = lambda: clients
            trainer.fit(module, datamodule=own)


class _Unchecked(SampleLevelDP):
    """Trains as usual but without the checks, and leaves one example of some clients out of every batch."""

    def __init__(self, without: Mapping[Any, int], noise_multiplier: float, **options: Any) -> None:
        super().__init__(noise_multiplier, method="rdp", **options)
        self._without = without

    def wrap_loaders(self, loaders: ClientLoaders) -> ClientLoaders:
        private = super().wrap_loaders(loaders)

        def make(client: ClientId) -> Any:
            loader: Any = private[client]
            if client in self._without:
                loader.batch_sampler.batches = _Without(loader.batch_sampler.batches, self._without[client])
            return loader

        return ClientLoaders(loaders.ids, make, num_examples=lambda client: len(private[client].dataset))  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._buffers = TensorWatch(dict, "")
        if self._gradients is not None:
            self._gradients.tolerance = math.inf

    def on_round_start(
        self, trainer: L.Trainer, module: L.LightningModule, round: int, cohort: Sequence[ClientId], view: RoundView
    ) -> None:
        super().on_round_start(trainer, module, round, cohort, view)
        self._params = TensorWatch(dict, "")

    def on_client_end(self, *args: Any, **kwargs: Any) -> None:
        self._training = None

    def _self_check(self, *args: Any) -> None:
        assert self._training is not None
        self._training.is_checked = True


class _Without(Sampler[list[int]]):
    """Batches without one example."""

    def __init__(self, batches: PoissonBatches, example: int) -> None:
        self.batches = batches
        self.example = example

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for chosen in self.batches:
            yield [example for example in chosen if example != self.example]


class _Eavesdrop(FederatedCallback):
    """Records each client's update."""

    def __init__(self) -> None:
        self.seen: dict[ClientId, Tensor] = {}

    def on_client_end(
        self, trainer: Any, module: Any, client: ClientId, run: LocalRun, update: Update | None, view: Any
    ) -> None:
        trees = [] if update is None else [update.delta, update.buffers]
        self.seen[client] = torch.cat(
            [value.detach().double().flatten().cpu() for tree in trees for value in tree.values()] or [torch.zeros(1)]
        ).nan_to_num()


def _loader_of(data: Any) -> Any:
    if isinstance(data, L.LightningDataModule):
        # Some datamodules return the clients' loaders only to a federated strategy.
        data.trainer = L.Trainer(strategy="fedavg", logger=False, enable_checkpointing=False, accelerator="cpu")
        data.prepare_data()
        data.setup("fit")
        data = data.train_dataloader()
    return data[next(iter(data))] if isinstance(data, Mapping) else data


def _upper_limit(errors: int, trials: int) -> float:
    from scipy.stats import beta  # type: ignore[import-untyped, unused-ignore]

    return float(beta.ppf(1 - (1 - CONFIDENCE) / 2, errors + 1, trials - errors)) if errors < trials else 1.0


def _proven(errors: Sequence[float], delta: float) -> float:
    """The epsilon of the Gaussian mechanism with the smallest separation that explains such error rates."""
    separation = sum(-NormalDist().inv_cdf(min(max(error, 1e-12), 1 - 1e-12)) for error in errors)
    if separation <= 0:
        return 0.0
    ledger = Ledger()
    ledger.record(Gaussian(1 / separation))
    return float(ledger.epsilon(delta))
