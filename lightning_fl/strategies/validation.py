"""Checks of the strategy's and the Trainer's settings; each error says what to change."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fl.aggregation import Aggregator, Transform
from lightning_fl.algorithms import Algorithm, Weighting
from lightning_fl.clients import Amount, Cohort, LocalWork, Participation, Stragglers, cohort_size
from lightning_fl.communication import Group, Message
from lightning_fl.data.partitioners.partitioner import Partitioner
from lightning_fl.federation import FederationSettings, report_masking
from lightning_fl.federation.errors import ConfigurationError

Schedules = TypeVar("Schedules", bound=list[Any])

SEVERAL_LOADERS = (
    "There are several training loaders, or one inside a list or dict; a federation needs one: a DataLoader, or "
    "ClientLoaders with one loader for each client. Join the data sets into one loader."
)

_MEASURED = {"loss": "mean loss", "grad": "mean gradient", "losses": "mean losses"}


@contextmanager
def misconfiguration() -> Iterator[None]:
    """Raises the federation's configuration errors as Lightning's."""
    try:
        yield
    except ConfigurationError as error:
        raise MisconfigurationException(str(error)) from error


def forbid_client_disclosure(what: str, settings: FederationSettings) -> None:
    """Refuses a feature that shows a silo's figures to the others, or a client's figures where clients are private.

    Args:
        what: The feature, as the error names it.
        settings: The federation's settings.

    Raises:
        MisconfigurationException: If silos hide their figures, or a transform hides the clients of a round.
    """
    with misconfiguration():
        report_masking.forbid_client_disclosure(what, settings)


def check_preprocessing(datamodule: Any, settings: FederationSettings) -> None:
    """Refuses preprocessing by exact figures of data that differential privacy protects.

    Raises:
        MisconfigurationException: If the datamodule names such figures.
    """
    learned = getattr(datamodule, "learned_from_data", "")
    if learned and settings.is_differentially_private:
        raise MisconfigurationException(
            "Differential privacy does not cover preprocessing by exact figures of the data: through them an example "
            f"changes the inputs of all others. {type(datamodule).__name__} has learned from the training data "
            f"{learned}"
        )


def check_schedules(schedules: Schedules, settings: FederationSettings, work: LocalWork) -> Schedules:
    """Returns the schedules, unless their number of steps would disclose how much data a silo has.

    Raises:
        MisconfigurationException: If it would.
    """
    if schedules:
        with misconfiguration():
            report_masking.check_steps("A schedule that steps inside local training", settings, work)
    return schedules


def settings_of_ranks(strategy: Any, trainer: L.Trainer) -> dict[str, str]:
    """The settings of a federation that must be the same on all ranks."""
    of_trainer = ("max_epochs", "max_steps", "min_epochs", "check_val_every_n_epoch", "num_sanity_val_steps")
    of_data = ("num_clients", "partition", "split_validation", "personal", "frozen", "_seed", "schedule", "durations")
    return {
        **settings_of_strategy(strategy),
        **settings_in_words(strategy, of_data),
        **{name: repr(getattr(trainer, name)) for name in of_trainer},
    }


def settings_of_strategy(strategy: Any) -> dict[str, str]:
    """The settings of a strategy on which the meaning of an update depends."""
    names = ("algorithm", "weighting", "client_optimizer", "cohort", "clients_per_round", "stragglers")
    return {
        **settings_in_words(strategy, (*names, "local_epochs", "local_steps", "aggregator")),
        "transforms": ", ".join(map(_numbers_of, strategy.transforms)),
    }


def settings_in_words(owner: Any, names: Iterable[str]) -> dict[str, str]:
    """Attributes of an object as text that is the same in every process, without addresses in memory."""
    return {name: re.sub(r" at 0x[0-9a-f]+", "", repr(getattr(owner, name))) for name in names}


def versions() -> dict[str, str]:
    """The versions of the libraries on which the results depend."""
    import lightning_fl  # not above, since the package imports this module

    torch_version = torch.__version__.split("+")[0]
    return {"lightning_fl": lightning_fl.__version__, "lightning": L.__version__, "torch": torch_version}


OWN_TO_EACH_SILO = "each silo's own"
"""What a datamodule says of numbers in ``described_columns`` that silos need not share."""


def described_columns(datamodule: Any, is_private: bool) -> dict[str, str]:
    """What the positions of features and classes mean, for a datamodule that says so.

    Args:
        datamodule: The datamodule or None.
        is_private: Whether the data is protected; then names that were learned from it stay here.
    """
    learned: str = getattr(datamodule, "learned_from_data", "")
    if is_private and learned:
        return {}
    return dict(getattr(datamodule, "described_columns", {}))


def warn_of_own_scaling(columns: Mapping[str, str]) -> None:
    """Warns of silos that each scale their columns by their own rows."""
    if OWN_TO_EACH_SILO in columns.values():
        rank_zero_warn(
            "Each silo scales its columns by its own rows, so that a number means something else at each of them. "
            "Agree on a schema (`lightning-fl analyze --schema`, or data.schema.save at one silo), and give it to all."
        )


def settings_of_training(trainer: L.Trainer) -> dict[str, str]:
    """What the module trains with, as far as it is numbers: its hyper-parameters and those of its optimizers.

    Text is left out, since silos rightly have paths and names of their own.
    """
    module = trainer.lightning_module
    found = {f"model.{name}": value for name, value in module.hparams.items()}
    for place, optimizer in enumerate(trainer.optimizers):
        name = type(optimizer).__name__ + (f" {place}" if len(trainer.optimizers) > 1 else "")
        found[f"optimizer {place}"] = type(optimizer).__name__
        for number, group in enumerate(optimizer.param_groups):
            where = f"{name}, group {number}" if len(optimizer.param_groups) > 1 else name
            found.update({f"{where}, {key}": value for key, value in group.items() if key != "params"})
    kinds = (int, float, bool, type(None), tuple)
    return {name: repr(value) for name, value in found.items() if type(value) in kinds or name.startswith("optimizer ")}


def _numbers_of(transform: Transform) -> str:
    """A transform's type and the numbers it was made with; its other attributes may differ between ranks."""
    numbers = {name: value for name, value in vars(transform).items() if type(value) in (int, float, bool)}
    return f"{type(transform).__name__}({numbers})"


