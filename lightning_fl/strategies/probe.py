"""Measures the mean loss or gradient of a client's data at the global model, before the client trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_fl.algorithms import ProbeKind
from lightning_fl.engines.local_trainer import loss_of
from lightning_fl.strategies import internals
from lightning_fl.strategies import results as logged
from lightning_fl.strategies.out_of_loop import out_of_loop
from lightning_fl.tree import sum_dtype
from lightning_fl.types import Tree


def probe(trainer: L.Trainer, kind: ProbeKind, batches: Iterable[Any], params: Mapping[str, Tensor]) -> Tensor | Tree:
    """Runs the module's ``training_step`` on each batch without training on it.

    Logged values, torchmetrics, buffers, step counts and callbacks are not affected. The module stays in training mode,
    so that dropout and BatchNorm act as they do in training.

    Args:
        trainer: The Trainer; its module is the global model.
        kind: ``"loss"`` or ``"grad"``.
        batches: One pass over a client's data.
        params: The module's shared parameters.

    Returns:
        The mean over the examples: of the loss, a scalar tensor in float64, or of the parameters' gradients, in the
        dtypes in which they are summed.

    Raises:
        ValueError: If ``training_step`` returned no loss at all.
    """
    device = trainer.lightning_module.device
    total, num_examples = torch.zeros((), dtype=torch.float64, device=device), 0
    grads = {name: torch.zeros_like(param, dtype=sum_dtype(param.dtype)) for name, param in params.items()}
    with out_of_loop(trainer, training=True) as results:
        for index, fetched in enumerate(batches):
            outputs, batch = internals.step_out_of_loop(trainer, "training_step", fetched, index)
            loss = loss_of(outputs)
            if loss is None:
                continue
            size, _ = logged.batch_size(results, batch)
            num_examples += size
            if kind == "loss":
                total += loss.detach().double() * size
                continue
            # Not `backward`, which would write into `.grad`; a probe leaves no trace.
            found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            for sums, grad in zip(grads.values(), found, strict=True):
                if grad is not None:
                    sums += grad.to(sums.dtype) * size
    if not num_examples:
        raise ValueError(
            "The algorithm measures the loss of each client's data, but `training_step` returned none for any batch. "
            "Return a loss, or use another algorithm."
        )
    return total / num_examples if kind == "loss" else {name: sums / num_examples for name, sums in grads.items()}
