"""The two forms of a training step: with Lightning's hooks around each batch, and without."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

import lightning_fl as fl
from lightning_fl.strategies.hooks import batch_hook
from tests.helpers.training import Ordinary, image_clients, trainer, weights


class Looks(L.Callback):
    """A hook that looks at batches and does nothing."""

    def on_train_batch_end(self, *_: Any) -> None:
        return None


def fit(callbacks: list[L.Callback], **options: Any) -> tuple[torch.Tensor, dict[str, float], str | None]:
    module, strategy = Ordinary(), fl.FederatedStrategy(fl.algorithms.FedProx(0.1), local_epochs=2, engine="sequential")
    federation = trainer(strategy, 2, callbacks=callbacks, **options)
    federation.fit(module, image_clients(validate=True))
    metrics = {name: float(value) for name, value in federation.callback_metrics.items()}
    return weights(module), metrics, batch_hook(federation, fl.FederatedStrategy)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}], ids=str)
def test_tight_and_hooked_steps_give_the_same(options: dict[str, Any]) -> None:
    tight, tight_metrics, no_hook = fit([], **options)
    hooked, hooked_metrics, hook = fit([Looks()], **options)
    assert no_hook is None
    assert hook == "Looks.on_train_batch_end"
    assert torch.equal(tight, hooked)
    assert tight_metrics == pytest.approx(hooked_metrics, rel=1e-6)
