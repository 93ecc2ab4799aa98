"""Sparsification: the largest coordinates, or a random choice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_fl.aggregation.compression.compressor import Compressor, as_bytes, from_bytes


def count(share: float, size: int) -> int:
    """The number of coordinates in a share of ``size``, at least one."""
    return min(size, max(1, math.ceil(share * size - 1e-9)))


def check_share(share: float) -> None:
    """Checks that a share is in range.

    Raises:
        ValueError: If it is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be in (0, 1]; it is the share of the coordinates that is sent.")


@dataclass(frozen=True)
class TopK(Compressor):
    """The coordinates of the largest magnitude, with their indices: 8 bytes each.

    Ties go to the lower index. It needs error feedback; otherwise a coordinate that is small in every round is never
    sent.

    Args:
        share: Share of the coordinates that is sent, in (0, 1]. Default 0.01.

    Raises:
        ValueError: If ``share`` is out of range.

    Reference:
        Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017.
    """

    is_idempotent: ClassVar[bool] = True
    shortens: ClassVar[bool] = True
    share: float = 0.01

    def __post_init__(self) -> None:
        check_share(self.share)

    def num_bytes(self, size: int) -> int:
        return 8 * count(self.share, size)

    def encode(self, vector: Tensor, generator: torch.Generator) -> Tensor:
        vector = vector.detach().cpu()
        order = vector.abs().sort(descending=True, stable=True).indices
        places = order[: count(self.share, len(vector))].sort().values
        return torch.cat([as_bytes(places.int()), as_bytes(vector[places].float())])

    def decode(self, payload: Tensor, size: int) -> Tensor:
        self.check(payload, size)
        places = from_bytes(payload[: len(payload) // 2], torch.int32).long()
        if len(places) and not (int(places.min()) >= 0 and int(places.max()) < size):
            raise ValueError(f"TopK got indices outside of 0 to {size - 1} from a client: its bytes are corrupt.")
        return torch.zeros(size).index_put((places,), from_bytes(payload[len(payload) // 2 :], torch.float32))


@dataclass(frozen=True)
class RandomK(Compressor):
    """A random choice of coordinates, the same for all clients of a round: 4 bytes each, and a seed.

    Args:
        share: Share of the coordinates that is sent, in (0, 1]. Default 0.01.
        scale: Whether to multiply them by ``1 / share``, which makes the result unbiased. Not with error feedback,
            which sends the rest later. Default False.

    Raises:
        ValueError: If ``share`` is out of range.

    Reference:
        Stich et al., "Sparsified SGD with Memory", NeurIPS 2018.
    """

    shares_randomness: ClassVar[bool] = True
    share: float = 0.01
    scale: bool = False

    def __post_init__(self) -> None:
        check_share(self.share)

    def num_bytes(self, size: int) -> int:
        return 8 + 4 * count(self.share, size)

    def encode(self, vector: Tensor, generator: torch.Generator) -> Tensor:
        seed = torch.randint(2**62, (1,), generator=generator)
        values = vector.detach().cpu()[self._places(int(seed), len(vector))].float()
        if self.scale:
            values *= len(vector) / max(1, len(values))
        return torch.cat([as_bytes(seed), as_bytes(values)])

    def decode(self, payload: Tensor, size: int) -> Tensor:
        self.check(payload, size)
        places = self._places(int(from_bytes(payload[:8], torch.int64)), size)
        return torch.zeros(size).index_put((places,), from_bytes(payload[8:], torch.float32))

    def places(self, size: int, generator: torch.Generator) -> Tensor:
        """The coordinates that :meth:`encode` selects with the same generator."""
        return self._places(int(torch.randint(2**62, (1,), generator=generator)), size)

    def _places(self, seed: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(size, generator=generator)[: count(self.share, size)]
