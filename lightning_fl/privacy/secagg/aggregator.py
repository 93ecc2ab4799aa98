"""Secure aggregation as an aggregator: the federation learns the weighted sum of the updates and nothing else."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_fl.aggregation import Aggregator, ClientLost, FederationFacts, RoundContext, WeightedMean
from lightning_fl.aggregation.weighted_mean import aggregate_of
from lightning_fl.communication import Group, Message
from lightning_fl.privacy.secagg.dropouts import num_dropouts, plan_dropouts
from lightning_fl.privacy.secagg.errors import ProtocolError, SecureAggregationError
from lightning_fl.privacy.secagg.masks import apply_masks
from lightning_fl.privacy.secagg.messages import SessionParams
from lightning_fl.privacy.secagg.packing import NUM_CHECKS, Packing, Ranges, Sums, split_report, with_report
from lightning_fl.privacy.secagg.pairwise import PairwiseClient, roster_of, with_update
from lightning_fl.privacy.secagg.participant import MIN_CLIENTS, two_thirds
from lightning_fl.privacy.secagg.primitives import digest, library
from lightning_fl.privacy.secagg.quantize import DTYPES
from lightning_fl.privacy.secagg.session import Session, open_session
from lightning_fl.privacy.secagg.simulate import Simulation
from lightning_fl.types import Aggregate, ClientId, Tree, Update

Protocol = Literal["pairwise", "bonawitz"]
DEFAULT_MAX_WEIGHT = 65536.0


@dataclass(frozen=True)
class SecureSum:
    """Accumulator of :class:`SecureAggregation`.

    Args:
        session: Identities, value ranges and journal.
        packing: The layout of the vector.
        vector: The sum of the vectors of this rank's clients; it never leaves the rank unmasked.
        model: Hash of the global model from which the clients train.
        clients: This rank's clients whose update is in the sum.
        simulation: The clients of the double-masking protocol, after the first has finished; used for one sum.
        sums: The sums over all clients, after the merge.
    """

    session: Session
    packing: Packing
    vector: Tensor
    model: bytes
    clients: tuple[ClientId, ...] = ()
    simulation: Simulation | None = None
    sums: Sums | None = None


class SecureAggregation(Aggregator):
    r"""The weighted mean, of which the federation learns only the sums :math:`\sum_i w_i u_i` and :math:`\sum_i w_i`.

    Every client adds masks to its update that cancel in the sum of all. Its weight, side channels, buffers and report
    are in the same masked vector. Coordinates are rounded stochastically to integers: a sum over n clients is within
    ``n * clip * max_weight / (2^b - 1)`` of the exact one. With 32-bit integers b is 29 for 3 clients, 27 for 10 and 24
    for 100.

    ``"pairwise"`` costs one all-reduce of integers, of the same size as in float32. It needs every client that
    advertised its keys to stay until the sum is made. ``"bonawitz"`` survives dropouts as long as floor(2n/3) + 1 and
    ``min_clients`` clients stay; it runs between the simulated clients of one process.

    Args:
        protocol: ``"pairwise"`` or ``"bonawitz"``.
        clip: Largest magnitude of a coordinate of an update; larger ones are clipped, with a warning.
        aux_clip: The same for side channels such as SCAFFOLD's.
        max_weight: Upper bound on a client's weight, which the federation may know. None: 1 under
            ``weighting="uniform"``, the largest number of examples of a simulated client, 65536 between silos.
        modulus_bits: 32, or 64 for twice the bytes and finer steps.
        min_clients: Smallest number of clients in a sum: a count of at least 3, or a share of the round's cohort, but
            at least 3. Default two thirds, so that nobody can get the sum of a few by making the others fail.
        keys: Folder of the silo's keys, in which ``{rank}`` stands for its rank. None: the variable
            ``LIGHTNING_FL_KEYS``, or ``keys/silo{rank}``. Simulated clients need none.
        dropout: For simulations: the share of each round's clients that drop out, at random stages. Default 0.
        dropout_seed: Seed of the dropouts. Default 0.
        aggregator: None or the weighted mean, the only aggregator that can be computed from a sum.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If ``cryptography`` is not installed.

    Reference:
        Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017.
    """

    hides_reports: ClassVar[bool] = True

    def __init__(
        self,
        protocol: Protocol = "pairwise",
        clip: float = 16.0,
        aux_clip: float = 1024.0,
        max_weight: float | None = None,
        modulus_bits: int = 32,
        min_clients: int | float = 2 / 3,
        keys: str | None = None,
        dropout: float = 0.0,
        dropout_seed: int = 0,
        aggregator: Aggregator | None = None,
    ) -> None:
        if protocol not in ("pairwise", "bonawitz"):
            raise ValueError(f"protocol={protocol!r} is not known; expected 'pairwise' or 'bonawitz'.")
        if aggregator is not None and type(aggregator) is not WeightedMean:
            raise ValueError(
                f"{type(aggregator).__name__} has to see each client's update, but secure aggregation reveals only "
                "their sum. Use either that aggregator alone, or SecureAggregation() with the weighted mean."
            )
        if isinstance(min_clients, float):
            if not 0 < min_clients <= 1:
                raise ValueError(
                    f"min_clients={min_clients} as a float is a share of the cohort and must lie in (0, 1]; write an "
                    "int for a count."
                )
        elif min_clients < MIN_CLIENTS:
            raise ValueError(
                f"min_clients={min_clients} is too few: in a sum of two, each learns the other's update by subtracting "
                f"its own. Expected at least {MIN_CLIENTS}."
            )
        if max_weight is not None and not max_weight > 0:
            raise ValueError(f"max_weight={max_weight} must be a positive number.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be a share from 0 to below 1.")
        # Raises if the library is missing: now, not in the first round.
        library()
        self.protocol: Protocol = protocol
        self.ranges = Ranges(clip, aux_clip, max_weight or DEFAULT_MAX_WEIGHT, modulus_bits)
        self.max_weight = max_weight
        self.min_clients = min_clients
        for tree in ("delta", "aux"):
            # Raises if even the smallest sum would leave too few bits for a coordinate.
            self.ranges.quantizer(tree, self.fewest(0))
        self.keys = keys
        self.dropout = dropout
        self.dropout_seed = dropout_seed

    def fewest(self, cohort_size: int) -> int:
        """Returns the fewest clients in a sum over a cohort."""
        if isinstance(self.min_clients, float):
            # Slightly less, because 2 / 3 of 6 is 4 and not 5 by a rounding error.
            return max(MIN_CLIENTS, math.ceil(self.min_clients * cohort_size - 1e-9))
        return self.min_clients

    def __repr__(self) -> str:
        # Hashed as what all participants must share, so it leaves out `keys`, which differs between silos.
        settings = {"protocol": self.protocol, **vars(self.ranges), "min_clients": self.min_clients}
        return f"SecureAggregation({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    @property
    def integer_bits(self) -> int:
        return self.ranges.modulus_bits

    def min_clients_of(self, cohort_size: int) -> int:
        fewest = self.fewest(cohort_size)
        return max(fewest, two_thirds(cohort_size)) if self.protocol == "bonawitz" else fewest

    def open(self, group: Group, facts: FederationFacts) -> Session:
        ranges = self.ranges
        if facts.is_training:
            self._check_cohort(facts.cohort_size, group, facts.silos)
            self._check_min_cohort(facts.min_cohort_size)
            ranges = self.ranges_of(facts.max_weight)
        if self.keys is not None and not facts.silos:
            warnings.warn(
                f"keys={self.keys!r} is not used: simulated clients make their own identities. Leave it out.",
                stacklevel=2,
            )
        return open_session(group, facts.silos, self.keys, ranges)

    def ranges_of(self, max_weight: Callable[[], float | None]) -> Ranges:
        """Returns the value ranges of an update.

        Args:
            max_weight: Returns the largest weight of a client, or None if it must stay unknown.
        """
        if self.max_weight is not None:
            return self.ranges
        # A power of two, so that dividing the weights by it and multiplying the sum again is exact.
        return replace(self.ranges, max_weight=2.0 ** math.ceil(math.log2(max_weight() or DEFAULT_MAX_WEIGHT)))

    def init(self, template: Update, device: torch.device, session: Session | None = None) -> SecureSum:
        if session is None:
            raise ValueError("SecureAggregation.init got no session. Pass the result of open(group, facts).")
        packing = Packing(template, session.ranges)
        # In the double-masking protocol each client's vector is masked separately, so there is no running sum.
        size = packing.vector_size if self.protocol == "pairwise" else 0
        vector = torch.zeros(size, dtype=packing.dtype, device=device)
        return SecureSum(session, packing, vector, model_digest(template))

    def add(self, acc: SecureSum, update: Update, ctx: RoundContext) -> SecureSum:
        assert ctx.client is not None
        num_clients = len(ctx.cohort)
        if self.protocol == "bonawitz":
            acc = self._simulate(acc, ctx)
            assert acc.simulation is not None
            # From 1, because at 0 Shamir's polynomial is the secret itself.
            number = ctx.cohort.index(ctx.client) + 1
            if not acc.simulation.is_waiting_for(number):
                raise ClientLost
            vector = acc.packing.zeros(next(iter(update.delta.values())).device)
            acc.packing.add(vector, update, num_clients)
            vector_id = acc.session.vector_id(acc.model, ctx.round)
            acc.simulation.send(number, with_report(vector, [], {}, 1).cpu(), vector_id)
        else:
            if plan_dropouts(self.dropout, self.dropout_seed, ctx, stages=("advertise",)).get(ctx.client):
                raise ClientLost
            acc.packing.add(acc.vector, update, num_clients)
        return replace(acc, clients=(*acc.clients, ctx.client))

    def merge(
        self, acc: SecureSum, group: Group, report: Message, ctx: RoundContext
    ) -> tuple[SecureSum, list[Message]]:
        if self.protocol == "bonawitz":
            simulation = self._simulate(acc, ctx).simulation
            assert simulation is not None
            total, survivors = simulation.finish()
            vector, _ = split_report(total.to(acc.vector.device), [], len(survivors))
            messages = [report]
        else:
            vector, messages = self._sum(acc, group, report, ctx)
        sums = acc.packing.unpack(vector, len(ctx.cohort))
        if sums.num_clipped and group.rank == 0 and acc.session.is_first("clipping"):
            warnings.warn(
                f"{sums.num_clipped} of {sums.num_clients} clients had coordinates beyond clip={self.ranges.clip:g} or "
                f"aux_clip={self.ranges.aux_clip:g}; they were clipped. If that is not intended, give "
                "SecureAggregation a larger one.",
                stacklevel=2,
            )
        # Callers sum weights over the reports. Only the totals are known, so the first report holds them, the rest 0.
        totals, zeros = {"weight": sums.weight, "num_clients": sums.num_clients}, {"weight": 0.0, "num_clients": 0}
        reports = [
            Message({**message.fields, **(zeros if rank else totals)}, message.tensors)
            for rank, message in enumerate(messages)
        ]
        return replace(acc, sums=sums), reports

    def gather(self, session: Session, group: Group, report: Message, topic: str) -> list[Message]:
        settings = digest(repr(self).encode())
        attempt = session.next_attempt(topic)
        params = SessionParams(session.id, digest(topic.encode()), settings, 0, attempt, group.size, self.fewest(0))
        scalars = report.fields.get("sums", {})
        clients = [
            PairwiseClient(rank + 1, session.identity(rank), params, session.trusted, session.journal, bool(scalars))
            for rank in ([group.rank] if group.talks else [])
        ]
        messages, advertisements, names = _exchange(
            group, report, scalars, clients, self._min_reporting_ranks(session), topic
        )
        scalars = {name: value for name, value in scalars.items() if name in names}
        vector = with_report(torch.empty(0, dtype=DTYPES[self.ranges.modulus_bits]), names, scalars, 1)
        for client in clients:
            client.mask(vector, advertisements, digest(topic.encode(), repr(sorted(scalars.items())).encode()))
        _, sums = split_report(group.all_reduce(vector), names, group.size)
        return _with_sums(messages, sums)

    def result(self, acc: SecureSum, ctx: RoundContext) -> Aggregate:
        sums = acc.sums
        assert sums is not None, "merge comes before result"
        return aggregate_of(sums.trees, sums.weight, sums.num_clients, ctx)

    def _min_reporting_ranks(self, session: Session) -> int:
        """Returns how many ranks must list a scalar before it is summed: a sum over one silo is that silo's value."""
        # A share is one of clients whose updates are summed; that few silos may log a metric is no failure.
        return 1 if session.is_simulated else self.fewest(0)

    def _check_cohort(self, cohort_size: int, group: Group, silos: bool) -> None:
        fewest = self.fewest(cohort_size)
        if cohort_size < fewest:
            raise ValueError(
                f"A round has {cohort_size} client(s), but secure aggregation needs at least {fewest}: otherwise each "
                "could subtract its own update. Use more clients."
            )
        if silos and self.dropout:
            raise ValueError(f"dropout={self.dropout} is for simulations, but the clients are silos. Leave it out.")
        for tree in ("delta", "aux"):
            self.ranges.quantizer(tree, cohort_size)
        left = cohort_size - num_dropouts(self.dropout, cohort_size)
        needed = self.min_clients_of(cohort_size)
        if left < needed:
            raise ValueError(
                f"dropout={self.dropout} leaves {left} of {cohort_size} clients, but protocol={self.protocol!r} needs "
                f"{needed}. Use a smaller dropout."
            )
        if self.protocol == "bonawitz" and (silos or group.size > 1):
            raise ValueError(
                "protocol='bonawitz' runs between the simulated clients of one process; between ranks there is no "
                "coordinator yet. Use protocol='pairwise', or one process."
            )

    def _check_min_cohort(self, min_cohort_size: int | None) -> None:
        if min_cohort_size is not None and min_cohort_size < self.fewest(min_cohort_size):
            raise ValueError(
                f"Rounds may have {min_cohort_size} client(s) by chance, but secure aggregation needs at least "
                f"{self.fewest(min_cohort_size)}, so training could end early. Draw cohorts of a fixed size: "
                "clients_per_round=... without cohort=Poisson(...)."
            )

    def _session_params(self, acc: SecureSum, ctx: RoundContext, threshold: int) -> SessionParams:
        session, num_clients = acc.session, len(ctx.cohort)
        settings = digest(repr(self).encode(), acc.packing.digest)
        attempt = session.next_attempt(ctx.round)
        # Includes the frozen tensors: clients whose frozen layers differ would train different models, whose updates
        # must not be summed.
        model = digest(acc.model, tensors_digest(ctx.frozen))
        return SessionParams(session.id, model, settings, ctx.round, attempt, num_clients, threshold)

    def _sum(self, acc: SecureSum, group: Group, report: Message, ctx: RoundContext) -> tuple[Tensor, list[Message]]:
        session = acc.session
        if session.is_simulated:
            # A refused client may have sent zeros, and is then among the others already.
            parties = list(dict.fromkeys([*acc.clients, *report.fields.get("refused", [])]))
        else:
            own = group.names[group.rank] if group.names else group.rank
            parties = [client for client in ctx.cohort if client == own and group.talks]
        fewest = self.fewest(len(ctx.cohort))
        params = self._session_params(acc, ctx, fewest)
        clients = [
            PairwiseClient(
                ctx.cohort.index(party) + 1,
                session.identity(party),
                params,
                session.trusted,
                session.journal,
                party in acc.clients,
            )
            for party in parties
        ]
        # A silo without an update adds zeros to the scalars too: the set of clients behind every sum is then the one
        # that the journal knows.
        adds_scalars = session.is_simulated or acc.clients
        scalars = report.fields.get("sums", {}) if adds_scalars else {}
        topic = f"end of round {ctx.round}"
        messages, advertisements, names = _exchange(
            group, report, scalars, clients, self._min_reporting_ranks(session), topic
        )
        # Not verified yet: `masks` below checks the signatures before anything is sent.
        accepted = len(with_update(roster_of(advertisements)))
        if accepted < fewest:
            raise SecureAggregationError(
                f"Round {ctx.round} has {accepted} update(s) left, but a secure sum needs at least {fewest}. No update "
                "has left its client, and the global model is unchanged."
            )
        vector = with_report(acc.vector, names, scalars, len(clients))
        vector_id = session.vector_id(acc.model, ctx.round)
        apply_masks(vector, [mask for client in clients for mask in client.masks(advertisements, vector_id)])
        vector, sums = split_report(group.all_reduce(vector), names, len(advertisements))
        return vector, _with_sums(messages, sums)

    def _simulate(self, acc: SecureSum, ctx: RoundContext) -> SecureSum:
        if acc.simulation is not None:
            return acc
        session = acc.session
        dropouts = plan_dropouts(self.dropout, self.dropout_seed, ctx)
        simulation = Simulation(
            self._session_params(acc, ctx, self.min_clients_of(len(ctx.cohort))),
            {number: session.identity(client) for number, client in enumerate(ctx.cohort, start=1)},
            acc.packing.vector_size + NUM_CHECKS,
            acc.packing.dtype,
            {ctx.cohort.index(client) + 1: stage for client, stage in dropouts.items()},
            journal=session.journal,
        )
        return replace(acc, simulation=simulation)


