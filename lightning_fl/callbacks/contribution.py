"""Measures each client's contribution to the global model, on data that the server trusts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_fl.algorithms import Algorithm
from lightning_fl.callbacks.federated import FederatedCallback
from lightning_fl.callbacks.monitored import mode_in
from lightning_fl.communication import Message
from lightning_fl.engines.tensors import clones, load
from lightning_fl.seeding import isolated_randomness, round_rng
from lightning_fl.strategies import FederatedStrategy, internals
from lightning_fl.strategies.out_of_loop import validate_out_of_loop
from lightning_fl.strategies.round_view import RoundView
from lightning_fl.strategies.validation import forbid_client_disclosure
from lightning_fl.tracking import loggers
from lightning_fl.tracking.metrics import Mode
from lightning_fl.tree import add, clone, scale
from lightning_fl.types import Aggregate, ClientId, LocalRun, Tree, Update

Value = Callable[[frozenset[int]], float]
"""The value of the coalition of the clients at these positions."""
Method = Literal["shapley", "leave_one_out", "gtg", "fedce"]
MOST_CLIENTS = 10
"""Maximum number of clients in a round for which all ``2 ** n`` coalitions are evaluated."""


class Contribution(FederatedCallback):
    r"""Measures each client's contribution in each round, from the models that coalitions of clients would have given.

    The value :math:`v(S)` of a coalition :math:`S` is the metric of :math:`x + \sum_{i \in S} p_i (y_i - x)` on the
    root data, with weights that add up to 1 in S; a metric that should be low counts negatively.

    - ``"shapley"``: :math:`\sum_{S \not\ni i} \frac{|S|! (n - |S| - 1)!}{n!} (v(S \cup i) - v(S))`, with all
      :math:`2^n` models, for rounds of at most 10 clients; the shares add up to :math:`v(N) - v(\emptyset)`.
    - ``"gtg"``: an estimate of the same from random orders of the clients, each truncated when little is left to gain,
      and skipped in rounds that gain little (GTG-Shapley).
    - ``"leave_one_out"``: :math:`v(N) - v(N \setminus i)`, with n models.
    - ``"fedce"``: the mean of two shares, each normalised to add up to 1, with n models: how far a client's update
      points away from that of the others, :math:`1 - \cos(u_i, \sum_{j \ne i} p_j u_j)`, and the error on the root data
      of the model without it, the metric itself if less of it is better, else 1 - metric (FedCE, which measures that
      error on each client's own data, and weighs the clients by the result).

    The models are those of federated averaging, whatever the algorithm does with the updates. Contributions disclose
    facts about single clients; they are in ``strategy.history``, in the loggers under ``contribution/``, and at the end
    as a table of their sums. Clients train one after the other.

    Args:
        root: The root data, a loader of batches for ``validation_step``. None: the Trainer's validation data, which
            then are less informative about a model that is selected by them.
        metric: A metric that ``validation_step`` logs. Default ``"val_loss"``.
        method: The method. Default ``"shapley"``.
        every_n_rounds: Measure in every n-th round. Default 1.
        tolerance: For ``"gtg"``, the share of a round's gain below which a gain counts as small. Default 0.01.
        orders: For ``"gtg"``, the maximum number of orders; each evaluates one model per client. Default 20.
        mode: ``"max"`` if more of ``metric`` is better, ``"min"`` if less is. None, the default: as a
            ``ModelCheckpoint`` of the Trainer monitors it, else by the words of its name.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: When training starts, if privacy has to hide the clients, or each has a model of its
            own, or if ``mode`` is None and unclear; in a round of more than 10 clients with ``"shapley"``, or if
            ``metric`` is not logged.

    Reference:
        Liu et al., "GTG-Shapley: Efficient and Accurate Participant Contribution Evaluation in Federated Learning", ACM
        TIST 2022.
        Jiang et al., "Fair Federated Medical Image Segmentation via Client Contribution Estimation", CVPR 2023.
    """

    def __init__(
        self,
        root: Iterable[Any] | None = None,
        metric: str = "val_loss",
        method: Method = "shapley",
        every_n_rounds: int = 1,
        tolerance: float = 0.01,
        orders: int = 20,
        mode: Mode | None = None,
    ) -> None:
        if mode not in (None, "min", "max"):
            raise ValueError(f"mode={mode!r} is not known; expected 'min', 'max' or None.")
        if method not in get_args(Method):
            raise ValueError(f"method={method!r} is not known; expected {', '.join(map(repr, get_args(Method)))}.")
        if every_n_rounds < 1 or orders < 1 or tolerance < 0:
            raise ValueError(
                f"Contribution got every_n_rounds={every_n_rounds}, orders={orders}, tolerance={tolerance}; expected "
                "at least 1, 1 and 0."
            )
        self.root, self.metric, self.method = root, metric, method
        self.every_n_rounds, self.tolerance, self.orders = every_n_rounds, tolerance, orders
        self.mode = mode
        self._is_higher_better = False
        self.totals: dict[ClientId, float] = {}
        """The sum of each client's contributions; the same on every rank."""
        self._start: Tree = {}
        self._own: list[tuple[ClientId, float, Tree]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets an earlier run of another Trainer; a checkpoint's state comes after this."""
        if stage == "fit" and trainer.current_epoch == 0:
            self.totals = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks that there are clients, and that nothing has to hide their updates."""
        if not isinstance(trainer.strategy, FederatedStrategy):
            rank_zero_info(f"Contribution measures nothing: {type(trainer.strategy).__name__} has no clients.")
            return
        mode = self.mode or mode_in(trainer, self.metric)
        if mode is None:
            raise MisconfigurationException(
                f"Contribution does not know whether more of {self.metric!r} is better or less. Give it mode='max' or "
                "mode='min'."
            )
        self._is_higher_better = mode == "max"
        settings = trainer.strategy.view.settings
        forbid_client_disclosure("Contribution", settings)
        if settings.algorithm.keeps_nodes:
            raise MisconfigurationException(
                f"Contribution measures contributions to one global model, but {type(settings.algorithm).__name__} "
                "has one model per client. Leave it out, or use an algorithm with a server."
            )
        if type(settings.algorithm).delta_like is not Algorithm.delta_like:
            raise MisconfigurationException(
                "Contribution measures contributions to one global model, but clients of "
                f"{type(settings.algorithm).__name__} do not send the change of one whole model. Leave it out, or use "
                "another algorithm, such as 'fedavg'."
            )

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, for a run that is resumed from a checkpoint."""
        return {"totals": list(self.totals.items())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the sums from a checkpoint."""
        self.totals = dict(state_dict["totals"])

    def on_round_start(
        self, trainer: L.Trainer, module: L.LightningModule, round: int, cohort: Sequence[ClientId], view: RoundView
    ) -> None:
        """Keeps the global model of the round's start."""
        self._own = []
        self._start = clones(view.params) if self._measures(round) else {}

    def on_client_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        client: ClientId,
        run: LocalRun,
        update: Update | None,
        view: RoundView,
    ) -> None:
        """Keeps the client's update."""
        if self._start and update is not None:
            self._own.append((client, run.weight, clone(update.delta)))

    def on_aggregate_end(
        self, trainer: L.Trainer, module: L.LightningModule, aggregate: Aggregate, view: RoundView
    ) -> None:
        """Measures the round's contributions."""
        if not self._start:
            return
        updates = self._gather(view)
        if self.method == "shapley" and len(updates) > MOST_CLIENTS:
            raise MisconfigurationException(
                f"Contribution(method='shapley') evaluates all coalitions of at most {MOST_CLIENTS} clients; this "
                f"round has {len(updates)}. Use method='gtg' or 'leave_one_out'."
            )
        strategy: Any = trainer.strategy
        before = clones(view.params)
        try:
            with strategy.local_phase(), isolated_randomness(view.settings.seed, view.round, "root", "contribution"):
                value = self._value(trainer, view, [own[1:] for own in updates])
                rng = round_rng(view.settings.seed, view.round, "contribution")
                found = self._contributions([own[1:] for own in updates], value, rng)
        finally:
            load(view.params, before)
        own = {client: share for (client, *_), share in zip(updates, found, strict=True)}
        for client, share in own.items():
            self.totals[client] = self.totals.get(client, 0.0) + share
        figures = {f"contribution/{client}": share for client, share in own.items()}
        view.add_facts(figures)
        internals.log_figures(trainer, figures)
        self._start, self._own = {}, []

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the table of all clients' sums."""
        if self.totals and trainer.is_global_zero:
            rows = [[str(client), own] for client, own in sorted(self.totals.items(), key=lambda item: -item[1])]
            loggers.log_table(trainer, "contribution", ["client", "contribution"], rows)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Drops the unfinished round."""
        self._start, self._own = {}, []

    def _measures(self, round: int) -> bool:
        return (round + 1) % self.every_n_rounds == 0

    def _gather(self, view: RoundView) -> list[tuple[ClientId, float, Tree]]:
        """The updates of all ranks, in the order of the cohort."""
        fields = {"clients": [[client, weight] for client, weight, _ in self._own]}
        tensors = {f"{place}/{name}": t.cpu() for place, own in enumerate(self._own) for name, t in own[2].items()}
        found = []
        for message in view.group.all_gather(Message(fields, tensors), "contributions"):
            for place, (client, weight) in enumerate(message.fields["clients"]):
                found.append((client, weight, {name: message.tensors[f"{place}/{name}"] for name in self._start}))
        return sorted(found, key=lambda own: view.cohort.index(own[0]))

    def _value(self, trainer: L.Trainer, view: RoundView, updates: Sequence[tuple[float, Tree]]) -> Value:
        root = trainer.val_dataloaders if self.root is None else self.root
        if root is None:
            raise MisconfigurationException("Contribution has no root data. Give it root=loader, or a validation set.")
        sign = 1.0 if self._is_higher_better else -1.0
        known: dict[frozenset[int], float] = {}

        def value(members: frozenset[int]) -> float:
            if members not in known:
                total = sum(updates[place][0] for place in members)
                params = self._start
                for place in sorted(members):
                    weight, delta = updates[place]
                    own = scale(delta, weight / total)
                    params = add(params, {name: t.to(params[name]) for name, t in own.items()})
                load(view.params, params)
                metrics, _ = validate_out_of_loop(trainer, root)
                if self.metric not in metrics:
                    raise MisconfigurationException(
                        f"Contribution(metric={self.metric!r}) is not among the metrics that validation_step logs: "
                        f"{', '.join(metrics) or 'nothing'}."
                    )
                known[members] = sign * metrics[self.metric]
            return known[members]

        return value

    def _contributions(
        self, updates: Sequence[tuple[float, Tree]], value: Value, rng: np.random.Generator
    ) -> list[float]:
        size = len(updates)
        if self.method == "shapley":
            return shapley(size, value)
        if self.method == "leave_one_out":
            return leave_one_out(size, value)
        if self.method == "fedce":
            everybody = frozenset(range(size))
            best = 1.0 if self._is_higher_better else 0.0  # the value without any error
            return fedce(updates, [best - value(everybody - {place}) for place in range(size)])
        return gtg_shapley(size, value, rng, self.tolerance, self.orders)


def fedce(updates: Sequence[tuple[float, Tree]], errors: Sequence[float]) -> list[float]:
    """FedCE's shares, which add up to 1, from the directions of updates and the leave-one-out errors, ``[n]``.

    Args:
        updates: Weight and update of each client.
        errors: For each client, the error of the model without it; negative ones count as 0.
    """
    vectors = [torch.cat([tensor.double().reshape(-1) for tensor in delta.values()]) for _, delta in updates]
    total = sum((weight * vector for (weight, _), vector in zip(updates, vectors, strict=True)), torch.zeros(()))
    angles = [
        1.0 - float(torch.cosine_similarity(vector, total - weight * vector, dim=0))
        for (weight, _), vector in zip(updates, vectors, strict=True)
    ]
    halves = zip(_normalised(angles), _normalised(errors), strict=True)
    return [(one + other) / 2 for one, other in halves]


def _normalised(values: Sequence[float]) -> list[float]:
    positive = [max(value, 0.0) for value in values]
    total = sum(positive)
    return [value / total if total else 1 / len(positive) for value in positive]


def leave_one_out(size: int, value: Value) -> list[float]:
    r"""The loss of value without each player, :math:`v(N) - v(N \setminus i)`, ``[size]``."""
    everybody = frozenset(range(size))
    return [value(everybody) - value(everybody - {place}) for place in everybody]


def shapley(size: int, value: Value) -> list[float]:
    """The exact Shapley values of all ``size`` players; ``value`` is called at least once for each coalition."""
    shares = [0.0] * size
    for place in range(size):
        others = [other for other in range(size) if other != place]
        for number in range(size):
            factor = math.factorial(number) * math.factorial(size - number - 1) / math.factorial(size)
            for members in map(frozenset, combinations(others, number)):
                shares[place] += factor * (value(members | {place}) - value(members))
    return shares


def gtg_shapley(
    size: int, value: Value, rng: np.random.Generator, tolerance: float = 0.01, orders: int = 20
) -> list[float]:
    """Estimates the Shapley values from random orders of the players; each player comes first in turn.

    Args:
        size: Number of players.
        value: The value of a coalition.
        rng: Draws the orders.
        tolerance: The share of the total gain below which the rest of an order counts as 0.
        orders: Number of orders.
    """
    first, last = value(frozenset()), value(frozenset(range(size)))
    shares, little = np.zeros(size), tolerance * max(abs(last), abs(first))
    if not size or abs(last - first) < little:
        return [0.0] * size
    for number in range(orders):
        leader = number % size
        rest = rng.permutation([place for place in range(size) if place != leader])
        members: frozenset[int] = frozenset()
        before = first
        for place in map(int, (leader, *rest)):
            members |= {place}
            if abs(last - before) < tolerance * abs(last - first):
                break
            after = value(members)
            shares[place] += after - before
            before = after
    found: list[float] = (shares / orders).tolist()
    return found
