"""A job as SLURM runs it: signalled in the middle of a round, it is to leave a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lightning_fl as fl
from tests.helpers.training import Plain, image_clients, trainer, weights


class Signalled(Plain):
    """Gets the signal in one of its steps, counted over all clients; the job ends soon after."""

    def __init__(self, at: int) -> None:
        super().__init__(make_optimizer=self._optimizer)
        self.at = at
        self.register_buffer("seen", torch.tensor(0.0, dtype=torch.float64))

    @staticmethod
    def _optimizer(params: Any) -> Any:
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.5)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen = self.seen + batch[0].double().sum()
        self.at -= 1
        if self.at == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.at == -1:
            os._exit(7)  # as killed
        return super().training_step(batch, batch_idx)


def train(folder: str, at: int, engine: str) -> tuple[Tensor, int]:
    options: dict[str, Any] = {"client_optimizer": "keep"} if engine == "kept" else {"engine": engine}
    strategy = fl.FederatedStrategy("fedavg", personal=["net.3.bias"], **options)
    module, own = Signalled(at), trainer(strategy, 4, default_root_dir=folder, devices="auto")
    own.fit(module, image_clients((5, 7, 11)))
    return weights(module), len(strategy.history)


if __name__ == "__main__":
    torch.save(train(sys.argv[1], int(sys.argv[2]), sys.argv[3]), Path(sys.argv[1]) / "result.pt")
