"""Synchronizes the ranks after a round, where the user's own hooks may have made them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_fl.communication import Group, Message, RankLost
from lightning_fl.strategies.hooks import has_hooks
from lightning_fl.tree import fingerprint

REMEDY = (
    "Start all ranks again with the last checkpoint to continue: trainer.fit(..., ckpt_path=FILE), or "
    "`--ckpt_path last` on the command line."
)
HOOKS_AFTER_THE_ROUND = ("on_train_batch_end", "on_validation_end", "on_validation_epoch_end", "on_train_epoch_end")


@contextmanager
def naming_round(when: str, what: str = "") -> Iterator[None]:
    """Adds the round and the remedy to the error about a lost rank."""
    try:
        yield
    except RankLost as error:
        name_round(error, when, what)
        raise


def name_round(error: RankLost, when: str, what: str = "") -> None:
    """Adds the round and the remedy to the text of an error, once."""
    if REMEDY not in str(error):
        error.args = (f"{when}: {error} {what}{REMEDY}",)


class RankSync:
    """Collectives between rounds, each run only if the user has hooks that make it necessary.

    Args:
        trainer: The Trainer.
        group: The ranks of the federation.
    """

    def __init__(self, trainer: L.Trainer, group: Group) -> None:
        self.trainer = trainer
        self.group = group

    def gather(self, round: int, message: Message, topic: str) -> list[dict[str, Any]]:
        """Gathers the fields of all ranks' messages after a round."""
        with naming_round(f"After round {round}"):
            return [gathered.fields for gathered in self.group.all_gather(message, topic)]

    def settle(self, round: int, tensors: Mapping[str, Tensor], has_trained: bool) -> None:
        """Broadcasts what the user's hooks have changed in the global model after the round's last batch.

        These hooks do not run on a rank without clients, which has no batch.
        """
        if self.group.is_alone or not has_hooks(self.trainer, "on_train_batch_end"):
            return
        # Fingerprints first: as a rule nothing has changed, and then no tensor travels.
        own = {name: fingerprint(tensor) for name, tensor in tensors.items()}
        ranks = self.gather(round, Message({"own": own, "trained": has_trained}), "after the last batch")
        # A rank that has trained has run the hooks, whose changes are to be kept.
        source = next((rank for rank, fields in enumerate(ranks) if fields["trained"]), 0)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if any(fields["own"][name] != ranks[0]["own"][name] for fields in ranks):
                    tensor.copy_(self.group.broadcast(tensor, source))

    def stop(self, round: int) -> None:
        """Stops all ranks if the hooks of one have set ``trainer.should_stop`` since the round's end."""
        if self.group.is_alone or not has_hooks(self.trainer, *HOOKS_AFTER_THE_ROUND):
            return
        ranks = self.gather(round, Message({"should_stop": self.trainer.should_stop}), "after the hooks")
        self.trainer.should_stop = any(fields["should_stop"] for fields in ranks)