def check_types(partition: Any, aggregator: Any, transforms: Any, personal: Any) -> None:
    """Makes sure that the strategy's parts are of the right kind.

    Raises:
        ValueError: If one is not.
    """
    check_type("partition", partition, Partitioner, "fl.datamodules.Dirichlet(0.3)")
    check_type("aggregator", aggregator, Aggregator, "fl.aggregation.WeightedMean()")
    for name, value, example in (
        ("transforms", transforms, "a list of fl.aggregation.Transform"),
        ("personal", personal, "a list of globs such as ['head.*']"),
    ):
        check_type(name, value, Sequence, example)
        if value is None:
            raise ValueError(f"{name}=None is no list; expected {example}. For none, leave it out or give [].")
    for transform in transforms:
        check_type("transforms", transform, Transform, "fl.aggregation.Transform objects")


def choose_weighting(
    weighting: Weighting | None, aggregator: Aggregator, transforms: Sequence[Transform], algorithm: Algorithm
) -> Weighting:
    """How clients are weighted: as the user says, else as the aggregator or a transform requires, else the algorithm's.

    Raises:
        ValueError: If the user says something else than the aggregator requires.
    """
    if weighting is not None and aggregator.weighting not in (None, weighting):
        raise ValueError(
            f"weighting={weighting!r} would be ignored: {type(aggregator).__name__} weights clients as "
            f"{aggregator.weighting!r}, since an attacker could claim any number of examples. Leave weighting out."
        )
    of_transforms = next((transform.weighting for transform in transforms if transform.weighting is not None), None)
    return weighting or aggregator.weighting or of_transforms or algorithm.weighting


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Makes sure that a setting has one of its values.

    Raises:
        ValueError: If it has not.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; expected one of {', '.join(map(repr, choices))}.")


