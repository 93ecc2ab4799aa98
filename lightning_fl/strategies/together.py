"""Clients that train side by side in Lightning's loop: one batch of the loop is a batch of each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_fl.clients.loaders import Loader
from lightning_fl.engines import Vectorized, VectorizedEngine
from lightning_fl.engines.stacking import num_bytes, part, signature, stack
from lightning_fl.strategies.capture import Capture
from lightning_fl.strategies.vectorizing import check_same_step, loader_kind
from lightning_fl.types import ClientId


class StackedBatch:
    """The batches of several clients, stacked; Lightning moves it to a device as one."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def to(self, device: torch.device, **kwargs: Any) -> StackedBatch:
        """The batch on ``device``."""
        return StackedBatch(
            pytree.tree_map(lambda leaf: leaf.to(device, **kwargs) if isinstance(leaf, Tensor) else leaf, self.content)
        )


class ClientsTogether:
    """Groups a rank's clients into units, and runs the steps of a unit.

    Args:
        module: The user's module.
        engine: Trains the units.
        settings: How many clients train together.
        batch_size: Tells the number of examples in a client's batch.
        allows_random: Whether random numbers in a step may differ from those that a client alone would draw.
    """

    def __init__(
        self,
        module: Any,
        engine: VectorizedEngine,
        settings: Vectorized,
        batch_size: Callable[[Any], int],
        allows_random: bool = False,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.allows_random = allows_random
        self.randomness = "error"
        self.capture = Capture(module)
        self.is_checked = False
        self.unit: Sequence[ClientId] = ()
        self.batch_size = 0
        self._batch_size = batch_size

    def group(
        self,
        clients: Sequence[ClientId],
        segments: Sequence[Sequence[int | None]],
        weights: Sequence[int | None],
        loaders: Sequence[Loader],
    ) -> tuple[list[list[ClientId]], list[Sequence[int | None]]]:
        """Puts clients with equally much work together; returns the units and their segments."""
        groups: dict[Any, list[list[ClientId]]] = {}
        units: list[list[ClientId]] = []
        own: list[Sequence[int | None]] = []
        for client, lengths, weight, loader in zip(clients, segments, weights, loaders, strict=True):
            kind = loader_kind(loader)
            key = None if kind is None or weight is None or None in lengths else (kind, weight, tuple(lengths))
            open_units = groups.setdefault(key, [])
            if key is not None and open_units and len(open_units[-1]) < self.max_clients:
                open_units[-1].append(client)
                continue
            units.append([client])
            own.append(lengths)
            open_units.append(units[-1])
        return units, own

    @property
    def max_clients(self) -> int:
        """The most clients that train together."""
        return self.settings.clients_per_step or self.engine.max_clients(self.settings.stacked_bytes)

    def split(self, unit: Sequence[ClientId], passes: Mapping[ClientId, list[Any]]) -> list[list[ClientId]]:
        """Divides a unit into clients whose batches can be stacked, and not more than memory allows.

        Args:
            unit: The clients.
            passes: The batches of those whose loader did not fail.
        """
        groups: dict[Any, list[ClientId]] = {}
        for client in unit:
            if client in passes:
                groups.setdefault(tuple(map(signature, passes[client])), []).append(client)
        return list(groups.values())

    def affordable(self, batches: list[Any]) -> int:
        """How many clients with batches like these may be in memory at once."""
        return max(1, self.settings.batch_bytes // max(1, sum(map(num_bytes, batches))))

    def stacked(self, passes: Sequence[list[Any]]) -> Iterator[StackedBatch]:
        """The clients' batches side by side, one after the other."""
        for batches in zip(*passes, strict=True):
            yield StackedBatch(stack(batches, share=False)[0])

    def start(self, unit: Sequence[ClientId]) -> None:
        """The clients of a unit have been loaded into the engine."""
        self.unit = unit
        self.losses: Any = 0.0
        self.num_examples = 0
        self.capture.forget()

    def check(self, batch: StackedBatch, *args: Any) -> None:
        """Makes sure, once, that one step of the unit does what a step of each client would do.

        Raises:
            NotVectorizable: If it does not; says why.
        """
        if not self.is_checked:
            self.randomness = check_same_step(self.engine, self.capture, batch.content, args, self.allows_random)
            self.is_checked = True

    def training_step(self, batch: StackedBatch, *args: Any) -> Tensor:
        """The step of all clients; returns the sum of their losses, so that each gets its own gradient."""
        losses, tensors = self.engine.step(self.capture, batch.content, *args, randomness=self.randomness)
        self.batch_size = self._batch_size(part(batch.content, 0))
        self.losses = self.losses + losses.detach().double() * self.batch_size
        self.num_examples += self.batch_size
        self.capture.tell(tensors, len(self.unit), self.batch_size)
        return losses.sum()

    def finish(self) -> list[float]:
        """The unit's last step is done; returns the clients' mean losses."""
        losses: list[float] = (self.losses / max(self.num_examples, 1)).tolist()
        self.unit = ()
        return losses
