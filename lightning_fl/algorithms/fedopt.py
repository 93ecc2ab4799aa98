"""FedOpt: any torch optimizer on the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_fl.algorithms.base import Algorithm
from lightning_fl.algorithms.registry import register
from lightning_fl.optimizer_tree import pack_param_state, unpack_param_state
from lightning_fl.tree import tree_map, zeros_like
from lightning_fl.types import Aggregate, State, Tree

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@register("fedopt")
@dataclass(frozen=True, repr=False)
class FedOpt(Algorithm):
    r"""FedOpt: a ``torch.optim`` optimizer on the server, with the negative mean change as the global model's gradient.

    .. math:: x \leftarrow \mathrm{optimizer}(x, \; -\mathrm{mean}_i (y_i - x))

    Each round creates a new optimizer and loads the state of the previous one, so the learning rate is constant.
    Torch's adaptive optimizers initialise their moments differently from the paper's and correct their bias; for the
    paper's, see :class:`FedAdam`. Freezing or unfreezing parameters between rounds restarts the optimizer.

    Args:
        optimizer: Creates the optimizer from the parameters, as ``functools.partial(torch.optim.AdamW, lr=0.1)`` does;
            in YAML ``{class_path: torch.optim.AdamW, init_args: {lr: 0.1}}``. Default None: SGD with learning rate 1,
            which is FedAvg.

    Raises:
        ValueError: If ``optimizer`` does not create an optimizer, or if the optimizer's step needs the loss; when
            training starts, if its state is not made up of tensors and numbers.

    Reference:
        Reddi et al., "Adaptive Federated Optimization", ICLR 2021.
    """

    optimizer: MakeOptimizer | None = None

    def __post_init__(self) -> None:
        made = self._make([nn.Parameter(torch.zeros(1, 1))])
        if not isinstance(made, Optimizer):
            raise ValueError(
                f"FedOpt got optimizer={self.optimizer!r}, which makes a {type(made).__name__}; expected a "
                "callable that makes a torch.optim.Optimizer, like functools.partial(torch.optim.SGD, lr=1.0)."
            )
        closure = signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is Parameter.empty:
            raise ValueError(
                f"FedOpt got {type(made).__name__}, which evaluates the loss in its step; the server has no loss, "
                "only the clients' mean update. Use an optimizer that takes a gradient, such as torch.optim.AdamW."
            )

    def __repr__(self) -> str:
        made = self._make([nn.Parameter(torch.zeros(1, 1))])
        options = ", ".join(f"{name}={value!r}" for name, value in made.defaults.items())
        return f"FedOpt(optimizer={type(made).__name__}({options}))"

    def server_init(self, params: Tree, population: int) -> State:
        # A trial step with a zero gradient, so that an unsuitable optimizer is refused before the first round.
        self._step(params, {}, zeros_like(params))
        return {"params": params, "optimizer": {}}

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        params, state = self._step(server["params"], server["optimizer"], tree_map(torch.neg, aggregate.mean()))
        return {"params": params, "optimizer": state}

    def _make(self, params: Sequence[nn.Parameter]) -> Optimizer:
        return (self.optimizer or partial(SGD, lr=1.0))(params)

    def _step(self, params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        trainable = {name: nn.Parameter(param.clone()) for name, param in params.items()}
        optimizer = self._make(list(trainable.values()))
        _load(optimizer, trainable, state)
        for name, param in trainable.items():
            param.grad = grads[name]
        options = _options(optimizer)
        optimizer.step()
        # Only the parameters' state is carried to the next round, not the optimizer and its options.
        if optimizer.state.keys() - set(trainable.values()) or _options(optimizer) != options:
            raise ValueError(
                f"{type(optimizer).__name__} keeps state between its steps that belongs to no single parameter, which "
                "FedOpt would lose. Use an optimizer of torch.optim."
            )
        return {name: param.detach() for name, param in trainable.items()}, _read(optimizer, trainable)


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _load(optimizer: Optimizer, trainable: Mapping[str, Tensor], state: Tree) -> None:
    packed: dict[str, Tree] = {}
    for key, value in state.items():
        entry, name = key.split(".", 1)
        packed.setdefault(name, {})[entry] = value
    for name, tree in packed.items():
        optimizer.state[trainable[name]] = unpack_param_state(tree)


def _read(optimizer: Optimizer, trainable: Mapping[str, Tensor]) -> Tree:
    remedy = "Use another optimizer, such as torch.optim.AdamW."
    return {
        f"{entry}.{name}": value
        for name, param in trainable.items()
        for entry, value in pack_param_state(optimizer, param, remedy).items()
    }
