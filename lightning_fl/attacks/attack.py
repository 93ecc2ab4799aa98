"""Interfaces of attacks on a client's data, on its own update, or on the updates of all attackers together."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.rows import Rows
from lightning_fl.communication import Group, Message
from lightning_fl.data.splitting import with_dataset
from lightning_fl.seeding import derive_seed
from lightning_fl.tree import Flat
from lightning_fl.types import ClientId, Update


class Attack(ABC):
    """Base class of attacks; see :class:`DataAttack`, :class:`UpdateAttack` and :class:`CollusionAttack`."""


class DataAttack(Attack):
    """Poisons the training data of the attackers, who then train like the others."""

    @abstractmethod
    def poison(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns the example as the attacker trains on it, poisoned or unchanged.

        Args:
            x: Its input.
            y: Its class, an integer tensor without dimensions.
            generator: Seeded by (seed, client, example), so that an example is poisoned in each pass or in none.
        """

    def poison_loader(self, loader: DataLoader, client: ClientId, seed: int) -> DataLoader:
        """The loader of a client over poisoned examples.

        Raises:
            ValueError: If its data set can't be indexed.
        """
        dataset = getattr(loader, "dataset", None)
        if not isinstance(loader, DataLoader) or dataset is None or isinstance(dataset, IterableDataset):
            raise ValueError(
                f"{type(self).__name__} poisons examples, but the loader of client {client!r} is a "
                f"{type(loader).__name__} whose data set can't be indexed. Use a DataLoader over a map-style data set."
            )
        return with_dataset(loader, PoisonedDataset(dataset, self, client, seed))


class PoisonedDataset(Dataset[tuple[Tensor, Tensor]]):
    """A data set of pairs ``(x, y)`` whose examples an attack changes.

    Args:
        dataset: The client's data set.
        attack: The attack.
        client: The client.
        seed: Seed of the choice of examples.
    """

    def __init__(self, dataset: Dataset, attack: DataAttack, client: ClientId, seed: int) -> None:
        self.dataset = dataset
        self.attack = attack
        self.client = client
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.dataset[index]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.client, index, "poison"))
        return self.attack.poison(torch.as_tensor(x), torch.as_tensor(y), generator)


class UpdateAttack(Attack):
    """Changes each attacker's own update, after all transforms: an attacker does not clip."""

    @abstractmethod
    def corrupt(self, update: Update, num_clients: int, num_attackers: int, generator: torch.Generator) -> Update:
        """Returns the attacker's update.

        Args:
            update: The update that it would send if it were honest.
            num_clients: Number of clients in the round.
            num_attackers: Number of attackers among them.
            generator: Seeded by (seed, round, client).
        """


class CollusionAttack(Attack):
    """All attackers send the same change of the parameters, which they craft from the updates of the honest clients."""

    @abstractmethod
    def craft(self, honest: "HonestUpdates", num_attackers: int) -> Flat:
        """Returns the change that all attackers send: flat buffers by dtype."""


@dataclass(frozen=True)
class HonestUpdates:
    r"""The honest clients' changes :math:`u_i` of the parameters, distributed over the ranks.

    Args:
        rows: This rank's rows.
        group: The ranks.
        counts: The number of rows of each rank.
    """

    rows: Rows
    group: Group
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.counts)

    def own(self, dtype: torch.dtype) -> Tensor:
        """This rank's rows in float64, ``[rows, elements]``."""
        return self.rows.columns(dtype, 0, self.rows.width(dtype)).double()

    def mean(self) -> Flat:
        r""":math:`\mu = \frac{1}{h} \sum_i u_i`."""
        return {dtype: self.group.all_reduce(self.own(dtype).sum(0)) / len(self) for dtype in self.rows.layout.dtypes}

    def std(self, mean: Flat) -> Flat:
        r"""The standard deviation :math:`\sigma` of each coordinate, with the number of honest clients as divisor."""
        return {
            dtype: (self.group.all_reduce((self.own(dtype) - mean[dtype]).square().sum(0)) / len(self)).sqrt()
            for dtype in self.rows.layout.dtypes
        }

    def gram(self) -> Gram:
        """The Gram matrix of the rows, in the order of ranks."""
        order = list(range(len(self)))
        gram = Gram.of((window.block for window in self.rows.windows(self.group, self.counts, order)), order)
        return gram.with_flat(self.group.all_reduce(gram.flat()))

    def relative_to(self, mean: Flat, direction: Flat) -> tuple[Tensor, Tensor]:
        r""":math:`\lVert u_i - \mu \rVert^2` and :math:`\langle u_i - \mu, p \rangle` of all rows, ``[h]`` each."""
        squares = torch.zeros(len(self.rows), dtype=torch.float64)
        along = torch.zeros(len(self.rows), dtype=torch.float64)
        for dtype in self.rows.layout.dtypes:
            centred = self.own(dtype) - mean[dtype]
            squares += centred.square().sum(1).cpu()
            along += (centred @ direction[dtype]).cpu()
        own = Message({"squares": squares.tolist(), "along": along.tolist()})
        messages = self.group.all_gather(own, "honest updates")
        return tuple(  # type: ignore[return-value]
            torch.tensor([value for message in messages for value in message.fields[name]], dtype=torch.float64)
            for name in ("squares", "along")
        )

    def row(self, index: int) -> Flat:
        """The row at an index in the order of ranks, on all ranks."""
        first = sum(self.counts[: self.group.rank])
        chosen = torch.zeros(len(self.rows), dtype=torch.float64)
        if first <= index < first + len(self.rows):
            chosen[index - first] = 1.0
        return {
            dtype: self.group.all_reduce(chosen.to(self.rows.device) @ self.own(dtype))
            for dtype in self.rows.layout.dtypes
        }


def with_delta(update: Update, delta: Mapping[str, Tensor]) -> Update:
    """The update with its change of the parameters replaced, in the original dtypes."""
    return replace(update, delta={name: delta[name].to(tensor.dtype) for name, tensor in update.delta.items()})
