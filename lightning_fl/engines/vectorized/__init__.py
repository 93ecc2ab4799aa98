"""Trains many clients together: one step of a module whose tensors are stacked over the clients."""

from lightning_fl.engines.vectorized.engine import Vectorized, VectorizedEngine

__all__ = ["Vectorized", "VectorizedEngine"]
