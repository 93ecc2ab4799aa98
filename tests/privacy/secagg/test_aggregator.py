"""Secure aggregation as an aggregator: its settings, its sums, what it refuses."""

from __future__ import annotations

import ast
import pickle
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_fl as fl
from lightning_fl.aggregation import Aggregator, FederationFacts, RoundContext, WeightedMean
from lightning_fl.communication import Group, LocalGroup, Message
from lightning_fl.privacy.secagg import RetryRefused, SecureAggregation, SecureAggregationError
from lightning_fl.privacy.secagg.session import Session
from lightning_fl.tree import scale
from lightning_fl.types import Aggregate, Update
from tests.helpers.distributed import PATIENCE

CPU = torch.device("cpu")


def updates(num_clients: int, dtype: torch.dtype = torch.float32) -> list[Update]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        Update(
            delta={"a": draw(3, 2), "b": draw(4, dtype=torch.float64), "scalar": draw()},
            buffers={"mean": 100 * draw(3), "count": draw().mul(10).round().long()},
            weight=float(client + 1),
            aux={"control": {"a": draw(3, 2)}, "squares": {"sum": 1e6 * draw()}},
        )
        for client in range(num_clients)
    ]


def context(num_clients: int, round: int = 0) -> RoundContext:
    return RoundContext(round=round, cohort=[f"client {i}" for i in range(num_clients)], population=10)


def facts(num_clients: int, **changes: Any) -> FederationFacts:
    return replace(FederationFacts(False, num_clients, True, lambda: float(num_clients)), **changes)


def take_in(aggregator: Aggregator, session: Any, given: Sequence[Update], ctx: RoundContext) -> Any:
    acc = aggregator.init(given[0], CPU, session)
    for client, update in zip(ctx.cohort, given, strict=True):
        acc = aggregator.add(acc, update, replace(ctx, client=client))
    return acc


def aggregate(aggregator: Aggregator, given: Sequence[Update]) -> Aggregate:
    ctx = context(len(given))
    session = aggregator.open(LocalGroup(), facts(len(given)))
    acc, _ = aggregator.merge(take_in(aggregator, session, given, ctx), LocalGroup(), Message(), ctx)
    return aggregator.result(acc, ctx)


