"""Evaluates the global, the personalized and a purely local model on each client's own validation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_fl.communication import Message
from lightning_fl.data.client_loaders import ClientLoaders, count_batches
from lightning_fl.engines.tensors import clones, load
from lightning_fl.seeding import ClientRandomness, isolated_randomness
from lightning_fl.strategies import FederatedStrategy
from lightning_fl.strategies.internals import log_figures
from lightning_fl.strategies.out_of_loop import train_out_of_loop, validate_out_of_loop
from lightning_fl.strategies.round_view import RoundView, personal_tensors
from lightning_fl.strategies.validation import forbid_client_disclosure
from lightning_fl.types import ClientId, Tree


class PersonalizedEvaluation(L.Callback):
    """Compares a global, a personalized and a local model on each client's own validation data.

    It uses the module's own ``validation_step``. The models are:

    - ``"global"``: the global model, with the common start values of personal tensors;
    - ``"personalized"``: the global model with the client's personal tensors loaded, or with Ditto the client's own
      model; then trained for ``finetune_epochs`` on the client's training data;
    - ``"local"``: the initial model of the first round, trained only on the client's training data.

    These models are trained without the algorithm, schedules, callbacks, the module's ``optimizer_step`` and logging,
    with a new optimizer at the learning rates of the last round's start. Federated training is not affected. Each
    client is evaluated on its home rank, even if it has not taken part yet. ``limit_train_batches``,
    ``limit_val_batches`` and ``fast_dev_run`` apply to each of these passes; ``limit_val_batches=0`` only turns off the
    validation of the global model.

    Args:
        val: For each client the loader of its validation data, or a function that creates it. None: those of the
            datamodule, such as ``fl.datamodules.ClientDatasets(train=[...], val=[...])``; a silo's is its validation
            loader.
        finetune_epochs: Passes of the personalized model over the client's training data. None: 1, or 0 for clients
            that have personal tensors or a model of their own.
        local_epochs: Passes of the local model over the client's training data; 0 leaves it out. None: the number of
            passes of a client that has taken part in all rounds so far.
        every_n_rounds: Evaluate after every ``every_n_rounds`` rounds, and log the means, weighted by examples, as
            ``personalized/val_loss`` and so on. None: once, after the last round.

    Raises:
        ValueError: If a number is out of range.
        MisconfigurationException: When training starts, if there is nothing to evaluate or no way to do it.

    Example:
        >>> import lightning_fl as fl
        >>> evaluation = fl.callbacks.PersonalizedEvaluation(finetune_epochs=1, local_epochs=0)
        >>> evaluation.metrics  # after fit: {client: {"global": {"val_loss": ...}, "personalized": ..., "local": ...}}
        {}
    """

    evaluates_clients = True

    def __init__(
        self,
        val: Mapping[ClientId, Any] | None = None,
        finetune_epochs: int | None = None,
        local_epochs: int | None = None,
        every_n_rounds: int | None = None,
    ) -> None:
        for name, value in (("finetune_epochs", finetune_epochs), ("local_epochs", local_epochs)):
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must be None or a whole number that is not negative.")
        if every_n_rounds is not None and every_n_rounds < 1:
            raise ValueError(f"every_n_rounds={every_n_rounds} must be None or a whole number of at least 1.")
        self.val = val
        self.finetune_epochs = finetune_epochs
        self.local_epochs = local_epochs
        self.every_n_rounds = every_n_rounds
        self.metrics: dict[ClientId, dict[str, dict[str, float]]] = {}
        """The values that ``validation_step`` logged, by client and model; the same on every rank."""
        self.num_examples: dict[ClientId, int] = {}
        """The number of validation examples of each client."""
        self._loaders: Mapping[ClientId, Any] = {}
        self._first: Tree = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets an earlier run of another Trainer; a checkpoint's state comes after this."""
        if stage == "fit" and trainer.current_epoch == 0:
            self._first = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds the clients' validation data, and keeps the initial model for the local ones."""
        if not isinstance(trainer.strategy, FederatedStrategy):
            rank_zero_info(
                f"PersonalizedEvaluation evaluates nothing: {type(trainer.strategy).__name__} has no clients."
            )
            return
        self._check(trainer, pl_module)
        self._loaders = self._find_loaders(trainer)
        # A resumed run has the initial model from its checkpoint; the module's tensors are those of a later round.
        if trainer.current_epoch > 0 and self.local_epochs != 0 and not self._first:
            raise MisconfigurationException(
                "PersonalizedEvaluation trains the local models from that of the first round, which this run, "
                f"continued after round {trainer.current_epoch}, does not have. Set local_epochs=0, or use the "
                "callback from the first round on."
            )

    def on_round_start(
        self, trainer: L.Trainer, module: L.LightningModule, round: int, cohort: Sequence[ClientId], view: RoundView
    ) -> None:
        """Keeps the first model for the local ones; frozen tensors once they are trained, as they were until then."""
        if self.local_epochs != 0:
            known = {*self._first, *view.trainer.tensors.frozen}
            self._first.update(clones({name: tensor for name, tensor in view.tensors.items() if name not in known}))

    def state_dict(self) -> dict[str, Any]:
        """The initial model, for a run that is resumed from a checkpoint."""
        return {"first": self._first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the initial model from a checkpoint."""
        self._first = state_dict["first"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluates every ``every_n_rounds`` rounds."""
        if self._loaders and self.every_n_rounds is not None and (trainer.current_epoch + 1) % self.every_n_rounds == 0:
            self._evaluate(trainer)
            self.log_dict(self.means())  # type: ignore[attr-defined]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluates if ``every_n_rounds`` is None."""
        if self._loaders and self.every_n_rounds is None and trainer.strategy.history:  # type: ignore[attr-defined]
            self._evaluate(trainer)
            log_figures(trainer, self.means())

    def means(self) -> dict[str, float]:
        """The clients' metrics, averaged by examples, under names such as ``personalized/val_loss``."""
        sums: dict[str, tuple[float, int]] = {}
        for client, kinds in self.metrics.items():
            for key, value in ((f"{kind}/{name}", value) for kind in kinds for name, value in kinds[kind].items()):
                total, num_examples = sums.get(key, (0.0, 0))
                own = self.num_examples[client]
                sums[key] = total + own * value, num_examples + own
        return {key: total / num_examples for key, (total, num_examples) in sums.items()}

    def _evaluate(self, trainer: L.Trainer) -> None:
        strategy: Any = trainer.strategy
        view: RoundView = strategy.view
        ids = [client for client in view.population.ids if client in self._loaders]
        # A client's personal tensors are in the store of its home rank.
        placed = view.place(ids, sticky=True)
        # Ranks have different numbers of clients, so Lightning must not call collectives meanwhile.
        with strategy.local_phase():
            own = []
            for client in placed[strategy.federation.rank]:
                # Evaluation must not change the random numbers of training.
                with isolated_randomness(view.settings.seed, len(view.history), client, "evaluation"):
                    own.append((client, *self._evaluate_client(trainer, client)))
        messages = strategy.federation.all_gather(Message({"clients": own}), "evaluation of the clients")
        found = {client: rest for message in messages for client, *rest in message.fields["clients"]}
        self.metrics = {client: found[client][0] for client in view.population.ids if client in found}
        self.num_examples = {client: found[client][1] for client in self.metrics}

    def _evaluate_client(self, trainer: L.Trainer, client: ClientId) -> tuple[dict[str, dict[str, float]], int]:
        module, strategy = trainer.lightning_module, trainer.strategy
        assert isinstance(strategy, FederatedStrategy)
        view = strategy.view
        loader, tensors = self._loader(trainer, client), view.tensors
        before, personal = clones(tensors), personal_tensors(view, client, module.device)
        num_passes = _num_passes(view, client) if self.local_epochs is None else self.local_epochs
        finetune_epochs = self.finetune_epochs if self.finetune_epochs is not None else int(not personal)
        starts: dict[str, tuple[Tree, int]] = {"global": (before, 0)}
        starts["personalized"] = {**before, **personal}, finetune_epochs
        if num_passes:
            starts["local"] = (
                {name: self._first.get(name, own).to(module.device) for name, own in before.items()},
                num_passes,
            )
        metrics: dict[str, dict[str, float]] = {}
        try:
            for kind, (start, num_epochs) in starts.items():
                load(tensors, start)
                if num_epochs:
                    self._train(trainer, view, client, num_epochs)
                metrics[kind], num_examples = validate_out_of_loop(trainer, loader)
        # After an error, for example for a checkpoint on exception, the module must hold the global model.
        finally:
            load(tensors, before)
        return metrics, num_examples

    def _train(self, trainer: L.Trainer, view: RoundView, client: ClientId, num_epochs: int) -> None:
        randomness, seed = ClientRandomness(), view.settings.seed
        loader = view.population.loaders[client]
        # Seeded for each training, so that the personalized and the local model see the same batches in the same order.
        randomness.enter(seed, len(view.history), client, "evaluation")
        randomness.seed_loader(loader, seed, len(view.history), client, "evaluation loader")
        try:
            with view.trainer.optimizers.borrowed_optimizer() as optimizer:
                train_out_of_loop(trainer, loader, optimizer, num_epochs, _pass_length(view, client))
        finally:
            randomness.exit()

    def _check(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        forbid_client_disclosure("PersonalizedEvaluation", strategy.view.settings)
        if getattr(type(module), "validation_step", None) is L.LightningModule.validation_step:
            raise MisconfigurationException("PersonalizedEvaluation calls `validation_step`, which the module lacks.")
        trains = self.finetune_epochs != 0 or self.local_epochs != 0
        if trains and (not module.automatic_optimization or trainer.precision == "16-mixed"):
            raise MisconfigurationException(
                "PersonalizedEvaluation can train only with automatic optimization and without a gradient scaler. Set "
                "finetune_epochs=0 and local_epochs=0, or use automatic optimization and precision='bf16-mixed'."
            )

    def _find_loaders(self, trainer: L.Trainer) -> Mapping[ClientId, Any]:
        strategy: Any = trainer.strategy
        population = strategy.view.population
        loaders: Mapping[ClientId, Any] = self.val or {}
        # A silo's validation loader may not be loaded yet; `_loader` asks the Trainer for it later.
        if self.val is None and population.silos is not None:
            return dict.fromkeys(population.ids)
        if self.val is None:
            loaders = getattr(getattr(trainer, "datamodule", None), "client_val_dataloaders", dict)()
        unknown = [client for client in loaders if client not in population]
        if unknown or not loaders:
            found = f"data of the unknown client {unknown[0]!r}" if unknown else "none"
            raise MisconfigurationException(
                f"PersonalizedEvaluation needs validation data of the federation's clients, found {found}. Give it "
                "val={client: loader, ...}, or fl.datamodules.ClientDatasets(train=[...], val=[...]) with one data set "
                "for each client."
            )
        return loaders if isinstance(loaders, ClientLoaders) else ClientLoaders(loaders)

    def _loader(self, trainer: L.Trainer, client: ClientId) -> Any:
        if isinstance(self._loaders, ClientLoaders):
            return self._loaders[client]
        own = trainer.val_dataloaders  # a silo's
        return own[0] if isinstance(own, list | tuple) and len(own) == 1 else own or ()


def _num_passes(view: RoundView, client: ClientId) -> int:
    """The number of passes over its data that a client makes if it takes part in all rounds so far."""
    work = view.max_work
    if work.steps is None:
        return len(view.history) * work.epochs
    num_batches = _pass_length(view, client) or 1
    return max(1, round(len(view.history) * work.steps * work.accumulate / num_batches))


def _pass_length(view: RoundView, client: ClientId) -> int | None:
    """The maximum number of batches in a pass over a client's data, as in training; None if there is no limit."""
    work, num_batches = view.max_work, count_batches(view.population.loaders[client])
    return work.max_pass_length if num_batches is None else work.pass_length(num_batches)
