"""Client-level differential privacy: updates are clipped, and noise hides the contribution of any one client."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_fl.aggregation import Aggregator, RoundContext, Transform
from lightning_fl.algorithms import Algorithm
from lightning_fl.privacy.accounting.bounds import Method, Relation, dp_accounting
from lightning_fl.privacy.accounting.ledger import Adversary, Epsilon, Gaussian, Ledger
from lightning_fl.privacy.accounting.sampling import Distributed, FixedSize, Full, Poisson, Sampling
from lightning_fl.privacy.client_level.band_mf import BandMF
from lightning_fl.privacy.client_level.clipping import (
    AdaptiveClip,
    centred_bit,
    check_clipped,
    clip_update,
    noise_on_model,
    with_trees,
)
from lightning_fl.privacy.client_level.distributed import ENCODED, Grid, encoded_like, num_coordinates
from lightning_fl.privacy.integer_noise import IntegerNoise, Mechanism
from lightning_fl.privacy.noise import (
    PrivacyError,
    SecureNoise,
    add_noise,
    check_added,
    check_source,
    warn_of_test_seed,
)
from lightning_fl.privacy.state import load_ledger, pack, unpack
from lightning_fl.tree import Flat, Layout, update_trees
from lightning_fl.types import Aggregate, State, Tree, Update

BITS = "privacy"
_NO_BITS = torch.zeros((), dtype=torch.float64)
GRID = 5e-4
"""Grid for the epsilon of each round: five times as fast as the ledger's own, and at most about 1e-3 larger."""
ADVERSARIES = {
    "central": "whoever sees the global model of every round, but not the server, nor who takes part",
    "distributed": (
        "whoever sees the sums of the clients' updates, the server and num_colluding clients included, but not the "
        "metrics and counts, which are exact"
    ),
    "local": "the server, and whoever sees the clients' updates, but not the metrics and counts, which are exact",
}


class PrivacyBudgetExceeded(PrivacyError):
    """The next round would exceed ``max_epsilon``."""


