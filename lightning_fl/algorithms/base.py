"""The interface of a federated algorithm: pure functions over state."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from lightning_fl.tree import add, subtract
from lightning_fl.types import Aggregate, Context, LocalRun, Phase, State, Tree, Update

Weighting = Literal["examples", "uniform"]
ProbeKind = Literal["loss", "grad", "losses"]
AuxRole = Literal["addend", "factor", "divisor"]


class Algorithm(ABC):
    """A federated algorithm: a frozen dataclass of hyper-parameters whose methods take state and return state.

    Every method defaults to FedAvg, ``x <- x + server_lr * mean_i(y_i - x)``; a subclass overrides the methods in which
    it differs. State is an argument and a return value, a mapping of trees and tensors, and never an attribute: so it
    can be checkpointed, moved between devices and stacked over clients.
    """

    weighting: ClassVar[Weighting] = "examples"
    """Default aggregation weights, as in the paper; the strategy's ``weighting`` overrides them."""
    keeps_client_state: ClassVar[bool] = False
    """Whether clients keep state between rounds. Each client then always trains on the same rank, its home rank."""
    probe: ClassVar[ProbeKind | None] = None
    """What to measure for ``client_init`` in one pass over a client's data at the global model, before it trains; for
    ``"losses"``, in one pass for each of several models."""
    needs_gradient_at: ClassVar[bool] = False
    """Whether ``grad_transform`` needs ``ctx["gradient_at"]``, a :class:`~lightning_fl.types.GradientAt` that computes
    the gradient of the step's batch at any parameters."""
    adds_to_gradients: ClassVar[bool] = True
    """Whether ``grad_transform`` adds a term of its own to each gradient: a parameter without a gradient in some step
    is then trained as if its gradient were 0. Otherwise the optimizer skips it, as it does without an algorithm."""
    knows_index: ClassVar[bool] = False
    """Whether ``client_init`` needs ``server["index"]``, the client's position in the order of all clients' ids."""
    keeps_nodes: ClassVar[bool] = False
    """Whether each client has a model of its own: ``server_update`` then gets each client's change separately, from the
    aggregator :class:`~lightning_fl.aggregation.Nodes`."""
    mixes_neighbours: ClassVar[bool] = False
    """Whether ``server_update`` can work through ``aggregate.neighbours`` where each silo knows its own change only.
    Otherwise it is given the changes of all clients."""
    sends_parts: ClassVar[bool] = False
    """Whether :meth:`delta_like` may return only some of the parameters."""
    aux_role: ClassVar[AuxRole] = "addend"
    """What ``server_update`` does with ``aggregate.aux``: ``"addend"``, it adds them to its state, as SCAFFOLD does;
    ``"factor"``, it multiplies its step by them, as FedNova; ``"divisor"``, its step is a ratio of the change and them,
    as q-FedAvg's. Whatever scales, bounds or noises an update does the same to the step of the first kind only."""
    needs_exact_deltas: ClassVar[bool] = False
    """Whether it is right only if the server gets the very changes that the clients have computed, as where clients
    keep what they have sent."""
    is_elementwise: ClassVar[bool] = False
    """Whether each element of the next state depends on the same element of the parameters and updates only, so that
    processes that each hold a shard can compute their shards independently. No norms, no means over a tensor, no side
    channels of another shape."""
    client_keys: ClassVar[tuple[str, ...]] = ("params",)
    """The entries of the server's state that ``client_init`` reads: only these are sent to silos on other machines."""
    server_lr: float = 1.0

    def prepare(self, module: nn.Module) -> None:
        """Changes the user's module before its optimizers are created, for example freezes some parameters."""
        return

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Warns about, or refuses, client optimizers that the algorithm was not derived for."""
        return

    def server_init(self, params: Tree, population: int) -> State:
        """The server's initial state; its entry ``"params"`` is the global model."""
        return {"params": params}

    def aux_like(self, params: Tree) -> Mapping[str, Tree]:
        """Templates (names, shapes and dtypes) of the side channels ``Update.aux`` that ``client_finish`` fills."""
        return {}

    def aux_of_clients(self, population: int) -> Mapping[str, Tree]:
        """As :meth:`aux_like`, for side channels whose shape depends on the number of clients."""
        return {}

    def delta_like(self, params: Tree, server: State) -> Tree:
        """A template of the ``delta`` that clients send in a round: all of ``params``, or some of them.

        Args:
            params: The global parameters.
            server: The server's state before the round; empty before the first.
        """
        return params

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        """The context of a client's local training; its entry ``"params"`` is the starting point.

        Args:
            server: The server's state.
            client: The client's state from its last round; None before its first.
            probe: What ``self.probe`` asks for, averaged over the client's examples at the global model: for ``"loss"``
                the mean loss, a float64 scalar tensor; for ``"grad"`` the mean gradient, a tree; for ``"losses"`` the
                mean loss at each of :meth:`candidates`, a float64 vector.
        """
        return {"params": server["params"]}

    def candidates(self, server: State) -> Sequence[Tree]:
        """The parameters at which a probe ``"losses"`` measures the loss; each takes a pass over the client's data."""
        return [server["params"]]

    def phases(self) -> tuple[Phase, ...]:
        """The phases of a client's local training, in order."""
        return (Phase(),)

    def personal(self, module: nn.Module, named: Sequence[str]) -> Sequence[str]:
        """``fnmatch`` patterns of the tensors that stay with their client; ``named`` are those given by the user."""
        return named

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        """The gradients that the optimizer uses, called at each optimizer step before gradient clipping."""
        return grads

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        """The client's update and next state, from its trained parameters."""
        return Update(delta=subtract(params, ctx["params"])), client

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        """The server's next state, from the round's aggregate."""
        return {**server, "params": add(server["params"], aggregate.delta, alpha=self.server_lr / aggregate.weight)}

    def report(self, server: State) -> Mapping[str, float]:
        """Figures computed from the server's state, for the round's entry in ``strategy.history`` and the loggers."""
        return {}


def check_hyperparameter(algorithm: Algorithm, name: str, holds: bool, expected: str) -> None:
    """Refuses a hyper-parameter that is out of range.

    Raises:
        ValueError: If ``holds`` is false.
    """
    if not holds:
        raise ValueError(f"{type(algorithm).__name__} got {name}={getattr(algorithm, name)!r}; expected {expected}.")
