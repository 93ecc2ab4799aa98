"""Training on devices: the training step as a file that needs no torch, and the gateway to which devices connect."""

from lightning_fl.devices.training_step import TrainingStep, export_training_step

__all__ = ["TrainingStep", "export_training_step"]