def check_work(num_clients: int | None, participation: Participation) -> None:
    """Checks the numbers of clients and of local epochs and steps.

    Raises:
        ValueError: If one is out of range, or both epochs and steps are given.
    """
    local_epochs, local_steps = participation.local_epochs, participation.local_steps
    check_type("cohort", participation.cohort, Cohort, "a cohort such as fl.clients.Poisson(0.01)")
    check_type("stragglers", participation.stragglers, Stragglers, "fl.clients.Stragglers(0.9)")
    if local_epochs is not None and local_steps is not None:
        raise ValueError(
            f"local_epochs={local_epochs} and local_steps={local_steps} contradict each other: a client trains for "
            "passes over its data or for optimizer steps. Give one of them."
        )
    counts = {"num_clients": num_clients, "local_epochs": local_epochs, "local_steps": local_steps}
    for name, value in counts.items():
        if name != "num_clients" and isinstance(value, Amount):
            continue
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be a whole number, at least 1.")
    clients_per_round = participation.clients_per_round
    participation.cohort.check(clients_per_round)
    if num_clients is not None or isinstance(clients_per_round, float):
        cohort_size(clients_per_round, num_clients or 1)
    elif clients_per_round is not None:
        cohort_size(clients_per_round, max(int(clients_per_round), 1))


def check_trainer(trainer: L.Trainer) -> None:
    """Refuses settings of the Trainer that are impossible inside a round.

    Raises:
        MisconfigurationException: If one of them is set.
    """
    tuners = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
    # By name, because the callback of Lightning's `lr_find` is private.
    tuner = next((name for name in tuners if name in ("_LRCallback", "LearningRateFinder", "BatchSizeFinder")), None)
    if tuner is not None:
        raise MisconfigurationException(
            "The tuner (lr_find, scale_batch_size) trains batch by batch and has no rounds. Tune with strategy='auto'."
        )
    if getattr(trainer.strategy, "_layer_sync", None) is not None:
        raise MisconfigurationException(
            "Trainer(sync_batchnorm=True) would be ignored: a client's BatchNorm must not see the batches of other "
            "clients, and the processes of a silo keep their own statistics, of which the first one's are sent. Leave "
            "it out, or put a layer that needs no batch, such as GroupNorm, in its place."
        )
    if not trainer.enable_validation:
        return  # some packages set an interval though there is nothing to validate
    val_check_interval = getattr(trainer, "val_check_interval", "a time")  # Lightning sets none if it is a time
    # The integer 1 equals 1.0, but to Lightning it means after every batch.
    if val_check_interval != 1.0 or isinstance(val_check_interval, int):
        raise MisconfigurationException(
            f"val_check_interval={val_check_interval} asks for validation inside a round, where there is no "
            "global model. Leave it at 1.0 and use check_val_every_n_epoch, which counts rounds."
        )
    if trainer.check_val_every_n_epoch is None:
        raise MisconfigurationException(
            "check_val_every_n_epoch=None counts batches over rounds, but there is a global model only at a round's "
            "end. Give a number of rounds."
        )


_NUM_STARTED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_NTASKS")
"""Variables in which launchers say how many processes they have started."""


def check_launcher() -> None:
    """Makes sure that a process which trains alone has been started alone.

    Raises:
        MisconfigurationException: If a launcher has started several, of which each would train a federation of its own.
    """
    for name in _NUM_STARTED:
        started = os.environ.get(name, "")
        if started.isdigit() and int(started) > 1:
            raise MisconfigurationException(
                f"{name}={started}: a launcher has started {started} processes, but each is a federation of its own. "
                "Under mpirun Lightning needs mpi4py to see the others: pip install mpi4py. Under SLURM start with "
                f"srun. If this is a single process, unset {name}."
            )


def check_not_in_notebook(num_processes: int) -> None:
    """Refuses several processes in a notebook, which cannot be started again as another process.

    Raises:
        MisconfigurationException: In a notebook or an interactive Python.
    """
    if hasattr(sys, "ps1"):
        raise MisconfigurationException(
            f"devices={num_processes} starts the script once for each process, and a notebook is not a script. Use "
            "devices=1, in which one process simulates any number of clients, or run "
            f"`!lightning-fl fit --config config.yaml --trainer.devices {num_processes}`."
        )


