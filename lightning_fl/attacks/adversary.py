"""The adversary of a simulation: which clients attack, how, and from which round on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_fl.aggregation import Aggregator, FederationFacts, RoundContext
from lightning_fl.aggregation.corruption import Corruption
from lightning_fl.aggregation.robust.rows import Rows, complete
from lightning_fl.algorithms import Algorithm
from lightning_fl.attacks.attack import Attack, CollusionAttack, DataAttack, HonestUpdates, UpdateAttack, with_delta
from lightning_fl.communication import Group, Message
from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.seeding import client_generator, round_rng
from lightning_fl.tree import Layout, is_finite, leaves, update_trees
from lightning_fl.types import Aggregate, ClientId, State, Update


class Adversary(Corruption):
    """Lets some clients of a simulation attack: ``FederatedStrategy(adversary=Adversary(ALIE()))``.

    Attackers train like the others. Their updates are changed after all transforms, because an attacker would skip
    clipping. The loggers get the number of attackers in the cohort, ``fl/attackers``, and their share of the weights,
    ``fl/attack_share``, if the aggregator has weights. Each rank keeps the updates of its clients in memory.

    Args:
        attack: The attack.
        clients: The attackers: a share of the clients or a number of clients, drawn by the seed; or their ids. Default
            0.2.
        start: The first round in which they attack, from 0. Default 0.

    Raises:
        ValueError: If an argument is out of range, or ``start`` is given for an attack on data.
    """

    def __init__(self, attack: Attack, clients: float | int | Sequence[ClientId] = 0.2, start: int = 0) -> None:
        if not isinstance(attack, Attack):
            raise ValueError(f"attack={attack!r} must be an attack, such as fl.attacks.SignFlip().")
        if isinstance(clients, bool) or (isinstance(clients, float) and not 0 <= clients <= 1):
            raise ValueError(f"clients={clients!r} must be a share from 0 to 1, a number of clients, or their ids.")
        if start < 0 or (start and isinstance(attack, DataAttack)):
            raise ValueError(
                f"start={start} must be at least 0, and 0 for an attack on data, which affects every round."
            )
        self.attack = attack
        self.clients = clients
        self.start = start

    def __repr__(self) -> str:
        return f"Adversary({self.attack!r}, clients={self.clients!r}, start={self.start})"

    def attackers(self, clients: Collection[ClientId], seed: int) -> frozenset[ClientId]:
        """The attackers among all clients.

        Raises:
            ValueError: If a named attacker is not a client, or there are more attackers than clients.
        """
        if isinstance(self.clients, Sequence):
            unknown = [client for client in self.clients if client not in clients]
            if unknown:
                raise ValueError(f"The adversary names {unknown[0]!r}, which is not a client of this federation.")
            return frozenset(self.clients)
        number = self.clients if isinstance(self.clients, int) else int(self.clients * len(clients) + 1e-9)
        if not 0 <= number <= len(clients):
            raise ValueError(f"The adversary has {number} attackers, but there are only {len(clients)} clients.")
        ids = sorted(clients, key=lambda client: (isinstance(client, str), client))
        order = round_rng(seed, 0, "attackers").permutation(len(ids))
        return frozenset(ids[place] for place in order[:number])

    def wrap_loaders(self, loaders: ClientLoaders, seed: int) -> ClientLoaders:
        attack = self.attack
        if not isinstance(attack, DataAttack):
            return loaders
        attackers = self.attackers(loaders.ids, seed)

        def open_loader(client: ClientId) -> Any:
            loader: Any = loaders[client]
            return attack.poison_loader(loader, client, seed) if client in attackers else loader

        is_known = loaders.num_examples(next(iter(loaders.ids))) is not None
        size = (lambda client: loaders.num_examples(client) or 0) if is_known else None
        return ClientLoaders(loaders.ids, open_loader, num_examples=size)

    def wrap_aggregator(self, aggregator: Aggregator) -> Aggregator:
        return AttackedAggregator(self, aggregator)


@dataclass(frozen=True)
class Received:
    """Accumulator of :class:`AttackedAggregator`.

    Args:
        session: The inner aggregator's session, and the attackers.
        template: An update with the names and shapes of all updates.
        device: The device of the updates.
        updates: This rank's updates by client, in the order of arrival.
        merged: The inner aggregator's accumulator after the merge.
        facts: The entries of the report.
    """

    session: tuple[Any, frozenset[ClientId]]
    template: Update
    device: torch.device
    updates: Mapping[ClientId, Update]
    merged: Any = None
    facts: Mapping[str, float] | None = None


class AttackedAggregator(Aggregator):
    """An aggregator that applies the attacks to the attackers' updates and passes all to another aggregator.

    Args:
        adversary: The adversary.
        inner: The aggregator.

    Raises:
        ValueError: If the aggregator hides updates.
    """

    def __init__(self, adversary: Adversary, inner: Aggregator) -> None:
        if inner.hides_reports:
            raise ValueError(
                f"An adversary reads and changes updates, which {type(inner).__name__} hides, so the simulated attack "
                "would not be realistic. Simulate attacks without secure aggregation."
            )
        self.adversary = adversary
        self.inner = inner

    def __repr__(self) -> str:
        return f"{self.inner!r} under {self.adversary!r}"

    @property
    def server_data(self) -> Any:
        return self.inner.server_data

    @property
    def needs_server(self) -> bool:
        return self.inner.needs_server

    def check(self, algorithm: Algorithm) -> None:
        self.inner.check(algorithm)

    def check_cohort(self, num_clients: int) -> None:
        self.inner.check_cohort(num_clients)

    def open(self, group: Group, facts: FederationFacts) -> tuple[Any, frozenset[ClientId]]:
        if facts.silos:
            raise ValueError(
                "An adversary is for simulations: it sees and changes the updates of clients, which silos would not "
                "allow. Leave adversary out."
            )
        return self.inner.open(group, facts), self.adversary.attackers(facts.clients, facts.seed)

    def init(self, template: Update, device: torch.device, session: Any = None) -> Received:
        return Received(session, template, device, {})

    def add(self, acc: Received, update: Update, ctx: RoundContext) -> Received:
        assert ctx.client is not None
        # A copy, since the engine may reuse the memory.
        own = replace(update.map(torch.clone), weight=update.weight)
        return replace(acc, updates={**acc.updates, ctx.client: own})

    def merge(self, acc: Received, group: Group, report: Message, ctx: RoundContext) -> tuple[Received, list[Message]]:
        session, attackers = acc.session
        attacking = attackers.intersection(ctx.cohort)
        updates = dict(acc.updates)
        if attacking and ctx.round >= self.adversary.start:
            updates = self._attack(acc, updates, attacking, group, ctx)
        inner = self.inner.init(acc.template, acc.device, session)
        refused = list(report.fields.get("refused", []))
        for client, update in updates.items():
            if is_finite(leaves(update_trees(update))):
                inner = self.inner.add(inner, update, replace(ctx, client=client))
            else:
                # Passed on as if the client had sent it like this.
                refused.append(client)
        weight = sum(update.weight for client, update in updates.items() if client in attackers)
        own = Message({**report.fields, "refused": refused, "attack_weight": weight}, report.tensors)
        merged, messages = self.inner.merge(inner, group, own, ctx)
        facts = {"attackers": float(len(attacking)) if ctx.round >= self.adversary.start else 0.0}
        shares, total = self.inner.shares(merged, ctx), sum(message.fields["weight"] for message in messages)
        if shares:
            facts["attack_share"] = sum(share for client, share in shares.items() if client in attackers)
        elif self.inner.is_sum and total:
            facts["attack_share"] = sum(message.fields["attack_weight"] for message in messages) / total
        return replace(acc, merged=merged, facts=facts), messages

    def _attack(
        self,
        acc: Received,
        updates: dict[ClientId, Update],
        attacking: frozenset[ClientId],
        group: Group,
        ctx: RoundContext,
    ) -> dict[ClientId, Update]:
        attack = self.adversary.attack
        own = [client for client in updates if client in attacking]
        if isinstance(attack, UpdateAttack):
            for client in own:
                generator = client_generator(ctx.seed, ctx.round, client, "attack")
                updates[client] = attack.corrupt(updates[client], len(ctx.cohort), len(attacking), generator)
        elif isinstance(attack, CollusionAttack):
            layout = Layout.of({"delta": acc.template.delta})
            rows = Rows(layout, acc.device)
            for client, update in updates.items():
                if client not in attacking:
                    stacked = {name: tensor[None] for name, tensor in update.delta.items()}
                    rows = rows.add({"delta": stacked}, [ctx.cohort.index(client)])
            messages = group.all_gather(Message({"rows": len(rows)}), f"attack in round {ctx.round}")
            honest = HonestUpdates(rows, group, tuple(message.fields["rows"] for message in messages))
            if len(honest):
                crafted = layout.unflatten(complete(attack.craft(honest, len(attacking))))["delta"]
                for client in own:
                    updates[client] = with_delta(updates[client], crafted)
        return updates

    def result(self, acc: Received, ctx: RoundContext) -> Aggregate:
        return self.inner.result(acc.merged, ctx)

    def shares(self, acc: Received, ctx: RoundContext) -> Mapping[ClientId, float]:
        return self.inner.shares(acc.merged, ctx)

    def remember(self, acc: Received, ctx: RoundContext) -> State:
        return self.inner.remember(acc.merged, ctx)

    def report(self, acc: Received, ctx: RoundContext) -> Mapping[str, Any]:
        return {**self.inner.report(acc.merged, ctx), **(acc.facts or {})}