def model_digest(template: Update) -> bytes:
    """Hashes the trained, shared part of the global model, parameters and buffers, bit for bit."""
    return tensors_digest({**template.delta, **template.buffers})


def tensors_digest(tensors: Tree) -> bytes:
    """Hashes tensors and their names, bit for bit."""
    parts: list[bytes | memoryview] = []
    for name, tensor in tensors.items():
        raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        parts += [name.encode(), memoryview(raw)]
    return digest(*parts)


def _exchange(
    group: Group,
    report: Message,
    scalars: dict[str, float],
    clients: list[PairwiseClient],
    min_reporting_ranks: int,
    topic: str,
) -> tuple[list[Message], list[bytes], list[str]]:
    """Gathers the reports, without their scalars, together with the key advertisements of all ranks' clients.

    Returns:
        The reports, the advertisements, and the names of the scalars that enough ranks list.
    """
    public = {name: value for name, value in report.fields.items() if name != "sums"}
    encoded = [client.advertise().hex() for client in clients]
    fields = {**public, "adverts": encoded, "names": sorted(scalars)}
    messages = group.all_gather(Message(fields, report.tensors), topic)
    try:
        advertisements = [bytes.fromhex(text) for message in messages for text in message.fields["adverts"]]
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"A rank sent keys that are not hexadecimal text: {error}") from error
    listed = Counter(name for message in messages for name in set(message.fields["names"]))
    names = sorted(name for name, num_ranks in listed.items() if num_ranks >= min_reporting_ranks)
    return messages, advertisements, names


def _with_sums(messages: list[Message], sums: dict[str, float]) -> list[Message]:
    first, *others = messages
    return [Message({**first.fields, "sums": sums}, first.tensors), *others]
