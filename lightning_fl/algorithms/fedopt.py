"""FedOpt: any torch optimizer on the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_fl.algorithms.base import Algorithm
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import tree_map, zeros_like
from lightning_fl.types import Aggregate, State, Tree

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

_NUMBERS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}


@register("fedopt")
@dataclass(frozen=True, repr=False)
class FedOpt(Algorithm):
    r"""FedOpt: a ``torch.optim`` optimizer takes the negative mean change as the gradient of the global model.

    .. math:: x \leftarrow \mathrm{optimizer}(x, \; -\mathrm{mean}_i (y_i - x))

    The optimizer is made anew in each round and given the state it had, so its learning rate is constant. The paper
    writes its own adaptive steps, which start and correct the moments differently: see :class:`FedAdam`. Freezing or
    unfreezing parameters between rounds restarts the optimizer.

    Args:
        optimizer: Makes the optimizer from the parameters, such as ``functools.partial(torch.optim.AdamW, lr=0.1)``; in
            YAML ``{class_path: torch.optim.AdamW, init_args: {lr: 0.1}}``. Default None: SGD with learning rate 1,
            which is FedAvg.

    Raises:
        ValueError: If ``optimizer`` does not make an optimizer, or one whose state is not made of tensors and numbers.

    Reference:
        Reddi et al., "Adaptive Federated Optimization", ICLR 2021.

    Example:
        >>> from functools import partial
        >>> FedOpt(partial(torch.optim.SGD, lr=1.0, momentum=0.9)).name
        'SGD'
    """

    optimizer: MakeOptimizer | None = None

    def __post_init__(self) -> None:
        if not isinstance(self._make([torch.zeros(1, 1)]), Optimizer):
            raise ValueError(
                f"FedOpt got optimizer={self.optimizer!r}, which makes no torch.optim.Optimizer; expected something "
                "like functools.partial(torch.optim.SGD, lr=1.0)."
            )

    def __repr__(self) -> str:
        return f"FedOpt(optimizer={self.name}({', '.join(f'{key}={value!r}' for key, value in self._options())}))"

    def server_init(self, params: Tree, population: int) -> State:
        self._step(params, {}, zeros_like(params))
        return {"params": params, "optimizer": {}}

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        params, state = self._step(server["params"], server["optimizer"], tree_map(torch.neg, aggregate.mean()))
        return {"params": params, "optimizer": state}
