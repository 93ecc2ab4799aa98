"""Where a round sends a part of the tensors, what is remembered of the others stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fl.aggregation import Aggregator, CenteredClipping, FoolsGold
from lightning_fl.communication import LocalGroup, Message
from lightning_fl.compression import Compress, LowRank, PowerSGD, TopK
from lightning_fl.types import Aggregate, Update
from tests.contract.helpers import context, init, open_session

NUM_ROUNDS = 6


def part(round: int) -> Update:
    """Two matrices, one a round in turns."""
    generator = torch.Generator().manual_seed(round)
    return Update({"ab"[round % 2]: torch.randn(6, 4, generator=generator, dtype=torch.float64)})


@pytest.mark.parametrize("transform", [Compress(TopK(0.1)), PowerSGD(1), LowRank(1)], ids=str)
def test_what_was_not_sent_is_kept_until_it_is(transform: Any) -> None:
    server: Any = {}
    client: Any = {}
    total, sent = {name: torch.zeros(6, 4, dtype=torch.float64) for name in "ab"}, {}
    for round in range(NUM_ROUNDS):
        update = part(round)
        ctx = replace(context(1), round=round, template=update, client="client 0")
        server = transform.start_round(server, ctx)
        own, client = transform.client(update, client, replace(ctx, server=server))
        aggregate, server = transform.server(Aggregate(own.delta, {}, 1.0, {}, 1, 1), server, ctx)
        for name, delta in update.delta.items():
            total[name] = total[name] + delta
            sent[name] = sent.get(name, 0) + aggregate.delta[name]
    for name, whole in total.items():
        torch.testing.assert_close(sent[name] + client["residual"][name], whole)
        assert not torch.equal(sent[name], whole)


def test_the_sides_of_a_matrix_take_turns_though_another_travels_in_between() -> None:
    transform, server, update = LowRank(1), {}, part(0)
    u, s, v = torch.linalg.svd(update.delta["a"], full_matrices=False)
    for round in range(60):
        own = update if round % 2 == 0 else part(1)
        ctx = replace(context(1), round=round, template=own, client="client 0")
        server = transform.start_round(server, ctx)  # type: ignore[assignment]
        sent, _ = transform.client(own, {}, replace(ctx, server=server))
        aggregate, server = transform.server(Aggregate(sent.delta, {}, 1.0, {}, 1, 1), server, ctx)  # type: ignore[assignment]
        if round % 2 == 0:
            found = aggregate.delta["a"]
    torch.testing.assert_close(found, s[0] * u[:, :1] @ v[:1], rtol=0, atol=0.02)


def memory_of(aggregator: Aggregator) -> Any:
    memory: Any = {}
    for round in range(NUM_ROUNDS):
        updates = [part(round + 10 * client) for client in range(3)]
        ctx = replace(context(3), round=round, memory=memory)
        acc = init(aggregator, updates[0], open_session(aggregator, LocalGroup(), 3, 1.0))
        for client, update in zip(ctx.cohort, updates, strict=True):
            acc = aggregator.add(acc, update, replace(ctx, client=client))
        acc, _ = aggregator.merge(acc, LocalGroup(), Message(), ctx)
        memory = aggregator.remember(acc, ctx)
    return memory


def test_foolsgold_sums_up_all_rounds() -> None:
    sums = memory_of(FoolsGold(num_attackers=0))["sums"]["'client 1'"]
    expected: dict[str, Tensor] = {}
    for round in range(NUM_ROUNDS):
        for name, delta in part(round + 10).delta.items():
            expected[name] = expected.get(name, torch.zeros_like(delta)) + delta
    torch.testing.assert_close(sums, expected)


def test_centered_clipping_keeps_the_centre_of_what_was_not_sent() -> None:
    assert memory_of(CenteredClipping(num_attackers=0))["centre"]["delta"].keys() == {"a", "b"}


def test_an_empty_tensor_is_sent_whole() -> None:
    update = Update({"empty": torch.zeros(0, 4)})
    sent, _ = PowerSGD(1).client(update, {}, context(1))
    aggregate, state = PowerSGD(1).server(Aggregate(sent.delta, {}, 1.0, {}, 1, 1), {}, context(1))
    assert aggregate.delta["empty"].shape == (0, 4)
    assert state["bytes"] == 0
