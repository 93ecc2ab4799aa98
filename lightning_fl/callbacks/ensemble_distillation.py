"""Distils the ensemble of a round's clients into the global model, on data without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_fl.algorithms import Algorithm
from lightning_fl.callbacks.federated import FederatedCallback
from lightning_fl.engines.buffers import moved
from lightning_fl.engines.evaluation_mode import evaluating
from lightning_fl.engines.tensors import clones, load
from lightning_fl.seeding import isolated_randomness
from lightning_fl.strategies import FederatedStrategy
from lightning_fl.strategies.round_view import RoundView
from lightning_fl.strategies.validation import check_same_on_ranks, forbid_client_disclosure
from lightning_fl.tree import cast_like
from lightning_fl.types import Aggregate, ClientId, LocalRun, Tree, Update


class EnsembleDistillation(FederatedCallback):
    r"""FedDF: after each round the global model is trained to match the ensemble of the clients' models.

    .. math::
        \min_x \; \mathrm{mean}_d \; \mathrm{KL}\bigl(\mathrm{softmax}(\mathrm{mean}_i f(y_i, d)) \,\Vert\,
        \mathrm{softmax}(f(x, d))\bigr), \qquad \text{from } x = \mathrm{mean}_i \, y_i

    over public inputs :math:`d` without labels, by Adam with a cosine learning-rate schedule. The module's ``forward``
    returns class scores :math:`f`; all models are in evaluation mode, and buffers keep their averaged values. The paper
    also stops early on a validation set. Every rank computes the scores of its clients' models, the ranks sum the
    scores, and each distils the same model. Clients train one after the other.

    Args:
        public: A loader of inputs, or of batches whose first entry they are; the same on all ranks. None: the
            ``public_dataloader()`` of the datamodule, as with ``DigitsDataModule(public_share=0.2)``.
        steps: Number of Adam steps after each round. Default 200.
        lr: Initial learning rate. Default 0.001, as in the paper.
        batch_size: Number of inputs in a step. Default 128, as in the paper.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: When training starts, if there are no public inputs; under secure aggregation and
            client-level privacy, which hide the clients' models; and if no party has the models of all clients, or
            each client has a model or tensors of its own.

    Reference:
        Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020.
    """

    def __init__(
        self, public: Iterable[Any] | None = None, steps: int = 200, lr: float = 1e-3, batch_size: int = 128
    ) -> None:
        if steps < 1 or not lr > 0 or batch_size < 1:
            raise ValueError(
                f"EnsembleDistillation got steps={steps}, lr={lr}, batch_size={batch_size}; expected at least 1, a "
                "positive number and at least 1."
            )
        self.public, self.steps, self.lr, self.batch_size = public, steps, lr, batch_size
        self._inputs: Tensor | None = None
        self._start: Tree = {}
        self._buffers: Tree = {}
        self._scores: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads the public inputs, and checks that the clients' models may be used."""
        strategy = trainer.strategy
        if not isinstance(strategy, FederatedStrategy):
            rank_zero_info(f"EnsembleDistillation does nothing: {type(strategy).__name__} has no clients.")
            return
        settings = strategy.view.settings
        forbid_client_disclosure("EnsembleDistillation", settings)
        reasons = {
            f"{type(settings.aggregator).__name__} hides them": settings.aggregator.hides_reports,
            "no party has the models of all silos over a network": strategy.network is not None,
            "clients start from models of different rounds": settings.schedule is not None,
            f"{type(settings.algorithm).__name__} has a model for each client": settings.algorithm.keeps_nodes,
            f"{type(settings.algorithm).__name__} does not send the change of one whole model": (
                type(settings.algorithm).delta_like is not Algorithm.delta_like
            ),
            f"clients keep {', '.join(strategy.personal)}": bool(strategy.personal),
            "clients train adapters of different base models": settings.aggregator.moves_frozen,
            "a silo has several processes": strategy.silo is not None,
        }
        found = [reason for reason, holds in reasons.items() if holds]
        if found:
            raise MisconfigurationException(
                f"EnsembleDistillation distils the models of a round's clients into one, but here {found[0]}. Leave it "
                "out."
            )
        self._inputs = self._read(trainer)
        with torch.no_grad():
            shape = tuple(self._score(pl_module, {}, self._inputs[:1]).shape)
        if len(shape) < 2 or shape[1] < 2:
            raise MisconfigurationException(
                f"EnsembleDistillation distils the softmax of class scores [batch, classes, ...], but the module's "
                f"forward returns {list(shape)} for one input, whose softmax is always 1. Let it return a score for "
                "each class, also if there are two."
            )
        check_same_on_ranks(strategy.view.group, "public inputs", len(self._inputs))

    def _read(self, trainer: L.Trainer) -> Tensor:
        public = self.public
        if public is None:
            loader = getattr(getattr(trainer, "datamodule", None), "public_dataloader", None)
            public = [] if loader is None else loader()
        batches = [batch[0] if isinstance(batch, list | tuple) else batch for batch in public]
        if not batches or not all(isinstance(batch, Tensor) for batch in batches):
            raise MisconfigurationException(
                f"EnsembleDistillation(public={self.public!r}) found no batches of tensors. Give it a loader of "
                "inputs, or a datamodule with a `public_dataloader`, such as DigitsDataModule(public_share=0.2)."
            )
        return torch.cat(batches)

    def on_round_start(
        self, trainer: L.Trainer, module: L.LightningModule, round: int, cohort: Sequence[ClientId], view: RoundView
    ) -> None:
        """Keeps the global model of the round's start."""
        self._start, self._buffers = clones(view.params), clones(view.trainer.tensors.buffers)
        self._scores = []

    def on_client_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        client: ClientId,
        run: LocalRun,
        update: Update | None,
        view: RoundView,
    ) -> None:
        """Computes the client's model's scores of the public inputs."""
        if update is None:
            return
        own = {name: cast_like(tensor + update.delta[name], tensor) for name, tensor in self._start.items()}
        with torch.no_grad():
            found = [self._score(module, {**own, **moved(self._buffers, update.buffers)}, x) for x in self._batches()]
        self._scores.append(torch.cat(found).double())

    def on_aggregate_end(
        self, trainer: L.Trainer, module: L.LightningModule, aggregate: Aggregate, view: RoundView
    ) -> None:
        """Distils the round's clients into the new global model."""
        strategy: Any = trainer.strategy
        num_clients = view.group.all_reduce(torch.tensor([len(self._scores)]))
        if not num_clients:
            return
        assert self._inputs is not None
        with torch.no_grad():  # for the shape, on a rank that has trained no client
            nothing = torch.zeros_like(self._score(module, {}, self._inputs), dtype=torch.float64)
        mean = view.group.all_reduce(sum(self._scores, nothing)) / num_clients.to(nothing.device)
        with strategy.local_phase(), isolated_randomness(view.settings.seed, view.round, "public", "distillation"):
            load(view.params, self._distil(module, view.params, mean.softmax(1)))
        self._scores = []

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Drops the unfinished round."""
        self._start, self._buffers, self._scores = {}, {}, []

    @torch.enable_grad()
    def _distil(self, module: nn.Module, params: Mapping[str, Tensor], targets: Tensor) -> Tree:
        assert self._inputs is not None
        student = {name: param.detach().clone().requires_grad_() for name, param in params.items()}
        optimizer = torch.optim.Adam(student.values(), self.lr)
        schedule = CosineAnnealingLR(optimizer, self.steps)
        size = min(self.batch_size, len(self._inputs))
        for _ in range(self.steps):
            chosen = torch.randperm(len(self._inputs))[:size]
            answers = log_softmax(self._score(module, student, self._inputs[chosen]), 1)
            loss = kl_div(answers, targets[chosen.to(targets.device)].to(answers.dtype), reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return {name: param.detach() for name, param in student.items()}

    def _score(self, module: nn.Module, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        device = next(module.parameters()).device
        with evaluating(module):
            found: Tensor = functional_call(module, dict(tensors), (inputs.to(device),))
        return found

    def _batches(self) -> Sequence[Tensor]:
        assert self._inputs is not None
        return self._inputs.split(1024)
