"""What every federated algorithm is: pure functions over state."""

# Annotations are not postponed here: jsonargparse would look them up in the modules of the subclasses.
from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from lightning_fl.tree import add, subtract
from lightning_fl.types import Aggregate, Context, LocalRun, Phase, State, Tree, Update

Weighting = Literal["examples", "uniform"]
ProbeKind = Literal["loss", "grad"]


class Algorithm(ABC):
    """A federated algorithm: a frozen dataclass of hyper-parameters whose methods take state and return state.

    The defaults are FedAvg with full control left to the subclass: ``x <- x + server_lr * mean_i(y_i - x)``.
    State is a mapping of trees and tensors, never an attribute, so that it checkpoints, moves and vectorizes.
    """

    weighting: ClassVar[Weighting] = "examples"
    """What a client weighs in the mean unless the user says otherwise: what the paper takes."""
    keeps_client_state: ClassVar[bool] = False
    """Whether clients keep state between their rounds; they then train on their home rank."""
    probe: ClassVar[ProbeKind | None] = None
    """What one pass over a client's data at the global model, before its training, measures for ``client_init``."""
    server_lr: float = 1.0

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Warns of, or refuses, client optimizers that the algorithm is not derived for."""
        return

    def server_init(self, params: Tree, population: int) -> State:
        """The server's state before the first round; its entry ``"params"`` is the global model."""
        return {"params": params}

    def aux_like(self, params: Tree) -> Mapping[str, Tree]:
        """Trees with the names, shapes and dtypes of the side channels that ``client_finish`` fills."""
        return {}

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        """What a client needs during its local training; the entry ``"params"`` is where it starts.

        Args:
            server: The server's state.
            client: What the client has kept from its last round, None before its first.
            probe: What ``self.probe`` asks for, by example over the client's data at the global model: ``"loss"`` the
                mean loss, a tensor without dimensions in float64; ``"grad"`` the mean gradient, a tree.
        """
        return {"params": server["params"]}

    def phases(self) -> tuple[Phase, ...]:
        """The stretches of a client's local training, one after the other."""
        return (Phase(),)

    def personal(self, module: nn.Module, named: Sequence[str]) -> Sequence[str]:
        """``fnmatch`` globs of the tensors that stay with their client; ``named`` are those that the user gave."""
        return named

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        """Replaces the gradients before clipping and each optimizer step."""
        return grads

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        """Turns a client's trained parameters into its update and its next state."""
        return Update(delta=subtract(params, ctx["params"])), client

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        """Moves the global model by the round's aggregate."""
        return {**server, "params": add(server["params"], aggregate.delta, alpha=self.server_lr / aggregate.weight)}


def check_hyperparameter(algorithm: Algorithm, name: str, holds: bool, expected: str) -> None:
    """Refuses a hyper-parameter that is out of range.

    Raises:
        ValueError: If ``holds`` is false.
    """
    if not holds:
        raise ValueError(f"{type(algorithm).__name__} got {name}={getattr(algorithm, name)!r}; expected {expected}.")