def warn_of_processes(num_processes: int, device: torch.device) -> None:
    """Warns before many more processes are started than the machine has cores."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu" and num_processes > 2 * num_cores:
        rank_zero_warn(
            f"devices={num_processes} starts {num_processes} processes on {num_cores} cores, each with its own copy of "
            "the model and of Python. A process simulates any number of clients: set num_clients, and no more devices "
            "than cores."
        )


def check_phases(algorithm: Algorithm, local_epochs: Any, local_steps: Any) -> None:
    """Makes sure that the strategy's amount of local work has an effect on the algorithm.

    Raises:
        ValueError: If it would be ignored.
    """
    given = {"local_epochs": local_epochs, "local_steps": local_steps}
    name, value = next(((name, value) for name, value in given.items() if value is not None), ("", None))
    if value is not None and all(phase.has_own_work for phase in algorithm.phases()):
        raise ValueError(
            f"{type(algorithm).__name__} sets itself how much a client trains, so {name}={value!r} would be ignored. "
            f"Leave {name} out."
        )


def check_algorithm(algorithm: Algorithm, trainer: L.Trainer) -> None:
    """Checks that the algorithm trains something that is sent, and can measure what its ``probe`` asks for.

    Raises:
        MisconfigurationException: If it does not.
    """
    name = type(algorithm).__name__
    sent = [phase for phase in algorithm.phases() if phase.model == "global" and phase.trains != "personal"]
    if not sent:
        raise MisconfigurationException(f"{name} has no phase that trains what is sent, so nothing would be learned.")
    check_gradient_at(algorithm, trainer)
    if algorithm.probe is not None and not trainer.lightning_module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} measures the {_MEASURED[algorithm.probe]} of each client's data by calling `training_step`, which "
            "with manual optimization would train. Use automatic optimization, or another algorithm."
        )
    if algorithm.probe == "grad" and trainer.precision == "16-mixed":
        raise MisconfigurationException(
            f"{name} measures gradients outside the steps whose loss precision='16-mixed' scales, so that they may "
            "underflow. Use precision='bf16-mixed' or '32-true'."
        )


def check_gradient_at(algorithm: Algorithm, trainer: L.Trainer) -> None:
    """Checks that an algorithm that needs the gradient of a batch at several points can have it.

    Raises:
        MisconfigurationException: If it can't.
    """
    if not algorithm.needs_gradient_at:
        return
    found, remedy = None, ""
    if not trainer.lightning_module.automatic_optimization:
        found, remedy = "calling `training_step` trains with manual optimization", "Use automatic optimization"
    elif trainer.accumulate_grad_batches != 1:
        found = f"a step with accumulate_grad_batches={trainer.accumulate_grad_batches} is of several batches"
        remedy = "Leave it at 1 and take a larger batch_size"
    elif trainer.precision == "16-mixed":
        found, remedy = "precision='16-mixed' scales the loss of a step only", "Use precision='bf16-mixed' or '32-true'"
    elif any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        found, remedy = "LBFGS looks at a batch several times in a step", "Use another optimizer"
    if found is not None:
        raise MisconfigurationException(
            f"{type(algorithm).__name__} needs the gradient of a batch at several points in each step, but {found}. "
            f"{remedy}, or another algorithm."
        )


def check_same_on_ranks(group: Group, what: str, own: int) -> None:
    """Makes sure that all ranks have the same number of something; otherwise some would wait for the others forever.

    Raises:
        MisconfigurationException: On every rank, if they differ.
    """
    counts = [message.fields["count"] for message in group.all_gather(Message({"count": int(own)}), what)]
    different = next((rank for rank, count in enumerate(counts) if count != counts[0]), None)
    if different is not None:
        raise MisconfigurationException(
            f"{group.who(different).capitalize()} has {counts[different] or 'no'} {what}, {group.who(0)} has "
            f"{counts[0] or 'none'}. Give each equally many, or none (limit_val_batches=0)."
        )


def describe_failure(exception: BaseException, hides: bool) -> str:
    """What the other parties are told about an exception that ends this party's run.

    Args:
        exception: The exception.
        hides: Whether its words stay here, since those of an error in reading data may show some of it.
    """
    if isinstance(exception, KeyboardInterrupt):
        return "its user has stopped it."
    words = "" if hides else str(exception).strip()
    return f"{type(exception).__name__}: {words}" if words else f"{type(exception).__name__}, with more in its output."


def check_type(name: str, value: Any, kind: type, example: str) -> None:
    """Makes sure that an argument is None or an instance of ``kind``.

    Raises:
        ValueError: If it has not.
    """
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; expected {example}.")
