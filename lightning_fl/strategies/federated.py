"""The Lightning strategy that turns a Trainer into a federation."""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_fl.aggregation import Aggregator, Corruption, Transform
from lightning_fl.algorithms import Algorithm, Weighting, get_algorithm
from lightning_fl.clients import Amount, Cohort, Durations, Participation, Population, Stragglers, Uniform, Weighted
from lightning_fl.clients.cohorts import describe_sampling
from lightning_fl.communication import LocalGroup, RankLost
from lightning_fl.communication.attendance import NAME_VARIABLE, check_silo_name
from lightning_fl.communication.line import Transport
from lightning_fl.data.partitioners.partitioner import Partitioner
from lightning_fl.data.splitting import shard
from lightning_fl.engines import ClientOptimizer, OptimizerStates, Vectorized
from lightning_fl.engines.optimizer_states import AsMade
from lightning_fl.engines.tensors import FederatedTensors, check_tensors
from lightning_fl.engines.vectorized.stacking import StackedBatch
from lightning_fl.federation import Federation, FederationSettings, GroupFederation
from lightning_fl.federation.history import History, html_table
from lightning_fl.federation.rank_verification import digest, synchronize_module, verify_ranks
from lightning_fl.federation.settings import is_private
from lightning_fl.federation.single_update import single_update
from lightning_fl.schedules import RoundSchedule
from lightning_fl.silos import Silo
from lightning_fl.strategies import internals
from lightning_fl.strategies.asynchronous import check_transport, open_launch
from lightning_fl.strategies.callback import RoundCallback
from lightning_fl.strategies.checkpoint import (
    KEY,
    ClientStateFiles,
    WholeCheckpointIO,
    bytes_of_first_rank,
    pack,
    read_client_states,
    silo_folder,
    unpack,
    warn_of_plain_checkpoint,
)
from lightning_fl.strategies.client_discovery import build_population
from lightning_fl.strategies.driver import LastFit, OnClientError, RoundDriver
from lightning_fl.strategies.engine_selection import select_engine
from lightning_fl.strategies.evaluation import EvaluationMetrics
from lightning_fl.strategies.frozen_weights import FrozenWeights, put_in
from lightning_fl.strategies.hooks import run_training_step
from lightning_fl.strategies.loops import adopt_loops
from lightning_fl.strategies.network import check_network, open_network, protections_of, secure_of, settings_of_silo
from lightning_fl.strategies.rank_sync import name_round
from lightning_fl.strategies.ranks import RankedStrategy
from lightning_fl.strategies.round_loaders import RoundLoader
from lightning_fl.strategies.round_view import RoundView
from lightning_fl.strategies.scheduling import check_clients, check_learning_rates, check_schedule, choose_schedule
from lightning_fl.strategies.silo import (
    check_module,
    check_silo,
    connect_processes,
    keep_metrics_apart,
    let_metrics_sync,
    mesh_of,
    spread_optimizer_states,
    spread_state_dict,
    whole_optimizer_state,
    whole_state_dict,
)
from lightning_fl.strategies.topology import Placed, check_nodes, elect, place
from lightning_fl.strategies.user_warnings import UserWarnings
from lightning_fl.strategies.validation import (
    SEVERAL_LOADERS,
    check_choice,
    check_launcher,
    check_phases,
    check_same_on_ranks,
    check_trainer,
    check_type,
    check_types,
    check_work,
    choose_weighting,
    describe_failure,
    described_columns,
    settings_in_words,
    settings_of_ranks,
    settings_of_training,
    versions,
    warn_of_own_scaling,
)
from lightning_fl.topologies import Topology

if TYPE_CHECKING:
    from lightning_fl.coordinator.shared_silo import SharedSilo
    from lightning_fl.coordinator.silo import NetworkFederation


