"""Steps of the user's module outside Lightning's loops, which leave no trace in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch
from torch import nn

from lightning_fl.engines.tensors import owner
from lightning_fl.strategies import lightning_internals as internals
from lightning_fl.strategies.lightning_results import ResultCollection
from lightning_fl.strategies.metrics import MetricStates


@contextmanager
def outside_training(trainer: L.Trainer, training: bool) -> Iterator[ResultCollection]:
    """Inside the block what the module logs is collected apart; afterwards its metrics and buffers are as before.

    Args:
        trainer: The Trainer.
        training: Whether training steps are run, or validation steps.

    Yields:
        What is logged.
    """
    module = trainer.lightning_module
    states = MetricStates(module, rank=0)
    metrics = states.snapshot()
    buffers = [(*owner(module, name), tensor, tensor.clone()) for name, tensor in module.named_buffers()]
    try:
        with internals.logging_aside(trainer, training) as results:
            yield results
    finally:
        states.restore(metrics)
        _put_back(buffers)


@torch.no_grad()
def _put_back(buffers: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]]) -> None:
    for module, key, tensor, value in buffers:
        setattr(module, key, tensor.copy_(value))  # a step may have put another tensor in its place
