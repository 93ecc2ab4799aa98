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
from lightning_fl.tree import tree_map, zeros_like
from lightning_fl.types import Aggregate, State, Tree

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@register("fedopt")
@dataclass(frozen=True, repr=False)
class FedOpt(Algorithm):
    r"""FedOpt: a ``torch.optim`` optimizer takes the negative mean change as the gradient of the global model.

    .. math:: x \leftarrow \mathrm{optimizer}(x, \; -\mathrm{mean}_i (y_i - x))

    The optimizer is made anew in each round and given the state it had, so its learning rate is constant. Torch's
    adaptive optimizers start and correct their moments differently from the paper's, for which see :class:`FedAdam`.
    Freezing or unfreezing parameters between rounds restarts the optimizer.

    Args:
        optimizer: Makes the optimizer from the parameters, such as ``functools.partial(torch.optim.AdamW, lr=0.1)``; in
            YAML ``{class_path: torch.optim.AdamW, init_args: {lr: 0.1}}``. Default None: SGD with learning rate 1,
            which is FedAvg.

    Raises:
        ValueError: If ``optimizer`` does not make an optimizer, or one whose state is not made of tensors and numbers.

    Reference:
        Reddi et al., "Adaptive Federated Optimization", ICLR 2021.
    """

    optimizer: MakeOptimizer | None = None

    def __post_init__(self) -> None:
        made = self._make([nn.Parameter(torch.zeros(1, 1))])
        if not isinstance(made, Optimizer):
            raise ValueError(
                f"FedOpt got optimizer={self.optimizer!r}, which makes a {type(made).__name__}; expected something "
                "that makes a torch.optim.Optimizer, like functools.partial(torch.optim.SGD, lr=1.0)."
            )
        closure = signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is Parameter.empty:
            raise ValueError(
                f"FedOpt got {type(made).__name__}, which evaluates the loss in its step; the server has a change of "
                "the model and no loss. Use an optimizer that takes a gradient, such as torch.optim.AdamW."
            )

    def __repr__(self) -> str:
        made = self._make([nn.Parameter(torch.zeros(1, 1))])
        options = ", ".join(f"{name}={value!r}" for name, value in made.defaults.items())
        return f"FedOpt(optimizer={type(made).__name__}({options}))"

    def server_init(self, params: Tree, population: int) -> State:
        self._step(params, {}, zeros_like(params))  # says before the first round what can't work
        return {"params": params, "optimizer": {}}

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        params, state = self._step(server["params"], server["optimizer"], tree_map(torch.neg, aggregate.mean()))
        return {"params": params, "optimizer": state}

    def _make(self, params: Sequence[nn.Parameter]) -> Optimizer:
        return (self.optimizer or partial(SGD, lr=1.0))(params)

    def _step(self, params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        held = {name: nn.Parameter(param.clone()) for name, param in params.items()}
        optimizer = self._make(list(held.values()))
        _load(optimizer, held, state)
        for name, param in held.items():
            param.grad = grads[name]
        options = _options(optimizer)
        optimizer.step()
        if optimizer.state.keys() - set(held.values()) or _options(optimizer) != options:
            raise ValueError(
                f"{type(optimizer).__name__} keeps something between its steps that belongs to no single parameter, "
                "which FedOpt would lose. Use an optimizer of torch.optim."
            )
        return {name: param.detach() for name, param in held.items()}, _read(optimizer, held)


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _load(optimizer: Optimizer, held: Mapping[str, Tensor], state: Tree) -> None:
    for key, value in state.items():
        entry, name = key.split(".", 1)
        number = entry.endswith(":number")
        optimizer.state[held[name]][entry.removesuffix(":number")] = value.item() if number else value.clone()


def _read(optimizer: Optimizer, held: Mapping[str, Tensor]) -> Tree:
    state: Tree = {}
    for name, param in held.items():
        for entry, value in optimizer.state[param].items():
            if isinstance(value, Tensor):
                state[f"{entry}.{name}"] = value.detach()
            elif isinstance(value, int | float):
                dtype = torch.float64 if isinstance(value, float) else torch.int64
                state[f"{entry}:number.{name}"] = torch.tensor(value, dtype=dtype)
            elif value is not None:
                raise ValueError(
                    f"FedOpt keeps tensors and numbers between rounds, but {type(optimizer).__name__} holds a "
                    f"{type(value).__name__} as {entry!r}. Use another optimizer, such as torch.optim.AdamW."
                )
    return state
