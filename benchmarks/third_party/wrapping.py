"""Shared by the files: a LightningModule around a network, and a Trainer that shows what it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import nn


class Wrapped(L.LightningModule):
    """Trains a network by SGD with momentum.

    Args:
        net: The network.
        loss: Computes the loss from the network and a batch.
    """

    def __init__(self, net: nn.Module, loss: Callable[[nn.Module, Any], torch.Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(self.net, batch)
        self.log("loss", loss)
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        params = [param for param in self.parameters() if param.requires_grad]
        return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def shown_to(trainer: type, call: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The module and the training loader that a package hands to a Trainer.

    Args:
        trainer: The package's Trainer class.
        call: Calls the package with a Trainer.
    """

    class Shown(Exception):
        pass

    class Showing(trainer):  # type: ignore[misc,valid-type]
        def fit(self, model: Any, train_dataloaders: Any = None, *args: Any, **kwargs: Any) -> None:
            data = train_dataloaders or kwargs.get("datamodule") or (args[1] if len(args) > 1 else None)
            raise Shown(model, data)

    try:
        call(Showing(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"))
    except Shown as shown:
        return shown.args[0], shown.args[1]
    raise AssertionError("the package has not called Trainer.fit")
