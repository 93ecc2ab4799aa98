"""What the ranks agree on after a round, when the user's own hooks may have made a difference between them."""

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

HOOKS_AFTER_THE_ROUND = ("on_train_batch_end", "on_validation_end", "on_validation_epoch_end", "on_train_epoch_end")


@contextmanager
def naming_round(when: str, what: str = "") -> Iterator[None]:
    """Adds to the error about a lost rank which round it was, and what to do."""
    try:
        yield
    except RankLost as error:
        raise RankLost(
            f"{when}: {error} {what}Start all ranks again with trainer.fit(..., ckpt_path='last'); they go on after "
            "the last checkpoint."
        ) from error


class RankSync:
    """Gathers between rounds, each only where the user's hooks make it necessary.

    Args:
        trainer: The Trainer.
        group: The ranks of the federation.
    """

    def __init__(self, trainer: L.Trainer, group: Group) -> None:
        self.trainer = trainer
        self.group = group

    def gather(self, round: int, message: Message, topic: str) -> list[dict[str, Any]]:
        """What all ranks have to tell after a round."""
        with naming_round(f"After round {round}"):
            return [told.fields for told in self.group.all_gather(message, topic)]

    def settle(self, round: int, tensors: Mapping[str, Tensor], has_trained: bool) -> None:
        """The users' hooks after the round's last batch have run; what they made of the global model goes to all ranks.

        A rank without clients has no batch, and so none of these hooks.
        """
        if self.group.size == 1 or not has_hooks(self.trainer, "on_train_batch_end"):
            return
        own = {name: fingerprint(tensor) for name, tensor in tensors.items()}
        told = self.gather(round, Message({"own": own, "trained": has_trained}), "after the last batch")
        source = next((rank for rank, fields in enumerate(told) if fields["trained"]), 0)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if any(fields["own"][name] != told[0]["own"][name] for fields in told):
                    tensor.copy_(self.group.broadcast(tensor, source))

    def stop(self, round: int) -> None:
        """If one rank's hooks have asked to stop since the round's end, all ranks stop."""
        if self.group.size == 1 or not has_hooks(self.trainer, *HOOKS_AFTER_THE_ROUND):
            return
        told = self.gather(round, Message({"should_stop": self.trainer.should_stop}), "after the hooks")
        self.trainer.should_stop = any(fields["should_stop"] for fields in told)
