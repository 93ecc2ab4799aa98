"""Refuses settings that break the guarantee of sample-level privacy; each error says what to change."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_fl.callbacks.personalized_evaluation import PersonalizedEvaluation
from lightning_fl.privacy.sample_level.per_sample import why_mixed, why_not_per_sample
from lightning_fl.strategies import FederatedStrategy, hooks
from lightning_fl.strategies.hooks import TRANSFER_HOOKS

PRECISIONS = ("32-true", "64-true", "bf16-mixed")


def refuse(found: str) -> MisconfigurationException:
    """The error to raise for a setting that breaks the guarantee."""
    return MisconfigurationException(f"SampleLevelDP can't give its guarantee: {found}.")


def check_settings(trainer: L.Trainer, module: L.LightningModule, strict: bool = False) -> None:
    """Checks the settings before the data is loaded, and again in every round, since callbacks may change them.

    Args:
        trainer: The Trainer.
        module: The module.
        strict: Whether each example is processed alone by construction.

    Raises:
        MisconfigurationException: If something breaks the guarantee.
    """
    if not isinstance(trainer.strategy, FederatedStrategy):
        raise refuse(
            f"the strategy is {type(trainer.strategy).__name__}, and only a federated one lets it draw the batches. "
            "Use Trainer(strategy='fedavg'), with num_clients=1 to train on all data in one place"
        )
    if not module.automatic_optimization:
        raise refuse(
            "the module optimizes manually, which bypasses the clipping. Set automatic_optimization=True, with one "
            "optimizer"
        )
    if trainer.accumulate_grad_batches != 1:
        raise refuse(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} sums batches that each need their own noise. "
            "Leave it at 1, use a larger batch_size, and limit the memory with "
            "SampleLevelDP(max_physical_batch_size=...)"
        )
    if trainer.gradient_clip_val:
        raise refuse(
            f"gradient_clip_val={trainer.gradient_clip_val} clips the noisy sum of gradients, not each example's. "
            "Leave it out: max_grad_norm clips each example's"
        )
    if trainer.precision not in PRECISIONS:
        raise refuse(
            f"precision={trainer.precision!r} scales the loss, or rounds the noise away. Use one of "
            f"{', '.join(map(repr, PRECISIONS))}"
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise refuse("overfit_batches repeats the same batches. Use limit_train_batches, which counts Poisson batches")
    probe, name = trainer.strategy.algorithm.probe, type(trainer.strategy.algorithm).__name__
    if probe is not None:
        raise refuse(
            f"{name} measures the mean {'gradient' if probe == 'grad' else 'loss'} of each client's data, without "
            "noise. Use another algorithm, or an option of it without that measurement"
        )
    if trainer.strategy.algorithm.needs_gradient_at:
        raise refuse(f"{name} computes the gradient of a batch at several points, without noise. Use another algorithm")
    holders = [(module, L.LightningModule), (getattr(trainer, "datamodule", None), L.LightningDataModule)]
    for holder, base in holders if strict else ():
        for hook in TRANSFER_HOOKS:
            if holder is not None and hooks.is_overridden(holder, hook, base):
                raise refuse(
                    f"strict=True allows no code to see two examples, but {type(holder).__name__} has its own {hook}, "
                    "which gets whole batches. Do the same in the data set or in training_step"
                )
    # Any override is refused, because its effect on gradients can't be known from outside.
    for hook in ("backward", "configure_gradient_clipping"):
        if is_overridden(hook, module):
            raise refuse(f"the module has its own {hook}, which could bypass the clipping of gradients. Remove it")


def check_training(trainer: L.Trainer, module: L.LightningModule, strict: bool = False) -> Optimizer:
    """Checks settings that are known only when training starts; returns the optimizer.

    Args:
        trainer: The Trainer.
        module: The module.
        strict: Whether gradients are computed without Opacus, which does not support all layers.

    Raises:
        MisconfigurationException: If something breaks the guarantee.
    """
    strategy: Any = trainer.strategy
    if strategy.view.trains_groups:
        raise refuse("engine='vectorized' trains several clients in one step. Use engine='sequential'")
    # Each evaluation of the batch would release a gradient, but the ledger counts one per step.
    if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
        raise refuse("LBFGS evaluates a batch several times in a step. Use another optimizer")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # The models that it trains are in no ledger, but their metrics depend on the clients' examples.
        trains = isinstance(callback, PersonalizedEvaluation) and (callback.finetune_epochs, callback.local_epochs)
        if trains not in (False, (0, 0)):
            raise refuse(
                "PersonalizedEvaluation trains on the clients' data without noise. Give it finetune_epochs=0 and "
                "local_epochs=0"
            )
    reason = why_mixed(module) if strict else why_not_per_sample(module)
    if reason is not None:
        raise refuse(reason)
    return trainer.optimizers[0]
