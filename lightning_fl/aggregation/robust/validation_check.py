"""A check that evaluates each client's model on data of the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.screened import Check, check_z, scores
from lightning_fl.data.client_loaders import count_examples
from lightning_fl.types import Update


@dataclass(frozen=True, repr=False)
class ValidationCheck(Check):
    r"""Leaves out clients whose model is much worse than the others', evaluated on data of the server.

    .. math::
        \frac{a_i - \operatorname{median}_j a_j}{s} < -z, \qquad
        s = \max\Bigl(1.4826 \operatorname{median}_j |a_j - m|, \sqrt{m (1 - m) / N}\Bigr)

    for the accuracies :math:`a_i` on the :math:`N` examples and their median :math:`m`; with ``metric="loss"`` the
    negative mean cross-entropies, without the second term. The module's ``forward`` has to return class scores, and a
    batch of the data has to be a pair ``(x, y)``. Each rank evaluates the models of its own clients, so it is for
    simulations. It costs one pass over the data for each client.

    Args:
        root: The server's data: a DataLoader, or a data set.
        metric: ``"accuracy"`` or ``"loss"``. Default ``"accuracy"``.
        z: The threshold, in standard deviations :math:`s` below the median. Default 3.

    Raises:
        ValueError: If an argument is out of range; before training, among silos.
    """

    measures: ClassVar[bool] = True
    root: DataLoader[Any] | Dataset[Any]
    metric: Literal["accuracy", "loss"] = "accuracy"
    z: float = 3.0

    def __post_init__(self) -> None:
        check_z(self.z)
        if self.metric not in ("accuracy", "loss"):
            raise ValueError(f"metric={self.metric!r} is not known; expected 'accuracy' or 'loss'.")
        object.__setattr__(self, "root", loader_of(self.root))

    def __repr__(self) -> str:
        return f"ValidationCheck({described(self._loader)}, metric={self.metric!r}, z={self.z})"

    @property
    def _loader(self) -> DataLoader[Any]:
        assert isinstance(self.root, DataLoader)
        return self.root

    def measure(self, update: Update, ctx: RoundContext) -> float:
        assert ctx.model_of is not None, "checks with data of the server are for simulations"
        model, total, num_examples = ctx.model_of(update), 0.0, 0
        device = next(iter(update.delta.values())).device
        for x, y in self._loader:
            scores, y = model(x.to(device)), y.to(device)
            found = scores.argmax(1) == y if self.metric == "accuracy" else -cross_entropy(scores, y, reduction="none")
            total += float(found.double().sum())
            num_examples += len(y)
        return total / max(num_examples, 1)

    def passes(self, gram: Gram, ctx: RoundContext) -> Tensor:
        # A model that diverged is worse than any other.
        values = gram.measured[self].nan_to_num(nan=-1e300, neginf=-1e300)
        found = scores(values) >= -self.z
        if self.metric == "accuracy":
            middle = float(torch.quantile(values, 0.5))
            error = (middle * (1 - middle) / (count_examples(self._loader) or 1e300)) ** 0.5
            found |= values >= middle - self.z * error
        return found


def loader_of(root: Any, shuffle: bool = False) -> DataLoader[Any]:
    """The server's data as a DataLoader.

    Raises:
        ValueError: If ``root`` is neither a loader nor a data set.
    """
    if isinstance(root, DataLoader):
        return root
    if not isinstance(root, Dataset):
        raise ValueError(f"root={root!r} must be a DataLoader or a data set of pairs (x, y).")
    return DataLoader(root, batch_size=32 if shuffle else 256, shuffle=shuffle)


def described(loader: DataLoader[Any]) -> str:
    """A description of the data that is the same on all ranks."""
    return f"root={type(loader.dataset).__name__} of {count_examples(loader)} examples"