@pytest.mark.parametrize("modulus_bits", [32, 64])
@pytest.mark.parametrize("protocol", ["pairwise", "bonawitz"])
@pytest.mark.parametrize("num_clients", [3, 5])
def test_sums_are_those_of_the_weighted_mean(num_clients: int, protocol: Any, modulus_bits: int) -> None:
    given = updates(num_clients)
    expected = aggregate(WeightedMean(), given)
    secure = SecureAggregation(protocol, modulus_bits=modulus_bits, aux_clip=16.0)
    found = aggregate(secure, given)
    assert (found.weight, found.num_clients, found.population) == (expected.weight, num_clients, 10)
    ranges = secure.open(LocalGroup(), facts(num_clients)).ranges
    bound = num_clients * ranges.quantizer("delta", num_clients).step * ranges.max_weight
    for name, total in expected.delta.items():
        assert found.delta[name].dtype == total.dtype
        assert (found.delta[name] - total).abs().max() <= bound + 1e-6
    torch.testing.assert_close(found.aux["control"]["a"], expected.aux["control"]["a"], rtol=0, atol=bound + 1e-6)
    torch.testing.assert_close(found.aux["squares"], expected.aux["squares"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.buffers["mean"], expected.buffers["mean"], rtol=1e-6, atol=1e-6)
    assert torch.equal(found.buffers["count"], expected.buffers["count"]), "counts are sent exactly"


def test_uniform_weights_are_within_n_steps() -> None:
    """n * c / (2^b - 1) for each coordinate of the sum."""
    given = [replace(update, weight=1.0) for update in updates(3, torch.float64)]
    secure = SecureAggregation(clip=4.0)
    session = secure.open(LocalGroup(), facts(3, max_weight=lambda: 1.0))
    acc, _ = secure.merge(take_in(secure, session, given, context(3)), LocalGroup(), Message(), context(3))
    found, expected = secure.result(acc, context(3)).delta, aggregate(WeightedMean(), given).delta
    for name, total in expected.items():
        assert (found[name] - total).abs().max() <= 3 * 4.0 / (2**29 - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "flower"}, "protocol='flower'"),
        ({"min_clients": 2}, "each learns the other's update"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"max_weight": 0.0}, "max_weight=0.0"),
        ({"modulus_bits": 16}, "modulus_bits=16"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"min_clients": 40_000}, "sum over 40000 clients"),
        ({"min_clients": 1.5}, "share of the cohort"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SecureAggregation(**arguments)


@pytest.mark.parametrize(
    ("min_clients", "cohort", "expected"),
    [(None, 3, 3), (None, 6, 4), (None, 10, 7), (None, 99, 66), (0.5, 10, 5), (0.01, 10, 3), (1.0, 7, 7), (5, 100, 5)],
)
def test_the_fewest_clients_are_a_share_or_a_count(min_clients: float | None, cohort: int, expected: int) -> None:
    options = {} if min_clients is None else {"min_clients": min_clients}
    assert SecureAggregation(**options).fewest(cohort) == expected  # type: ignore[arg-type]


def test_an_aggregator_that_needs_each_update_is_refused() -> None:
    class Median(WeightedMean):
        pass

    with pytest.raises(ValueError, match="Median has to see each client's update"):
        fl.FederatedStrategy("fedavg", aggregator=SecureAggregation(aggregator=Median()))
    SecureAggregation(aggregator=WeightedMean())


@pytest.mark.parametrize("num_clients", [1, 2])
def test_fewer_than_three_clients_are_refused(num_clients: int) -> None:
    with pytest.raises(ValueError, match="needs at least 3"):
        SecureAggregation().open(LocalGroup(), facts(num_clients))


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ({}, {"cohort_size": 40_000}, "fewer clients in a round"),
        ({"dropout": 0.4, "protocol": "bonawitz"}, {}, "leaves 6 of 10 clients, .* needs 7"),
        ({"dropout": 0.8}, {}, "leaves 2 of 10 clients, .* needs 7"),
        ({"dropout": 0.2}, {"silos": True}, "the clients are silos"),
        ({"protocol": "bonawitz"}, {"silos": True}, "simulated clients of one process"),
    ],
)
def test_federations_that_do_not_fit_are_refused(
    arguments: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SecureAggregation(**arguments).open(LocalGroup(), facts(10, **changes))


def opened(num_clients: int = 3, **arguments: Any) -> tuple[SecureAggregation, Session]:
    secure = SecureAggregation(**arguments)
    return secure, secure.open(LocalGroup(), facts(num_clients))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tree", ["delta", "buffers", "aux"])
def test_a_client_does_not_send_nan_or_inf(tree: str, value: float) -> None:
    (secure, session), ctx = opened(), replace(context(3), client="client 0")
    broken = updates(1)[0]
    tensors = broken.aux["control"] if tree == "aux" else getattr(broken, tree)
    tensors["a" if tree != "buffers" else "mean"].view(-1)[0] = value
    acc = secure.init(updates(1)[0], CPU, session)
    with pytest.raises(ValueError, match="NaN or Inf"):
        secure.add(acc, broken, ctx)
    assert not acc.vector.any()


@pytest.mark.parametrize("weight", [4.5, -1.0, float("nan")])
def test_weights_out_of_range_are_refused(weight: float) -> None:
    (secure, session), ctx = opened(), replace(context(3), client="client 0")
    with pytest.raises(ValueError, match=r"max_weight=4\..*weighting='uniform'|NaN"):
        secure.add(secure.init(updates(1)[0], CPU, session), replace(updates(1)[0], weight=weight), ctx)


def test_weights_of_zero_and_the_largest() -> None:
    first, second, third = updates(3)
    given = [replace(first, weight=0.0), replace(second, weight=3.0), replace(third, weight=3.0)]
    found, expected = aggregate(SecureAggregation(), given), aggregate(WeightedMean(), given)
    assert found.weight == 6.0
    torch.testing.assert_close(found.delta, expected.delta, rtol=0, atol=1e-5)


def test_complex_tensors_are_refused() -> None:
    secure, session = opened()
    with pytest.raises(ValueError, match="'z' is complex"):
        secure.init(Update({"z": torch.zeros(1, dtype=torch.complex64)}), CPU, session)


def test_a_round_without_a_session_is_refused() -> None:
    with pytest.raises(ValueError, match="got no session"):
        SecureAggregation().init(updates(1)[0], CPU)


def test_clipping_is_told_once() -> None:
    (secure, session), given = opened(clip=0.01), updates(3)
    with pytest.warns(UserWarning, match=r"3 of 3 clients had coordinates beyond clip=0\.01"):
        secure.merge(take_in(secure, session, given, context(3)), LocalGroup(), Message(), context(3))
    secure.merge(take_in(secure, session, given, context(3, 1)), LocalGroup(), Message(), context(3, 1))


def test_one_aggregator_serves_two_federations() -> None:
    """A session does not change the aggregator, so opening a second one leaves the first as it was."""
    secure, given, ctx = SecureAggregation(), updates(3), context(3)
    first, second = (secure.open(LocalGroup(), facts(num_clients)) for num_clients in (3, 100))
    assert (first.ranges.max_weight, second.ranges.max_weight) == (4.0, 128.0)
    acc, _ = secure.merge(take_in(secure, first, given, ctx), LocalGroup(), Message(), ctx)
    expected = aggregate(WeightedMean(), given)
    torch.testing.assert_close(secure.result(acc, ctx).delta, expected.delta, rtol=0, atol=1e-5)


def test_its_description_and_pickle_hold_no_secret() -> None:
    secure, session = opened()
    assert "session" not in repr(secure)
    copied = pickle.loads(pickle.dumps(secure))
    assert vars(copied) == vars(secure) == vars(SecureAggregation()), (
        "opening a session leaves the aggregator as it was"
    )
    with pytest.raises(TypeError, match="never copied or pickled"):
        pickle.dumps(session)


def test_only_one_file_touches_the_cryptography_and_only_when_needed() -> None:
    package = Path(fl.__file__).parent
    # The coordinator's certificates have nothing to do with secure aggregation, and its room is imported when needed.
    for path in set(package.rglob("*.py")) - set((package / "coordinator").rglob("*.py")):
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("cryptography" in ast.unparse(node) for node in top), path
        if path.name != "primitives.py":
            assert "import cryptography" not in path.read_text()


# ---- several ranks, as threads


class Ranks:
    """Groups whose collectives are real sums among threads, and that keep what each rank has shown the others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.slots: list[Any] = [None] * size
        self.seen: list[Tensor] = []
        self.said: list[Message] = []

    def run(self, function: Callable[[Group], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def call(rank: int) -> None:
            try:
                results[rank] = function(ThreadGroup(self, rank))
            except Exception as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


class ThreadGroup(Group):
    def __init__(self, ranks: Ranks, rank: int) -> None:
        super().__init__(rank, ranks.size)
        self.ranks = ranks

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        parts = self.ranks.exchange(self.rank, tensor.clone())
        if self.rank == 0:
            self.ranks.seen += parts
        return torch.stack(parts).sum(0, dtype=tensor.dtype)

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        data = self.ranks.exchange(self.rank, message.encode())
        messages = [Message.decode(part) for part in data]
        if self.rank == 0:
            self.ranks.said += messages
        return messages

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        return self.ranks.exchange(self.rank, tensor)[root]

    def barrier(self) -> None:
        self.ranks.barrier.wait()


def merge_on(group: Group, shares: Sequence[Sequence[int]], given: Sequence[Update], **report: Any) -> Any:
    secure, ctx = SecureAggregation(), context(len(given))
    acc = secure.init(given[0], CPU, secure.open(group, facts(len(given))))
    for client in shares[group.rank]:
        acc = secure.add(acc, given[client], replace(ctx, client=ctx.cohort[client]))
    fields = {"sums": {name: value * (group.rank + 1) for name, value in report.items()}, "who": group.rank}
    acc, messages = secure.merge(acc, group, Message(fields), ctx)
    return secure.result(acc, ctx), messages


def test_nothing_but_masked_words_and_public_keys_is_shown() -> None:
    given = updates(3)
    ranks = Ranks(3)
    ranks.run(lambda group: merge_on(group, [[0], [1], [2]], given, loss=0.25))
    for message in ranks.said:
        told = set(message.fields) - {"nonce", "identity", "problem", "folder"}
        assert told <= {"who", "adverts", "names"}
        assert not message.tensors
    plain, session = opened()
    for vector, update in zip(ranks.seen, given, strict=True):
        acc = plain.init(update, CPU, session)
        plain.add(acc, update, replace(context(3), client="client 0"))
        assert (vector[: len(acc.vector)] == acc.vector).float().mean() < 0.1


def test_a_rank_from_another_model_is_named() -> None:
    given = updates(3)

    def merge(group: Group) -> Any:
        own = [replace(given[0], delta=scale(given[0].delta, 1 + group.rank // 2)), *given[1:]]
        return merge_on(group, [[0], [1], [2]], own)

    results = Ranks(3).run(merge)
    assert all(isinstance(result, Exception) for result in results)
    told = [str(result) for result in results if isinstance(result, SecureAggregationError)]
    assert told
    assert all(re.search("participant [123] .* starts from another global model", text) for text in told)


def assert_no_sum(results: Sequence[Any], message: str) -> None:
    """No rank has a sum; the first to notice says why, the others find it gone."""
    told = [str(result) for result in results if isinstance(result, SecureAggregationError)]
    assert told
    assert all(message in text for text in told)
    assert all(isinstance(result, SecureAggregationError | threading.BrokenBarrierError) for result in results)


def test_too_few_updates_are_not_summed() -> None:
    given = updates(3)
    results = Ranks(3).run(lambda group: merge_on(group, [[0], [1], []], given))
    assert_no_sum(results, "has 2 update(s) left")


def test_a_vector_that_gets_lost_gives_no_number() -> None:
    class Lossy(ThreadGroup):
        def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
            return super().all_reduce(tensor if self.rank else torch.zeros_like(tensor), op)

    ranks, given = Ranks(3), updates(3)
    results = ranks.run(lambda group: merge_on(Lossy(ranks, group.rank), [[0], [1], [2]], given))
    assert_no_sum(results, "masks have not cancelled")


def test_merging_again_gives_the_same_sum_under_new_masks() -> None:
    given = updates(3)

    def merge(group: Group) -> Any:
        secure, ctx = SecureAggregation(), context(3)
        empty = secure.init(given[0], CPU, secure.open(group, facts(3)))
        acc = secure.add(empty, given[group.rank], replace(ctx, client=ctx.cohort[group.rank]))
        return [secure.result(secure.merge(acc, group, Message(), ctx)[0], ctx).delta for _ in range(2)]

    ranks = Ranks(3)
    for first, again in ranks.run(merge):
        torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not any(torch.equal(ranks.seen[rank], ranks.seen[rank + 3]) for rank in range(3))


def test_fewer_clients_the_second_time_are_refused() -> None:
    """The retry trap: client 3 vanishes after the first sum has been made, and the round is tried again."""
    given, ctx = updates(4), context(4)

    def merge(group: Group) -> Any:
        secure = SecureAggregation()
        empty = secure.init(given[0], CPU, secure.open(group, facts(4)))
        acc = secure.add(empty, given[group.rank], replace(ctx, client=ctx.cohort[group.rank]))
        secure.merge(acc, group, Message(), ctx)
        return secure.merge(acc if group.rank < 3 else empty, group, Message(), ctx)

    results = Ranks(4).run(merge)
    assert [isinstance(result, RetryRefused) for result in results[:3]].count(True) >= 1
    assert all(isinstance(result, Exception) for result in results)


def test_gathered_reports_hold_sums_only() -> None:
    def gather(group: Group) -> Any:
        secure = SecureAggregation()
        session = secure.open(group, facts(3))
        own = Message({"sums": {"val_loss": 0.5 + group.rank}, "name": f"rank {group.rank}"})
        return secure.gather(session, group, own, "evaluation")

    ranks = Ranks(3)
    for messages in ranks.run(gather):
        assert messages[0].fields["sums"] == {"val_loss": 4.5}
        assert all("sums" not in message.fields for message in messages[1:])
    assert not any("sums" in message.fields for message in ranks.said)
