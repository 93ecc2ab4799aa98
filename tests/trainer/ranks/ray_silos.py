"""Three workers of Ray Train, each a silo with its own data; run by an interpreter that has Ray.

python ray_silos.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

NUM_SILOS = 3


def loader_of(rank: int) -> DataLoader[Any]:
    from tests.helpers.training import images

    return DataLoader(images(8 * (rank + 1), seed=rank), batch_size=4)


def train(config: dict[str, str]) -> None:
    """What each worker does."""
    from ray.train import get_context
    from ray.train.lightning import RayLightningEnvironment

    from lightning_fl import FederatedStrategy
    from tests.helpers.training import Plain, trainer

    rank = get_context().get_world_rank()
    module = Plain(torch.float64)
    strategy = FederatedStrategy("fedavg")
    trainer(strategy, max_epochs=3, plugins=[RayLightningEnvironment()]).fit(module, loader_of(rank))
    clients = [entry["num_clients"] for entry in strategy.history]
    torch.save((module.state_dict(), clients), Path(config["folder"]) / f"{rank}.pt")


if __name__ == "__main__":
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    folder = sys.argv[1]
    ray.init(num_cpus=NUM_SILOS, include_dashboard=False)
    TorchTrainer(
        train,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=NUM_SILOS),
        run_config=RunConfig(storage_path=folder),
    ).fit()
