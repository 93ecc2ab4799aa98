"""One round of federated training, independent of Lightning.

A round reads::

    round = Round.open(settings, state, trainer, store, federation, index, cohort)
    for data in plan:
        task = round.start(data)
        for batch, position in task.batches:
            round.step(task, batch, position)
        round.finish(task)
    result = round.close(round.merge(RankReport()))
"""

from lightning_fl.federation.client_batches import ClientBatches, LoaderFailed
from lightning_fl.federation.client_group import ClientGroup, GroupUpdate
from lightning_fl.federation.client_task import ClientTask
from lightning_fl.federation.federation import Federation, GroupFederation, LocalFederation, Opening
from lightning_fl.federation.planner import Planner, RankPlan
from lightning_fl.federation.report import RankReport
from lightning_fl.federation.round import ClientData, GroupOutcome, Round, RoundResult
from lightning_fl.federation.server import Closing, ServerRound, close_server, open_server, server_step
from lightning_fl.federation.settings import FederationSettings, FederationState

__all__ = [
    "ClientBatches",
    "ClientData",
    "ClientGroup",
    "ClientTask",
    "Closing",
    "Federation",
    "FederationSettings",
    "FederationState",
    "GroupFederation",
    "GroupOutcome",
    "GroupUpdate",
    "LoaderFailed",
    "LocalFederation",
    "Opening",
    "Planner",
    "RankPlan",
    "RankReport",
    "Round",
    "RoundResult",
    "ServerRound",
    "close_server",
    "open_server",
    "server_step",
]
