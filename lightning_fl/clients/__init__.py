"""Population, cohorts, local work, placement on ranks, and client states."""

from lightning_fl.clients.cohorts import Cohort, CohortSampling, Poisson, RoundRobin, Sampling, Uniform, cohort_size
from lightning_fl.clients.durations import Durations, FixedDurations, Lognormal, Measured, as_durations
from lightning_fl.clients.local_work import LocalWork
from lightning_fl.clients.participation import Participation, ParticipationSampler
from lightning_fl.clients.placement import place_at_home, place_by_size
from lightning_fl.clients.population import Population
from lightning_fl.clients.state_store import ClientStore
from lightning_fl.clients.uneven_work import Amount, Between, PerClient, Stragglers
from lightning_fl.clients.weighted_cohort import Weighted
from lightning_fl.data.client_loaders import ClientLoaders, count_batches, count_examples
from lightning_fl.seeding import ClientRandomness, client_generator, derive_seed, round_rng

__all__ = [
    "Amount",
    "Between",
    "ClientLoaders",
    "ClientRandomness",
    "ClientStore",
    "Cohort",
    "CohortSampling",
    "Durations",
    "FixedDurations",
    "LocalWork",
    "Lognormal",
    "Measured",
    "Participation",
    "ParticipationSampler",
    "PerClient",
    "Poisson",
    "Population",
    "RoundRobin",
    "Sampling",
    "Stragglers",
    "Uniform",
    "Weighted",
    "as_durations",
    "client_generator",
    "cohort_size",
    "count_batches",
    "count_examples",
    "derive_seed",
    "place_at_home",
    "place_by_size",
    "round_rng",
]
