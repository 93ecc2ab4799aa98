"""Prints the plan of a run, without training."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_fl.engines.tensors import FederatedTensors
from lightning_fl.strategies import FederatedStrategy
from lightning_fl.tree import sum_dtype


class DryRun(L.Callback):
    """Prints which clients would train on which rank and what a round would send, then stops before the first batch.

    From the command line: ``lightning-fl fit --config recipe.yaml --dry-run``.

    Args:
        console: The console to print to. None: the terminal.

    Raises:
        MisconfigurationException: When training starts, if the strategy is not federated.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(strategy="fedavg", callbacks=[DryRun()], logger=False, accelerator="cpu")
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the plan of the first round and stops the Trainer."""
        trainer.should_stop = True
        strategy = trainer.strategy
        if not isinstance(strategy, FederatedStrategy):
            raise MisconfigurationException(
                f"DryRun needs a federated strategy, found {type(strategy).__name__}. Choose a federated one, "
                "such as Trainer(strategy='fedavg')."
            )
        if trainer.is_global_zero:
            self.console.print(_facts(strategy, pl_module))
            self.console.print(_placement(strategy))


def _facts(strategy: FederatedStrategy, module: nn.Module) -> Table:
    view = strategy.view
    shared, num_bytes = _shared(strategy, module)
    kind = "silos" if view.population.silos is not None else "simulated clients"
    works = [view.max_work.for_phase(phase) for phase in strategy.algorithm.phases()]
    amounts = [f"{w.epochs} local epochs" if w.steps is None else f"{w.steps} steps" for w in works]
    work = ", then ".join(amounts)
    work = work if view.participation.is_even else f"at most {work}"
    table = Table("what", "value", title="A round of this run, without training")
    for what, value in {
        "algorithm": repr(strategy.algorithm),
        "clients": f"{len(view.population):,} {kind}, {view.expected_cohort_size:,g} in a round",
        "cohort": repr(strategy.cohort),
        "weighting": strategy.weighting,
        "a client trains": f"{work}, optimizer state: {strategy.client_optimizer}",
        "ranks": str(strategy.federation.size),
        "shared tensors": f"{shared:,} with {num_bytes / 1e6:,.2f} MB",
        "sent by each rank in a round": f"{num_bytes / 1e6 if strategy.federation.size > 1 else 0:,.2f} MB",
        "memory on each rank beyond the model": f"about {3 * num_bytes / 1e6:,.2f} MB",
    }.items():
        table.add_row(what, value)
    return table


def _shared(strategy: FederatedStrategy, module: nn.Module) -> tuple[int, int]:
    tensors = FederatedTensors(module, strategy.personal)
    values: list[Any] = [*tensors.params.values(), *tensors.buffers.values()]
    # Tensors are sent in the dtype in which they are summed, which may be wider than their own.
    return len(values), sum(value.numel() * sum_dtype(value.dtype).itemsize for value in values)


def _placement(strategy: FederatedStrategy) -> Table:
    view = strategy.view
    table = Table("rank", "clients", "who", title="The first round's cohort")
    for rank, clients in enumerate(view.place(view.cohort)):
        who = ", ".join(map(str, clients[:12])) + (", ..." if len(clients) > 12 else "")
        table.add_row(str(rank), str(len(clients)), who)
    return table
