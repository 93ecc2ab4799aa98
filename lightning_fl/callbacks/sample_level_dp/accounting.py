"""The clients' privacy ledgers under sample-level privacy: the privacy spent, and the cost of another round."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_fl.clients.local_work import LocalWork
from lightning_fl.clients.state_store import LEDGER
from lightning_fl.communication import Message
from lightning_fl.privacy.accounting.bounds import Method
from lightning_fl.privacy.accounting.ledger import Gaussian, Ledger
from lightning_fl.privacy.accounting.per_client import noise_multiplier_for_all
from lightning_fl.privacy.accounting.sampling import Sampling
from lightning_fl.privacy.noise import PrivacyError
from lightning_fl.privacy.sample_level.poisson_loader import PoissonLoader
from lightning_fl.privacy.state import unpack
from lightning_fl.strategies.round_view import RoundView
from lightning_fl.types import ClientId


def clients_here(view: RoundView) -> list[ClientId]:
    """The clients whose home is this rank."""
    return view.place(list(view.population.ids), sticky=True)[view.group.rank]


def ledger_of(view: RoundView, client: ClientId) -> Ledger:
    """The privacy ledger of a client whose home is this rank."""
    ledger, state = Ledger(), view.client_state(client)
    if LEDGER in state:
        ledger.load_state_dict(unpack(state[LEDGER]))
    return ledger


def loader_of(view: RoundView, client: ClientId) -> PoissonLoader:
    """A client's Poisson loader.

    Raises:
        PrivacyError: If its loader is not a Poisson loader.
    """
    loader = view.population.loaders[client]
    if not isinstance(loader, PoissonLoader):
        raise PrivacyError(
            f"The loader of client {client!r} is a {type(loader).__name__} and draws no Poisson batches. The run stops."
        )
    return loader


def cost_of(view: RoundView, client: ClientId, noise_multiplier: float, work: LocalWork | None = None) -> Ledger:
    """The releases that a client's training in a round adds to its ledger.

    Args:
        view: The current round.
        client: The client.
        noise_multiplier: The noise of its steps.
        work: The client's local work. None: as planned for the current round, else the largest of any client.
    """
    ledger, num_steps = Ledger(), sum(steps_of(view, client, work))
    if num_steps:
        ledger.record(Gaussian(noise_multiplier, loader_of(view, client).sampling), num_steps)
    return ledger


def steps_of(view: RoundView, client: ClientId, work: LocalWork | None = None) -> list[int]:
    """The number of steps in each phase of a client's training in a round; see :func:`cost_of`."""
    phases = view.work_of(client) if work is None else view.phases_of(work)
    return [phase.num_steps(len(loader_of(view, client))) or 0 for phase in phases]


def with_another_round(view: RoundView, noise_multiplier: float) -> list[Ledger]:
    """The ledgers of this rank's clients as they would be if each took part in another round."""
    return [
        ledger_of(view, client) + cost_of(view, client, noise_multiplier, view.max_work)
        for client in clients_here(view)
    ]


def gather(view: RoundView, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Gathers the ranks' fields; only this rank's if silos hide the sizes of their data, which the fields reveal."""
    if view.settings.aggregator.hides_reports and view.population.silos is not None:
        return [own]
    return [message.fields for message in view.group.all_gather(Message(own), "sample-level privacy")]


def gather_ledgers(view: RoundView, own: Ledger) -> list[Ledger]:
    """Gathers a ledger from each rank of a simulation."""
    found = []
    for fields in gather(view, {"ledger": own.state_dict()}):
        ledger = Ledger()
        ledger.load_state_dict(fields["ledger"])
        found.append(ledger)
    return found


def calibrate(trainer: L.Trainer, view: RoundView, target_epsilon: float, delta: float, method: Method) -> float:
    """The smallest noise multiplier such that no client's epsilon exceeds the target in ``max_epochs`` rounds.

    Raises:
        MisconfigurationException: If the number of rounds is not known.
    """
    num_rounds = trainer.max_epochs
    if num_rounds is None or num_rounds < 1:
        raise MisconfigurationException(
            f"target_epsilon={target_epsilon} needs the number of rounds, found max_epochs={num_rounds}. Set it."
        )
    counts: dict[Sampling, int] = {}
    for client in clients_here(view):
        for event, count in cost_of(view, client, 1.0, view.max_work):
            # Among clients with the same sampling rate the one with the most steps spends most; skip the others.
            counts[event.sampling] = max(counts.get(event.sampling, 0), count * num_rounds)
    own = noise_multiplier_for_all(target_epsilon, delta, counts, method) if counts else 0.0
    # If ranks may know each other's figures, all use the largest multiplier, which any rank's client may need.
    found = max(float(fields["noise"]) for fields in gather(view, {"noise": own}))
    rank_zero_info(
        f"noise_multiplier={found:.4f} keeps each client's epsilon within {target_epsilon:g} for {num_rounds} rounds, "
        f"at delta={delta:g}."
    )
    return found
