"""Client loaders, partitioners, splitting and collation: which examples each client has and how they are read."""

from lightning_fl.data.client_loaders import ClientLoaders, Loader, count_batches, count_examples

__all__ = ["ClientLoaders", "Loader", "count_batches", "count_examples"]