class FederatedStrategy(RankedStrategy):
    """Trains an unmodified LightningModule as a federation; a round is a Lightning epoch.

    Args:
        algorithm: A registered name such as ``"fedavg"``, or an object with its hyper-parameters.
        num_clients: Simulated clients among which a plain training loader is split.
        clients_per_round: Clients that take part in a round: a count (int), a share (float; a half is rounded to the
            even count, so that 0.5 of 5 are 2), or None for all.
        local_epochs: Passes of each client over its data in a round. None: 1. An uneven amount is an
            :class:`~lightning_fl.clients.Amount`, such as ``fl.clients.Between(1, 5)``.
        local_steps: Optimizer steps of each client in a round, instead of passes; its loader is cycled.
        partition: How a plain training loader is split among simulated clients. None: IID.
        weighting: How clients are weighted in the mean: by ``"examples"``, ``"uniform"``, or None for the algorithm's
            own.
        client_optimizer: ``"reset"``: each client starts a round with a fresh optimizer state; ``"keep"``: with the
            state of its last round.
        aggregator: Combines the updates of a round. None: :class:`~lightning_fl.aggregation.WeightedMean`.
        transforms: Change each update between client and server, in order.
        personal: ``fnmatch`` globs on ``state_dict`` names: tensors that never leave their client, also while they are
            frozen.
        engine: How a rank trains its clients: ``"sequential"``, one after the other; ``"vectorized"`` (or an
            ``fl.engines.Vectorized(...)``), many in one step; ``"auto"`` for the faster one where it is exact.
        seed: Seed of cohorts, partition and local training. None: the one of ``seed_everything``, else 0.
        split_validation: Whether the ranks of a simulation share the validation data instead of each reading all of it.
        on_client_error: Whether a client whose loader raises ends the run (``"raise"``) or is left out of the round
            with a warning (``"skip"``).
        cohort: How the clients of a round are chosen. None: :class:`~lightning_fl.clients.Uniform`.
        stragglers: Clients that do not finish their local training. None: all clients finish.
        timeout: Seconds that a collective waits for the other ranks.
        frozen: What happens to frozen parameters, which don't travel in rounds, before the first one: ``"compare"``:
            they must be the same on all ranks; ``"broadcast"``: all ranks get those of rank 0.
        checkpoint_frozen: Whether checkpoints hold frozen parameters. If not, they hold digests of them, and are loaded
            into a module that has the same base.
        adversary: Lets some simulated clients attack, as ``fl.attacks.Adversary(fl.attacks.ALIE())``. None: nobody.
        schedule: When a round closes, and whom it waits for, on a simulated clock, as
            ``fl.schedules.Buffered(size=10, concurrency=30)``; with ``federation`` or ``transport``, in real time.
            None: a round waits for all its clients.
        durations: How long clients take on that clock: seconds by client, a distribution such as
            ``fl.clients.Lognormal(median=20)``, or ``"measured"``. None: there is no clock.
        topology: Who mixes its model with whom, as ``fl.topologies.Ring()``, instead of a server for all; with
            ``"fedavg"``, ``"dsgd"``, ``"d2"``, ``"gradienttracking"`` or ``"pushsum"``; ``Swarm()`` with any.
        federation: The coordinator's address, ``"https://host:port"``: this launch is then one silo of a federation
            over a network, and its training loader that silo's data.
        kit: The folder with the silo's key and certificate, for ``federation``.
        silo_name: The name of this silo, where each rank is one: in messages, history and records it stands in place
            of the rank. None: the environment variable ``LIGHTNING_FL_SILO_NAME``, if it is set.
        transport: How ranks that are silos reach the first one, which keeps the model, in rounds that wait for none of
            them: ``"gloo"``, or ``"rpc"`` for ``torch.distributed.rpc``, which pickles and has no authentication: for
            one's own cluster only. Needs a ``schedule``. None: the ranks meet in collectives.
        silo: How several processes train one silo together, as ``fl.silos.DDP(ranks=2)`` or ``fl.silos.FSDP2()``. None:
            a silo is one process.

    Raises:
        ValueError: If an argument is out of range, or two contradict each other.

    Example:
        >>> import lightning as L
        >>> import lightning_fl as fl
        >>> strategy = fl.FederatedStrategy("fedavg", num_clients=100, clients_per_round=0.1, local_epochs=2)
        >>> trainer = L.Trainer(strategy=strategy, max_epochs=20, logger=False, accelerator="cpu")
    """

    strategy_name: ClassVar[str] = "federated"
    is_federated: ClassVar[bool] = True
    default_checkpoint_io = WholeCheckpointIO

    def __init__(
        self,
        algorithm: str | Algorithm = "fedavg",
        num_clients: int | None = None,
        clients_per_round: int | float | None = None,
        local_epochs: int | Amount | None = None,
        local_steps: int | Amount | None = None,
        partition: Partitioner | None = None,
        weighting: Weighting | None = None,
        client_optimizer: ClientOptimizer = "reset",
        aggregator: Aggregator | None = None,
        transforms: Sequence[Transform] = (),
        personal: Sequence[str] = (),
        engine: str | Vectorized = "auto",
        seed: int | None = None,
        split_validation: bool = False,
        on_client_error: OnClientError = "raise",
        cohort: Cohort | None = None,
        stragglers: Stragglers | None = None,
        timeout: float = 1800.0,
        frozen: Literal["compare", "broadcast"] = "compare",
        checkpoint_frozen: bool = True,
        adversary: Corruption | None = None,
        schedule: RoundSchedule | None = None,
        durations: Durations | dict[int | str, float] | str | None = None,
        topology: Topology | None = None,
        federation: str | None = None,
        kit: str | Path | None = None,
        silo_name: str | None = None,
        silo: Silo | None = None,
        transport: Transport | None = None,
    ) -> None:
        super().__init__()
        found = get_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
        if not isinstance(found, Algorithm):
            raise ValueError(f"algorithm={algorithm!r} is neither a registered name nor an fl.algorithms.Algorithm.")
        check_type("topology", topology, Topology, "a topology such as fl.topologies.Ring()")
        placed = place(Placed(found, weighting, cohort, clients_per_round), topology)
        self.algorithm, weighting = placed.algorithm, placed.weighting
        cohort, clients_per_round = placed.cohort, placed.clients_per_round
        self.cohort = cohort or Uniform()
        self.stragglers = stragglers
        check_types(partition, aggregator, transforms, personal)
        is_in_real_time = federation is not None or transport is not None
        self.schedule, self.durations = choose_schedule(schedule, durations, is_in_real_time)
        if self.schedule is not None:
            clients_per_round = self.schedule.clients_per_round(clients_per_round)
        secure = any(transform.needs_secure_sampling for transform in transforms)
        self.participation = Participation(
            self.cohort, clients_per_round, local_epochs, local_steps, stragglers, secure
        )
        check_work(num_clients, self.participation)
        check_choice("weighting", weighting, (None, "examples", "uniform"))
        check_choice("client_optimizer", client_optimizer, ("reset", "keep"))
        check_choice("on_client_error", on_client_error, ("raise", "skip"))
        check_choice("frozen", frozen, ("compare", "broadcast"))
        self.frozen = frozen
        self._bytes_of_frozen = 0
        self.checkpoint_frozen = checkpoint_frozen
        self._frozen_weights = FrozenWeights()
        if not isinstance(engine, Vectorized):
            check_choice("engine", engine, ("auto", "sequential", "vectorized"))
        self.num_clients = num_clients
        self.clients_per_round = clients_per_round
        self.local_epochs = local_epochs
        self.local_steps = local_steps
        self.partition = partition
        aggregator = elect(topology, aggregator, is_in_real_time)
        self.aggregator = check_nodes(self.algorithm, aggregator, transforms, adversary, self.schedule, federation)
        if self.schedule is not None:
            check_schedule(
                self.schedule,
                num_clients,
                local_steps,
                local_epochs,
                self.cohort,
                stragglers,
                transforms,
                self.aggregator,
                self.algorithm,
            )
            # First, because the others may give updates a form that can't be scaled. In real time the coordinator
            # weighs updates, which alone knows how old they are when they come.
            if not is_in_real_time:
                transforms = (*self.schedule.transforms, *transforms)
        self.weighting: Weighting = choose_weighting(weighting, self.aggregator, transforms, self.algorithm)
        if self.weighting == "examples" and isinstance(self.cohort, Weighted) and self.cohort.weights == "examples":
            rank_zero_warn(
                "cohort=Weighted('examples') draws clients by their number of examples, and weighting='examples' "
                "counts it once more: a client then counts by its square. Set weighting='uniform'."
            )
        self.client_optimizer: ClientOptimizer = client_optimizer
        self.transforms = tuple(transforms)
        for number, transform in enumerate(self.transforms, start=1):
            transform.check(self.transforms[number:], self.aggregator, self.weighting)
            transform.check_algorithm(self.algorithm)
        self.aggregator.check(self.algorithm)
        sampling = None if num_clients is None else describe_sampling(self.cohort, num_clients, clients_per_round)
        if sampling is not None and sampling.kind != "poisson":
            self.aggregator.check_cohort(round(sampling.size))
        self.adversary = adversary
        if adversary is not None:
            check_type("adversary", adversary, Corruption, "fl.attacks.Adversary(fl.attacks.SignFlip())")
            self.aggregator = adversary.wrap_aggregator(self.aggregator)
        check_phases(self.algorithm, local_epochs, local_steps)
        self.named_personal = (personal,) if isinstance(personal, str) else tuple(personal)
        self.personal = self.named_personal
        self.engine = engine
        self.seed = seed
        self.split_validation = split_validation
        self.on_client_error: OnClientError = on_client_error
        if not timeout > 0:
            raise ValueError(f"timeout={timeout} must be a positive number of seconds.")
        self.timeout = timedelta(seconds=timeout)
        self.silo = silo
        check_silo(self)
        self.silo_name = silo_name if silo_name is None else check_silo_name(silo_name)
        check_network(self, federation, kit)
        check_transport(self, transport, federation)
        self.transport = transport
        self.address, self.kit = federation, kit
        self.network: NetworkFederation | SharedSilo | None = None
        self.driver: RoundDriver | None = None
        self._last_fit: LastFit | None = None
        self._connection: tuple[Any, ...] | None = None
        self._unfinished: dict[str, tuple[ClientStateFiles, list[str]]] = {}
        self._loaded_checkpoint: tuple[Any, dict[str, Any] | None] | None = None
        self.limit_train_batches: int | float = 1.0
        self._as_made: list[AsMade] = []
        self.group_losses: Tensor | None = None
        """The losses of the clients that train side by side, in their last step."""
        self._error: BaseException | None = None
        self._is_requeued = False
        self._warnings = UserWarnings()
        self._evaluation_metrics: EvaluationMetrics | None = None

    # ---- processes

    @property
    def in_local_phase(self) -> bool:
        return super().in_local_phase or (self.driver is not None and self.driver.in_local_phase)

    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.cluster_environment is not None
        if self.transport is not None:  # in `setup` there will be a line to the first rank
            self.network, self._error = None, None
            return
        # Each fit, validate and test comes here; the ranks stay connected between them, also from Trainer to Trainer.
        connection = self.global_rank, self.num_ranks, self.root_device.type
        if self._connection == connection:
            self._give_mesh()
            return
        environment = self.cluster_environment
        where = environment.main_address, environment.main_port, self.root_device, self.timeout, self._own_name
        # In a federation over a network all processes of the launch are one silo.
        on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", self.num_processes))
        together = on_machine if self.address is None else self.num_ranks
        self.federation = connect_processes(self.silo, self.global_rank, self.num_ranks, together, where)
        self._connection = connection
        self._give_mesh()
        if self.federation.is_alone:
            check_launcher()
        if self.address is None:
            return
        if self.federation.size > 1:
            raise MisconfigurationException(
                f"With federation={self.address!r} a launch is one silo, but there are {self.federation.size} ranks "
                "that are one each. Start one process, or set silo=fl.silos.DDP() if they train one silo together."
            )
        assert self.kit is not None
        self.network = open_network(self.address, self.kit, self.federation, self._module)

    def _open_launch(self) -> None:
        """Joins ranks that no round waits for: each is alone but for its line to the first one."""
        environment = self.cluster_environment
        assert environment is not None
        self.network = open_launch(
            self,
            self._trainer,
            rank=self.global_rank,
            size=self.num_ranks,
            address=environment.main_address,
            port=environment.main_port,
            name=self._own_name,
            seed=self._seed,
        )

    def _give_mesh(self) -> None:
        if self.federation.is_spread:
            internals.give_mesh(self._module, mesh_of(self.federation, self.root_device))

    # ---- set-up

    def connect(self, model: L.LightningModule) -> None:
        super().connect(model)
        self._loaded_checkpoint = None
        trainer = model.trainer
        # Lightning connects for each fit, validate and test.
        self._last_fit, self.driver = self._fit_so_far, None
        self._works_alone = False
        # Lightning cuts loaders up by rank wherever `is_distributed` holds, which `sync_dist` needs; the clients are
        # spread over the ranks instead.
        internals.keep_samplers(trainer)
        internals.adopt_signals(trainer)
        adopt_loops(trainer)
        # A second one would drive each round twice, also one that came with the callbacks of another Trainer. It is
        # inserted here, and not by a hook of the user's module, because Lightning orders the callbacks and restores
        # their states only after it has connected the strategy.
        callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, RoundCallback)]  # type: ignore[attr-defined]
        trainer.callbacks = [RoundCallback(self), *callbacks]  # type: ignore[attr-defined]

    def setup(self, trainer: L.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            check_trainer(trainer)
            if self.transport is not None:  # not earlier: Lightning tells only now whether a checkpoint was loaded
                self._open_launch()
        check_same_on_ranks(self.federation, "validation data", trainer.enable_validation)
        self._frozen_weights = FrozenWeights()
        if trainer.state.fn == TrainerFn.FITTING:
            self.algorithm.prepare(self._module)
        super().setup(trainer)
        # Now, because the checkpoint of a plain Trainer, which Lightning loads later, has the state of all its steps.
        self._as_made = [AsMade(optimizer) for optimizer in self.optimizers]
        assert self.lightning_module is not None
        if self.silo is not None:
            check_module(self.silo, self.lightning_module, self._protects_examples)
        if trainer.state.fn == TrainerFn.FITTING or self.federation.size > 1:
            check_tensors(self.lightning_module, self.federation.is_spread)
        self.personal = tuple(self.algorithm.personal(self.lightning_module, self.named_personal))
        columns = described_columns(getattr(trainer, "datamodule", None), self._is_private)
        if self._validation_is_per_rank and (self.network is not None or not self.federation.is_alone):
            warn_of_own_scaling(columns)
        if not self.federation.is_alone:
            settings = {**settings_of_ranks(self, trainer), **settings_of_training(trainer)}
            for group in (self.federation.inner, self.federation):
                verify_ranks(group, self.lightning_module, settings, versions(), columns)
            # Without `seed_everything` the ranks have initialised their modules differently. Only after the check: with
            # modules whose tensors differ, the broadcasts would pair up different ones.
            sent = synchronize_module(self.federation, self.lightning_module, self.frozen == "broadcast")
            self._bytes_of_frozen = sent
            if sent:
                rank_zero_info(f"Rank 0 has sent {sent:,} bytes of frozen parameters to each of the others.")
        if self.network is not None and trainer.state.fn == TrainerFn.FITTING:
            from lightning_fl.coordinator.silo import Introduction

            common = {**settings_of_training(trainer), **columns}
            tensors = FederatedTensors(self.lightning_module, self.personal, may_be_spread=self.federation.is_spread)
            protections = protections_of(self, trainer.callbacks)  # type: ignore[attr-defined]
            own, secure, is_asynchronous = settings_of_silo(self), secure_of(self), self.schedule is not None
            said = Introduction(own, common, versions(), protections, secure, self.weighting, is_asynchronous)
            self.network.join(tensors, said)
            if self.driver is not None:  # `configure_optimizers` has needed the loaders; now it is known who takes part
                self.driver.settings = self._settings_of(self.driver.population)
                self.driver.renew(self.driver.population)
        if self.federation.inner.size > 1:
            keep_metrics_apart(self.lightning_module)
        self._evaluation_metrics = EvaluationMetrics(self._parties, self.lightning_module, self.aggregator)

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        if internals.has_no_optimizer(self.optimizers):
            raise MisconfigurationException(
                "`configure_optimizers` returned no optimizer, so clients would not train. Return one."
            )

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        # The first batch only: it tells whether the ranks evaluate the same data, and a digest of every batch would
        # cost time.
        if self._works_alone and self.evaluation_metrics.compares and not self.evaluation_metrics.first_batch:
            self.evaluation_metrics.first_batch = digest(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    def process_dataloader(self, dataloader: object) -> object:
        trainer = self._trainer
        # Lightning hands over every loader without saying what it is for; `training` is true only for the training
        # loader, not for those of the sanity check.
        if not trainer.training:
            if self.split_validation and not trainer.predicting and not self._validation_is_per_rank:
                return shard(dataloader, self.federation.rank, self.federation.size)
            return dataloader
        # Lightning processes the loaders of a list one by one before it combines them; this is the second.
        if self.driver is not None and not internals.has_train_loader(trainer):
            raise MisconfigurationException(SEVERAL_LOADERS)
        population = build_population(
            dataloader,
            self.federation,
            started_by_launcher=self.started_by_launcher,
            num_clients=self.num_clients,
            partition=self.partition,
            seed=self._seed,
            callbacks=trainer.callbacks,  # type: ignore[attr-defined]
            silo=None if self.network is None else self.network.name,
            is_of_several=self.silo is not None,
        )
        if self.schedule is not None and self.network is None:
            check_clients(self.schedule, self.durations, population)
        if self.adversary is not None:
            population = population.with_loaders(self.adversary.wrap_loaders(population.loaders, self._seed))
        if self.driver is None:
            self.driver = self._make_driver(population)
        else:
            self.driver.renew(population)
        return self.driver.loader

    def _make_driver(self, population: Population) -> RoundDriver:
        trainer = self._trainer
        if self.silo_name is not None and population.silos is None:
            raise MisconfigurationException(
                f"silo_name={self.silo_name!r} is for a launch with data of its own, but the clients here are "
                "simulated. Leave it out, or start the silos with torchrun."
            )
        return RoundDriver(
            trainer,
            population,
            self._parties,
            self._settings_of(population),
            self.participation,
            limit=self.limit_train_batches,
            personal=self.personal,
            strategy_type=FederatedStrategy,
            on_client_error=self.on_client_error,
            last=self._last_fit,
        )

    def _settings_of(self, population: Population) -> FederationSettings:
        size = len(population) if self.network is None else self.network.size
        sampling = describe_sampling(self.cohort, size, self.clients_per_round)
        if self.schedule is not None and not self.schedule.draws_cohorts:
            sampling = replace(sampling, kind="other")  # speed decides
        return FederationSettings(
            self.algorithm,
            self.aggregator if self.network is None else single_update(self.aggregator),
            self.transforms,
            self.weighting,
            seed=self._seed,
            population=size,
            sampling=sampling,
            silos=population.silos is not None,
            protects_examples=self._protects_examples,
            schedule=self.schedule if self.network is None else None,
            durations=self.durations,
            clients=population.ids if self.algorithm.knows_index else (),
        )

    # ---- hooks

    def start_training(self) -> None:
        """Called by :class:`RoundCallback` when training starts."""
        trainer = self._trainer
        if not isinstance(trainer.train_dataloader, RoundLoader):
            raise MisconfigurationException(SEVERAL_LOADERS)
        if internals.fetches_itself(trainer):
            raise MisconfigurationException(
                "`training_step(dataloader_iter)` fetches its batches itself, but in a federation each batch belongs "
                "to a client. Write `training_step(batch, batch_idx)`."
            )
        check_learning_rates(self.schedule, trainer)
        self.active_driver.personal, self.active_driver.sticky = self.personal, self._clients_keep_state
        self._resume()
        # It hooks into the user's optimizers, and the hooks must not outlive a start that fails.
        optimizers = OptimizerStates(self.optimizers, getattr(self.precision_plugin, "scaler", None))
        try:
            self.active_driver.num_bytes_before, self._bytes_of_frozen = self._bytes_of_frozen, 0
            self.active_driver.start(*select_engine(self, trainer, optimizers))
        except BaseException:
            optimizers.close()
            raise
        if self.network is not None:
            self.network.restore(self.active_driver.store, self.optimizers)

    @property
    def _clients_keep_state(self) -> bool:
        keepers = (*self.transforms, *self._trainer.callbacks)  # type: ignore[attr-defined]
        return (
            self.algorithm.keeps_client_state
            or self.client_optimizer == "keep"
            or bool(self.personal)
            or any(phase.model == "own" for phase in self.algorithm.phases())
            or any(getattr(keeper, "keeps_client_state", False) for keeper in keepers)
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(args[0], StackedBatch):
            output = run_training_step(self._trainer, super().training_step, *args, **kwargs)
            if output is None and self.driver is not None and self.driver.local_trainer is not None:
                self.driver.local_trainer.within.refuse_skipping()
            return output
        vectorized = self.active_driver.vectorized
        assert vectorized is not None
        with self.precision_plugin.train_step_context():
            loss, losses = vectorized.step(*args, **kwargs)
        # Lightning's closure passes only the sum on; the hooked steps find each client's loss here.
        self.group_losses = losses.detach()
        return loss

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self.driver is not None:
            self.driver.join_gradients()

    def _resume(self) -> None:
        if self._loaded_checkpoint is None:
            return
        (path, packed), self._loaded_checkpoint = self._loaded_checkpoint, None
        driver = self.active_driver
        driver.forget_last_fit()
        if packed is None:
            warn_of_plain_checkpoint(path)
            if self.client_optimizer == "reset":
                for made in self._as_made:
                    made.put_back()
            return
        driver.resume(unpack(packed, self.algorithm, self._module), packed)
        if driver.sticky and packed["history"]:
            read_client_states(
                path, packed["manifests"], driver.store, driver.population, self.federation, self._silo_folder
            )

    def on_train_end(self) -> None:
        self.active_driver.check_released("in on_train_end")
        super().on_train_end()

    def on_validation_start(self) -> None:
        self._start_evaluation()
        if self.personal:
            self._warnings.personal(self._trainer, self.personal)

    def on_test_start(self) -> None:
        self._start_evaluation()

    def _start_evaluation(self) -> None:
        results, silos = internals.active_results(self._trainer), self._validation_is_per_rank
        self.evaluation_metrics.start(results, silos or self.split_validation, silos, self._is_private)
        # Until the last batch: ranks may have different numbers of batches, so that a collective in a step would hang.
        self._works_alone = True

    def end_evaluation(self) -> None:
        """Called after the last evaluation batch: from here on collectives concern all ranks again."""
        self._works_alone = False
        self.evaluation_metrics.end()

    def check_evaluation_data(self, num_loaders: int) -> None:
        """Makes sure that all ranks have the same number of loaders to evaluate."""
        check_same_on_ranks(self.federation, "loaders with batches to evaluate", num_loaders)

    def on_exception(self, exception: BaseException) -> None:
        """Leaves word for the other ranks, which would only see that this one is gone."""
        self._error = exception
        if isinstance(exception, RankLost) and self.history:  # outside a round, such as in validation
            name_round(exception, f"After round {self.history[-1]['round']}")
        if not self.federation.is_alone and (self.silo is not None or not isinstance(exception, RankLost)):
            self.federation.leave(describe_failure(exception, self._is_private))
        super().on_exception(exception)

    def interrupt(self) -> None:
        """Called by :class:`RoundCallback` when an exception ends the run; from here on a rank works alone."""
        # The exception may be this rank's alone. A collective in another callback's `on_exception` or in a last
        # checkpoint would wait for ranks that never come.
        self._works_alone = True
        if self.driver is not None:
            self.driver.interrupt()

    # ---- checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        # Lightning does not pass `save_weights_only` on; it shows in what the checkpoint holds.
        weights_only = "optimizer_states" not in checkpoint
        driver = self.driver
        if driver is not None and driver.defers_checkpoints and not self._is_requeued:
            driver.defer_checkpoint(str(filepath), weights_only)
            return
        if self._is_requeued and self.federation.is_spread:
            return  # the parts are on processes that get the signal at other places; there is the last round's
        if driver is not None and driver.apart is not None:  # the others can't be asked
            rank_zero_warn(
                f"{filepath} was not written: this silo knows only its own model, and a checkpoint holds those of all. "
                "The previous one is complete."
            )
            return
        if driver is not None:
            driver.check_released("before a checkpoint")
        if driver is None or weights_only:
            self._write_checkpoint(checkpoint, filepath, storage_options)
            return
        driver.rewind(checkpoint)
        checkpoint[KEY] = {**pack(self.algorithm, driver.state, self._module), **driver.progress()}
        checkpoint[KEY]["is_secret"] = driver.settings.hides_clients
        # After an exception the other ranks may be gone, or may not save at all.
        group = LocalGroup() if self.in_local_phase else self.federation
        # Client states are written before the checkpoint that names them, and those of its predecessor are deleted
        # after it: whenever the process dies, the checkpoint on disk has its states.
        client_states = ClientStateFiles(group, filepath, self._silo_folder) if driver.sticky else None
        job = f"requeue-{os.environ.get('SLURM_JOB_ID', '')}-{driver.plan.round}" if self._is_requeued else None
        checkpoint[KEY]["manifests"] = client_states.write(driver.store, self.federation, job) if client_states else []
        self._write_checkpoint(checkpoint, filepath, storage_options)
        if client_states is not None and job is None:
            self.barrier()
            if self.is_global_zero or client_states.is_own:
                self._unfinished[str(filepath)] = client_states, checkpoint[KEY]["manifests"]
                # Written in the background, the checkpoint may reach the disk later than its predecessor's states go.
                if not isinstance(self.checkpoint_io, AsyncCheckpointIO):
                    self._finish_client_states()

    def _write_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any) -> None:
        if not self.checkpoint_frozen:
            moving = () if self.driver is None else self.driver.moving
            self._frozen_weights.leave_out(checkpoint, self._module, moving)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _finish_client_states(self) -> None:
        while self._unfinished:
            client_states, manifests = self._unfinished.popitem()[1]
            client_states.finish(manifests)

    def requeue(self, handle: Callable[[], None]) -> None:
        """Called on SLURM's signal that the job is about to end and will be queued again.

        Args:
            handle: Lightning's handler, which saves a checkpoint and queues the job.
        """
        # Ranks get the signal at different places, so that none may wait for another.
        driver = self.driver
        if driver is not None and driver.is_closing:
            driver.once_closed = lambda: self.requeue(handle)
            return
        self._is_requeued = True
        try:
            with self.local_phase():
                handle()
        finally:
            self._is_requeued = False

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.driver is not None and self.driver.forget_deferred(str(filepath)):
            return
        super().remove_checkpoint(filepath)
        self._unfinished.pop(str(filepath), None)
        own = self._silo_folder
        # Beside a URL there are no states.
        if own is not None or (self.is_global_zero and "://" not in str(filepath)):
            ClientStateFiles(self.federation, filepath, own).forget()

    def join_nodes(self) -> None:
        """Brings the mean of all nodes' models into the module, where silos without a centre know their own only."""
        if self.driver is not None and not self.in_local_phase:
            self.driver.join_nodes()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.join_nodes()
        state = super().lightning_module_state_dict()
        return whole_state_dict(self._module, state) if self.federation.is_spread else state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = super().optimizer_state(optimizer)
        return whole_optimizer_state(optimizer, state) if self.federation.is_spread else state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if self.federation.is_spread:
            spread_optimizer_states(self.optimizers)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        # Lightning converts the module to the Trainer's precision after it has loaded the weights: with
        # precision="64-true" these would be rounded to single precision.
        self.precision_plugin.convert_module(self._module)
        checkpoint = put_in(checkpoint, self.lightning_module_state_dict)
        if self.federation.is_spread:
            checkpoint = {**checkpoint, "state_dict": spread_state_dict(self._module, checkpoint["state_dict"])}
        super().load_model_state_dict(checkpoint, strict)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        received = bytes_of_first_rank(checkpoint_path, self.federation)
        if received is None:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        else:  # from another organisation: never unpickled
            checkpoint = torch.load(io.BytesIO(received), map_location="cpu", weights_only=True)
        # Kept until training starts: Lightning loads a checkpoint before it makes the training loader, and with it the
        # driver that the state belongs to.
        self._loaded_checkpoint = checkpoint_path, checkpoint.get(KEY)
        return checkpoint

    def teardown(self) -> None:
        if self.driver is not None:
            self.driver.stop()
        if self.network is not None:
            self.network.leave("its run has ended", self._error)
        internals.clip_norms_as_before(self.precision_plugin)
        if self.lightning_module is not None:
            let_metrics_sync(self.lightning_module)
        super().teardown()  # this waits for checkpoints that are written in the background
        self._finish_client_states()

    def take_new_trainer(self) -> None:
        super().take_new_trainer()
        self.driver = self._last_fit = None

    def __getstate__(self) -> dict[str, Any]:
        """The settings and what stays of the last fit, to copy or pickle; connections stay with their process."""
        state = super().__getstate__() | {"driver": None, "_last_fit": self._fit_so_far}
        return state | {
            "federation": LocalGroup(),
            "_connection": None,
            "_evaluation_metrics": None,
            "_error": None,
            "_launcher": None,
            "network": None,
        }

    # ---- public state

    @property
    def history(self) -> History:
        """One entry for each finished round: clients, examples, steps, refused and empty clients, seconds."""
        last = self._fit_so_far
        return History() if last is None else History(last.history)

    def _repr_html_(self) -> str:
        """What a notebook shows: the settings that differ from their defaults, and the last rounds."""
        names = [name for name in inspect.signature(FederatedStrategy).parameters if hasattr(self, name)]
        own, default = (settings_in_words(strategy, names) for strategy in (self, FederatedStrategy(self.algorithm)))
        rows = [[name, own[name]] for name in names if name == "algorithm" or own[name] != default[name]]
        return f"<b>FederatedStrategy</b>{html_table(['setting', 'value'], rows)}{self.history._repr_html_()}"

    @property
    def _fit_so_far(self) -> LastFit | None:
        return self._last_fit if self.driver is None else self.driver.so_far

    @property
    def active_driver(self) -> RoundDriver:
        """Drives the rounds of the current fit."""
        assert self.driver is not None
        return self.driver

    @property
    def evaluation_metrics(self) -> EvaluationMetrics:
        """Joins the metrics of evaluations over the ranks."""
        assert self._evaluation_metrics is not None
        return self._evaluation_metrics

    @property
    def view(self) -> RoundView:
        """The current round, or between rounds the next one, as callbacks see it."""
        return self.active_driver.view

    @property
    def _parties(self) -> Federation:
        """The way to the other parties of the federation."""
        return GroupFederation(self.federation) if self.network is None else self.network

    @property
    def _module(self) -> L.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _trainer(self) -> L.Trainer:
        return self._module.trainer

    @property
    def _own_name(self) -> str:
        """The name of this launch as a silo, empty if it has none or may be a part of a simulation."""
        name = self.silo_name if self.silo_name is not None else os.environ.get(NAME_VARIABLE, "")
        return check_silo_name(name) if name and (self.started_by_launcher or self.silo is not None) else ""

    @property
    def _silo_folder(self) -> Path | None:
        """This silo's own folder of client states; None beside the checkpoint, whose path rank 0 chooses."""
        is_silo = self.driver is not None and self.driver.population.silos is not None
        if not is_silo or self.is_global_zero:
            return None
        rank = self.federation.rank if self.transport is None else self.global_rank
        return silo_folder(self._trainer.default_root_dir, rank, self.federation.inner.rank)

    @property
    def _protects_examples(self) -> bool:
        callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        return any(getattr(callback, "protects_examples", False) for callback in callbacks)

    @property
    def _is_private(self) -> bool:
        return is_private(self.aggregator, self.transforms, self._protects_examples)

    @property
    def _seed(self) -> int:
        # Read at each use: `seed_everything` may be called after the strategy was made.
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    @property
    def _validation_is_per_rank(self) -> bool:
        last = self._fit_so_far
        if last is not None:
            return last.silos
        if self.network is not None:
            return True
        # Without a fit there is no driver to ask, so this decides as `build_population` would.
        simulated = getattr(getattr(self._trainer, "datamodule", None), "gives_clients", False)
        is_launched = self.started_by_launcher or self.silo is not None
        return is_launched and self.num_clients is None and self.partition is None and not simulated
