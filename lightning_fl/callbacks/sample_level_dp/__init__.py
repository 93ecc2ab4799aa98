"""Differential privacy for examples, as a callback."""

from lightning_fl.callbacks.sample_level_dp.callback import SampleLevelDP

__all__ = ["SampleLevelDP"]
