"""Streaming DiLoCo: synchronises one fragment of the model per round."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lightning_fl.algorithms.base import check_hyperparameter
from lightning_fl.algorithms.diloco import DiLoCo
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update

_NUMBERED = re.compile(r"^(.*?\.)?\d+(?=\.)")


@dataclass(frozen=True)
class StreamingDiLoCo(DiLoCo):
    r"""Streaming DiLoCo: each round synchronises one fragment of the model, while the others stay local.

    .. math::
        p &= t \bmod P \\
        \Delta_p &= \mathrm{mean}_i (y_{i,p} - x_p), \quad
        v_p \leftarrow \beta v_p + \Delta_p, \quad x_p \leftarrow x_p + \eta_s (\Delta_p + \beta v_p) \\
        y_{i,p} &\leftarrow \alpha y_{i,p} + (1 - \alpha) x_p

    In round :math:`t`, of H local steps, fragment p of P is synchronised: the first time after :math:`(p + 1) H` local
    steps, then after every :math:`P H`. A round sends about 1/P of DiLoCo's bytes. For all other fragments a replica
    continues from its own values. The blocks of a model, such as ``layers.3``, are assigned to the fragments in turn;
    a module that is in no numbered block is a block of its own. With one fragment and no mixing this is
    :class:`DiLoCo`.

    Args:
        server_lr: The outer learning rate :math:`\eta_s`. Default 0.7.
        momentum: The outer momentum :math:`\beta`. Default 0.9.
        nesterov: Whether the outer momentum is Nesterov's. Default True.
        fragments: Number of fragments P. Default 2.
        mix: The share :math:`\alpha` of a replica's own values in the values from which it continues after a fragment
            was synchronised. Default 0: it takes the global ones.

    Raises:
        ValueError: If ``fragments`` is not positive, ``mix`` not in [0, 1) or ``momentum`` not in [0, 1); when training
            starts, if the model has fewer blocks than fragments.

    Example:
        >>> import lightning_fl as fl
        >>> algorithm = fl.algorithms.StreamingDiLoCo(fragments=4)
        >>> strategy = fl.FederatedStrategy(algorithm, num_clients=8, local_steps=50, client_optimizer="keep")

    Reference:
        Douillard et al., "Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch", 2025.
    """

    fragments: int = 2
    mix: float = 0.0

    keeps_client_state: ClassVar[bool] = True
    sends_parts: ClassVar[bool] = True
    client_keys: ClassVar[tuple[str, ...]] = ("params", "round")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hyperparameter(self, "fragments", self.fragments >= 1, "a positive whole number")
        check_hyperparameter(self, "mix", 0 <= self.mix < 1, "a number in [0, 1)")

    def server_init(self, params: Tree, population: int) -> State:
        blocks = list(dict.fromkeys(map(_block, params)))
        if len(blocks) < self.fragments:
            raise ValueError(
                f"StreamingDiLoCo got fragments={self.fragments}, but the model has {len(blocks)} blocks: "
                f"{', '.join(blocks)}. Use fewer fragments."
            )
        return {**super().server_init(params, population), "round": torch.zeros((), dtype=torch.int64)}

    def delta_like(self, params: Tree, server: State) -> Tree:
        return {name: params[name] for name in self._names(params, [int(server.get("round", 0))])}

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        params, now = server["params"], int(server["round"])
        start = dict(params)
        if client is not None:
            joined = self._names(params, range(int(client["round"]), now))
            for name, own in client["local"].items():
                if name not in joined:
                    start[name] = own
                elif self.mix:
                    start[name] = self.mix * own + (1 - self.mix) * params[name]
        sent = {name: params[name] for name in self._names(params, [now])}
        return {"params": start, "sent": sent, "round": server["round"]}

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        delta = {name: params[name] - before for name, before in ctx["sent"].items()}
        return Update(delta=delta), {"local": params, "round": ctx["round"].clone()}

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        of_fragment = {key: {name: server[key][name] for name in aggregate.delta} for key in ("params", "velocity")}
        moved = super().server_update(of_fragment, aggregate)
        return {**{key: {**server[key], **moved[key]} for key in moved}, "round": server["round"] + 1}

    def _names(self, params: Iterable[str], rounds: Sequence[int]) -> list[str]:
        """The names of the tensors that are synchronised at the end of any of the given rounds."""
        names = list(params)
        place = {block: index for index, block in enumerate(dict.fromkeys(map(_block, names)))}
        fragments = {round % self.fragments for round in rounds[-self.fragments :]}
        return [name for name in names if place[_block(name)] % self.fragments in fragments]


def _block(name: str) -> str:
    """The numbered block that contains a tensor, such as ``"layers.3"``; without one, the tensor's module."""
    found = _NUMBERED.match(name)
    return found[0] if found else name.rpartition(".")[0]