@dataclass(frozen=True)
class ClientLevelDP(Transform):
    r"""Client-level differential privacy: DP-FedAvg with a fixed or an adaptive clip norm.

    .. math::
        \Delta_i \leftarrow \Delta_i \min(1, C / \lVert \Delta_i \rVert), \qquad
        \Delta = \frac{1}{m} \Bigl(\sum_i \Delta_i + \mathcal{N}(0, z^2 C^2)\Bigr)

    :math:`\Delta_i` is everything a client contributes: parameters, buffers and side channels together; one that holds
    NaN counts as zero. All clients have the same weight, and the sum is divided by the expected number :math:`m` of
    clients, even when nobody takes part. The guarantee protects a client with all its data, in the global models of all
    rounds. It does not cover logged training metrics, step counts, and client states beside a checkpoint. The number of
    examples and steps of a client counts as public.

    The noise comes from the operating system. In ``"central"`` mode the server draws it once for the federation; a
    federation of silos has no server that could be trusted with it. In ``"local"`` mode each client adds noise to its
    own update, so nobody has to be trusted, at the price of :math:`\sqrt{m}` times the noise on the mean. The server
    then sees who takes part and may compare any two updates of a client, so there is no amplification, and neighbouring
    data sets replace one client's data. Silos exchange logged metrics and counts exactly: log nothing about a silo's
    data that the others may not know.

    In ``"distributed"`` mode each client adds a share of integer noise to its update, rounded to a grid, and
    ``SecureAggregation`` shows nobody more than the sum of all. So many shares have the noise of ``"central"`` together
    that the fewest clients in a secure sum are enough; with fewer the round is given up. A client knows its own share,
    which therefore does not count against it: the shares of all but ``num_colluding`` must be enough. There is no
    amplification, since the server knows who takes part. Discrete Gaussian noise costs what Gaussian noise costs, up to
    less than rounding shows; for Skellam noise the accountant is Rényi's; see :class:`Grid` for the bounds. The sum is
    divided by the number of clients in it.

    With ``mechanism=BandMF(bands)`` the noise of a round cancels a part of that of the rounds before, for clients that
    take part in turns and not by chance.

    Cohorts are drawn from the operating system's randomness; Poisson cohorts amplify the most. A round is in the ledger
    before its clients train. It stays there if the round fails and the same Trainer runs it again, and checkpoints
    written from then on hold it.

    Args:
        clip: The clip norm :math:`C`, or :class:`AdaptiveClip`.
        noise_multiplier: The noise :math:`z`, relative to the clip norm. 0 only clips, which is NOT PRIVATE.
        mode: ``"central"``, ``"local"`` or ``"distributed"``.
        delta: The delta of the logged epsilon. None: 1e-5, or ``population ** -1.1`` if that is less.
        max_epsilon: Training stops before a round that would make epsilon larger. None: no limit.
        method: The accountant, as for :meth:`Ledger.epsilon`.
        noise: In distributed mode ``"discrete_gaussian"`` or ``"skellam"``.
        num_colluding: In distributed mode, how many clients may tell the adversary their noise. Default 1: each client
            knows its own.
        mechanism: In central mode :class:`BandMF`, for noise that is correlated between rounds. None: independent.
        insecure_test_seed: Makes the noise repeat, for tests. The run is then NOT PRIVATE, and stays so if it continues
            without the seed.

    Raises:
        ValueError: If an argument is out of range; or, when the strategy is built, if the combination breaks the bound.
        ImportError: If the ``privacy`` extra is not installed.

    Reference:
        McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018.

    Example:
        >>> import lightning_fl as fl
        >>> strategy = fl.FederatedStrategy(
        ...     "fedavg",
        ...     num_clients=1000,
        ...     cohort=fl.clients.Poisson(0.1),
        ...     transforms=[fl.privacy.ClientLevelDP(clip=0.5, noise_multiplier=1.0)],
        ... )
    """

    clip: float | AdaptiveClip
    noise_multiplier: float
    mode: Literal["central", "local", "distributed"] = "central"
    delta: float | None = None
    max_epsilon: float | None = None
    method: Method = "pld"
    insecure_test_seed: int | None = None
    noise: Mechanism = "discrete_gaussian"
    num_colluding: int = 1
    mechanism: BandMF | None = None

    weighting: ClassVar[Literal["examples", "uniform"] | None] = "uniform"
    client_keys: ClassVar[tuple[str, ...]] = ("clip",)
    needs_secure_sampling = True
    hides_clients = True
    is_lossy = True

    def __post_init__(self) -> None:
        if isinstance(self.clip, AdaptiveClip):
            if self.clip.bit_noise is not None:
                noise_on_model(self.noise_multiplier, self.clip.bit_noise)
        elif not 0 < self.clip < float("inf"):
            raise ValueError(f"ClientLevelDP got clip={self.clip}; expected a positive number or AdaptiveClip(...).")
        Gaussian(self.noise_multiplier)
        if self.mode not in ADVERSARIES:
            raise ValueError(f"ClientLevelDP got mode={self.mode!r}; expected 'central', 'local' or 'distributed'.")
        if self.noise not in ("discrete_gaussian", "skellam"):
            raise ValueError(f"ClientLevelDP got noise={self.noise!r}; expected 'discrete_gaussian' or 'skellam'.")
        if self.num_colluding < 0:
            raise ValueError(f"ClientLevelDP got num_colluding={self.num_colluding}; expected at least 0.")
        if self.mode != "distributed" and (self.noise, self.num_colluding) != ("discrete_gaussian", 1):
            raise ValueError(
                f"noise={self.noise!r} and num_colluding={self.num_colluding} have no effect in mode={self.mode!r}. "
                "Leave them out, or use mode='distributed'."
            )
        if self.mode != "central" and self.mechanism is not None:
            raise ValueError(
                f"mechanism={self.mechanism} correlates the noise that a server adds, and in mode={self.mode!r} the "
                "clients add it. Leave it out, or use mode='central'."
            )
        if self.mode == "distributed" and isinstance(self.clip, AdaptiveClip):
            raise ValueError(
                "mode='distributed' takes a fixed clip norm: AdaptiveClip would change the grid. Give one."
            )
        if self.method not in ("pld", "rdp"):
            raise ValueError(f"ClientLevelDP got method={self.method!r}; expected 'pld' or 'rdp'.")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"ClientLevelDP got delta={self.delta}; expected a number well below 1 / clients.")
        if self.max_epsilon is not None and not self.max_epsilon > 0:
            raise ValueError(f"ClientLevelDP got max_epsilon={self.max_epsilon}; expected a positive number.")
        # Both raise if a library is missing: now, not after the first round has been trained.
        dp_accounting()
        SecureNoise()
        if self.insecure_test_seed is not None:
            warn_of_test_seed()

    @property
    def is_private(self) -> bool:  # type: ignore[override]
        """Whether there is noise, and nobody can compute it."""
        return self.noise_multiplier > 0 and self.insecure_test_seed is None

    # ---- when the strategy is built

    def check(self, later: Sequence[Transform], aggregator: Aggregator, weighting: str) -> None:
        if weighting != "uniform":
            raise ValueError(
                f"weighting={weighting!r} lets one client weigh more than the noise covers. Leave weighting out: under "
                "ClientLevelDP all clients have the same weight."
            )
        if self.mode == "distributed":
            self._check_distributed(later, aggregator)
            return
        if not aggregator.is_sum:
            raise ValueError(
                f"ClientLevelDP bounds what a client adds to a sum, but {type(aggregator).__name__} is not a sum. Use "
                "fl.aggregation.WeightedMean()."
            )
        for transform in later:
            if not transform.keeps_norm_bound:
                raise ValueError(
                    f"{type(transform).__name__} comes after ClientLevelDP and may lengthen the clipped update. Put "
                    "ClientLevelDP last."
                )

    def check_algorithm(self, algorithm: Algorithm) -> None:
        super().check_algorithm(algorithm)
        if algorithm.aux_role != "addend":
            raise ValueError(
                f"ClientLevelDP clips and noises the side channels of {type(algorithm).__name__} with the changes, but "
                f"its step uses them as a {algorithm.aux_role}: the clip would not shorten the step as it does the "
                "changes, and noise may turn it around. Use another algorithm, such as 'fedavg', 'fedadam' or "
                "'scaffold'."
            )

    def _check_distributed(self, later: Sequence[Transform], aggregator: Aggregator) -> None:
        if aggregator.integer_bits is None:
            raise ValueError(
                "mode='distributed' gives each client a share of the noise, which is enough only where nobody sees a "
                f"single update, but {type(aggregator).__name__} does. Use aggregator=fl.privacy.SecureAggregation()."
            )
        if later:
            raise ValueError(
                f"{type(later[0]).__name__} comes after ClientLevelDP(mode='distributed'), whose updates are integers. "
                "Put ClientLevelDP last."
            )

    def like(self, update: Update) -> Update:
        if update.buffers:
            warnings.warn(
                f"Under ClientLevelDP buffers ({', '.join(update.buffers)}) are clipped and noised like parameters. "
                "Noise may make a running variance negative, and changes masks and counters. Replace BatchNorm by "
                "GroupNorm, keep the buffers personal, or register them with persistent=False, so that each client "
                "starts with their values of the round's start.",
                stacklevel=2,
            )
        if self.mode == "distributed":
            return encoded_like(update)
        if not isinstance(self.clip, AdaptiveClip):
            return update
        device = next(iter(update_trees(update)["delta"].values())).device
        bit = {"unclipped": torch.zeros((), dtype=torch.float64, device=device)}
        return replace(update, aux={**update.aux, BITS: bit})

    # ---- a round

    def book(self, state: State, release: Any) -> State:
        if release.unit != "client":
            raise ValueError(
                f"The data was scaled by a release that protects an {release.unit}, but ClientLevelDP protects "
                "clients. Use PrivateScaling(unit='client')."
            )
        booked = unpack(state["booked"]) if "booked" in state else []
        if release.id in booked:
            return state
        ledger = load_ledger(state)
        ledger.record(release.event)
        return {**state, "ledger": pack(ledger.state_dict()), "booked": pack([*booked, release.id])}

    def start_round(self, state: State, ctx: RoundContext) -> State:
        if self.mode == "central" and ctx.silos:
            raise ValueError(
                "ClientLevelDP(mode='central') needs a server that adds the noise and keeps it secret. A federation of "
                "silos has none: each silo would know the noise, or the sum without it, and so the others' share. Use "
                "mode='distributed' with SecureAggregation, mode='local', or simulate the clients."
            )
        if self.insecure_test_seed is None:
            check_source()
        ledger, gap = load_ledger(state), ctx.round - (int(state["round"]) + 1 if "round" in state else 0)
        if gap > 0:
            ledger.record(Gaussian(0.0), gap)  # earlier rounds ran without this transform, so without noise
        num_insecure = int(state.get("insecure", 0))
        if self.insecure_test_seed is not None:
            num_insecure += 1
        elif num_insecure:
            ledger.record(Gaussian(0.0), num_insecure)  # anyone who knows the seed can compute their noise
            num_insecure = 0
        if self.mode == "distributed":
            if ctx.integer_bits is None:
                raise ValueError(
                    "mode='distributed' needs a secure sum among the ranks of a federation; here a coordinator sees "
                    "each silo's update. Use mode='local'."
                )
            self._grid(ctx).check_modulus(len(ctx.cohort), ctx.integer_bits)
        event = self._event(ctx)
        drawn = self._check_cohort(state.get("drawn"), event.sampling, ctx)
        of_mechanism: State = {}
        begins = True
        if self.mechanism is not None:
            of_mechanism, begins = self.mechanism.start_round(state, ctx, self._noises(self.cohort(ctx)))
        if begins:
            ledger.record(event)  # before training: a round that crashes halfway may have released something already
        if self.max_epsilon is not None and self._epsilon(ledger, ctx) > self.max_epsilon:
            raise PrivacyBudgetExceeded(
                f"Round {ctx.round} would make epsilon {self._epsilon(ledger, ctx):.4g}, more than "
                f"max_epsilon={self.max_epsilon:g}. Stop here, or raise max_epsilon or the noise before you start."
            )
        clip = self.clip.initial if isinstance(self.clip, AdaptiveClip) else self.clip
        adapts = isinstance(self.clip, AdaptiveClip) and "clip" in state
        return {
            "ledger": pack(ledger.state_dict()),
            "round": torch.tensor(ctx.round),
            "insecure": torch.tensor(num_insecure),
            "clip": state["clip"] if adapts else torch.tensor(clip, dtype=torch.float64),
            "drawn": pack(drawn),
            **of_mechanism,
            **({"booked": state["booked"]} if "booked" in state else {}),
        }

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        if update.weight != 1.0:
            raise PrivacyError(f"Client {ctx.client!r} weighs {update.weight}, but clients must weigh 1.")
        clip = float(ctx.server["clip"])
        # Before clipping, after which every update is within the norm.
        bits = centred_bit(update, clip) if isinstance(self.clip, AdaptiveClip) else _NO_BITS
        update = clip_update(update, clip)
        check_clipped(update, clip)
        if self.mode == "distributed":
            noise = IntegerNoise(self.insecure_test_seed, ctx.round, str(ctx.client))
            return self._grid(ctx).encode(update, noise), state
        if self.mode == "local":
            source = SecureNoise(self.insecure_test_seed, ctx.round, str(ctx.client))
            flat, layout = _flatten(update_trees(update))
            flat, bits = self._release(flat, bits, clip, 1.0, source)
            update = with_trees(update, layout.unflatten(flat))
        if isinstance(self.clip, AdaptiveClip):
            device = next(iter(update.delta.values())).device
            update = replace(update, aux={**update.aux, BITS: {"unclipped": bits.to(device)}})
        return update, state

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        if self.mode == "distributed":
            return self._decode(aggregate, ctx), state
        clip, cohort = float(state["clip"]), self.cohort(ctx)
        aux = dict(aggregate.aux)
        # Taken out, because the bits get noise of another scale than the update.
        channel = aux.pop(BITS, None)
        bits = _NO_BITS if channel is None else channel["unclipped"].double()
        flat, layout = _flatten(update_trees(replace(aggregate, aux=aux)))
        if self.mode == "central":
            # Rank 0 draws the noise and shares the result, because all ranks must hold the same model.
            exact = flat
            if ctx.group.rank == 0:
                start = flat if self.mechanism is None else self.mechanism.without_past(flat, state, clip)
                flat, bits = self._release(start, bits, clip, cohort, SecureNoise(self.insecure_test_seed, ctx.round))
            flat = {dtype: ctx.group.broadcast(values) for dtype, values in flat.items()}
            bits = ctx.group.broadcast(bits)
            if self.mechanism is not None:
                state = self.mechanism.end_round(state, exact, flat, clip, ctx.round)
        trees = layout.unflatten(flat)
        released = Aggregate(
            delta=trees.get("delta", {}),
            buffers=trees.get("buffers", {}),
            weight=cohort,
            aux={name: trees[f"aux/{name}"] for name in aux},
            num_clients=max(round(cohort), 1),  # the expected number; the exact one is not covered by the noise
            population=aggregate.population,
        )
        if isinstance(self.clip, AdaptiveClip):
            adapted = torch.tensor(self.clip.next(clip, float(bits), cohort), dtype=torch.float64)
            state = {**state, "clip": adapted, "last_clip": state["clip"]}
        return released, state

    # ---- the guarantee

    def report(self, state: State, ctx: RoundContext) -> Mapping[str, float | str]:
        epsilon = self._epsilon(load_ledger(state), ctx)
        is_private = epsilon < float("inf") and self.insecure_test_seed is None
        seed = " (insecure_test_seed)" if self.insecure_test_seed is not None else ""
        return {
            "dp_epsilon": float(epsilon),
            "dp_delta": epsilon.delta,
            "dp_noise_multiplier": float(self.noise_multiplier),
            # `clip` is already the one of the next round.
            "dp_clip": float(state.get("last_clip", state["clip"])),
            "dp_is_private": float(is_private),
            "dp_guarantee": f"epsilon-delta, {epsilon.relation}" if is_private else f"NOT PRIVATE{seed}",
            "dp_mode": self.mode,
            "dp_unit": "client",
            "dp_adversary": ADVERSARIES[self.mode],
            **({} if self.mechanism is None else {"dp_mechanism": repr(self.mechanism)}),
        }

    def stop_reason(self, state: State, ctx: RoundContext) -> str | None:
        if self.max_epsilon is None:
            return None
        ledger = load_ledger(state)
        if self.mechanism is None or self.mechanism.books_next(state):
            ledger.record(self._event(ctx))
        if self._epsilon(ledger, ctx) <= self.max_epsilon:
            return None
        spent = float(self._epsilon(load_ledger(state), ctx))
        return (
            f"Training stops: epsilon is {spent:.4g}, and another round would exceed max_epsilon={self.max_epsilon:g}."
        )

    def sampling(self, ctx: RoundContext) -> Sampling:
        """Returns the draw of a round's clients as the ledger records it; an unknown one counts as :class:`Full`."""
        drawn = ctx.sampling
        if self.mode == "distributed":
            return Distributed(self.noise, self._grid(ctx).slack)
        if drawn is None or self.mode == "local":
            return Full()  # in local mode the server sees who takes part
        if drawn.kind == "poisson":
            return Poisson(drawn.rate)
        return FixedSize(int(drawn.size), drawn.num_clients) if drawn.kind == "fixed" else Full()

    def cohort(self, ctx: RoundContext) -> float:
        """Returns the expected number of clients in a round."""
        return float(ctx.sampling.size if ctx.sampling is not None else max(len(ctx.cohort), 1))

    def _event(self, ctx: RoundContext) -> Gaussian:
        distributed = self.mode == "distributed"
        z = self._grid(ctx).effective_noise_multiplier if distributed else self.noise_multiplier
        return Gaussian(z, self.sampling(ctx), self._adversary)

    def _grid(self, ctx: RoundContext) -> Grid:
        assert not isinstance(self.clip, AdaptiveClip)
        assert ctx.template is not None, "the round gives each transform a template"
        num_honest = ctx.min_clients - self.num_colluding
        if num_honest < 1:
            raise ValueError(
                f"A secure sum may have {ctx.min_clients} clients, of which num_colluding={self.num_colluding} leaves "
                "nobody whose noise is secret. Raise SecureAggregation(min_clients=...), or lower num_colluding."
            )
        return Grid(self.clip, num_coordinates(ctx.template), self.noise_multiplier, num_honest, self.noise)

    def _decode(self, aggregate: Aggregate, ctx: RoundContext) -> Aggregate:
        if aggregate.num_clients < ctx.min_clients:
            raise PrivacyError(
                f"The sum of round {ctx.round} has {aggregate.num_clients} clients, and {ctx.min_clients} must add "
                "noise. The run stops."
            )
        assert ctx.template is not None
        trees = self._grid(ctx).decode(aggregate.delta[ENCODED], ctx.template)
        return Aggregate(
            delta=trees.get("delta", {}),
            buffers=trees.get("buffers", {}),
            weight=float(aggregate.num_clients),
            aux={name: trees[f"aux/{name}"] for name in ctx.template.aux},
            num_clients=aggregate.num_clients,
            population=aggregate.population,
        )

    def _epsilon(self, ledger: Ledger, ctx: RoundContext) -> Epsilon:
        # Well below 1 / clients: with a delta of that size, publishing one client outright would count as private.
        delta = min(1e-5, max(ctx.population, 1) ** -1.1) if self.delta is None else self.delta
        relation: Relation | None = "replace_one" if self.mode == "local" else None
        # In local mode the server is one of those who look, and rounds whose noise it added hide nothing from it.
        return ledger.epsilon(delta, self.method, relation, GRID, adversary=self._adversary)

    @property
    def _adversary(self) -> Adversary:
        return "model" if self.mode == "central" else "server"

    def _release(
        self, flat: Flat, bits: Tensor, clip: float, cohort: float, source: SecureNoise
    ) -> tuple[Flat, Tensor]:
        """Adds noise to the clipped values and to the bits of an adaptive clip; one budget covers both."""
        on_model, on_bits = self._noises(cohort)
        flat_bits = {bits.dtype: bits[None]}
        noisy, noisy_bits = add_noise(flat, on_model * clip, source), add_noise(flat_bits, on_bits, source)
        check_added(flat, noisy, on_model * clip)
        check_added(flat_bits, noisy_bits, on_bits)
        return noisy, noisy_bits[bits.dtype][0]

    def _noises(self, cohort: float) -> tuple[float, float]:
        """Returns the standard deviations of the noise on the model, in clip norms, and on the bits."""
        on_model, on_bits = self.noise_multiplier, 0.0
        if isinstance(self.clip, AdaptiveClip) and self.noise_multiplier:
            on_bits = self.clip.noise_on_bits(self.noise_multiplier, cohort)
            on_model = noise_on_model(self.noise_multiplier, on_bits)
        return on_model if self.mechanism is None else on_model * self.mechanism.norm, on_bits

    def _check_cohort(self, before: Tensor | None, sampling: Sampling, ctx: RoundContext) -> dict[str, Any]:
        """Counts the clients drawn since the sampling last changed, and checks that the sampling allows so many."""
        drawn: dict[str, Any] = {"sampling": sampling.state_dict(), "drawn": 0, "of": 0}
        if before is not None and unpack(before)["sampling"] == drawn["sampling"]:
            drawn = unpack(before)
        drawn["drawn"] += len(ctx.cohort)
        drawn["of"] += ctx.population
        problem = sampling.check(drawn["drawn"], drawn["of"])
        if len(set(ctx.cohort)) < len(ctx.cohort):
            problem = "a client was drawn twice"
        if problem is not None:
            raise PrivacyError(f"The cohorts are not what the ledger records: {problem}. The run stops.")
        return drawn


def _flatten(trees: Mapping[str, Tree]) -> tuple[Flat, Layout]:
    layout = Layout.of(trees)
    return layout.flatten(trees), layout
