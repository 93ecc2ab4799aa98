"""The local training of a client group in a round: its batches, its phases, and its measurements."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fl.clients.local_work import BatchPosition
from lightning_fl.data.client_loaders import Loader, likely_examples
from lightning_fl.engines import ClientFacts
from lightning_fl.federation.client_group import ClientGroup
from lightning_fl.types import ClientId, LocalRun, Phase


class ClientTask:
    """The local training of a client group in a round.

    Args:
        group: Calls the algorithm for the group.
        batches: The group's batches, each with its position.
        phases: The phases of its training.
        known_sizes: Number of examples in one pass over each client's data; None if it is known only after training.
        loader: The loader of a client alone, whose length is used if its batches don't tell how many examples they
            hold.
    """

    def __init__(
        self,
        group: ClientGroup,
        batches: Iterator[tuple[Any, BatchPosition]],
        phases: Sequence[Phase],
        known_sizes: Sequence[int | None],
        loader: Loader | None = None,
    ) -> None:
        self.group = group
        self.batches = batches
        self.phases = phases
        self.known_sizes = known_sizes
        self.loader = loader
        self.started = time.perf_counter()
        self.phase = phases[0]
        self._phase_index = 0
        self._examples_seen = 0
        self._examples_of_pass: int | None = None
        self._sizes_are_known = True
        self._losses: list[tuple[Sequence[int], Tensor | None, int]] = []
        self._loss_sum = 0.0
        self._examples_of_losses = 0
        self._has_loss = False
        self._every = tuple(range(len(group.clients)))

    @property
    def clients(self) -> tuple[ClientId, ...]:
        """The clients of the group."""
        return self.group.clients

    @property
    def counts(self) -> bool:
        """Whether the current phase trains the model that is sent, so that its losses and logged values are used."""
        return self.phase.model == "global"

    def next_phase(self) -> Phase:
        """Starts the next phase."""
        # Each phase reads the data again: with the examples of earlier phases in the count, the pass that ends in this
        # phase would seem larger than it is.
        self._phase_index += 1
        self.phase = self.phases[self._phase_index]
        self._examples_seen = 0
        return self.phase

    def record(
        self,
        position: BatchPosition,
        num_examples: int,
        losses: Tensor | None,
        mask: Sequence[int] | None = None,
        is_known: bool = True,
    ) -> None:
        """Records a step.

        Args:
            position: The batch's position in the local work.
            num_examples: Examples in the batch of one client.
            losses: The loss of a client alone, or of each of several; None if the batch was skipped.
            mask: The positions in the group of the clients that trained. None: all.
            is_known: Whether the batch, or the module, specifies its number of examples; if not, ``num_examples`` is
                only a weight of its loss.
        """
        self._sizes_are_known &= is_known
        # Examples count in every phase, because a client's weight is the size of its data, whichever model a phase
        # trains.
        self._examples_seen += num_examples
        if position.ends_pass and self._examples_of_pass is None:
            self._examples_of_pass = self._examples_seen
        if not self.counts:
            return
        # Reading a loss on a CPU costs nothing, and a running sum needs no memory for each step. A skipped batch is
        # added here on a GPU too: it has no loss to wait for.
        if mask is None and len(self._every) == 1 and (losses is None or losses.is_cpu):
            self._examples_of_losses += num_examples
            if losses is not None:
                self._has_loss = True
                self._loss_sum += losses.item() * num_examples
        else:  # summed when the group has finished: reading a loss on a GPU would wait for the step
            self._losses.append((self._every if mask is None else mask, losses, num_examples))

    @property
    def steps_by_client(self) -> list[int] | None:
        """How many steps each client has taken; None if all have taken every step."""
        # The records count batches, which are optimizer steps only where gradients do not accumulate. Groups with
        # unequal work never accumulate; all others rely on the engine's own count.
        if all(len(mask) == len(self._every) for mask, _, _ in self._losses):
            return None
        counts = [0] * len(self._every)
        for mask, _, _ in self._losses:
            for place in mask:
                counts[place] += 1
        return counts

    def runs(self, facts: Sequence[ClientFacts]) -> list[LocalRun]:
        """Combines the engine's facts with the recorded losses and examples of each client."""
        weight_of = self.group.settings.weight_of
        runs = []
        for known, own, loss in zip(self.known_sizes, facts, self._mean_losses(), strict=True):
            size = self._num_examples() if known is None else known
            runs.append(LocalRun(own.num_steps, size, weight_of(size), loss, own.lr_sum, own.normalizer))
        return runs

    def _num_examples(self) -> int:
        """Examples of one pass, as counted in training.

        Raises:
            ValueError: If the client is weighted by it, and it can't be determined.
        """
        if self._sizes_are_known:
            # With work in steps and no length, or fewer steps than a pass has batches, the end of a pass is never seen;
            # the client is then weighted by the number of examples that it has processed.
            return self._examples_seen if self._examples_of_pass is None else self._examples_of_pass
        likely = likely_examples(self.loader)
        if likely is None and self.group.settings.weighting == "examples":
            raise ValueError(
                f"Client {self.clients[0]!r} should be weighted by its examples, but its loader has no length in "
                "examples, and its batches have no first dimension that counts them. Give "
                "fl.datamodules.ClientLoaders(..., num_examples=...), log with self.log(..., batch_size=...), or set "
                'FederatedStrategy(weighting="uniform").'
            )
        return self._examples_seen if likely is None else likely

    def _mean_losses(self) -> list[float]:
        if not self._losses:
            size = max(1, self._examples_of_losses)
            return [self._loss_sum / size if self._has_loss else float("nan")] * len(self._every)
        size = len(self._every)
        taken = [(mask, stacked, num) for mask, stacked, num in self._losses if stacked is not None]
        # Skipped batches of a client alone were counted without an entry in the list; they enlarge the denominator as
        # on a CPU.
        examples = torch.full((size,), float(self._examples_of_losses), dtype=torch.float64)
        for mask, _, num in self._losses:
            examples[list(mask)] += num
        if not taken:
            return [float("nan")] * size
        sums = torch.zeros(size, dtype=torch.float64)
        if all(mask == self._every for mask, _, _ in taken):
            weights = torch.tensor([num for _, _, num in taken], dtype=torch.float64)
            # One copy for all steps: a copy for each would wait for the GPU as often as the client has steps.
            of_steps = torch.stack([stacked.reshape(size) for _, stacked, _ in taken]).cpu().double()
            sums = (of_steps * weights[:, None]).sum(0)
        else:
            for mask, stacked, num in taken:
                sums[list(mask)] += stacked.cpu().double() * num
        means: list[float] = (sums / examples.clamp(min=1)).tolist()
        return means
