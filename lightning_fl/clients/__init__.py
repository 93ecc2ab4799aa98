"""Who takes part: population, cohorts, placement on ranks, client states."""

from lightning_fl.clients.loaders import ClientLoaders
from lightning_fl.clients.participation import Draws, Participation
from lightning_fl.clients.placement import place_at_home, place_by_size
from lightning_fl.clients.plan import LocalWork, RoundPlan
from lightning_fl.clients.population import Population, count_batches, count_examples
from lightning_fl.clients.round_loader import RoundLoader
from lightning_fl.clients.sampling import Cohort, Poisson, RoundRobin, Sampling, Uniform, cohort_size
from lightning_fl.clients.seeding import ClientRandomness, client_generator, derive_seed, round_rng
from lightning_fl.clients.store import ClientStore
from lightning_fl.clients.uneven import Amount, Between, PerClient, Stragglers
from lightning_fl.clients.weighted import Weighted

__all__ = [
    "Amount",
    "Between",
    "ClientLoaders",
    "ClientRandomness",
    "ClientStore",
    "Cohort",
    "Draws",
    "LocalWork",
    "Participation",
    "PerClient",
    "Poisson",
    "Population",
    "RoundLoader",
    "RoundPlan",
    "RoundRobin",
    "Sampling",
    "Stragglers",
    "Uniform",
    "Weighted",
    "client_generator",
    "cohort_size",
    "count_batches",
    "count_examples",
    "derive_seed",
    "place_at_home",
    "place_by_size",
    "round_rng",
]
