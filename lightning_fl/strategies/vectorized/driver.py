"""Clients that train side by side in Lightning's loop: one batch of the loop is a batch of each of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_fl.data.lazy_batches import LazyBatch, stack_lazy
from lightning_fl.engines import Vectorized, VectorizedEngine
from lightning_fl.engines.vectorized.stacking import NotStackable, num_bytes, part, signature, stack
from lightning_fl.engines.vectorized.step_schedule import StepMask, are_equal, parts, step_schedule_of
from lightning_fl.federation.round import Round
from lightning_fl.strategies import internals as internals
from lightning_fl.strategies import results as logged
from lightning_fl.strategies.vectorized.compatibility import MAX_FLOPS_ON_CPU, BatchForecast, check_equivalence
from lightning_fl.strategies.vectorized.log_capture import LogCapture, NotVectorizable
from lightning_fl.strategies.vectorized.side_effects import (
    check_unchanged,
    check_undrawn,
    own_attributes,
    random_states,
)
from lightning_fl.strategies.vectorized.step_cache import StepCache, with_grads
from lightning_fl.types import ClientId

__all__ = ["NotStackable", "NotVectorizable", "StackedBatch", "VectorizedDriver"]

BYTES_OF_ARITHMETIC = 2**20
"""A step of a client alone whose parameters take so much is all arithmetic."""


class StackedBatch:
    """The batches of several clients, stacked; Lightning moves it to a device as one.

    Args:
        content: The batches, in which each tensor is stacked over the clients.
        tick: The clients of the unit that train on it.
    """

    def __init__(self, content: Any, tick: StepMask) -> None:
        self.content = content
        self.tick = tick

    def to(self, device: torch.device, **kwargs: Any) -> StackedBatch:
        """The batch on ``device``."""
        content = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device, **kwargs), self.content)
        return StackedBatch(content, self.tick)


class VectorizedDriver:
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
        self.capture = LogCapture(trainer.lightning_module)
        self.replay = StepCache(engine, self.capture, settings.compile) if settings.record else None
        self.unit: Sequence[ClientId] = ()
        self.num_examples_of_step = 0
        self.num_ticks = 0
        self._is_checked = False
        self._grads_of: dict[Any, frozenset[str] | None] = {}
        self._randomness = "error"

    @property
    def max_clients(self) -> int:
        """The most clients that train together."""
        return self.settings.clients_per_step or self.engine.max_clients(self.settings.stacked_bytes)

    @property
    def wants_equal(self) -> bool:
        """Whether only clients with equal work may train together, because their steps share more than a shape."""
        kinds = set(self._grads_of.values())
        is_shared = self.trainer.accumulate_grad_batches > 1 or bool(internals.client_schedules(self.trainer))
        return is_shared or None in kinds or len(kinds) > 1

    @property
    def _arithmetic(self) -> float:
        return min(1.0, self.engine.bytes_of_one / BYTES_OF_ARITHMETIC)

    def group(self, outlooks: Mapping[ClientId, BatchForecast | None]) -> list[list[ClientId]]:
        """Puts clients together who may train side by side.

        Args:
            outlooks: What is known of each client's batches before they are read.
        """
        most, wants_equal = self.max_clients, self.wants_equal
        families: dict[Any, list[ClientId]] = {}
        for client, outlook in outlooks.items():
            segments = outlook.segments if outlook is not None and wants_equal else None
            family = (None, client) if outlook is None else (outlook.family, segments)
            families.setdefault(family, []).append(client)
        units = []
        for clients in families.values():
            works = {client: outlook.work if (outlook := outlooks[client]) else () for client in clients}
            alike: dict[Any, list[ClientId]] = {}
            for client, work in works.items():
                alike.setdefault(work, []).append(client)
            rest: list[ClientId] = []
            for own in sorted(alike.values(), key=lambda own: -len(works[own[0]])):
                num_full = len(own) // most * most
                units += [own[start : start + most] for start in range(0, num_full, most)]
                rest += own[num_full:]
            for start in range(0, len(rest), most):
                chunk = set(rest[start : start + most])
                units += self.split({client: work for client, work in works.items() if client in chunk})
        return units

    def split(self, works: Mapping[ClientId, Sequence[Any]]) -> list[list[ClientId]]:
        """Divides clients into those that had best train together.

        Args:
            works: For each client, what its batches look like, one after the other.
        """
        unit = list(works)
        rows = parts(list(works.values()), self.engine.optimizers.num_steps_apart, self.wants_equal, self._arithmetic)
        return [[unit[row] for row in own] for own in rows]

    def ticks(self, works: Sequence[Sequence[Any]]) -> list[StepMask] | None:
        """In which steps the clients of a unit train; None if all train in each."""
        return None if are_equal(works) else step_schedule_of(works, self.engine.optimizers.num_steps_apart)

    @staticmethod
    def signatures(passes: Mapping[ClientId, list[Any]]) -> dict[ClientId, tuple[Any, ...]]:
        """What must be alike for batches of clients to be stacked."""
        return {client: tuple(map(_signature, batches)) for client, batches in passes.items()}

    def affordable(self, unit: Sequence[ClientId], batches: list[Any], lengths: Iterable[int]) -> list[list[ClientId]]:
        """Divides a unit into clients whose batches may be in memory at once.

        Args:
            unit: The clients.
            batches: Those of one of them, which has at least one.
            lengths: How many batches each has.
        """
        a_batch = sum(map(_num_bytes, batches)) / len(batches)
        found: list[list[ClientId]] = [[]]
        held = 0.0
        for client, length in zip(unit, lengths, strict=True):
            held += length * a_batch
            if found[-1] and held > self.settings.batch_bytes:
                found.append([])
                held = length * a_batch
            found[-1].append(client)
        return found

    def stacked(self, passes: Sequence[list[Any]], ticks: Sequence[StepMask] | None) -> Iterator[StackedBatch]:
        """The batches of clients that :meth:`split` leaves together side by side, each made when its turn comes.

        Args:
            passes: Each client's batches.
            ticks: Who of them trains in each step. None: all.

        Raises:
            NotStackable: If they hold something that can't be stacked.
        """
        unread = [iter(batches) for batches in passes]
        every = tuple(range(len(passes)))
        for tick in [every] * len(passes[0]) if ticks is None else ticks:
            yield self._stacked([next(unread[row]) for row in tick], tick)

    def _stacked(self, batches: Sequence[Any], tick: StepMask) -> StackedBatch:
        is_unread = isinstance(batches[0], LazyBatch)
        content = stack_lazy(batches) if is_unread else stack(batches, share=False, pool=self.engine.pool)[0]
        return StackedBatch(self.trainer.precision_plugin.convert_input(content), tick)

    def start(self, round: Round, unit: Sequence[ClientId], batch: StackedBatch) -> None:
        """The clients of a unit have been loaded into the engine; ``batch`` is their first.

        Raises:
            NotVectorizable: If one step of the unit would not do what a step of each client does; says why. It is
                checked at the first unit.
        """
        self.unit, self._round = unit, round
        self.num_ticks = 0
        self.num_steps = torch.zeros(len(unit), dtype=torch.int64)
        self.num_examples = torch.zeros(len(unit), dtype=torch.int64)
        self.losses = torch.zeros(len(unit), dtype=torch.float64, device=self.engine.device)
        self.capture.forget()
        self._round.choose(batch.tick)
        if not self._is_checked:
            self._check(batch)
            self._is_checked = True
        if self.replay is not None:
            self.replay.start()

    def _check(self, batch: StackedBatch) -> None:
        is_cpu = self.engine.device.type == "cpu"
        most = MAX_FLOPS_ON_CPU if is_cpu and not self.is_asked_for else math.inf
        with self._in_step(batch) as (content, args):
            self._randomness = check_equivalence(self.engine, self.capture, content, args, self.allows_random, most)

    def look_at(self, passes: Sequence[list[Any]], works: Sequence[Sequence[Any]]) -> bool:
        """Tries a step of each shape of batch that is new; tells whether :attr:`wants_equal` is another one since.

        Args:
            passes: The batches of each client of the unit that has been started.
            works: Their signatures.
        """
        before = self.wants_equal
        for row, (batches, signatures) in enumerate(zip(passes, works, strict=True)):
            for batch, key in zip(batches, signatures, strict=True):
                if key not in self._grads_of:
                    self._round.choose((row,))
                    with self._in_step(self._stacked([batch], (row,))) as (content, args):
                        self._grads_of[key] = with_grads(self.engine, self.capture, content, args, self._randomness)
        return self.wants_equal != before

    @contextmanager
    def _in_step(self, batch: StackedBatch) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        strategy = self.trainer.strategy
        content = strategy.batch_to_device(batch).content
        with strategy.precision_plugin.train_step_context():
            yield content, logged.step_arguments(self.trainer.lightning_module, 0)

    def leave(self) -> None:
        """The clients at hand won't train as they were started."""
        if self.unit:
            self._round.leave_clients()
        self.unit = ()

    def refuse(self, reason: str) -> None:
        """Clients can't train together, or had better not; says so.

        Raises:
            MisconfigurationException: If the user has asked for it.
        """
        self.leave()
        if self.is_asked_for:
            raise MisconfigurationException(
                f"engine='vectorized' can't train several clients in one step: {reason}. Change that, or let each "
                "client train alone with engine='sequential' ('auto' chooses)."
            )
        if len(self.trainer.strategy.active_rounds.population) > 1:  # type: ignore[attr-defined]
            rank_zero_info(f"Clients train one after the other: {reason}.")

    def training_step(self, batch: StackedBatch, *args: Any) -> Tensor:
        """The step of all clients; returns the sum of their losses, so that each gets its own gradient."""
        content, rows = batch.content, torch.tensor(batch.tick)
        self._round.choose(batch.tick)
        if self.replay is None:
            loss, losses, tensors = self._step(content, args)
        else:
            loss, losses, tensors = self.replay(content, args, self._randomness, self._step)
        batch_size = logged.count_examples(part(content, 0))
        self.num_examples_of_step = batch_size * len(rows)
        self.num_ticks += 1
        self.num_steps[rows] += 1
        self.num_examples[rows] += batch_size
        self.losses[rows.to(self.losses.device)] += losses.detach().double() * batch_size
        self.capture.tell(tensors, rows, batch_size)
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

    def finish(self) -> tuple[list[float], list[int] | None]:
        """The unit's last step is done; returns the clients' mean losses, and their steps if not all took each."""
        losses = self.losses / self.num_examples.clamp(min=1).to(self.losses.device)
        self.unit = ()
        num_steps: list[int] = self.num_steps.tolist()
        return losses.tolist(), None if min(num_steps) == self.num_ticks else num_steps

    def only(self, taken: Sequence[bool]) -> Mapping[str, Mapping[str, Any]]:
        """Tells the torchmetrics of those clients whose updates were taken in, and returns what they have logged."""
        accepted = torch.tensor(taken)
        logged = self.capture.entries(accepted)
        self.capture.update_metrics(accepted)
        return logged


def _signature(batch: Any) -> Any:
    return batch.signature if isinstance(batch, LazyBatch) else signature(batch)


def _num_bytes(batch: Any) -> int:
    return batch.num_bytes if isinstance(batch, LazyBatch) else num_bytes(batch)
