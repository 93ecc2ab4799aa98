"""Clients that train side by side in Lightning's loop: one batch of the loop is a batch of each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_fl.clients.rows import Rows, stack_rows
from lightning_fl.engines import Vectorized, VectorizedEngine
from lightning_fl.engines.allocator import keep_freed_memory
from lightning_fl.engines.stacking import NotStackable, num_bytes, part, signature, stack
from lightning_fl.strategies import lightning_results as logged
from lightning_fl.strategies.capture import Capture, NotVectorizable
from lightning_fl.strategies.replay import Replay
from lightning_fl.strategies.vectorizing import MAX_FLOPS_ON_CPU, check_same_step
from lightning_fl.strategies.watching import check_unchanged, check_undrawn, own_attributes, random_states
from lightning_fl.types import ClientId

__all__ = ["ClientsTogether", "NotStackable", "NotVectorizable", "StackedBatch"]


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
        trainer: The Trainer.
        engine: Trains the units.
        settings: How many clients train together.
        is_asked_for: Whether the user has asked for it, so that what stands against it is an error.
        allows_random: Whether random numbers in a step may be others than a client alone would draw, and depend on who
            trains beside it.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        engine: VectorizedEngine,
        settings: Vectorized,
        is_asked_for: bool = False,
        allows_random: bool = False,
    ) -> None:
        self.trainer = trainer
        self.engine = engine
        self.settings = settings
        self.is_asked_for = is_asked_for
        self.allows_random = allows_random
        self.capture = Capture(trainer.lightning_module)
        self.replay = Replay(engine, self.capture, settings.compile) if settings.record else None
        self.unit: Sequence[ClientId] = ()
        self.batch_size = 0
        self._is_checked = False
        self._randomness = "error"

    @property
    def max_clients(self) -> int:
        """The most clients that train together."""
        return self.settings.clients_per_step or self.engine.max_clients(self.settings.stacked_bytes)

    def group(
        self,
        clients: Sequence[ClientId],
        segments: Sequence[Sequence[int | None]],
        kinds: Sequence[tuple[Any, int | None]],
    ) -> tuple[list[list[ClientId]], list[Sequence[int | None]]]:
        """Puts clients with equally much work together; returns the units and their segments.

        Args:
            clients: The clients.
            segments: How many batches each trains on, pass by pass.
            kinds: What each one's batches look like, and its number of examples; None where that is not known.
        """
        most = self.max_clients
        fullest: dict[Any, list[ClientId]] = {}
        units: list[list[ClientId]] = []
        own: list[Sequence[int | None]] = []
        for client, lengths, kind in zip(clients, segments, kinds, strict=True):
            key = (kind, tuple(lengths))
            is_known = None not in kind and None not in lengths
            if is_known and key in fullest and len(fullest[key]) < most:
                fullest[key].append(client)
                continue
            units.append([client])
            own.append(lengths)
            if is_known:
                fullest[key] = units[-1]
        return units, own

    def split(self, unit: Sequence[ClientId], passes: Mapping[ClientId, list[Any]]) -> list[list[ClientId]]:
        """Divides a unit into clients whose batches can be stacked.

        Args:
            unit: The clients.
            passes: The batches of those whose loader did not fail.
        """
        groups: dict[Any, list[ClientId]] = {}
        for client in filter(passes.__contains__, unit):
            groups.setdefault(tuple(map(_signature, passes[client])), []).append(client)
        return list(groups.values())

    def affordable(self, batches: list[Any]) -> int:
        """How many clients with batches like these may be in memory at once."""
        return max(1, self.settings.batch_bytes // max(1, sum(map(_num_bytes, batches))))

    def stacked(self, passes: Sequence[list[Any]]) -> Iterator[StackedBatch]:
        """The batches of clients that :meth:`split` leaves together side by side, each made when its turn comes.

        Raises:
            NotStackable: If they hold something that can't be stacked.
        """
        convert = self.trainer.precision_plugin.convert_input
        for batches in zip(*passes, strict=True):
            is_unread = isinstance(batches[0], Rows)
            yield StackedBatch(convert(stack_rows(batches) if is_unread else stack(batches, share=False)[0]))

    def start(self, unit: Sequence[ClientId], batch: StackedBatch) -> None:
        """The clients of a unit have been loaded into the engine; ``batch`` is their first.

        Raises:
            NotVectorizable: If one step of the unit would not do what a step of each client does; says why. It is
                checked at the first unit.
        """
        self.unit = unit
        self.losses: Any = 0.0
        self.num_examples = 0
        self.capture.forget()
        if not self._is_checked:
            strategy = self.trainer.strategy
            content = strategy.batch_to_device(batch).content
            with strategy.precision_plugin.train_step_context():
                args = logged.step_arguments(self.trainer.lightning_module, 0)
                is_cpu = self.engine.device.type == "cpu"
                most = MAX_FLOPS_ON_CPU if is_cpu and not self.is_asked_for else math.inf
                self._randomness = check_same_step(self.engine, self.capture, content, args, self.allows_random, most)
            self._is_checked = True
            if is_cpu and self.settings.kept_bytes:
                keep_freed_memory(self.settings.kept_bytes)
        if self.replay is not None:
            self.replay.start()

    def refuse(self, reason: str) -> None:
        """Clients can't train together, or had better not; says so.

        Raises:
            MisconfigurationException: If the user has asked for it.
        """
        self.unit = ()
        if self.is_asked_for:
            raise MisconfigurationException(
                f"engine='vectorized' can't train several clients in one step: {reason}. Change that, or let each "
                "client train alone with engine='sequential' ('auto' chooses)."
            )
        if len(self.trainer.strategy.active_rounds.population) > 1:  # type: ignore[attr-defined]
            rank_zero_info(f"Clients train one after the other: {reason}.")

    def training_step(self, batch: StackedBatch, *args: Any) -> Tensor:
        """The step of all clients; returns the sum of their losses, so that each gets its own gradient."""
        content = batch.content
        if self.replay is None:
            loss, losses, tensors = self._step(content, args)
        else:
            loss, losses, tensors = self.replay(content, args, self._randomness, self._step)
        self.batch_size = logged.count_examples(part(content, 0))
        self.losses = self.losses + losses.detach().double() * self.batch_size
        self.num_examples += self.batch_size
        self.capture.tell(tensors, len(self.unit), self.batch_size)
        return loss

    def _step(self, content: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
        module = self.capture.module
        before, drawn = own_attributes(module), random_states()
        try:
            losses, tensors = self.engine.step(self.capture, content, *args, randomness=self._randomness)
            check_unchanged(before, own_attributes(module))
            check_undrawn(drawn)
        except (NotVectorizable, RuntimeError) as error:
            if not isinstance(error, NotVectorizable) and not any(word in str(error) for word in ("vmap", "functorch")):
                raise
            raise MisconfigurationException(
                f"training_step can't run for {len(self.unit)} clients in one step, though it could at first: {error}. "
                "Let each client train alone with FederatedStrategy(engine='sequential')."
            ) from error
        return losses.sum(), losses, tensors

    def clip_norms(self, optimizer: torch.optim.Optimizer, max_norm: float) -> bool:
        """Clips each client's gradients by their norm; tells whether several clients train at the moment."""
        if self.unit:
            self.engine.clip_norms(optimizer, max_norm)
        return bool(self.unit)

    def finish(self) -> list[float]:
        """The unit's last step is done; returns the clients' mean losses."""
        losses: list[float] = (self.losses / max(self.num_examples, 1)).tolist()
        self.unit = ()
        return losses

    def only(self, taken: Sequence[bool]) -> Mapping[str, Mapping[str, Any]]:
        """Tells the torchmetrics of those clients whose updates were taken in, and returns what they have logged."""
        accepted = torch.tensor(taken).nonzero().flatten()
        logged = self.capture.entries(accepted)
        self.capture.update_metrics(accepted)
        return logged


def _signature(batch: Any) -> Any:
    return batch.signature if isinstance(batch, Rows) else signature(batch)


def _num_bytes(batch: Any) -> int:
    return batch.num_bytes if isinstance(batch, Rows) else num_bytes(batch)
