"""The data types of the framework: clients' updates, their aggregate, and local training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, Protocol, TypeAlias
from uuid import UUID

from torch import Tensor

ClientId: TypeAlias = int | str
Tree: TypeAlias = dict[str, Tensor]
"""Tensors keyed by ``state_dict`` name."""
State: TypeAlias = Mapping[str, Any]
"""An algorithm's state between rounds: only trees and tensors, so that it can be checkpointed and moved."""
Context: TypeAlias = Mapping[str, Any]
"""Values that an algorithm passes from ``client_init`` to its later methods, for the same client and round."""


class GradientAt(Protocol):
    """Gradients of the loss on the batch of the current step, at parameters of the algorithm's choice.

    Logged values, metrics and buffers are not affected. A gradient costs a forward and a backward pass, a product with
    the Hessian another backward pass.
    """

    def __call__(self, params: Tree) -> Tree:
        """The gradient at ``params``, which may be some of the shared parameters; the others keep their values."""

    def hessian_product(self, params: Tree, vector: Tree) -> Tree:
        """The Hessian of the loss at ``params`` times ``vector``, exact, by differentiating the gradient."""


def as_client_id(name: Any) -> ClientId:
    """A client's id as a plain integer or string, the form in which files and messages contain it.

    Args:
        name: An integer or a string of any kind, such as NumPy's, or a ``UUID``, which becomes a string.

    Raises:
        ValueError: If it is anything else, or text that is not valid Unicode.
    """
    if isinstance(name, Integral) and not isinstance(name, bool):
        return int(name)
    if isinstance(name, str | UUID):
        text = str.__str__(name) if isinstance(name, str) else str(name)  # an enum's own `str` is its label
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"The client id {name!r} is not valid Unicode ({error.reason}); rename it.") from error
        return text
    raise ValueError(
        f"The client id {name!r} is a {type(name).__name__}; expected an integer or a string, so give each client one, "
        "such as its number or name."
    )


@dataclass(frozen=True)
class Update:
    """One client's contribution to a round.

    Args:
        delta: Change of the trainable shared parameters over local training, ``y_i - x``.
        buffers: Change of the shared persistent buffers. Always weighted-averaged; no algorithm sees them.
        weight: The client's weight in the mean, set by the strategy.
        aux: Side channels such as SCAFFOLD's ``c_i' - c_i``: summed, never weighted.
    """

    delta: Tree
    buffers: Tree = field(default_factory=dict)
    weight: float = 1.0
    aux: Mapping[str, Tree] = field(default_factory=dict)

    def part(self, index: int) -> Update:
        """The update of one client, if this one's tensors are stacked over several clients."""
        return self.map(lambda tensor: tensor[index])

    def select(self, chosen: Tensor) -> Update:
        """The stacked updates of the clients that ``chosen`` selects, as indices or as a mask."""
        return self.map(lambda tensor: tensor[chosen])

    def map(self, function: Callable[[Tensor], Tensor]) -> Update:
        """The update with ``function`` applied to each tensor."""

        def map_tree(tree: Tree) -> Tree:
            return {name: function(tensor) for name, tensor in tree.items()}

        aux = {name: map_tree(tree) for name, tree in self.aux.items()}
        return Update(map_tree(self.delta), map_tree(self.buffers), self.weight, aux)


@dataclass(frozen=True)
class Aggregate:
    """The sum of a round's updates. Division happens once, in :meth:`mean`, after the server halves of the transforms.

    Args:
        delta: ``sum_i w_i (y_i - x)``.
        buffers: ``sum_i w_i (b_i - b)``.
        weight: ``sum_i w_i``; a differential-privacy transform replaces it by its expected value.
        aux: Unweighted sums of the side channels.
        num_clients: Number of updates accepted in this round.
        population: Number of clients in the federation.
        nodes: For algorithms with ``keeps_nodes``, the clients' own ``y_i - x_i``, in the order of their ids: each
            tensor ``[population, ...]``, zeros for a client that has sent nothing.
        node_weights: The clients' weights by their data, which add up to 1, whether or not they have sent anything:
            float64 ``[population]``.
        neighbours: Exchanges rows with other ranks, if each rank knows only its own node's row. None: each rank knows
            all rows.
    """

    delta: Tree
    buffers: Tree
    weight: float
    aux: Mapping[str, Tree]
    num_clients: int
    population: int
    nodes: Tree = field(default_factory=dict)
    node_weights: Tensor | None = None
    neighbours: Neighbours | None = None

    def mean(self) -> Tree:
        """The weighted mean of the clients' changes, ``delta / weight``; zero if no client took part."""
        return {name: total / (self.weight or 1.0) for name, total in self.delta.items()}


class Neighbours(Protocol):
    """Exchanges rows between nodes, each of which is on its own rank."""

    @property
    def place(self) -> int:
        """The node of this rank."""

    def mix(self, matrix: Tensor, nodes: Tree) -> Tree:
        """``matrix @ nodes``, of which only this rank's row is valid; nodes send to their neighbours only.

        Args:
            matrix: A mixing matrix ``[n, n]``.
            nodes: Tensors ``[n, ...]`` of which this rank's row is valid.
        """

    def gather(self, nodes: Tree) -> Tree:
        """The tensors with all rows valid; all ranks send to all."""


@dataclass(frozen=True)
class Phase:
    """A phase of a client's local training; each starts with the optimizers and schedules of the round's start.

    Args:
        trains: Which tensors are trained: ``"all"``, the ``"shared"`` or the ``"personal"`` ones, or ``fnmatch`` globs
            on ``state_dict`` names. The others are frozen.
        epochs: Passes over the client's data. None: the strategy's epochs or steps.
        steps: Optimizer steps instead of passes.
        model: ``"global"`` trains the model that starts from the global one and whose change is sent. ``"own"`` trains
            a whole model of the client, which it keeps between rounds and never sends; it starts as the global model of
            the client's first round.
        grad_transform: Replaces the algorithm's ``grad_transform`` in this phase. None: the algorithm's.
        start: The start of a phase of the client's own model, ``(own, trained, ctx) -> own``: computed from the shared
            tensors of that model, and of the model to send as trained by earlier phases. None: the own model.
    """

    trains: str | tuple[str, ...] = "all"
    epochs: int | None = None
    steps: int | None = None
    model: Literal["global", "own"] = "global"
    grad_transform: Callable[[Tree, Tree, Context], Tree] | None = None
    start: Callable[[Tree, Tree, Context], Tree] | None = None

    @property
    def has_own_work(self) -> bool:
        """Whether the phase sets its own length instead of using the strategy's."""
        return self.epochs is not None or self.steps is not None


@dataclass(frozen=True)
class LocalRun:
    """Facts about one client's local training, measured by the engine, in phases that train the model that is sent.

    Args:
        num_steps: Optimizer steps actually taken (a ``GradScaler`` can skip one).
        num_examples: Number of examples in one pass over the client's loader.
        weight: The client's weight in the mean.
        loss: Mean training loss over the examples processed; NaN if the module returned none.
        lr_sum: For each tensor, the sum of the learning rates of its optimizer steps. With SGD's momentum, how far it
            moves under a constant gradient of 1.
        normalizer: FedNova's ``|a_i|_1``, or None if it is unknown for the optimizer.
        logged: The client's own values of the numbers that the module logged with ``self.log``.
    """

    num_steps: int
    num_examples: int
    weight: float
    loss: float
    lr_sum: Mapping[str, float]
    normalizer: float | None = None
    logged: Mapping[str, float] = field(default_factory=dict)
